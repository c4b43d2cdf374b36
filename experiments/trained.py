"""Trained runs, taken up from their checkpoints, and their ranks under other memories and in groups of test targets."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
import torch

from recbole_raserec.config.config import Config
from recbole_raserec.data.preparation.download import ensure_dataset
from recbole_raserec.evaluation.protocols import Metrics, Ranks, collect_ranks, metrics_from_ranks
from recbole_raserec.recommendation.stage import train_model
from recbole_raserec.retrieval.memory import MemoryBank
from recbole_raserec.retrieval.queries import encode_split
from recbole_raserec.retrieval.stage import fine_tune
from recbole_raserec.training.stage import DECIMALS, Outcome


@dataclasses.dataclass
class Trained:
    """A finished run: its configuration, backbone and whole model (None for a model without retrieval)."""

    config: Any
    base: Outcome
    ours: Outcome

    @property
    def test(self) -> Any:
        """The test split's data set."""
        return self.base.splits.test._dataset

    def ranks(self, model: Any) -> Ranks:
        """Ranks of the test targets."""
        splits = self.base.splits
        return collect_ranks(model, splits.test, self.config, splits.seen["test"])

    def ranks_with(self, memory: MemoryBank) -> Ranks:
        """Ranks of the test targets with another memory; the weights stay."""
        model = self.ours.model
        model.use_memory(memory)
        queries = encode_split(model.backbone, self.test, model.item_vectors().device)
        queries.search(memory, model.top_k)
        model.known["test"] = queries
        return self.ranks(model)

    def metrics(self, ranks: Ranks, chosen: Optional[np.ndarray] = None) -> dict[str, Metrics]:
        """Metrics by protocol, of all test targets or of the `chosen` ones (bool or indices)."""
        pick = (
            torch.arange(len(ranks.kept)) if chosen is None else torch.arange(len(ranks.kept))[torch.from_numpy(chosen)]
        )
        return {
            name: metrics_from_ranks(values[pick], self.config, decimals=DECIMALS)
            for name, values in ranks.by_protocol().items()
        }  # fmt: skip


def load(options: Sequence[str], seed: int, args: argparse.Namespace) -> Trained:
    """Train RaSeRec with these options, or take up the run that is there."""
    argv = [*options, f"--dataset={args.dataset}", f"--data_path={args.data_path}", f"--seed={seed}"]
    argv += [f"--checkpoint_dir={args.checkpoint_dir}", *(f"--{option}" for option in args.options)]
    config = Config(argv=argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    ensure_dataset(config)
    base = train_model(config.for_backbone())
    return Trained(config, base, fine_tune(config, base))


def bank_like(memory: MemoryBank) -> MemoryBank:
    """An empty bank with the options of `memory`."""
    return MemoryBank(
        memory.hidden_size, memory.similarity, memory.index, memory.ivf_lists, memory.ivf_probes, memory.seed,
        memory.scope, memory.min_support, memory.retrieve_by,
    )  # fmt: skip


def add_rows(bank: MemoryBank, source: MemoryBank, rows: np.ndarray) -> None:
    """Let pairs of another bank join this one."""
    columns: Mapping[str, np.ndarray] = {
        name: getattr(source, name)[rows] for name in ("keys", "targets", "users", "positions", "times")
    }
    bank.add(**columns)
