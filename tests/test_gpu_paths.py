"""What a GPU computes, without one: its code paths on the CPU, and its operations under torch's fake tensors."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(ROOT))

from benchmarks.gpu_checks import CHECKS, bank_of, built, gap
from recbole_raserec.data.loaders import PACKED_SLOTS, PACKED_TARGETS, WEIGHT, fixed_shape, rounded
from recbole_raserec.kernels import info_nce, linear_cross_entropy
from recbole_raserec.kernels.losses import _DeviceCrossEntropy
from recbole_raserec.recommendation.sasrec import attention_branch
from recbole_raserec.retrieval import memory as memory_module
from recbole_raserec.retrieval.heads import RetrievalModule
from recbole_raserec.retrieval.index import FlatIndex
from recbole_raserec.retrieval.search import GuardedSearch
from recbole_raserec.training import trainer as trainer_module
from recbole_raserec.training.graphs import FixedShapes, GraphedLoss

STILL = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
MODELS = {
    "SASRec": {"training": "packed", **STILL},
    "DuoRec": {"training": "prefix", **STILL},
    "BSARec": {"training": "packed", **STILL},
    "GRU4Rec": {"training": "packed", "dropout_prob": 0.0},
}


def again(step):
    """In place of a CUDA graph: the step made again."""
    for _ in range(2):
        step()
    return step


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


@pytest.mark.parametrize("model", list(MODELS))
def test_steps_of_few_shapes_are_those_of_the_batches(model):
    """Losses and weights of some recorded steps are those of the usual ones, also for batches of other shapes."""
    net, splits, config = built(model, **MODELS[model], train_batch_size=128)
    batches = list(splits.train)[:5]
    other, results, shapes = copy.deepcopy(net), [], set()
    recorded = GraphedLoss(net, net.calculate_loss, record=again)
    fixed = list(FixedShapes(batches, config, net.max_seq_length))
    for there, loss, loader in ((other, other.calculate_loss, batches), (net, recorded, fixed)):
        optimizer = torch.optim.SGD(there.parameters(), lr=0.5)
        for batch in [*loader, *loader, *loader]:
            optimizer.zero_grad()
            value = loss(batch)
            value.backward()
            optimizer.step()
            results.append(float(value.detach()))
            shapes.add(tuple(tuple(x.shape) for x in batch.interaction.values()))
    half = len(results) // 2
    assert results[half:] == pytest.approx(results[:half], rel=1e-4)
    assert 0 < len(recorded._steps) <= len(batches)
    assert all(gap(a, b) < 1e-3 for a, b in zip(net.parameters(), other.parameters()) if b.norm() > 1e-3)


def test_a_step_that_cannot_be_recorded_is_made(caplog):
    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    net, splits, config = built("SASRec", **MODELS["SASRec"])
    recorded = GraphedLoss(net, net.calculate_loss, record=refuse)
    batch = next(iter(FixedShapes(splits.train, config, net.max_seq_length)))
    values = []
    for _ in range(3):
        net.zero_grad()
        loss = recorded(batch)
        loss.backward()
        values.append(float(loss.detach()))
        assert net.item_embedding.weight.grad is not None
    assert len(set(values)) == 1
    assert len([r for r in caplog.records if "cuda_graphs" in r.message]) == 1


def test_recording_leaves_random_numbers_and_parameters_without_gradients_alone():
    net, splits, config = built("SASRec", training="packed")
    net.unused = torch.nn.Parameter(torch.ones(3))
    recorded = GraphedLoss(net, net.calculate_loss, record=lambda step: (step(), step)[1])
    batch = next(iter(FixedShapes(splits.train, config, net.max_seq_length)))
    recorded(batch)
    before = torch.get_rng_state()
    recorded._seen = dict.fromkeys(recorded._seen, 9)
    state = {}
    recorded._record = lambda step: (step(), lambda: state.setdefault("rng", torch.get_rng_state()).sum() * 0.0)[1]
    recorded(batch).backward()
    assert torch.equal(state["rng"], before)
    assert net.unused.grad is None


def test_weights_of_a_packed_batch_of_fixed_shape():
    net, splits, config = built("SASRec", **MODELS["SASRec"])
    batch = next(iter(splits.train))
    predicted = batch[PACKED_TARGETS] > 0
    batch.interaction[WEIGHT] = torch.rand(predicted.shape) * predicted
    fixed = fixed_shape(batch, config, net.max_seq_length)
    assert float(net.calculate_loss(fixed).detach()) == pytest.approx(float(net.calculate_loss(batch).detach()), 1e-5)
    assert len(fixed[PACKED_SLOTS]) == len(fixed[WEIGHT]) == rounded(int(predicted.sum()), 16)


def test_contrast_of_packed_rows_keeps_its_shape():
    net, splits, config = built("DuoRec", training="packed", **STILL)
    assert fixed_shape(next(iter(splits.train)), config, net.max_seq_length) is None


@pytest.mark.parametrize("steps", [2, 16])
def test_rounded_sizes(steps):
    sizes = [rounded(size, steps) for size in range(1, 2000)]
    assert all(size <= found <= size * (1 + 1 / steps) + 1 for size, found in enumerate(sizes, start=1))
    assert len(set(sizes)) <= 12 * steps


def test_search_on_a_device(monkeypatch):
    """torch's products find the lists that faiss finds, whatever is added, removed and barred in between."""
    monkeypatch.setattr(memory_module, "SEARCHES", ("cpu",))
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
    net, splits, config = built(model, training=MODELS[model]["training"])
    batch = fixed_shape(next(iter(splits.train)), config, net.max_seq_length)
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=amp):
        there = on_device(net, "cuda")
        batch.interaction = {name: fake(x, "cuda") for name, x in batch.interaction.items()}
        assert there.calculate_loss(batch).device.type == "cuda"
        h = there.eval()(batch[there.ITEM_SEQ], batch[there.ITEM_SEQ_LEN])
        assert h.device.type == "cuda"
        assert h.shape == (len(batch[there.ITEM_SEQ]), there.item_vectors().shape[1])


