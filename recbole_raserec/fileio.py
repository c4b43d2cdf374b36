"""Files written whole or not at all, and read without pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
