"""The tests on every Python found: `nox`; on one: `nox -s tests-3.13`; with other versions: `nox -- numpy==2.2.6`.

What follows `--` and holds `==` takes the place of its line in constraints.txt, and the rest goes to pytest.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "venv"

RECBOLE = "recbole==1.2.1"  # without its dependencies: setup.py names them where pip cannot install them


@nox.session(python=["3.10", "3.11", "3.12", "3.13", "3.14"])
def tests(session: nox.Session) -> None:
    """README's commands for the tests, and then pytest."""
    pins = [argument for argument in session.posargs if "==" in argument and not argument.startswith("-")]
    names = {pin.partition("==")[0] for pin in pins}
    lines = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join([line for line in lines if line.partition("==")[0] not in names] + pins) + "\n")
    session.install("torch", "-c", str(constraints))
    session.install("-c", str(constraints), ".[test]")
    session.install("--no-deps", RECBOLE)
    session.run("python", "-m", "pytest", "-q", *(argument for argument in session.posargs if argument not in pins))
