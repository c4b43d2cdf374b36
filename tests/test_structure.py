"""The package keeps its layers, its faces and its size, see pyproject.toml and structure.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import structure
from conftest import ROOT


@pytest.fixture(scope="module")
def found():
    return structure.measure()


@pytest.mark.parametrize("figure", structure.FIGURES)
def test_count(found, figure):
    words, most = structure.FIGURES[figure]
    assert structure.size(found[figure]) <= most, f"{words}: {found[figure]}"


def test_a_package_with_faults_is_found_out(tmp_path):
    package = tmp_path / "pack"
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "room" / "__init__.py").write_text("from pack.room.inner import a")
    (package / "room" / "inner.py").write_text("from pack.top import b\na = 1")
    (package / "top.py").write_text("def b():\n    from pack.room import a")
    (package / "other.py").write_text("from pack.room import inner\n")
    found = structure.measure(package)
    assert found["modules"] == 3
    assert found["past"] == ["pack.other imports pack.room.inner"]
    assert set(found["circle"]) == {"pack.room.inner", "pack.top"}


def test_contracts():
    pytest.importorskip("importlinter", reason="the contracts of pyproject.toml need import-linter")
    code = "import sys; from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
