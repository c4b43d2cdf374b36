"""The checkpoint directory: configuration, weights, memory and external ids; it reloads without the data set.

Layout: ``checkpoint.json`` (format, model, options, figures), ``model.safetensors`` (weights), ``ids.json``
(external user and item ids in the order of the internal ones), ``memory/`` (RaSeRec), ``items.json`` and ``histories/``
(see :mod:`recbole_raserec.serving.catalogue`). Nothing in it is pickle.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
import shutil
from pathlib import Path
from typing import Any, Optional

import torch

from recbole_raserec.errors import CheckpointError
from recbole_raserec.fileio import read_json, read_tensors, replacing, sha256, write_json
from recbole_raserec.recommendation.backbone import wrap_backbone
from recbole_raserec.recommendation.trainer import BEST, load_weights
from recbole_raserec.registry import get_model
from recbole_raserec.retrieval.keeper import TRAINING_BUFFERS
from recbole_raserec.retrieval.knn import raserec_class
from recbole_raserec.retrieval.memory import MemoryBank
from recbole_raserec.retrieval.raserec import RaSeRec
from recbole_raserec.serving.catalogue import FILE
from recbole_raserec.serving.histories import DIRECTORY

FORMAT, VERSION = "recbole-raserec checkpoint", 1
MANIFEST, IDS, MEMORY, LIVE = "checkpoint.json", "ids.json", "memory", "live.json"


class Options(dict):
    """Options as RecBole's models read them: ``options["key"]`` is None where the key is missing."""

    def __missing__(self, key: str) -> None:
        return None


class Vocabulary:
    """Stands in for a data set where a model only asks how many users and items there are.

    Args:
        options: names of the id fields. users, items: external ids; index 0 is padding.
    """

    def __init__(self, options: Any, users: list[str], items: list[str]):
        self.uid_field, self.iid_field = options["USER_ID_FIELD"], options["ITEM_ID_FIELD"]
        self.tokens = {self.uid_field: users, self.iid_field: items}
        self.inter_feat = {self.iid_field: torch.empty(0, dtype=torch.int64)}  # no training rows here

    def num(self, field: str) -> int:
        """Number of ids of a field, padding included."""
        return len(self.tokens[field])

    @property
    def user_num(self) -> int:
        return self.num(self.uid_field)

    @property
    def item_num(self) -> int:
        return self.num(self.iid_field)


@dataclasses.dataclass
class Checkpoint:
    """A reloaded checkpoint: the model in evaluation mode with its weights and memory, its options, its ids.

    Attributes:
        vocabulary: ids the model was trained with. users: all user ids, those of later updates too.
        applied: number of the last journaled change that the saved parts hold. parts: where ids and memory lie.
    """

    model: Any
    options: Options
    vocabulary: Vocabulary
    manifest: dict[str, Any]
    users: list[str]
    applied: int
    parts: Path


def write_checkpoint(
    directory: Path, manifest: dict[str, Any], ids: dict[str, list[str]], memory: Any = None, catalogue: Any = None
) -> None:
    """Complete a directory that holds the weights. The manifest comes last: without it there is no checkpoint."""
    directory = Path(directory)
    write_json(directory / IDS, ids)
    if catalogue is not None:
        catalogue.save(directory)
    if memory is not None:
        memory.save(directory / MEMORY, manifest["fingerprint"])
    weights = sha256(directory / BEST)
    write_json(directory / MANIFEST, {"format": FORMAT, "version": VERSION, **manifest, "weights_sha256": weights})


def save_parts(
    source: Path, target: Path, ids: dict[str, list[str]], memory: Any, catalogue: Any, trained_users: int, applied: int
) -> None:
    """Replace ids, memory and catalogue of a checkpoint as a whole.

    They go into a directory of their own beside the old ones; the step that counts is the atomic replacement of
    ``live.json``, which names it. The old ones are deleted then, so that nothing of a forgotten user stays.

    Args:
        source: the checkpoint. target: the same, or a directory that becomes a copy of it with the new parts.
        trained_users: ids of the users that the model was trained with; later ones follow in `ids`.
        applied: number of the last journaled change that the parts hold.
    """
    manifest = read_manifest(source)
    target.mkdir(parents=True, exist_ok=True)
    if target.resolve() != source.resolve():
        with replacing(target / BEST) as part:
            shutil.copyfile(source / BEST, part)
    name = f"live-{secrets.token_hex(8)}"
    parts = target / name
    parts.mkdir()
    write_json(parts / IDS, ids)
    catalogue.save(parts)
    if memory is not None:
        memory.save(parts / MEMORY, manifest["fingerprint"])
    write_json(target / LIVE, {"parts": name, "users": trained_users, "applied": applied})
    if target.resolve() != source.resolve():
        write_json(target / MANIFEST, manifest)
    for old in [*target.glob("live-*"), *(target / own for own in (IDS, FILE, MEMORY, DIRECTORY))]:
        if old.is_dir() and old.name != name:
            shutil.rmtree(old, ignore_errors=True)
        elif old.is_file():
            old.unlink()


