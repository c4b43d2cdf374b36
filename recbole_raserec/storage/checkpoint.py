"""The checkpoint directory: configuration, weights, memory and external ids; it reloads without the data set.

Layout: `checkpoint.json` (format, model, options, figures), `model.safetensors` (weights), `ids.json` (external user
and item ids in the order of the internal ones), `memory/` (RaSeRec), `items.json` and `histories/` (the catalogue),
`features.safetensors` (what a model reads beside sequences). A
service that changes it keeps ids, memory and catalogue in a directory `live-...` that `live.json` names. No pickle.
"""

from __future__ import annotations

import re
import secrets
import shutil
from pathlib import Path
from typing import Any, Optional

import torch

from recbole_raserec.errors import CheckpointError
from recbole_raserec.storage.files import read_json, read_tensors, replacing, sha256, write_json

FORMAT, VERSION = "recbole-raserec checkpoint", 1
STATE, BEST = "state.safetensors", "model.safetensors"
MANIFEST, IDS, MEMORY, LIVE = "checkpoint.json", "ids.json", "memory", "live.json"
ITEMS, HISTORIES, FEATURES = "items.json", "histories", "features.safetensors"


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
    write_json(directory / IDS, ids)
    if catalogue is not None:
        catalogue.save(directory)
    if features is not None:
        features.save(directory / FEATURES)
        manifest = {**manifest, "features_sha256": sha256(directory / FEATURES)}
    if memory is not None:
        memory.save(directory / MEMORY, manifest["fingerprint"])
    weights = sha256(directory / BEST)
    write_json(directory / MANIFEST, {"format": FORMAT, "version": VERSION, **manifest, "weights_sha256": weights})


def save_parts(
    source: Path, target: Path, ids: dict[str, list[str]], memory: Any, catalogue: Any, trained_users: int, applied: int
) -> None:
    """Replace ids, memory and catalogue of a checkpoint as a whole, by the atomic replacement of `live.json`.

    The old ones are deleted then, so that nothing of a forgotten user stays.

    Args:
        source: the checkpoint.
        target: the same, or a directory that becomes a copy of it with the new parts.
        ids: external ids, {"users": [...], "items": [...]}.
        memory: None where the model has none.
        catalogue: of the items and the users' histories.
        trained_users: number of users that the model was trained with; later ones follow in `ids`.
        applied: number of the last journaled change that the parts hold.
    """
    manifest, copied = read_manifest(source), target.resolve() != source.resolve()
    target.mkdir(parents=True, exist_ok=True)
    if copied:
        for name in (BEST, *([FEATURES] if "features_sha256" in manifest else [])):
            with replacing(target / name) as part:
                shutil.copyfile(source / name, part)
    parts = target / f"live-{secrets.token_hex(8)}"
    parts.mkdir()
    write_json(parts / IDS, ids)
    catalogue.save(parts)
    if memory is not None:
        memory.save(parts / MEMORY, manifest["fingerprint"])
    write_json(target / LIVE, {"parts": parts.name, "users": trained_users, "applied": applied})
    if copied:
        write_json(target / MANIFEST, manifest)
    for old in [*target.glob("live-*"), *(target / own for own in (IDS, ITEMS, MEMORY, HISTORIES))]:
        if old.is_dir() and old != parts:
            shutil.rmtree(old, ignore_errors=True)
        elif old.is_file():
            old.unlink()


def live_parts(directory: Path) -> tuple[Path, Optional[int], int]:
    """Where ids and memory lie, the number of trained users if it is not that of the ids, the last change they hold."""
    path = directory / LIVE
    if not path.is_file():
        return directory, None, 0
    found, keys = read_json(path), ("parts", "users", "applied")
    name, users, applied = map(found.get, keys) if isinstance(found, dict) else (None, None, None)
    sound = isinstance(name, str) and re.fullmatch(r"live-[0-9a-f]{16}", name)
    if not sound or type(users) is not int or type(applied) is not int or not (directory / str(name)).is_dir():
        raise CheckpointError(f"{path} is damaged: it does not name the parts of this checkpoint.")
    return directory / str(name), users, applied


def read_manifest(directory: Any) -> dict[str, Any]:
    """Manifest of a checkpoint directory; raises CheckpointError if there is none, or it is damaged."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        hint = "A finished run leaves one below `checkpoint_dir`; its last line names it."
        raise CheckpointError(f"{path.parent.absolute()} is not a checkpoint directory: it has no {MANIFEST}. {hint}")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise CheckpointError(f"{path} is not a {FORMAT} of version {VERSION}.")
    missing = [key for key in ("model", "options", "fingerprint") if key not in manifest]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; it is damaged.")
    return manifest


def read_ids(directory: Any) -> dict[str, list[str]]:
    """External ids of a checkpoint, {"users": [...], "items": [...]}; raises CheckpointError if they are damaged."""
    folder = live_parts(Path(directory))[0]
    ids = read_json(folder / IDS)
    lists = [ids.get(name) for name in ("users", "items")] if isinstance(ids, dict) else [None]
    if not all(isinstance(x, list) and all(isinstance(token, str) for token in x) for x in lists):
        raise CheckpointError(f"{folder / IDS} does not hold two lists of ids; it is damaged.")
    return ids


def read_weights(directory: Any, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint; raises CheckpointError unless they are those its manifest was written for."""
    path = Path(directory) / BEST
    weights, _ = read_tensors(path)
    if sha256(path) != manifest.get("weights_sha256"):
        raise CheckpointError(f"{path} is not what {MANIFEST} was written for; it is damaged or from another run.")
    return weights