@pytest.mark.parametrize("model", list(MODELS))
def test_gradients_without_data(monkeypatch, model):
    """A step never asks what a tensor holds: it runs, backwards too, on tensors without any."""
    monkeypatch.setattr("recbole_raserec.kernels.losses.torch.autocast", lambda *a, **k: contextlib.nullcontext())
    net, splits, config = built(model, training=MODELS[model]["training"])
    batch = fixed_shape(next(iter(splits.train)), config, net.max_seq_length)
    batch.interaction = {name: fake(x, "meta") for name, x in batch.interaction.items()}
    on_device(net, "meta").calculate_loss(batch).backward()
    assert net.item_embedding.weight.grad.shape == net.item_embedding.weight.shape


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


def test_trainer_records_where_a_gpu_trains(monkeypatch, tmp_path):
    """A run whose steps are recorded has the losses of one whose steps are not."""
    from recbole_raserec.quick_start import run_recbole_raserec

    losses = []
    for records in (False, True):
        monkeypatch.setattr(trainer_module.ResumableTrainer, "_records", records)
        monkeypatch.setattr(trainer_module, "GraphedLoss", lambda model, loss: GraphedLoss(model, loss, record=again))
        options = {
            **STILL, "training": "packed", "epochs": 2, "native_kernels": False, "softmax_precision": "float32",
            "data_path": str(ROOT / "dataset"), "checkpoint_dir": str(tmp_path / str(records)), "hidden_size": 32,
            "show_progress": False, "state": "ERROR", "inner_size": 64,
        }  # fmt: skip
        record = run_recbole_raserec("SASRec", "planted", config_dict=options, argv=[])
        losses.append([loss for _, loss in record["curves"]["base"]["train_loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_benchmark_without_a_gpu_says_what_it_would_do(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), f"--output={tmp_path}"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "No GPU" in run.stdout
    assert all(f"- {name}:" in run.stdout for name in ("tests", "epochs", "search", "quality"))
    assert not list(tmp_path.glob("gpu.*"))


@pytest.mark.parametrize("name", [name for name in CHECKS if not name.startswith(("run", "data", "DuoRec"))])
def test_checks_of_the_benchmark_run(name):
    error, tolerance = CHECKS[name]("cpu", "")
    assert error <= tolerance
