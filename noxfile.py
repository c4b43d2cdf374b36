"""The tests on every Python found: `nox`; on one: `nox -s tests-3.13`; with other versions: `nox -- numpy==2.2.6`.

What follows `--` and holds `==` is installed at that version, and the rest goes to pytest.
"""

from __future__ import annotations

import nox

nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "venv"

RECBOLE = "recbole==1.2.1"  # without its dependencies: setup.py names them where pip cannot install them


@nox.session(python=["3.10", "3.11", "3.12", "3.13", "3.14"])
def tests(session: nox.Session) -> None:
    """README's commands for the tests, and then pytest."""
    others = [argument for argument in session.posargs if "==" in argument and not argument.startswith("-")]
    constraints = ("-c", "constraints.txt")
    if not any(argument.startswith("torch==") for argument in others):
        session.install("torch==2.13.0", *constraints)
    session.install(".[test]", *constraints)
    session.install("--no-deps", RECBOLE)
    if others:
        session.install(*others)
    session.run("python", "-m", "pytest", "-q", *(argument for argument in session.posargs if argument not in others))
