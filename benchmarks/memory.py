"""The memory's indexes at size, and exact search against the bare matrix product."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Case, Side

#: Entries and their length in `memory-index`; queries of which each index is timed.
ENTRIES, WIDTH, QUERIES = 10_000_000, 64, 2_000
#: Further queries, around other centres than the entries'; what an index finds for them is reported and not required.
FAR_QUERIES = 500
TOP_K = 20

#: Approximate indexes and their settings at that size.
SETTINGS: dict[str, dict[str, int]] = {
    "ivf": {"ivf_lists": 4096, "ivf_probes": 64},
    "ivfpq": {"ivf_lists": 4096, "ivf_probes": 96},
    "hnsw": {},
}


def vectors(size: int, seed: int = 0, centres_seed: int = 0) -> np.ndarray:
    """Keys as a trained encoder gives them, roughly: unit vectors around a thousand centres, [size, WIDTH] float32."""
    centres = np.random.default_rng(centres_seed).standard_normal((1000, WIDTH)).astype(np.float32)
    rng = np.random.default_rng([seed, centres_seed])
    made = np.empty((size, WIDTH), np.float32)
    for start in range(0, size, 1 << 18):
        part = made[start : start + (1 << 18)]
        part[:] = centres[rng.integers(0, 1000, len(part))]
        part += 0.7 * rng.standard_normal(part.shape).astype(np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return made


def bank_of(keys: np.ndarray, kind: str) -> Any:
    """A bank with these keys, each of another user."""
    from recbole_raserec.retrieval.memory import MemoryBank

    bank = MemoryBank(WIDTH, "dot", kind, **SETTINGS.get(kind, {}))
    size = len(keys)
    bank.add(keys, np.ones(size, np.int32), np.arange(size, dtype=np.int32), np.ones(size, np.int32))
    return bank


def index_at_size(kind: str) -> Side:
    """Build, save, reopen, search, and search the reopened one: seconds of each."""

    def run(data_path: str) -> dict[str, Any]:
        from recbole_raserec.retrieval.memory import MemoryBank

        keys = vectors(ENTRIES)
        queries = vectors(QUERIES, seed=1)
        bank = bank_of(keys, kind)
        del keys
        started = time.perf_counter()
        bank.search(queries[:1], TOP_K, None, None)
        built = time.perf_counter() - started
        started = time.perf_counter()
        found = bank.search(queries, TOP_K, None, None)
        seconds = time.perf_counter() - started
        recall = bank.index_recall
        far = bank.search(vectors(FAR_QUERIES, 1, 1), TOP_K, None, None)
        folder = Path(tempfile.mkdtemp())
        try:
            started = time.perf_counter()
            bank.save(folder)
            saved = time.perf_counter() - started
            del bank
            per_entry = sum(path.stat().st_size for path in folder.iterdir()) / ENTRIES
            started = time.perf_counter()
            reopened = MemoryBank.load(folder, verify=False)
            opened = time.perf_counter() - started
            started = time.perf_counter()
            reopened.search(queries[:1], TOP_K, None, None)
            first = time.perf_counter() - started
        finally:
            shutil.rmtree(folder)
        note = (
            f"{ENTRIES} entries, {per_entry:.0f} bytes each on disk; index {built:.0f} s, saved in {saved:.1f} s, "
            f"reopened in {opened:.3f} s, first search then {first:.1f} s; {QUERIES / seconds:.0f} queries a second"
        )
        ids = {"ids": found.ids.tolist(), "far": far.ids.tolist()}
        return {"seconds": seconds, "note": note, "recall": recall, **ids}

    return run


def recall(ours: dict[str, Any], peer: dict[str, Any]) -> str:
    """Share of the exact neighbours that were found."""

    def share(name: str) -> float:
        pairs = zip(ours.pop(name), peer.pop(name))
        return float(np.mean([len(set(a) & set(b)) / TOP_K for a, b in pairs]))

    found, far = share("ids"), share("far")
    assert found >= 0.95, f"recall@{TOP_K} {found:.3f}"
    return (
        f"recall@{TOP_K} {found:.4f} on {QUERIES} queries (the index itself measured {ours['recall']:.4f}); "
        f"{far:.4f} on {FAR_QUERIES} queries far from all entries"
    )


def exact_search(data_path: str) -> dict[str, Any]:
    """All pairs of amazon-beauty's size: 131,413 queries over as many entries, K best of each."""
    keys = vectors(131_413)
    bank = bank_of(keys, "flat")
    bank.search(keys[:10], TOP_K, None, None)
    started = time.perf_counter()
    users, positions = np.arange(len(keys)), np.ones(len(keys), int)
    bank.search(keys, TOP_K, users, positions)
    return {"seconds": time.perf_counter() - started, "note": f"{len(keys)} queries, the guard included"}


def bare_product(data_path: str) -> dict[str, Any]:
    """The product alone, into one reused buffer, with the block of queries that is fastest on a sixteenth of them."""
    import torch

    keys = torch.from_numpy(vectors(131_413))
    table = keys.t()

    def seconds(block: int, rows: int) -> float:
        buffer = torch.empty(block, len(keys))
        started = time.perf_counter()
        for start in range(0, rows, block):
            part = keys[start : min(start + block, rows)]
            torch.mm(part, table, out=buffer[: len(part)])
        return time.perf_counter() - started

    block = min((8, 16, 32, 64, 128, 256, 512), key=lambda size: seconds(size, len(keys) // 16))
    return {"seconds": seconds(block, len(keys)), "note": f"{block} queries a product"}


CASES = {
    f"memory-index-{kind}": Case(
        f"memory of {ENTRIES // 10**6} M x 64 float32 keys, {QUERIES} queries, K = {TOP_K}: {kind} against exact",
        index_at_size(kind), index_at_size("flat"), recall,
    )
    for kind in SETTINGS
}  # fmt: skip
CASES["memory-exact"] = Case(
    f"exact guarded search, 131,413 queries over as many entries of 64 floats, K = {TOP_K}: against the bare product",
    exact_search,
    bare_product,
)
