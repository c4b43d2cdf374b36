"""Keeps the memory in step with the backbone while the retrieval-augmented module trains."""

from __future__ import annotations

from typing import Optional

import numpy as np
import torch

from recbole_raserec.data.dataset import SequenceDataset
from recbole_raserec.retrieval.queries import Queries, encode_split
from recbole_raserec.retrieval.raserec import RaSeRec

#: Buffers of a training model that a finished checkpoint does not need.
TRAINING_BUFFERS = ("known_ids", "known_mask")

#: Memories from which the module's starting scale is taken.
CALIBRATION = 20_000


class MemoryKeeper:
    """Encodes, searches and looks up for one training of RaSeRec.

    Frozen backbone: training and validation windows are encoded and searched once. Otherwise keys are encoded anew
    before each epoch and each evaluation, and the training windows' neighbours searched anew every `refresh` epochs; in
    between they are part of the training state, so that a resumed run sees the same ones.

    Args:
        model: with an empty memory; it receives the <prefix, next item> pairs of `train`.
        train, valid: splits.
        min_length: shortest prefix that becomes a memory.
        refresh: epochs between two searches when the backbone is not frozen.
        progress: show progress bars.
    """

    def __init__(
        self, model: RaSeRec, train: SequenceDataset, valid: SequenceDataset, min_length: int, refresh: int,
        progress: bool,
    ):  # fmt: skip
        self.model, self.train, self.valid = model, train, valid
        self.refresh, self.progress = refresh, progress
        self._queries = {"train": self.encode(train, "training"), "valid": self.encode(valid, "validation")}
        self._rows = np.flatnonzero(self._queries["train"].positions >= min_length)
        memories = self._queries["train"].take(self._rows)
        model.remember(memories)
        sample = torch.linspace(0, len(memories) - 1, min(len(memories), CALIBRATION)).long()
        targets = torch.from_numpy(memories.targets)[sample].to(memories.h.device)
        h = memories.h[sample.to(memories.h.device)]
        model.ram.calibrate(h, h, model.item_vectors().detach()[targets])
        if not model.frozen:
            model.register_buffer("known_ids", torch.zeros(len(self._queries["train"]), model.top_k, dtype=torch.int32))
            model.register_buffer("known_mask", torch.zeros(len(self._queries["train"]), model.top_k, dtype=torch.bool))

    def encode(self, split: SequenceDataset, what: str) -> Queries:
        """Encode the windows of a split with the model's current backbone."""
        device = next(self.model.ram.parameters()).device
        return encode_split(self.model.backbone, split, device, f"Encode {what}" if self.progress else None)

    def search(self, queries: Queries, what: str) -> Queries:
        """Find the neighbours of `queries` in the model's memory."""
        queries.search(self.model.memory, self.model.top_k, f"Search {what}" if self.progress else None)
        return queries

    def before_epoch(self, epoch: int) -> None:
        """Make the training windows' vectors and neighbours known to the model."""
        if self.model.frozen:
            if not self.model.knows("train"):
                self.model.know("train", self.search(self._queries["train"], "training"))
            return
        queries = self._reencode()
        if epoch % self.refresh == 0 or not bool(self.model.known_mask.any()):
            self.search(queries, "training")
            self.model.known_ids.copy_(queries.ids)
            self.model.known_mask.copy_(queries.mask)
        queries.ids, queries.mask = self.model.known_ids.long(), self.model.known_mask
        self.model.know("train", queries)

    def before_evaluation(self) -> None:
        """Bring the memory's keys up to date; with a frozen backbone look the validation windows up."""
        if not self.model.frozen:
            self._reencode()
        elif not self.model.knows("valid"):
            self.model.know("valid", self.search(self._queries["valid"], "validation"))

    def admit_validation(self, test: Optional[SequenceDataset] = None) -> None:
        """Add the validation pairs to the memory, as the papers do before the test; the weights stay as they are."""
        if not self.model.frozen:
            self._reencode()
        self.model.remember(self.encode(self.valid, "validation"))
        if test is not None:
            self.model.know("test", self.search(self.encode(test, "test"), "test"))

    def _reencode(self) -> Queries:
        queries = self.encode(self.train, "training")
        self.model.refresh_memory(queries.h[torch.from_numpy(self._rows).to(queries.h.device)])
        return queries
