"""What Windows refuses, refused here, and then the package in use: every module, runs, a resumed run, a memory in use.

    python tests/as_on_windows.py DIRECTORY      in a process of its own: it leaves the process as it made it

Refused are POSIX's modules and functions to the package's own files, names that Windows does not allow, `os.fsync` of a
file open for reading alone, and replacing or deleting a file that this process has open or mapped. The encoding of the
console is Windows's, and text files opened without an encoding are errors.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.util
import os
import pkgutil
import re
import signal
import stat
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import psutil

MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty"}
FUNCTIONS = {
    "chown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getloadavg", "getpgid", "getuid", "killpg", "mkfifo",
    "sched_getaffinity", "sched_setaffinity", "setsid", "statvfs", "sysconf", "uname", "wait3", "wait4",
}  # fmt: skip
SIGNALS = {"SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGUSR2"}
_INSIDE = threading.local()


def refuse() -> None:
    """From now on this process is refused what Windows refuses."""
    package = str(Path(importlib.util.find_spec("recbole_raserec").origin).parent)
    _hide(package)
    fsync = os.fsync

    def checked(handle: int) -> None:
        import fcntl

        mode = os.fstat(handle).st_mode
        if stat.S_ISREG(mode) and fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor: it is open for reading alone")
        fsync(handle)

    os.fsync = checked
    memory = psutil.Process.memory_info
    psutil.Process.memory_info = lambda self: SimpleNamespace(rss=memory(self).rss, peak_wset=memory(self).rss)
    sys.addaudithook(_audit)


def _hide(package: str) -> None:
    """Modules and functions, from the files below `package` alone: other packages have their own ways on Windows."""

    class Without:
        def __init__(self, module, names):
            self.__dict__.update(_module=module, _names=names)

        def __getattr__(self, name):
            if name in self._names and sys._getframe(1).f_code.co_filename.startswith(package):
                raise AttributeError(f"Windows has no {self._module.__name__}.{name}")
            return getattr(self._module, name)

        def __setattr__(self, name, value):
            setattr(self._module, name, value)

    hidden = {"os": Without(os, FUNCTIONS), "signal": Without(signal, SIGNALS)}
    found = builtins.__import__

    def importing(name, globals=None, locals=None, fromlist=(), level=0):
        ours = str((globals or {}).get("__file__", "")).startswith(package)
        if ours and level == 0 and name in MODULES:
            raise ImportError(f"Windows has no module {name}")
        module = found(name, globals, locals, fromlist, level)
        return hidden.get(name, module) if ours else module

    builtins.__import__ = importing


def _audit(event: str, arguments: tuple) -> None:
    if getattr(_INSIDE, "busy", False):
        return
    _INSIDE.busy = True
    try:
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            path = os.fspath(arguments[0])
            if path in ("/proc/self/status", "/proc/cpuinfo"):
                raise FileNotFoundError(2, "Windows has no such file", path)
            _named(path)
        elif event == "os.mkdir":
            _named(os.fspath(arguments[0]))
        elif event == "os.rename":
            _free(os.fspath(arguments[0]))
            _free(os.fspath(arguments[1]))
            _named(os.fspath(arguments[1]))
        elif event == "os.remove":
            _free(os.fspath(arguments[0]))
    finally:
        _INSIDE.busy = False


def _named(path: str | bytes) -> None:
    for part in Path(os.fsdecode(path)).parts[1:]:
        if re.search(r'[<>:"|?*\x00-\x1f]|[ .]$', part) and part not in (".", ".."):
            raise OSError(22, "Windows allows no such name", path)


def _free(path: str | bytes) -> None:
    path = os.path.abspath(os.fsdecode(path))
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mapped = any(line.rstrip().endswith(path) for line in maps)
    handles = []
    for handle in os.listdir("/proc/self/fd"):
        try:
            handles.append(os.readlink(f"/proc/self/fd/{handle}"))
        except OSError:
            continue
    if mapped or path in handles:
        raise PermissionError(13, "the file is open in this process", path)


def use(directory: Path) -> None:
    """Import every module, and use what writes files."""
    os.chdir(directory)
    import recbole_raserec
    from recbole_raserec.errors import MissingExtraError
    from recbole_raserec.kernels import native

    native.NAMES = ()  # those of an installed package are of no use there
    for module in pkgutil.walk_packages(recbole_raserec.__path__, "recbole_raserec."):
        if "._native_" in module.name:  # compiled, and called by ctypes
            continue
        try:
            importlib.import_module(module.name)
        except (ModuleNotFoundError, MissingExtraError) as error:  # an extra that is not installed
            if str(getattr(error, "name", "")).startswith("recbole"):
                raise
    assert native.loaded() is None

    rows = ["user,item,time", *(f"u{user},i{(user + step) % 25},{step}" for user in range(60) for step in range(8))]
    Path("raw.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    from recbole_raserec.cli.main import main

    assert main(["prepare", "--input=raw.csv", "--format=ratings", "--name=toy", "--output=data"]) == 0
    options = {
        "data_path": "data", "show_progress": False, "state": "ERROR", "backbone": "SASRec", "hidden_size": 16,
        "inner_size": 16, "ram_inner_size": 16, "MAX_ITEM_LIST_LENGTH": 8, "ram_epochs": 2, "top_k": 4,
        "regeneration": "personalised", "regen_epochs": 1, "regen_layers": 1, "regen_inner_size": 16,
        "regen_personal_epochs": 1, "result_file": "result.json",
    }  # fmt: skip
    from recbole_raserec.training.trainer import ResumableTrainer

    def run(epochs):
        given = {**options, "epochs": epochs}
        return recbole_raserec.run_recbole_raserec("RaSeRec", "toy", config_dict=given, argv=[])["metrics"]

    train_epoch, left = ResumableTrainer._train_epoch, [0]

    def interrupted(self, *arguments, **named):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return train_epoch(self, *arguments, **named)

    ResumableTrainer._train_epoch = interrupted
    for left[0] in (2, 4):  # in the second epoch of one model, and of a later one
        with contextlib.suppress(KeyboardInterrupt):
            run(2)
        assert left[0] == 0
    assert run(2) == run(2)  # continued, and found again
    found = max(Path("saved").glob("RaSeRec*/checkpoint.json"), key=lambda path: path.stat().st_mtime).parent
    for _ in range(2):  # the second finds what the first one saved, with all of it open
        with contextlib.closing(recbole_raserec.Recommender.load(found, journal=True)) as recommender:
            recommender.update([("anna", "i3", 100), ("anna", "i4", 101)])
            recommender.save()
            recommender.update([("u1", "i5", 102)])
            recommender.forget("u2")
            recommender.save()
            assert len(recommender.recommend([["i1", "i2"]], k=3)[0]) == 3
            print(recommender.explain(["i1", "i2"], k=2).to_text())
    print("used", recbole_raserec.__file__)


if __name__ == "__main__":
    if sys.flags.warn_default_encoding:
        warnings.filterwarnings("error", category=EncodingWarning, module="recbole_raserec")
    refuse()
    use(Path(sys.argv[1]))
