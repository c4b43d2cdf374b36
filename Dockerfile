# The service in a container: docs/install.md has the commands.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
# PyTorch's wheels without CUDA; another index for those with it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir torch==2.13.0 -c constraints.txt --extra-index-url "${TORCH_INDEX}"
COPY . .
RUN pip install --no-cache-dir -c constraints.txt '.[serve]' && pip install --no-cache-dir --no-deps recbole==1.2.1

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/venv /opt/venv
# What is kept beside the checkpoint, logs and caches, goes into /tmp: the file system may be read-only but for it.
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin raserec
USER 10001
WORKDIR /tmp
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Reading needs the variable RECBOLE_RASEREC_READ_TOKEN, or --public behind the image's name.
ENTRYPOINT ["recbole-raserec", "serve", "/checkpoint", "--host=0.0.0.0", "--port=8000"]
CMD ["--read_only"]
