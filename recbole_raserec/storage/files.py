"""Files written whole or not at all, and read without pickle."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import IO, Any, Callable, Optional

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recbole_raserec.errors import CheckpointError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the directory of `path`; on success it replaces `path` atomically.

    When the body raises, the temporary file is removed and whatever stood at `path` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
        sync_directory(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def sync_directory(path: str | os.PathLike) -> None:
    """Make the names in a directory durable: a synced file can still lose its name when the power fails."""
    if os.name == "nt":  # where a directory cannot be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable JSON file ({error}); it is damaged or foreign.") from None


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], meta: Any = None) -> None:
    """Write named tensors as one safetensors file, atomically; `meta` (JSON-able) travels in its header."""
    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as part:
        save_file(flat, str(part), metadata={"meta": json.dumps(meta)})


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], Any]:
    """Read what :func:`write_tensors` wrote: (tensors by name, meta).

    Raises:
        CheckpointError: the file is missing, truncated, corrupted or not a safetensors file of this package.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path} does not exist.")
    try:
        with safe_open(str(path), framework="pt") as archive:
            meta = json.loads((archive.metadata() or {})["meta"])
            return {name: archive.get_tensor(name) for name in list(archive.keys())}, meta
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file of this package ({error}).") from None


# Locks between processes: files that the system lets go of when their holder ends, however it ends.


#: Seconds between two looks at a lock that is waited for.
_PAUSE = 0.1

#: What a file system says that has no locks: nobody waits there.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, getattr(errno, "ENOTSUP", errno.ENOSYS)})

#: What it says of a lock that somebody has.
_HELD = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK})

#: Whether a started process can be given an open file, and holds its lock with its starter.
INHERITED = sys.platform != "win32"


def lock_file(path: str | os.PathLike) -> Optional[IO[bytes]]:
    """The open file at `path`, made if it is not there, with its lock; None if somebody has that.

    Closing it lets go; so does the end of the last process that has it open. It stays where it is, with what is in it:
    deleting it could delete the lock of the next holder.

    Raises:
        OSError: the file cannot be opened, or the system fails to lock it.
    """
    file = open(path, "a+b", buffering=0)  # noqa: SIM115  held as long as the lock
    try:
        _lock(file.fileno())
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return file
        file.close()
        if error.errno not in _HELD:
            raise
        return None
    return file


@contextlib.contextmanager
def one_at_a_time(path: str | os.PathLike, waiting: Optional[Callable[[], None]] = None) -> Iterator[None]:
    """Inside, no other process is inside for the same `path`; the others wait, until it ends or dies.

    The lock is the file ``.lock`` in the directory `path`, which is made.

    Args:
        waiting: called once if somebody is inside.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    name = path / ".lock"
    held = lock_file(name)
    if held is None and waiting is not None:
        waiting()
    while held is None:
        time.sleep(_PAUSE)
        held = lock_file(name)
    with held:
        yield


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        os.lseek(handle, 1 << 30, os.SEEK_SET)  # away from what the file holds, which a locked byte would hide
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


# The state of torch optimizers as named tensors, for files without pickle.


def optimizer_tensors(optimizer: Any, prefix: str = "optimizer") -> dict[str, torch.Tensor]:
    """The state of each parameter under ``<prefix>.<number>.<name>``; options such as learning rates are not in it."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{number}.{name}": torch.as_tensor(value)
        for number, slots in state.items()
        for name, value in slots.items()
        if value is not None  # a momentum that was never there
    }


def load_optimizer(optimizer: Any, tensors: Mapping[str, torch.Tensor], prefix: str = "optimizer") -> None:
    """Put into `optimizer` what :func:`optimizer_tensors` gave, out of `tensors`, which may hold more.

    Raises:
        KeyError, ValueError, RuntimeError: it does not fit.
    """
    state: dict[int, dict[str, Any]] = {}
    for key, value in part_of(tensors, prefix).items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def part_of(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those under ``<prefix>.``, by the rest of their names."""
    start = f"{prefix}."
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def plain(value: Any) -> Any:
    """`value` in JSON's types: NumPy's as Python's, what is not finite as null, anything else as its text."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # scalars and arrays of NumPy and torch
        return plain(value.tolist())
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


# What a result rests on, as short texts.

#: Raised when the same options and data would train to something else than before.
TRAINING_VERSION = 2

#: The same for one model alone.
MODEL_VERSIONS = {"BERT4Rec": 3, "FEARec": 1, "GRU4Rec": 1, "NARM": 1, "RaSeRec": 1}


def data_fingerprint(dataset: Any) -> str:
    """Hash of the filtered, remapped interaction log and of the external ids behind it.

    Args:
        dataset: RecBole data set before its ``build()``.
    """
    digest = hashlib.sha256()
    log = dataset.inter_feat
    for field in (dataset.uid_field, dataset.iid_field, dataset.time_field):
        if field is not None and field in log:
            digest.update(field.encode())
            digest.update(np.ascontiguousarray(np.asarray(log[field], dtype=np.float64)).tobytes())
    for field in (dataset.uid_field, dataset.iid_field):
        digest.update("\x00".join(map(str, dataset.field2id_token[field])).encode())
    return digest.hexdigest()


def fingerprint(options: dict[str, Any], *parts: str) -> str:
    """Hash of training options and of anything else the result rests on."""
    payload = json.dumps([TRAINING_VERSION, options, list(parts)], sort_keys=True, default=str)
    return hashlib.sha256(payload.encode()).hexdigest()


def version_of(model: str) -> list[str]:
    """What a fingerprint of `model` holds beside options and data."""
    return [str(MODEL_VERSIONS[model])] if model in MODEL_VERSIONS else []
