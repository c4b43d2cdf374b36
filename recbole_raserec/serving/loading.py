"""The checkpoint directory: configuration, weights, memory and external ids; it reloads without the data set.

Layout: ``checkpoint.json`` (format, model, options, figures), ``model.safetensors`` (weights), ``ids.json``
(external user and item ids in the order of the internal ones), ``memory/`` (RaSeRec), ``items.json`` and ``histories/``
(see :mod:`recbole_raserec.data.catalogue`). Nothing in it is pickle.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Optional

import torch

from recbole_raserec.config import get_model
from recbole_raserec.errors import CheckpointError
from recbole_raserec.recommendation import wrap_backbone
from recbole_raserec.retrieval import TRAINING_BUFFERS, MemoryBank, RaSeRec
from recbole_raserec.storage import BEST, MEMORY, live_parts, load_weights, read_ids, read_manifest, read_weights


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
    parts, trained, applied = live_parts(directory)
    vocabulary = Vocabulary(options, ids["users"][:trained], ids["items"])
    memory: Any = None
    name = manifest["model"]
    try:
        if name == "RaSeRec":
            inner = Options(manifest["backbone_options"], device=target)
            base = get_model(inner["model"])(inner, vocabulary)
            model = RaSeRec(options, vocabulary, wrap_backbone(base, inner, vocabulary))
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
