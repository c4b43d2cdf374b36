"""What a GPU computes, without one: its code paths on the CPU, and its operations under torch's fake tensors."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from pretend_card import CARD, Card
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(ROOT))

from benchmarks import gpu
from benchmarks.gpu_checks import CHECKS, bank_of, built, gap, whole_run
from recbole_raserec.config import Config
from recbole_raserec.data import PACKED_TARGETS
from recbole_raserec.kernels import info_nce, linear_cross_entropy
from recbole_raserec.kernels.losses import _DeviceCrossEntropy
from recbole_raserec.recommendation.sasrec import attention_branch
from recbole_raserec.retrieval import memory as memory_module
from recbole_raserec.retrieval.heads import RetrievalModule
from recbole_raserec.retrieval.index import FlatIndex
from recbole_raserec.retrieval.search import GuardedSearch

STILL = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
MODELS = {
    "SASRec": {"training": "packed", **STILL},
    "DuoRec": {"training": "prefix", **STILL},
    "BSARec": {"training": "packed", **STILL},
    "GRU4Rec": {"training": "packed", "dropout_prob": 0.0},
}


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_softmax_of_a_device(monkeypatch, rows, low):
    """In chunks, with weights: the loss and both gradients of torch's cross entropy in float64."""
    monkeypatch.setattr("recbole_raserec.kernels.losses.DEVICE_CHUNK_BYTES", 4 * 30 * rows)
    torch.manual_seed(0)
    h, items, weights = torch.randn(20, 8), torch.randn(30, 8), torch.rand(20)
    targets = torch.randint(30, (20,))
    exact = [x.double().requires_grad_() for x in (h, items)]
    wanted = (F.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="none") * weights).sum()
    (3 * wanted).backward()
    ours = [x.clone().requires_grad_() for x in (h, items)]
    found = _DeviceCrossEntropy.apply(*ours, targets, weights, low)
    (3 * found).backward()
    tolerance = 1e-6 if low is None else 1e-2
    assert gap(found, wanted) < tolerance
    assert all(gap(a.grad, b.grad) < tolerance for a, b in zip(ours, exact))
    assert float(_DeviceCrossEntropy.apply(h[:0], items, targets[:0], weights[:0], low)) == 0


def test_search_on_a_device(monkeypatch):
    """torch's products find the lists that faiss finds, whatever is added, removed and barred in between."""
    monkeypatch.setattr(memory_module, "SEARCHES", ("cpu",))
    monkeypatch.setattr(memory_module, "SEARCH_SCORES", 50_000)
    monkeypatch.setattr("recbole_raserec.retrieval.index._DEVICE_SCORES", 1 << 16)
    bank, queries, users, positions = bank_of(3000, 64, 16)
    searched = []
    own = FlatIndex._search_on_device
    monkeypatch.setattr(FlatIndex, "_search_on_device", lambda self, *a: searched.append(len(self)) or own(self, *a))

    def same():
        wanted, found = (bank.search(q, 20, users, positions) for q in (queries, torch.from_numpy(queries)))
        assert np.array_equal(found.ids, wanted.ids)
        np.testing.assert_allclose(found.similarity, wanted.similarity, rtol=1e-6)

    same()
    held = bank._device_copy
    bank.add(queries[:10] * 2, np.arange(1, 11), np.full(10, 3), np.arange(1, 11))
    same()
    assert len(bank._device_copy) == 3010
    assert len(held) == 3000
    bank.forget(int(users[0]))
    same()
    bank.set_keys(np.random.default_rng(1).standard_normal((3010, 16)).astype(np.float32))
    same()
    assert set(searched) == {3000, 3010}
    before = len(searched)
    bank.search(torch.from_numpy(queries[:10]), 20, users[:10], positions[:10])  # few: by faiss
    assert len(searched) == before
    same()
    rows = np.zeros(64, dtype=np.int64)
    every = GuardedSearch(FlatIndex(bank.keys, torch.tensor(bank.keys)), bank.keys, 9.0, bank._prepare()._guard)
    assert every._score_pairs(queries, rows, rows).shape == (64,)