def _live(directory: Path) -> tuple[Path, Optional[int], int]:
    """Where ids and memory lie, the number of trained users if it is not that of the ids, the last change they hold."""
    path = directory / LIVE
    if not path.is_file():
        return directory, None, 0
    found = read_json(path)
    found = found if isinstance(found, dict) else {}
    name, users, applied = (found.get(key) for key in ("parts", "users", "applied"))
    sound = isinstance(name, str) and re.fullmatch(r"live-[0-9a-f]{16}", name)
    if not sound or type(users) is not int or type(applied) is not int or not (directory / str(name)).is_dir():
        raise CheckpointError(f"{path} is damaged: it does not name the parts of this checkpoint.")
    return directory / str(name), users, applied


def read_manifest(directory: Any) -> dict[str, Any]:
    """Manifest of a checkpoint directory.

    Raises:
        CheckpointError: there is none, it is damaged, or of another format.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{Path(directory).absolute()} is not a checkpoint directory: it has no {MANIFEST}. A finished run "
            f"leaves one below `checkpoint_dir`; its last line names it."
        )
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise CheckpointError(f"{path} is not a {FORMAT} of version {VERSION}.")
    missing = [key for key in ("model", "options", "fingerprint") if key not in manifest]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; it is damaged.")
    return manifest


def read_ids(directory: Any) -> dict[str, list[str]]:
    """External ids of a checkpoint: {"users": [...], "items": [...]}.

    Raises:
        CheckpointError: missing or damaged.
    """
    folder = _live(Path(directory))[0]
    ids = read_json(folder / IDS)
    lists = [ids.get(name) for name in ("users", "items")] if isinstance(ids, dict) else [None]
    if not all(isinstance(x, list) and all(isinstance(token, str) for token in x) for x in lists):
        raise CheckpointError(f"{folder / IDS} does not hold two lists of ids; it is damaged.")
    return ids


def read_weights(directory: Any, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint.

    Raises:
        CheckpointError: missing, damaged, or not the ones the manifest was written for.
    """
    path = Path(directory) / BEST
    weights, _ = read_tensors(path)
    if sha256(path) != manifest.get("weights_sha256"):
        raise CheckpointError(f"{path} is not what {MANIFEST} was written for; it is damaged or from another run.")
    return weights


def load_checkpoint(directory: Any, device: Optional[str] = None) -> Checkpoint:
    """Reload a finished run without its data set.

    Args:
        directory: as named by the run's last line.
        device: for the weights; the default is a GPU if there is one, else the CPU.

    Raises:
        CheckpointError: a part is missing, damaged, foreign, or of another run; or the model reads more of the data set
            than the number of its users and items, so that it cannot be rebuilt without it.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = Options(manifest["options"], device=target)
    ids = read_ids(directory)
    parts, trained, applied = _live(directory)
    vocabulary = Vocabulary(options, ids["users"][:trained], ids["items"])
    memory: Any = None
    name = manifest["model"]
    try:
        if name == "RaSeRec":
            inner = Options(manifest["backbone_options"], device=target)
            base = get_model(inner["model"])(inner, vocabulary)
            model = raserec_class(options)(options, vocabulary, wrap_backbone(base, inner, vocabulary))
            memory = MemoryBank.load(parts / MEMORY, manifest["fingerprint"])
        else:
            model = get_model(name)(options, vocabulary)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}: {name} cannot be rebuilt from its checkpoint alone ({error!r}).") from None
    weights = read_weights(directory, manifest)
    weights = {name: value for name, value in weights.items() if name not in TRAINING_BUFFERS}
    load_weights(model, weights, directory / BEST)
    if isinstance(model, RaSeRec):
        try:
            model.use_memory(memory)
        except ValueError as error:
            raise CheckpointError(f"{parts / MEMORY} does not belong to this model: {error}") from None
    return Checkpoint(model.to(target).eval(), options, vocabulary, manifest, ids["users"], applied, parts)
