"""The checkpoint directory: configuration, weights, memory and external ids; it reloads without the data set.

Layout: `checkpoint.json` (format, model, options, figures), `model.safetensors` (weights), `ids.json` (external user
and item ids in the order of the internal ones), `memory/` (RaSeRec), `items.json` and `histories/` (the catalogue),
`features.safetensors` (what a model reads beside sequences). A service that changes it keeps ids, memory and catalogue
in a directory `live-...` that `checkpoint.json` names. No pickle.

`checkpoint.json` holds the SHA-256 of itself and of each other file; of a directory of arrays that of its manifest,
which holds those of the arrays. So a directory is what was written, as a whole, or is refused. Version 1 of the format
(0.1.0) has checksums of weights and arrays alone, and names the parts of a service in `live.json`.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch

from recbole_raserec.errors import CheckpointError
from recbole_raserec.storage.files import (
    ARRAYS,
    MANIFEST_BYTES,
    check_seal,
    read_json,
    read_tensors,
    regular,
    replacing,
    sealed,
    sha256,
    write_json,
)

FORMAT, VERSION = "recbole-raserec checkpoint", 2
STATE, BEST = "state.safetensors", "model.safetensors"
MANIFEST, IDS, MEMORY, LIVE = "checkpoint.json", "ids.json", "memory", "live.json"
ITEMS, HISTORIES, ITEM_TEXT, FEATURES = "items.json", "histories", "item_text", "features.safetensors"
#: What a training leaves, and what a service changes.
_TRAINED = (BEST, FEATURES)
_CHANGED = (IDS, ITEMS, *(f"{name}/{ARRAYS}" for name in (MEMORY, HISTORIES, ITEM_TEXT)))
#: Keys of a manifest that version 1 did not have.
_SINCE_2 = ("files", "parts", "journal", "sha256")


def dense_tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The dense tensors of a state dict (sparse buffers are rebuilt by the model's constructor)."""
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.layout == torch.strided}


def load_weights(model: torch.nn.Module, tensors: dict[str, torch.Tensor], source: Any) -> None:
    """Load `tensors` of the file `source` into a model; raises CheckpointError unless it has exactly these."""
    own = dense_tensors(model.state_dict())
    wrong = [k for k in own if k not in tensors or tensors[k].shape != own[k].shape]
    wrong += [k for k in tensors if k not in own]
    if wrong:
        raise CheckpointError(f"{source} does not fit the model: {', '.join(sorted(wrong)[:5])} missing or misshapen.")
    model.load_state_dict(tensors, strict=False)


def write_checkpoint(
    directory: Path, manifest: dict[str, Any], ids: dict[str, list[str]], memory: Any = None, catalogue: Any = None,
    features: Any = None,
) -> None:  # fmt: skip
    """Complete a directory that holds the weights. The manifest comes last: without it there is no checkpoint."""
    if features is not None:
        features.save(directory / FEATURES)
    trained = _listed(directory, [BEST] if features is None else _TRAINED)
    _write_manifest(directory, manifest, {**trained, **_write_parts(directory, manifest, ids, memory, catalogue)}, None)
    remove_unused(directory, directory)


def _write_parts(directory: Path, manifest: dict[str, Any], ids: Any, memory: Any, catalogue: Any) -> dict[str, Any]:
    """Write what a service changes into `directory`, and list it."""
    write_json(directory / IDS, ids)
    if catalogue is not None:
        catalogue.save(directory)
    if memory is not None:
        memory.save(directory / MEMORY, manifest["fingerprint"])
    return _listed(directory, [name for name in _CHANGED if (directory / name).is_file()])


def _listed(directory: Path, names: Any) -> dict[str, Any]:
    paths = {name: directory / name for name in names}
    return {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in paths.items()}


