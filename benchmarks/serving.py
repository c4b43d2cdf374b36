"""Recommendations as a service gives them: 1,024 histories at a time, and one at a time, with retrieval and without.

The variable RASEREC_CHECKPOINT names a trained RaSeRec run to measure. Without it the weights are random: the exact
search does the same work then, but an approximate index searches wider, for random keys are harder to tell apart.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Case, Side, config_of

BATCH, K = 1024, 10

#: Calls of which the percentiles are taken, of the batch and of single histories.
BATCHES, SINGLES = 20, 1000


def _recommender(data_path: str, index: str | None) -> tuple[Any, str]:
    """A RaSeRec over SASRec whose memory has this `index`, or its backbone alone; and what weights it has."""
    directory = os.environ.get("RASEREC_CHECKPOINT")
    if not directory:
        return _random(data_path, index), "random weights"
    import dataclasses

    from recbole_raserec import Recommender, load_checkpoint
    from recbole_raserec.data.catalogue import Catalogue
    from recbole_raserec.serving.live import Options

    found = load_checkpoint(directory, "cpu")
    catalogue = Catalogue.load(found.parts, len(found.users), found.vocabulary.item_num)
    if index is not None:
        found.model.memory.index = index
        return Recommender(found, catalogue, Path(directory)), "trained weights"
    options = Options(found.manifest["backbone_options"], device=found.options["device"])
    base = found.model.backbone.model
    found = dataclasses.replace(found, model=base, options=options, manifest={**found.manifest, "model": "backbone"})
    return Recommender(found, catalogue, Path(directory)), "trained weights"


def _random(data_path: str, index: str | None) -> Any:
    """The same with random weights; histories, sizes and the number of memories are those of amazon-beauty."""
    import torch

    from recbole_raserec import Recommender
    from recbole_raserec.config import get_model
    from recbole_raserec.data.catalogue import catalogue_of
    from recbole_raserec.data.splits import prepare_data
    from recbole_raserec.recommendation.backbone import wrap_backbone
    from recbole_raserec.retrieval.raserec import RaSeRec
    from recbole_raserec.retrieval.stage import RetrievalHooks
    from recbole_raserec.serving.live import Checkpoint, Options, Vocabulary

    config = config_of("RaSeRec", data_path, backbone="SASRec", index=index or "flat")
    own = config.for_backbone()
    splits = prepare_data(own)
    torch.manual_seed(0)
    model: Any = get_model("SASRec")(own, splits.dataset)
    with torch.no_grad():
        model.item_embedding.weight.mul_(25)  # to the length that training gives them
    if index is not None:
        model = RaSeRec(config, splits.dataset, wrap_backbone(model, config, splits.dataset))
        RetrievalHooks(model, splits.train._dataset, splits.valid._dataset, config)
    ids = splits.vocabulary()
    options = Options((config if index else own).explain(), device=torch.device("cpu"))
    manifest = {"model": type(model).__name__, "dataset": "amazon-beauty", "fingerprint": ""}
    vocabulary = Vocabulary(options, ids["users"], ids["items"])
    checkpoint = Checkpoint(model.eval(), options, vocabulary, manifest, ids["users"], 0, Path())
    return Recommender(checkpoint, catalogue_of(splits, own), Path())


def side(index: str | None) -> Side:
    """A side: seconds are the median of a batch."""

    def work(data_path: str) -> dict[str, Any]:
        recommender, weights = _recommender(data_path, index)
        chosen = np.random.default_rng(0).permutation(np.arange(1, len(recommender.users)))[: max(BATCH, SINGLES)]
        users = [recommender.users[number] for number in chosen]
        histories = [[recommender.items[item] for item in row] for row in recommender.stored(users)]
        recommender.recommend(histories[:BATCH], K, users=users[:BATCH])  # builds the index
        batches = _times([(histories[:BATCH], users[:BATCH])] * BATCHES, recommender)
        singles = _times([([histories[n]], [users[n]]) for n in range(SINGLES)], recommender)
        found = recommender.recommend(histories[:BATCH], K, users=users[:BATCH])
        figures = {
            f"{name}_{share}_ms": float(np.percentile(times, share) * 1000)
            for name, times in (("batch", batches), ("single", singles)) for share in (50, 99)
        }  # fmt: skip
        parts = [f"{name} p50 {figures[f'{name}_50_ms']:.1f} ms, p99 {figures[f'{name}_99_ms']:.1f} ms"
                 for name in ("batch", "single")]  # fmt: skip
        memories = "no memory" if index is None else f"{len(recommender.model.memory)} memories"
        note = f"{'; '.join(parts)} ({weights}, {memories}, {BATCHES} batches of {BATCH}, {SINGLES} single histories)"
        return {"seconds": float(np.median(batches)), "note": note, **figures, "lists": found.items[:50]}

    return work


def _times(calls: list[Any], recommender: Any) -> np.ndarray:
    times = []
    for histories, users in calls:
        started = time.perf_counter()
        recommender.recommend(histories, K, users=users)
        times.append(time.perf_counter() - started)
    return np.array(times)


def whole_lists(ours: dict[str, Any], peer: dict[str, Any]) -> str:
    """Both give K items to everybody, and retrieval changes some."""
    assert all(len(row) == K for row in [*ours["lists"], *peer["lists"]])
    same = np.mean([len(set(a) & set(b)) / K for a, b in zip(ours["lists"], peer["lists"])])
    assert same < 1
    more = {name: ours[f"{name}_50_ms"] - peer[f"{name}_50_ms"] for name in ("batch", "single")}
    return f"lists of {K} items each; retrieval adds {more['batch']:.1f} ms to a batch and {more['single']:.1f} to one"


CASES = {
    f"serve-latency-{index}": Case(
        f"amazon-beauty, Recommender.recommend for {BATCH} histories and for one, memory index {index}: against the "
        "same backbone without retrieval",
        side(index),
        side(None),
        whole_lists,
    )
    for index in ("flat", "hnsw")
}