def test_search_keeps_float32():
    bank, queries, _, _ = bank_of(500, 20, 16)
    vectors = torch.tensor(bank._prepare()._vectors)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            found = FlatIndex(vectors.numpy(), vectors).search(queries, 5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    wanted = FlatIndex(vectors.numpy()).search(queries, 5)
    assert np.array_equal(found[1], wanted[1])
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)


def fake(x, device):
    """Like `x`, on a device that is not there: `cuda`, in a `FakeTensorMode`, or `meta`."""
    return torch.empty(x.shape, dtype=x.dtype, device=device)


def on_device(net, device):
    """The module, its parameters and buffers now there."""
    for module in net.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else torch.nn.Parameter(fake(p, device))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fake(buffer, device)
        if isinstance(module, torch.nn.RNNBase):
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    return net


built_for_cuda = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="a torch that knows no CUDA")


@built_for_cuda
@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("model", [name for name in MODELS if name != "GRU4Rec"])  # cuDNN asks for the card
def test_models_on_a_fake_gpu(model, amp):
    """Loss and scores are computed on a GPU that is not there, from tensors that are all on it."""
    net, splits, _ = built(model, training=MODELS[model]["training"])
    batch = next(iter(splits.train))
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=amp):
        there = on_device(net, "cuda")
        batch.interaction = {name: fake(x, "cuda") for name, x in batch.interaction.items()}
        if PACKED_TARGETS not in batch.columns:  # where its targets are, a fake tensor cannot tell
            assert there.calculate_loss(batch).device.type == "cuda"
        h = there.eval()(batch[there.ITEM_SEQ], batch[there.ITEM_SEQ_LEN])
        assert h.device.type == "cuda"
        assert h.shape == (len(batch[there.ITEM_SEQ]), there.item_vectors().shape[1])


@built_for_cuda
def test_losses_and_the_retrieval_module_on_a_fake_gpu():
    options = {"ram": "dual", "alpha": 0.5, "learnable_alpha": True, "beta": 0.6, "attn_tau": 1.0, "ram_heads": 2}
    module = RetrievalModule({**options, "ram_inner_size": 32, "ram_dropout": 0.5}, 16)
    with FakeTensorMode(), torch.no_grad():
        h, keys = (torch.randn(size, device="cuda") for size in ((6, 16), (6, 4, 16)))
        mixed = on_device(module, "cuda")(h, keys, keys, torch.ones(6, 4, dtype=torch.bool, device="cuda"))
        targets = torch.ones(6, dtype=torch.int64, device="cuda")
        loss = linear_cross_entropy(mixed, torch.randn(30, 16, device="cuda"), targets, precision="float32")
        assert (loss + info_nce(mixed, h, 0.5, "cos")).device.type == "cuda"


def test_fused_attention_is_the_written_out_one(monkeypatch):
    net, _, _ = built("SASRec", **STILL, training="packed")
    hidden, lengths = torch.randn(5, 9, 64), torch.tensor([9, 1, 4, 2, 8])
    monkeypatch.setattr("recbole_raserec.recommendation.sasrec.fuses_attention", lambda x: False)
    layer = net.trm_encoder.layer[0]
    wanted = attention_branch(layer, hidden, hidden), attention_branch(layer, hidden[:, :1], hidden, lengths)
    monkeypatch.setattr("recbole_raserec.recommendation.sasrec.fuses_attention", lambda x: True)
    found = attention_branch(layer, hidden, hidden), attention_branch(layer, hidden[:, :1], hidden, lengths)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_benchmark_without_a_gpu_says_what_it_would_do(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), f"--output={tmp_path}"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "No GPU" in run.stdout
    assert all(f"- {name}:" in run.stdout for name in ("tests", "epochs", "search", "quality"))
    assert not list(tmp_path.glob("gpu.*"))


