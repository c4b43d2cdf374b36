"""Stage iii: an epoch of the retrieval-augmented module, cached against recomputed for every batch."""

from __future__ import annotations

import copy
import itertools
import time
from typing import Any

import numpy as np

from benchmarks.common import Case, config_of

#: Batches of which the peer is timed, and whose losses both sides report.
PEER_BATCHES = 12


def _stage(data_path: str) -> tuple[Any, Any, Any, Any]:
    """Frozen random SASRec, RaSeRec over it with dropout off, hooks, loader of the training rows."""
    import torch

    from recbole_raserec.config import get_model
    from recbole_raserec.data.loaders import RowLoader
    from recbole_raserec.data.splits import prepare_data
    from recbole_raserec.recommendation.backbone import wrap_backbone
    from recbole_raserec.retrieval.raserec import RaSeRec
    from recbole_raserec.retrieval.stage import RetrievalHooks

    config = config_of("RaSeRec", data_path, backbone="SASRec", ram_dropout=0.0, train_batch_size=1024, index="flat")
    backbone_config = config.for_backbone()
    splits = prepare_data(backbone_config)
    torch.manual_seed(0)
    encoder = get_model("SASRec")(backbone_config, splits.dataset)
    with torch.no_grad():
        encoder.item_embedding.weight.mul_(25)  # to the length that training gives them
    model = RaSeRec(config, splits.dataset, wrap_backbone(encoder, config, splits.dataset))
    train, valid = splits.train._dataset, splits.valid._dataset
    hooks = RetrievalHooks(model, train, valid, config)
    model.train()
    config["train_batch_size"] = 1024
    loader = RowLoader(config, train, splits.train._sampler, shuffle=True)
    return model, hooks, loader, train


def cached(data_path: str) -> dict[str, Any]:
    """Vectors and neighbours of all training windows once, then a whole epoch that looks them up."""
    import torch

    from recbole_raserec.kernels.allocator import keep_freed_memory

    keep_freed_memory()
    started = time.perf_counter()
    model, hooks, loader, _ = _stage(data_path)
    hooks.before_epoch(0)
    once = time.perf_counter() - started
    start = copy.deepcopy(model.ram.state_dict())
    order = loader.generator.get_state()

    def epoch(precision: str, limit: int) -> list[float]:
        model.softmax_precision = precision
        model.ram.load_state_dict(start)
        loader.generator.set_state(order)
        optimizer = torch.optim.Adam(model.ram.parameters(), lr=1e-3, fused=True)
        return [_step(model, optimizer, model.calculate_loss(batch)) for batch in itertools.islice(loader, limit)]

    exact = epoch("float32", PEER_BATCHES)  # the losses to compare; the epoch is timed as it is shipped
    started = time.perf_counter()
    batches = len(epoch("auto", len(loader)))
    seconds = time.perf_counter() - started
    note = f"whole epoch of {batches} batches of 1024; data, encoding and search before it, once: {once:.0f} s"
    return {"seconds": seconds, "note": note, "once_seconds": once, "losses": exact}


def published(data_path: str) -> dict[str, Any]:
    """What the papers' public implementation does in each batch: encode the windows padded to 50, search faiss for more
    than K, filter in Python, and a softmax over a fresh batch x items matrix with torch's cross entropy."""
    import faiss
    import torch
    import torch.nn.functional as F

    model, _, loader, train = _stage(data_path)
    memory, store = model.memory, train.store
    keys = np.ascontiguousarray(memory.keys / np.linalg.norm(memory.keys, axis=1, keepdims=True))
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys)
    owner, place = memory.users.tolist(), memory.positions.tolist()
    optimizer = torch.optim.Adam(model.ram.parameters(), lr=1e-3)

    def neighbours(unit: np.ndarray, who: list[int], where: list[int]) -> torch.Tensor:
        ids = torch.zeros((len(unit), model.top_k), dtype=torch.int64)
        _, found = index.search(unit, model.top_k + 60)
        for row, candidates in enumerate(found.tolist()):
            kept = [m for m in candidates if owner[m] != who[row] or place[m] < where[row]][: model.top_k]
            assert len(kept) == model.top_k, "search for more candidates"
            ids[row] = torch.tensor(kept)
        return ids

    losses, aside = [], 0.0
    started = time.perf_counter()
    for batch in loader:
        who, where = batch["user_id"].numpy(), batch["sequence_position"].numpy()
        item_seq, lengths = store.windows(who, where, train.max_item_list_len, train.max_item_list_len)
        with torch.no_grad():
            h = model.encode(torch.from_numpy(item_seq), torch.from_numpy(lengths))
        unit = h.numpy() / np.linalg.norm(h, axis=1, keepdims=True)
        ids = neighbours(unit, who.tolist(), where.tolist())
        paused = time.perf_counter()
        # Equal histories of different users have equal keys: of such ties faiss returns any. To walk through the same
        # losses, those with the lower ids are taken, once it is sure that they are as similar.
        exact, mask = model.neighbours(h, batch["user_id"], batch["sequence_position"])
        similar = [np.einsum("bh,bkh->bk", unit, keys[chosen.numpy()]) for chosen in (ids, exact)]
        assert np.abs(similar[0] - similar[1]).max() < 1e-5
        aside += time.perf_counter() - paused
        augmented = model.augment(h, exact, mask)
        loss = F.cross_entropy(augmented @ model.item_vectors().t(), batch["item_id"])
        losses.append(_step(model, optimizer, loss))
        if len(losses) == PEER_BATCHES:
            break
    batches = len(loader)
    seconds = (time.perf_counter() - started - aside) * batches / PEER_BATCHES
    note = f"{PEER_BATCHES} of {batches} batches of 1024, scaled to the epoch"
    return {"seconds": seconds, "note": note, "losses": losses}


def _step(model: Any, optimizer: Any, loss: Any) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def same_losses(ours: dict[str, Any], peer: dict[str, Any]) -> str:
    """Both sides walk through the same losses (in float32)."""
    apart = max(abs(a - b) for a, b in zip(ours["losses"], peer["losses"]))
    assert len(ours["losses"]) == len(peer["losses"]) == PEER_BATCHES
    assert apart < 1e-4, f"losses differ by {apart}"
    first, last = ours["losses"][0], ours["losses"][-1]
    return f"losses of {PEER_BATCHES} steps ({first:.4f} to {last:.4f}) differ by {apart:.1e} at most"


CASES = {
    "stage3-epoch": Case(
        "amazon-beauty, one epoch of the retrieval-augmented module over a frozen SASRec, dropout off: cached against "
        "encoding, search and filter in each batch",
        cached,
        published,
        same_losses,
    ),
}
