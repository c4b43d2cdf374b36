"""What must give on a GPU what it gives on the CPU; each check returns its error, and what it may be.

`CHECKS` by name: (device, data path) -> (error, tolerance). An error is a difference relative to the CPU's value, norms
over norms; of checks of whole runs it is 0 where they end.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

from benchmarks.common import config_of

ROOT = Path(__file__).resolve().parents[1]
STILL = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}

Check = Callable[[str, str], "tuple[float, float]"]


def gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; NaN where either has one."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


def ranking(device: str, data_path: str) -> tuple[float, float]:
    """Ranks of both protocols, of scores that are whole numbers: they must be the same."""
    from recbole_raserec.evaluation.ranking import rank_in_chunks

    generator = torch.Generator().manual_seed(1)
    h, items = (torch.randint(-9, 10, size, generator=generator).float() for size in ((300, 16), (5000, 16)))
    targets = torch.randint(1, 5000, (300,), generator=generator)
    seen = np.arange(0, 3010, 10)[:301], np.random.default_rng(1).integers(1, 5000, 3000)
    wanted = rank_in_chunks(h, items, targets, seen)
    found = rank_in_chunks(h.to(device), items.to(device), targets, seen)
    return float(sum((a != b).sum() for a, b in zip(found, wanted))), 0.0


def losses(precision: str) -> Check:
    """Softmax over all items: the loss and both gradients, against float64; rows with weights."""

    def check(device: str, data_path: str) -> tuple[float, float]:
        from recbole_raserec.kernels import linear_cross_entropy

        generator = torch.Generator().manual_seed(2)
        h, items = (torch.randn(size, generator=generator) for size in ((700, 64), (12_102, 64)))
        targets = torch.randint(1, len(items), (len(h),), generator=generator)
        weights = torch.rand(len(h), generator=generator)
        exact = [x.double().requires_grad_() for x in (h, items)]
        rows = torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="none")
        wanted = (rows * weights).sum() / weights.sum()
        wanted.backward()
        ours = [x.to(device).requires_grad_() for x in (h, items)]
        found = linear_cross_entropy(*ours, targets.to(device), weights.to(device), precision)
        found.backward()
        pairs = [(found, wanted), *((a.grad, b.grad) for a, b in zip(ours, exact))]
        return max(gap(a, b) for a, b in pairs), 1e-5 if precision == "float32" else 1e-2

    return check


def contrast(device: str, data_path: str) -> tuple[float, float]:
    """InfoNCE and its gradient."""
    from recbole_raserec.kernels import info_nce

    views = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(3))
    results = []
    for place in ("cpu", device):
        x = views.clone().to(place).requires_grad_()
        loss = info_nce(x[0], x[1], 0.1, "cos")
        loss.backward()
        results.append((loss, x.grad))
    return max(gap(b, a) for a, b in zip(*results)), 1e-4


def retrieval_module(device: str, data_path: str) -> tuple[float, float]:
    """The module (RAM): what it gives and its gradients."""
    from recbole_raserec.retrieval.heads import RetrievalModule

    options = {"ram": "dual", "alpha": 0.5, "learnable_alpha": True, "beta": 0.6, "attn_tau": 1.0, "ram_heads": 2}
    torch.manual_seed(4)
    module = RetrievalModule({**options, "ram_inner_size": 128, "ram_dropout": 0.0}, 64)
    h, keys, values = torch.randn(200, 64), torch.randn(200, 20, 64), torch.randn(200, 20, 64)
    mask = torch.rand(200, 20) > 0.2
    results = []
    for place in ("cpu", device):
        net = copy.deepcopy(module).to(place)
        out = net(*(x.to(place) for x in (h, keys, values, mask)))
        out.square().mean().backward()
        results.append([out, *(p.grad for p in net.parameters() if p.grad is not None)])
    return max(gap(b, a) for a, b in zip(*results)), 1e-3


def search(device: str, data_path: str) -> tuple[float, float]:
    """The exact search with the guard: the lists of torch's products on the device are those of faiss."""
    from recbole_raserec.retrieval.memory import MemoryBank

    bank, queries, users, positions = bank_of(20_000, 500)
    wanted = bank.search(queries, 20, users, positions)
    found = bank.search(torch.from_numpy(queries).to(device), 20, users, positions)
    assert isinstance(bank, MemoryBank)
    return float((found.ids != wanted.ids).mean()), 0.0


