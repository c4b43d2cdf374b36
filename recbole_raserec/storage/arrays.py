"""A directory of arrays that is replaced as a whole, checked, and memory-mapped when read. Nothing in it is pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from recbole_raserec.errors import CheckpointError
from recbole_raserec.storage.files import read_json, replacing, sha256, write_json

ARRAYS = "manifest.json"
# The files this module writes: only these are ever deleted, whatever else lies in the directory.
_OWN_FILE = re.compile(r"[a-z_]+-[0-9a-f]{16}\.npy")
_OWN_PART = re.compile(r"\.(?:[a-z_]+-[0-9a-f]{16}\.npy|manifest\.json)\..*\.part")
_CHUNK = 1 << 22


def write_arrays(directory: Path, kind: str, version: int, arrays: Mapping[str, np.ndarray], meta: Any) -> None:
    """Replace the arrays stored in `directory` by `arrays`, as a whole.

    New arrays go to files of new names; the atomic replacement of the manifest then decides which are read. Maps that
    others hold of the old arrays stay valid.

    Args:
        directory: created when missing; other files in it are left alone.
        kind: what the directory holds.
        version: of its format.
        arrays: by name (lower-case letters and `_`).
        meta: JSON-able description, returned by `read_arrays`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    entries = {}
    for name, array in arrays.items():
        path = directory / f"{name}-{token}.npy"
        with replacing(path) as part:
            with open(part, "wb") as handle:
                np.lib.format.write_array(handle, np.ascontiguousarray(array), allow_pickle=False)
            entries[name] = {
                "file": path.name,
                "bytes": part.stat().st_size,
                "sha256": sha256(part),
                "shape": list(array.shape),
                "dtype": array.dtype.str,
            }
    manifest = {"kind": kind, "version": version, "meta": meta, "arrays": entries}
    write_json(directory / ARRAYS, {**manifest, "sha256": _seal(manifest)})
    current = {entry["file"] for entry in entries.values()}
    for path in directory.iterdir():
        if (_OWN_FILE.fullmatch(path.name) and path.name not in current) or _OWN_PART.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def read_arrays(
    directory: Path,
    kind: str,
    version: int,
    expected: Mapping[str, str],
    verify: bool = True,
    optional: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, np.ndarray], Any]:
    """Read what `write_arrays` wrote: (read-only memory-mapped arrays by name, meta).

    Args:
        directory: where it was written.
        kind: must be the one it was written with.
        version: must be the one it was written with.
        expected: dtype string of each array that must be there.
        verify: compare each file's SHA-256, which reads it once; otherwise only size, shape and dtype.
        optional: dtype string of each array that may be there.

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
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise _bad(path, f"it does not describe a {kind}")
    if manifest.get("version") != version:
        raise _bad(path, f"its format version is {manifest.get('version')!r}, this release reads {version}")
    seal = manifest.pop("sha256", None)
    if seal != _seal(manifest) or not isinstance(manifest.get("arrays"), dict) or "meta" not in manifest:
        raise _bad(path, "its content does not match its own checksum")
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
    return CheckpointError(
        f"{path} is damaged or not of this package: {problem}. It was left as it is; restore it from a copy, or delete "
        f"{path.parent} and build it again."
    )


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode("utf-8")).hexdigest()