def _write_manifest(directory: Path, manifest: Mapping[str, Any], files: Any, parts: Any, mark: Any = None) -> None:
    kept = {key: value for key, value in manifest.items() if key not in ("weights_sha256", "features_sha256")}
    about = {"format": FORMAT, **kept, "version": VERSION, "parts": parts, "journal": mark, "files": files}
    write_json(directory / MANIFEST, sealed(about))


def save_parts(
    source: Path, target: Path, ids: dict[str, list[str]], memory: Any, catalogue: Any, trained: tuple[int, int],
    applied: int, mark: Optional[str] = None,
) -> None:  # fmt: skip
    """Replace ids, memory and catalogue of a checkpoint as a whole, by the atomic replacement of its manifest.

    The old ones are deleted then, so that nothing of a forgotten user stays. What fails leaves nothing behind.

    Args:
        source: the checkpoint.
        target: the same, or a directory that becomes a copy of it with the new parts.
        ids: external ids, {"users": [...], "items": [...]}.
        memory: None where the model has none.
        catalogue: of the items and the users' histories.
        trained: numbers of users and items that the model was trained with; later ones follow in `ids`.
        applied: number of the last journaled change that the parts hold.
        mark: of the journal of `target`; None: the one that it has.
    """
    manifest, copied, made = read_manifest(source), target.resolve() != source.resolve(), not target.exists()
    parts = target / f"live-{secrets.token_hex(8)}"
    try:
        parts.mkdir(parents=True)
        files = trained_files(source, manifest)
        for name in files if copied else ():
            with replacing(target / name) as part:
                shutil.copyfile(source / name, part)
        files.update(_write_parts(parts, manifest, ids, memory, catalogue))
        named = {"directory": parts.name, "users": trained[0], "items": trained[1], "applied": applied}
        _write_manifest(target, manifest, files, named, mark or (None if copied else manifest.get("journal")))
    except BaseException:
        path = target / MANIFEST
        if not path.is_file() or parts.name not in path.read_text("utf-8"):  # else it was interrupted after its end
            shutil.rmtree(target if made else parts, ignore_errors=True)
        raise
    remove_unused(target, parts)


def remove_unused(directory: Path, parts: Path) -> None:
    """Delete what saves that were interrupted, or the parts before `parts`, left in a checkpoint."""
    own = (IDS, ITEMS, MEMORY, HISTORIES, ITEM_TEXT, LIVE) if parts != directory else ()
    for old in [*directory.glob("live-*"), *(directory / name for name in own)]:
        if old.is_dir() and old != parts:
            shutil.rmtree(old, ignore_errors=True)
        elif old.is_file() and (old.name != LIVE or parts.name not in old.read_text(errors="replace")):
            old.unlink()


def live_parts(directory: Path, manifest: dict[str, Any]) -> tuple[Path, Optional[int], Optional[int], int]:
    """Where ids and memory lie, the numbers of trained users and items if they are not those of the ids, the last
    change they hold."""
    path, found = directory / MANIFEST, manifest.get("parts")
    if manifest["version"] == 1 and (directory / LIVE).exists():
        path, found = directory / LIVE, read_json(directory / LIVE, MANIFEST_BYTES)
        found = {**found, "directory": found.get("parts")} if isinstance(found, dict) else []
    if found is None:
        return directory, None, None, 0
    keys = ("directory", "users", "items", "applied")
    name, users, items, applied = map(found.get, keys) if isinstance(found, dict) else (None, None, None, None)
    sound = isinstance(name, str) and re.fullmatch(r"live-[0-9a-f]{16}", name) is not None
    sound = sound and (items is None or type(items) is int)  # older releases do not write it
    if not sound or type(users) is not int or type(applied) is not int or not (directory / str(name)).is_dir():
        raise CheckpointError(f"{path} is damaged: it does not name the parts of this checkpoint.")
    return directory / str(name), users, items, applied


