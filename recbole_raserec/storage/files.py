"""Files written whole or not at all, read with checks and without pickle: JSON, named tensors, directories of arrays.

And fingerprints: short texts that say what a result rests on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recbole_raserec.errors import CheckpointError, DiskFullError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Manifest of a directory of arrays, and the names of its files: no others are ever deleted.
ARRAYS = "manifest.json"
_OWN_FILE = re.compile(r"[a-z_]+-[0-9a-f]{16}\.npy")
#: What `replacing` writes into, as `tempfile` names it.
_PART = re.compile(r"\..+\.[a-z0-9_]{8}\.part")

#: Errors of a system that has no room, and how libraries that keep no number word them (safetensors, NumPy).
_FULL = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
_FULL_TEXT = re.compile(r"os error (?:28|122|27)\b|\d+ requested and \d+ written")

#: Bytes of the largest JSON file that is read; manifests of checkpoints and arrays are far smaller.
JSON_BYTES = 1 << 30
MANIFEST_BYTES = 1 << 26


def disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room for what is written."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return isinstance(error, (OSError, SafetensorError)) and _FULL_TEXT.search(str(error)) is not None


@contextlib.contextmanager
def room_for(path: str | os.PathLike) -> Iterator[None]:
    """Raise what goes wrong within for want of room as one DiskFullError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, DiskFullError) or not disk_full(error):
            raise
        message = f"{path} cannot be written: no room on the disk ({error}); free some, then try again."
        raise DiskFullError(message) from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the directory of `path`, which replaces `path` atomically unless the body raises.

    Such files that killed processes left in that directory are removed. A DiskFullError says that there is no room.
    """
    path = Path(path)
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.iterdir():
            if _PART.fullmatch(left.name):
                with contextlib.suppress(OSError), open(left, "rb+") if fcntl else contextlib.nullcontext() as file:
                    if file is not None:  # that of a living process is locked; Windows removes none that is open
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left.unlink()
        held, part = _new_part(path)
        try:
            yield part
            with open(part, "rb+") as written:  # Windows syncs no file that is open for reading alone
                os.fsync(written.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(part, 0o666 & ~umask)
            if fcntl is None:
                held.close()  # Windows moves no open file; elsewhere the lock is held until it is in its place
            os.replace(part, path)
            sync_directory(path.parent)
        finally:
            held.close()
            part.unlink(missing_ok=True)


def _new_part(path: Path) -> tuple[Any, Path]:
    """A new file beside `path`, open and locked."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        file = os.fdopen(handle, "rb+")
        with contextlib.suppress(OSError):  # a file system without locks
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(name):  # not taken for one that was left, before it was locked
            return file, Path(name)
        file.close()


#: Format of raw data by the end of a file's name, before .gz.
RAW_FORMATS = {
    **dict.fromkeys((".csv", ".tsv", ".dat", ".txt"), "ratings"),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}


def raw_format(path: str | os.PathLike) -> str:
    """The format of raw data that the end of a file's name stands for; empty for another end."""
    return RAW_FORMATS.get(Path(os.fspath(path).lower().removesuffix(".gz")).suffix, "")


def raw_stem(path: str | os.PathLike) -> str:
    """The name of a data set that is made of a file: of `data/my ratings.csv.gz` `my_ratings`."""
    name = Path(path).name
    for suffix in (".gz", *RAW_FORMATS):
        name = name[: -len(suffix)] if name.lower().endswith(suffix) else name
    return re.sub(r"[^\w.+-]", "_", name)


def unwritable(option: str, path: str | os.PathLike, folder: bool = False) -> list[str]:
    """What keeps the file, or the `folder` of files, that an option names from being written; tried without a trace."""
    path = Path(path)
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path)  # a name that cannot be: `exists` says no more than False from Python 3.14 on
        if not folder and path.exists() and not path.is_file():
            return [f"{option}: {path} is {'a directory' if path.is_dir() else 'no regular file'}; name a file"]
        place = path if folder else path.parent
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            return [f"{option}: {path} cannot be written, as {place} is a file; name a directory"]
        with tempfile.TemporaryFile(dir=place):
            return []
    except OSError as error:
        return [f"{option}: {path} cannot be written ({error.strerror}); name another place"]


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


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


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
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike, most: int = JSON_BYTES) -> Any:
    """Read a JSON file; raises CheckpointError if it is missing, no file, larger than `most` bytes, or not JSON."""
    regular(path, most)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        damage = f"is not a readable JSON file ({error}); it is damaged or not of this package."
        raise CheckpointError(f"{path} {damage}") from None