@pytest.mark.parametrize("name", ["ranking", "loss, bfloat16", "contrast", "search"])
def test_checks_of_the_benchmark_run(name):
    error, tolerance = CHECKS[name]("cpu", "")
    assert error <= tolerance


@pytest.fixture
def card(monkeypatch):
    """A card that runs use; the memory is searched there."""
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *a, **k: None)
    own = Config._init_device
    monkeypatch.setattr(Config, "_init_device", lambda self: own(self) or self.final_config_dict.update(device=CARD))
    monkeypatch.setattr(memory_module, "SEARCHES", (CARD.type,))
    monkeypatch.setattr(memory_module, "SEARCH_SCORES", 1)
    with Card():
        yield CARD.type


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_trains_the_backbone_too_mixes_nothing(card):
    options = {
        "backbone": "SASRec", "training": "packed", "freeze_backbone": False, "hidden_size": 16, "inner_size": 16,
        "n_layers": 1, "n_heads": 1, "ram_inner_size": 16, "ram_heads": 1, "ram": "single", "top_k": 2, "epochs": 1,
        "ram_epochs": 1, "train_batch_size": 4096, "ram_train_batch_size": 4096, "metrics": ["NDCG"], "topk": [10],
    }  # fmt: skip
    assert whole_run("RaSeRec", **options)(card, "") == (0.0, 0.0)


@pytest.mark.parametrize(
    "name", [*(name for name in CHECKS if "scores" in name and "GRU" not in name), "retrieval module"]
)
def test_models_mix_nothing_of_a_card_and_the_cpu(card, name):
    error, tolerance = CHECKS[name](card, "")
    assert error <= tolerance


def test_card_refuses_what_cuda_refuses(card):
    there, here = torch.ones(3, device=card), torch.ones(3)
    for wrong in (lambda: there + here, lambda: here[there.long()], lambda: here.to(card).mul_(here), there.numpy):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    assert float((there + torch.tensor(1.0))[torch.tensor([0, 2])].sum()) == 4.0


JOBS = """
import sys, os, json
sys.path.insert(0, {root!r})
from benchmarks import gpu
def no(): raise RuntimeError("broken") from ValueError("the cause")
JOBS = [({{"check": "a"}}, lambda: {{"ok": True}}), ({{"check": "b"}}, no), ({{"check": "c"}}, lambda: os._exit(9)),
        ({{"check": "d"}}, lambda: [{{"ok": True, "n": 1}}, {{"ok": True, "n": 2}}])]
gpu.WORK["checks"] = lambda args: iter(JOBS)
sys.argv[0] = "gpu.py"
gpu.main()
"""


def test_benchmark_goes_on_after_a_fault(monkeypatch, tmp_path):
    """A job that fails, or whose process dies, is a row; what follows it runs in a process of its own."""
    (tmp_path / "jobs.py").write_text(JOBS.format(root=str(ROOT)))
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "jobs.py"))
    args, rows = argparse.Namespace(device="cpu", data_path="", dataset="planted", check=""), []
    assert gpu.run_part("checks", args, "", gpu.time.monotonic() + 60, rows) is None
    assert [(row["check"], row["ok"]) for row in rows] == [
        ("a", True), ("b", False), ("c", False), ("d", True), ("d", True),
    ]  # fmt: skip
    assert rows[1]["failed"] == "RuntimeError: broken"
    assert rows[1]["trace"].index("the cause") < rows[1]["trace"].index("broken")
    assert "died, status 9" in rows[2]["failed"]
    record = {"sections": {"tests": rows}, "versions": {}, "card": "none", "threads": 1, "command": "", "skipped": []}
    assert "3 of 5 checks hold" in gpu.page(record)
    assert "RuntimeError: broken" in gpu.page(record)