def read_manifest(directory: Any) -> dict[str, Any]:
    """Manifest of a checkpoint directory; raises CheckpointError if there is none, or it is damaged."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        hint = "A finished run leaves one below `checkpoint_dir`; its last line names it."
        raise CheckpointError(f"{path.parent.absolute()} is not a checkpoint directory: it has no {MANIFEST}. {hint}")
    manifest = read_json(path, MANIFEST_BYTES)
    known = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    if not known or manifest.get("version") not in (1, VERSION):
        raise CheckpointError(f"{path} is not a {FORMAT} of version 1 or {VERSION}.")
    if manifest["version"] == VERSION:
        check_seal(path, manifest)
    missing = [key for key in ("model", "options", "fingerprint") if key not in manifest]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; it is damaged.")
    kinds = {"model": str, "options": dict, "backbone_options": dict, "fingerprint": str, "files": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(manifest.get(key, kind()), kind)]
    if manifest["version"] == 1:
        wrong += [key for key in _SINCE_2 if key in manifest]
    files = manifest.get("files", {}) if not wrong else {}
    if not all(isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry) for entry in files.values()):
        wrong.append("files")
    if wrong:
        raise CheckpointError(f"{path} is damaged: {', '.join(wrong)} cannot be what it says.")
    return manifest


def trained_files(directory: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Size and SHA-256 of the files that a training left, by name."""
    if manifest["version"] == VERSION:
        return {name: manifest["files"][name] for name in _TRAINED if name in manifest["files"]}
    kept = {name: manifest.get(f"{key}_sha256") for name, key in zip(_TRAINED, ("weights", "features"))}
    return {name: {"bytes": regular(directory / name), "sha256": mark} for name, mark in kept.items() if mark}


def check_files(directory: Path, manifest: dict[str, Any]) -> None:
    """Raise a CheckpointError unless the files of a checkpoint are those its manifest lists; version 1 lists few."""
    parts, files = live_parts(directory, manifest)[0], trained_files(directory, manifest)
    if manifest["version"] == VERSION:
        files = manifest["files"]
        for name in _CHANGED:
            if (parts / name).exists() and name not in files:
                raise CheckpointError(f"{parts / name} is not of this checkpoint: {MANIFEST} does not list it.")
    for name, entry in files.items():
        path = (directory if name in _TRAINED else parts) / name
        if name not in (*_TRAINED, *_CHANGED) or regular(path) != entry["bytes"] or sha256(path) != entry["sha256"]:
            raise CheckpointError(
                f"{path} is not what {MANIFEST} was written for: it is damaged or from another run. Restore the "
                "directory from a copy, or delete it and run the command again that made it."
            )


def mark_journal(directory: Path, manifest: Mapping[str, Any], mark: str) -> None:
    """Note in the manifest that the directory has the journal of this mark, which must not be missing from now on."""
    if manifest["version"] == VERSION and manifest["journal"] != mark:  # of version 1 with the first save
        _write_manifest(directory, manifest, manifest["files"], manifest["parts"], mark)


def read_ids(directory: Any) -> dict[str, list[str]]:
    """External ids of a checkpoint, {"users": [...], "items": [...]}; raises CheckpointError if they are damaged."""
    folder = live_parts(Path(directory), read_manifest(directory))[0]
    ids = read_json(folder / IDS)
    lists = [ids.get(name) for name in ("users", "items")] if isinstance(ids, dict) else [None]
    if not all(isinstance(x, list) and x and all(isinstance(token, str) for token in x) for x in lists):
        raise CheckpointError(f"{folder / IDS} does not hold two lists of ids; it is damaged.")
    return ids


def read_weights(directory: Any, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint; raises CheckpointError unless they are those its manifest was written for."""
    path = Path(directory) / BEST
    kept = trained_files(Path(directory), manifest).get(BEST)
    if not kept or regular(path) != kept["bytes"] or sha256(path) != kept["sha256"]:
        raise CheckpointError(f"{path} is not what {MANIFEST} was written for; it is damaged or from another run.")
    return read_tensors(path)[0]