def regular(path: str | os.PathLike, most: int | None = None) -> int:
    """Bytes of a regular file; a CheckpointError where there is none (a pipe or a device is none), or it has more."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        raise CheckpointError(f"{path} does not exist.") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a file; it is damaged or not of this package.")
    if most is not None and found.st_size > most:
        raise CheckpointError(f"{path} has {found.st_size} bytes, {most} are the most; it is damaged.")
    return found.st_size


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` as JSON holds it, with the SHA-256 of all of it under `sha256`."""
    found = json.loads(json.dumps({**value, "sha256": None}))
    del found["sha256"]
    return {**found, "sha256": _seal(found)}


def check_seal(path: Path, value: Mapping[str, Any]) -> None:
    """Raise a CheckpointError unless `value`, read from `path`, is what `sealed` returned."""
    if value.get("sha256") != _seal({key: item for key, item in value.items() if key != "sha256"}):
        raise _bad(path, "its content does not match its own checksum")


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], meta: Any = None) -> None:
    """Write named tensors as one safetensors file, atomically.

    `meta` (JSON-able) travels in its header, and so does the SHA-256 of all of it.
    """
    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    about = json.dumps(meta)
    with replacing(path) as part:  # one entry: safetensors writes several in any order
        save_file(flat, str(part), metadata={"meta": f"sha256:{_digest(flat, about)} {about}"})


def _digest(tensors: Mapping[str, torch.Tensor], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], Any]:
    """What `write_tensors` wrote: (tensors by name, meta); raises CheckpointError if it is missing or damaged."""
    regular(path)
    try:
        with safe_open(str(path), framework="pt") as archive:
            about = (archive.metadata() or {})["meta"]
            # Copies: the tensors are maps of the file, and Windows replaces no file that is mapped.
            tensors = {name: archive.get_tensor(name).clone() for name in list(archive.keys())}
            if about.startswith("sha256:"):  # 0.1.0 wrote none
                mark, _, about = about.partition(" ")
                if mark != f"sha256:{_digest(tensors, about)}":
                    raise ValueError("its content does not match its own checksum")
            return tensors, json.loads(about)
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file of this package ({error}).") from None


