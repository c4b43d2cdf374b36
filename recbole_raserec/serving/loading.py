"""A checkpoint directory as a model: weights, memory and ids, reloaded without the data set.

The format is that of `recbole_raserec.storage.checkpoint`; nothing in it is pickle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch

from recbole_raserec.config import get_model, trims
from recbole_raserec.data import pad_lists
from recbole_raserec.errors import CheckpointError
from recbole_raserec.recommendation import wrap_backbone
from recbole_raserec.retrieval import TRAINING_BUFFERS, MemoryBank, RaSeRec, raserec_class
from recbole_raserec.storage import BEST, MEMORY, live_parts, load_weights, read_ids, read_manifest, read_weights


class Options(dict):
    """Options as RecBole's models read them: ``options["key"]`` is None where the key is missing."""

    def __missing__(self, key: str) -> None:
        return None


class Vocabulary:
    """Stands in for a data set where a model only asks how many users and items there are.

    Args:
        options: names of the id fields.
        users: external ids by internal ones; the first is that of the padding.
        items: the same.

    Attributes:
        numbers: internal ids of the items by external ones.
    """

    def __init__(self, options: Mapping[str, Any], users: list[str], items: list[str]):
        self.uid_field, self.iid_field = options["USER_ID_FIELD"], options["ITEM_ID_FIELD"]
        self.users, self.items = users, items
        self.numbers = {token: number for number, token in enumerate(items) if number}
        self.inter_feat = {self.iid_field: torch.empty(0, dtype=torch.int64)}  # no training rows here

    def num(self, field: str) -> int:
        """Number of ids of a field, padding included."""
        return len({self.uid_field: self.users, self.iid_field: self.items}[field])

    @property
    def user_num(self) -> int:
        return len(self.users)

    @property
    def item_num(self) -> int:
        return len(self.items)


@dataclasses.dataclass
class Checkpoint:
    """A reloaded checkpoint: the model in evaluation mode with its weights and memory, its options, its ids.

    Attributes:
        vocabulary: ids the model was trained with.
        users: all user ids, those of later updates too.
        applied: number of the last journaled change that the saved parts hold.
        parts: directory of ids and memory.
    """

    model: Any
    options: Options
    vocabulary: Vocabulary
    manifest: dict[str, Any]
    users: list[str]
    applied: int
    parts: Path

    @cached_property
    def longest(self) -> int:
        """The model reads the last that many items of a history."""
        return int(self.options["MAX_ITEM_LIST_LENGTH"])

    def batch(self, histories: Sequence[Sequence[int]], users: np.ndarray) -> tuple[torch.Tensor, ...]:
        """What the model reads of B histories, none of them empty.

        Args:
            histories: internal ids of items, oldest first.
            users: int64 [B].

        Returns:
            item_seq [B, L], item_seq_len [B] and the users [B], int64, on the model's device.
        """
        model, longest = self.model, self.longest
        cut = model.backbone.trims if isinstance(model, RaSeRec) else trims(model)
        batch = *pad_lists([row[-longest:] for row in histories], None if cut else longest), users
        return tuple(torch.from_numpy(part).to(self.options["device"]) for part in batch)


def load_checkpoint(directory: Union[str, Path], device: Optional[str] = None) -> Checkpoint:
    """Reload a finished run without its data set.

    Args:
        directory: as named by the run's last line.
        device: for the weights; the default is a GPU if there is one, else the CPU.

    Raises:
        CheckpointError: a part is missing, damaged, or of another run; or the model reads more of the data set than
            the number of its users and items, so that it cannot be rebuilt without it.
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