def bank_of(entries: int, asked: int, size: int = 64) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """A memory of random keys, and queries of its users: bank, vectors [Q, H], users [Q], positions [Q]."""
    from recbole_raserec.retrieval.memory import MemoryBank

    random = np.random.default_rng(5)
    bank = MemoryBank(size, "cosine", "flat")
    users = np.sort(random.integers(1, max(entries // 6, 2), entries)).astype(np.int32)
    positions = (np.arange(entries) - np.searchsorted(users, users)).astype(np.int32) + 1
    keys = random.standard_normal((entries, size), dtype=np.float32)
    bank.add(keys, random.integers(1, 12_000, entries), users, positions)
    rows = random.integers(0, entries, asked)
    queries = keys[rows] + 0.3 * random.standard_normal((asked, size), dtype=np.float32)
    return bank, queries, users[rows], positions[rows]


def scores_of(model: str, **options: Any) -> Check:
    """The scores of all items that a model gives, and the loss of a batch with its gradients, without dropout."""

    def check(device: str, data_path: str) -> tuple[float, float]:
        net, splits, _ = built(model, **options)
        batch = next(iter(splits.train))
        results = []
        for place in ("cpu", device):
            there = copy.deepcopy(net).to(place)
            loss = there.calculate_loss(batch.to(place))
            loss.backward()
            with torch.no_grad():
                scored = there.eval().full_sort_predict(next(iter(splits.valid))[0].to(place))
            grads = [p.grad for p in there.parameters() if p.grad is not None and p.grad.norm() > 1e-6]
            results.append([loss, scored, *grads])
        return max(gap(b, a) for a, b in zip(*results)), 2e-3

    return check


def built(model: str, **options: Any) -> tuple[Any, Any, Any]:
    """A model of the planted data set on the CPU, its splits and its configuration."""
    from recbole_raserec.config import get_model
    from recbole_raserec.data.splits import prepare_data

    options = {"softmax_precision": "float32", "native_kernels": False, "train_batch_size": 512, **options}
    config = config_of(model, str(ROOT / "dataset"), "planted", use_gpu=False, **options)
    splits = prepare_data(config)
    torch.manual_seed(6)
    net = get_model(model)(config, splits.train._dataset)
    net.train()
    return net, splits, config


def training(model: str, **options: Any) -> Check:
    """The losses of thirty steps of training, without dropout."""

    def check(device: str, data_path: str) -> tuple[float, float]:
        net, splits, _ = built(model, **options)
        batches = list(splits.train)[:15] * 2
        results = []
        for place in ("cpu", device):
            there = copy.deepcopy(net).to(place)
            optimizer = torch.optim.Adam(there.parameters(), lr=1e-3, fused=True)
            values = []
            for batch in batches:
                optimizer.zero_grad()
                value = there.calculate_loss(batch.to(place))
                value.backward()
                optimizer.step()
                values.append(value.detach().cpu())
            results.append(torch.stack(values))
        return gap(results[1], results[0]), 2e-3

    return check


def whole_run(model: str, **options: Any) -> Check:
    """A short run of the main job on the device, from data to report."""

    def check(device: str, data_path: str) -> tuple[float, float]:
        from recbole_raserec.quick_start import run_recbole_raserec

        with tempfile.TemporaryDirectory() as directory:
            given = {
                "data_path": str(ROOT / "dataset"), "checkpoint_dir": directory, "epochs": 1, "show_progress": False,
                "state": "ERROR", "use_gpu": device == "cuda", **options,
            }  # fmt: skip
            run_recbole_raserec(model, "planted", config_dict=given, argv=[])
            if "epochs" not in options:  # one epoch more from the stored state
                run_recbole_raserec(model, "planted", config_dict={**given, "epochs": 2}, argv=[])
        return 0.0, 0.0

    return check


@dataclasses.dataclass
class _Step:
    """One step of a group, compared with that of one process: a function that pickles."""

    device: str

    def __call__(self) -> float:
        from recbole_raserec.distributed import current
        from recbole_raserec.training.data_parallel import SplitSteps

        torch.set_num_threads(1)
        net, splits, _ = built("SASRec", training="packed", **STILL)
        alone = copy.deepcopy(net).to(self.device)
        together = copy.deepcopy(net).to(self.device)
        batches = list(splits.train)[:4]
        for there, split in ((alone, False), (together, True)):
            optimizer = torch.optim.SGD(there.parameters(), lr=0.1)
            loss = there.calculate_loss
            if split:
                loss = SplitSteps(current(), there, "SASRec", optimizer, None).loss_of(loss)
            for batch in batches:
                optimizer.zero_grad()
                loss(batch.to(self.device)).backward()
                optimizer.step()
        pairs = zip(together.parameters(), alone.parameters())
        return max(gap(a, b) for a, b in pairs if b.norm() > 1e-4)  # the keys' biases are rounding alone


def one_process(device: str, data_path: str) -> tuple[float, float]:
    """Steps of a group of one process whose sums go through nccl (on the CPU: gloo)."""
    import torch.distributed as dist

    from recbole_raserec.distributed.group import joined

    with tempfile.TemporaryDirectory() as directory:
        store = dist.FileStore(f"{directory}/store", 1)
        with joined(0, 1, 0, store, device == "cuda"):
            value = torch.ones(1000, device=device)
            dist.all_reduce(value)
            assert float(value.sum()) == 1000.0
            return _Step(device)(), 1e-4


def two_processes(device: str, data_path: str) -> tuple[float, float]:
    """Steps of two processes that share one card: nccl refuses that, their sums go through gloo."""
    from recbole_raserec.distributed.launch import Layout, start

    return start(Layout(nproc=2, size=2), _Step(device), (), False, 1), 1e-4


PACKED = {"training": "packed"}
RETRIEVAL = {"backbone": "SASRec", "ram_epochs": 1, "top_k": 5, "epochs": 2}

CHECKS: dict[str, Check] = {
    "ranking": ranking,
    "loss, float32": losses("float32"),
    "loss, bfloat16": losses("bfloat16"),
    "contrast": contrast,
    "retrieval module": retrieval_module,
    "search": search,
    "SASRec, packed: scores, loss, gradients": scores_of("SASRec", **STILL, **PACKED),
    "DuoRec: scores, loss, gradients": scores_of("DuoRec", **STILL),
    "BSARec, packed: scores, loss, gradients": scores_of("BSARec", **STILL, **PACKED),
    "GRU4Rec, packed: scores, loss, gradients": scores_of("GRU4Rec", dropout_prob=0.0, **PACKED),
    "SASRec, packed: training": training("SASRec", **STILL, **PACKED),
    "DuoRec: training": training("DuoRec", **STILL),
    "BSARec, packed: training": training("BSARec", **STILL, **PACKED),
    "GRU4Rec, packed: training": training("GRU4Rec", dropout_prob=0.0, **PACKED),
    "data parallel, nccl, one process": one_process,
    "data parallel, two processes on one card": two_processes,
    "run: SASRec, packed, resumed": whole_run("SASRec", **PACKED),
    "run: SASRec, packed, bfloat16": whole_run("SASRec", enable_amp=True, weight_averaging=0.9, **PACKED),
    "run: NARM, packed": whole_run("NARM", epochs=1, **PACKED),
    "run: BERT4Rec": whole_run("BERT4Rec", epochs=1),
    "run: FEARec": whole_run("FEARec", epochs=1),
    "run: RaSeRec": whole_run("RaSeRec", memory="both", head="both", memory_scope="past", **RETRIEVAL),
    "run: RaSeRec, the backbone too": whole_run("RaSeRec", freeze_backbone=False, **RETRIEVAL),
    "run: RaSeRec, regenerated, personalised": whole_run(
        "RaSeRec", regeneration="personalised", regen_epochs=1, regen_personal_epochs=1, head="knn", **RETRIEVAL
    ),
}