def write_arrays(directory: Path, kind: str, version: int, arrays: Mapping[str, np.ndarray], meta: Any) -> None:
    """Replace the arrays stored in `directory` by `arrays`, as a whole.

    New arrays go to files of new names, which the atomic replacement of the manifest makes count: old maps stay valid.

    Args:
        directory: created when missing; other files in it are left alone.
        arrays: by name (lower-case letters and `_`).
        meta: JSON-able description, returned by `read_arrays`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    token, entries = secrets.token_hex(8), {}
    for name, array in arrays.items():
        path = directory / f"{name}-{token}.npy"
        with replacing(path) as part:
            with open(part, "wb") as handle:
                np.lib.format.write_array(handle, np.ascontiguousarray(array), allow_pickle=False)
            entries[name] = {
                "file": path.name, "bytes": part.stat().st_size, "sha256": sha256(part), "shape": list(array.shape),
                "dtype": array.dtype.str,
            }  # fmt: skip
    manifest = {"kind": kind, "version": version, "meta": meta, "arrays": entries}
    write_json(directory / ARRAYS, sealed(manifest))
    for path in directory.iterdir():
        if _OWN_FILE.fullmatch(path.name) and token not in path.name:
            with contextlib.suppress(OSError):
                path.unlink()


def read_arrays(
    directory: Path, kind: str, version: int, expected: Mapping[str, str], verify: bool = True,
    optional: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, np.ndarray], Any]:  # fmt: skip
    """Read what `write_arrays` wrote in `directory` with the same `kind` and `version`.

    Args:
        expected: dtype string of each array that must be there.
        verify: compare each file's SHA-256, which reads it once; otherwise only size, shape and dtype.
        optional: dtype string of each array that may be there.

    Returns:
        read-only memory-mapped arrays by name, and meta.

    Raises:
        CheckpointError: missing, damaged, of something else, or of another version; names the file and the remedy.
    """
    manifest = _read_manifest(directory, kind, version)
    entries = manifest["arrays"]
    if not set(expected) <= set(entries) <= set(expected) | set(optional):
        raise _bad(directory / ARRAYS, f"it lists the arrays {sorted(entries)}, expected are {sorted(expected)}")
    kinds = {**optional, **expected}
    return {name: _open(directory, name, entries[name], kinds[name], verify) for name in entries}, manifest["meta"]


def _read_manifest(directory: Path, kind: str, version: int) -> dict[str, Any]:
    path = directory / ARRAYS
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: {directory} holds no {kind}. Check the path, or build it again.")
    manifest = read_json(path, MANIFEST_BYTES)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise _bad(path, f"it does not describe a {kind}")
    if manifest.get("version") != version:
        raise _bad(path, f"its format version is {manifest.get('version')!r}, this release reads {version}")
    check_seal(path, manifest)
    if not isinstance(manifest.get("arrays"), dict) or "meta" not in manifest:
        raise _bad(path, "it lists no arrays")
    return manifest


def _open(directory: Path, name: str, entry: Any, dtype: str, verify: bool) -> np.ndarray:
    """One array of the manifest, memory-mapped."""
    file = entry.get("file") if isinstance(entry, dict) else None
    # A name that is not of ours could point outside the directory, or at another array.
    if not isinstance(file, str) or not _OWN_FILE.fullmatch(file) or not file.startswith(f"{name}-"):
        raise _bad(directory / ARRAYS, f"it names the file {file!r} for the array {name!r}")
    path = directory / file
    if not path.is_file():
        raise _bad(path, "the manifest lists it, but it does not exist")
    if path.stat().st_size != entry.get("bytes"):
        raise _bad(path, f"it has {path.stat().st_size} bytes instead of {entry.get('bytes')}")
    if verify and sha256(path) != entry.get("sha256"):
        raise _bad(path, "its SHA-256 is not the one in the manifest")
    try:
        # Not np.load: that opens zip archives and pickles too when their first bytes say so.
        array = np.lib.format.open_memmap(str(path), mode="r")
    except (ValueError, OSError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError) as error:
        raise _bad(path, f"it is not a plain .npy array ({error})") from None
    if array.dtype.str != dtype or entry.get("dtype") != dtype or list(array.shape) != entry.get("shape"):
        raise _bad(path, f"it holds {array.dtype.str} {list(array.shape)}, expected {dtype} {entry.get('shape')}")
    return np.asarray(array)


def _bad(path: Path, problem: str) -> CheckpointError:
    remedy = f"It was left as it is; restore it from a copy, or delete {path.parent} and build it again."
    return CheckpointError(f"{path} is damaged or not of this package: {problem}. {remedy}")


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode("utf-8")).hexdigest()


def named_tensors(**parts: Any) -> dict[str, torch.Tensor]:
    """The tensors of mappings, modules and optimizers under `part.name`, of the latter under `part.number.name`.

    An optimizer's options, such as learning rates, are not among them.
    """
    found: dict[str, torch.Tensor] = {}
    for part, held in parts.items():
        state = held if isinstance(held, Mapping) else held.state_dict()
        if isinstance(held, torch.optim.Optimizer):
            slots = ((f"{n}.{name}", x) for n, values in state["state"].items() for name, x in values.items())
            state = {name: torch.as_tensor(x) for name, x in slots if x is not None}  # a momentum that was never there
        found.update({f"{part}.{name}": value for name, value in state.items()})
    return found


def load_named(tensors: Mapping[str, torch.Tensor], **parts: Any) -> None:
    """Put what `named_tensors` returned into modules and optimizers, which raise their own errors where it is unfit."""
    for part, held in parts.items():
        state: dict[Any, Any] = part_of(tensors, part)
        if isinstance(held, torch.optim.Optimizer):
            slots: dict[int, dict[str, Any]] = {}
            for key, value in state.items():
                number, _, name = key.partition(".")
                slots.setdefault(int(number), {})[name] = value
            state = {"state": slots, "param_groups": held.state_dict()["param_groups"]}
        held.load_state_dict(state)


def part_of(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those under `prefix.`, by the rest of their names."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


#: Raised when the same options and data would train to something else than before.
TRAINING_VERSION = 2
#: The same for one model alone.
MODEL_VERSIONS = {"BERT4Rec": 3, "FEARec": 1, "GRU4Rec": 1, "NARM": 1, "RaSeRec": 1}


def data_fingerprint(dataset: Any) -> str:
    """Hash of the filtered, remapped log of a RecBole data set before its `build()`, and of its external ids."""
    digest, log = hashlib.sha256(), dataset.inter_feat
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
