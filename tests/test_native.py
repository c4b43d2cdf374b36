"""The compiled kernels against torch: values, gradients, dropout, repeatability, and what happens without them."""

from __future__ import annotations

import importlib.machinery
import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import N_ITEMS, Ids, batch, build, disturb, options

from recbole_raserec.kernels import native
from recbole_raserec.kernels.encoder import Architecture, Ragged, encode
from recbole_raserec.kernels.losses import linear_cross_entropy
from recbole_raserec.recommendation.duorec import DuoRec
from recbole_raserec.recommendation.sasrec import SASRec

pytestmark = pytest.mark.skipif(native.loaded() is None, reason="no compiled kernels here (no C compiler?)")

SIZES = {"hidden_size": 64, "inner_size": 96, "n_heads": 2}


def models(**changes):
    """SASRec that uses the kernels, and one with the same weights that does not."""
    torch.manual_seed(0)
    ours = disturb(SASRec(options(**{**SIZES, **changes}), Ids()), scale=0.1)
    plain = SASRec(options(**{**SIZES, **changes}, native_kernels=False), Ids())
    plain.load_state_dict(ours.state_dict())
    assert ours.compiled()
    assert not plain.compiled()
    return ours, plain


def compare(ours, plain, run, tolerance=2e-5):
    """Same outputs and gradients: run(model) -> tensor."""
    outputs = [run(model) for model in (ours, plain)]
    assert outputs[0].shape == outputs[1].shape
    assert (outputs[0] - outputs[1]).abs().max() < tolerance
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(5))
    for model, output in zip((ours, plain), outputs):
        model.zero_grad()
        (output * weights).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        scale = max(1.0, float(b.grad.abs().max()))
        assert (a.grad - b.grad).abs().max() < tolerance * scale, name


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_encoder_equals_torch(flavour, n_layers, heads):
    ours, plain = models(n_layers=n_layers, n_heads=heads, hidden_dropout_prob=0.0, attn_dropout_prob=0.0)
    rows = batch(rows=40)
    seq, length = rows["item_id_list"], rows["item_length"]
    compare(ours.train(), plain.train(), lambda model: model.forward(seq, length))
    wanted = (torch.rand(seq.shape, generator=torch.Generator().manual_seed(1)) < 0.4) & (seq > 0)
    wanted[3] = False  # a sequence of which nothing is wanted

    def positions(model):
        if model is ours:
            return model._encode(Ragged.of_rows(seq, length, wanted))
        return model.encode_positions(seq)[wanted]

    compare(ours, plain, positions)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from([16, 32, 48]), st.integers(1, 3))
def test_any_ragged_batch(longest, rows, seed, size, threads):
    generator = torch.Generator().manual_seed(seed)
    changes = {"hidden_size": size, "inner_size": 32, "n_heads": 1, "MAX_ITEM_LIST_LENGTH": 60, "n_layers": 2}
    ours, plain = models(**changes, hidden_dropout_prob=0.0, attn_dropout_prob=0.0)
    length = torch.randint(1, longest + 1, (rows,), generator=generator)
    seq = torch.randint(1, N_ITEMS, (rows, int(length.max())), generator=generator)
    seq = seq * (torch.arange(seq.size(1)) < length[:, None])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(ours.train(), plain.train(), lambda model: model.forward(seq, length), 5e-5)
    finally:
        torch.set_num_threads(before)


def test_evaluation_draws_nothing_and_keeps_nothing(flavour):
    ours, plain = (model.eval() for model in models())
    rows = batch(rows=30)
    state = torch.get_rng_state()
    with torch.no_grad():
        found = ours.forward(rows["item_id_list"], rows["item_length"])
        wanted = plain.forward(rows["item_id_list"], rows["item_length"])
    assert torch.equal(state, torch.get_rng_state())
    assert not found.requires_grad
    assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("place", ["hidden_dropout_prob", "attn_dropout_prob"])
def test_dropout_is_that_of_torch_on_average(flavour, place):
    """Means over many draws agree within their own scatter; so do the spreads."""
    changes = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, place: 0.4, "n_layers": 1}
    ours, plain = (model.train() for model in models(**changes))
    rows = batch(rows=3)
    seq, length = (x.repeat_interleave(3000, 0) for x in (rows["item_id_list"], rows["item_length"]))
    torch.manual_seed(3)
    with torch.no_grad():
        found, wanted = (model.forward(seq, length).view(3, 3000, -1) for model in (ours, plain))
    apart = (found.mean(1) - wanted.mean(1)).abs()
    scatter = (wanted.std(1) * (2 / 3000) ** 0.5).clamp(min=1e-6)
    long = length.view(3, 3000)[:, 0] > 1  # one item attends to itself alone
    assert (apart / scatter)[long].max() < 5.5
    ratio = (found.std(1) / wanted.std(1))[long]
    assert ratio.min() > 0.9
    assert ratio.max() < 1.1


def test_a_gradient_that_is_not_contiguous():
    ours, plain = (model.train() for model in models(hidden_dropout_prob=0.0, attn_dropout_prob=0.0))
    rows = batch(rows=20)
    for model in (ours, plain):
        model.zero_grad()
        model.forward(
            rows["item_id_list"], rows["item_length"]
        ).sum().backward()  # the gradient is one number, expanded
    for a, b in zip(ours.parameters(), plain.parameters()):
        assert (a.grad - b.grad).abs().max() < 2e-5 * max(1.0, float(b.grad.abs().max()))


def test_backward_draws_the_same_dropout(flavour):
    """The directional derivative of the loss under one seed is the gradient's."""
    ours, _ = models(n_layers=2)
    ours.train()
    rows = batch(rows=8)
    seq, length = rows["item_id_list"], rows["item_length"]
    weights = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))

    def loss():
        torch.manual_seed(11)
        return (ours.forward(seq, length) * weights).sum()

    loss().backward()
    generator = torch.Generator().manual_seed(2)
    for name, weight in ours.named_parameters():
        step = torch.randn(weight.shape, generator=generator) * 1e-2 / weight.numel() ** 0.5
        wanted = float((weight.grad * step).sum())
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                weight.add_(sign * step)
                values.append(float(loss().double()))
                weight.sub_(sign * step)
        assert (values[0] - values[1]) / 2 == pytest.approx(wanted, rel=0.03, abs=2e-4), name


@pytest.mark.parametrize("threads", [1, 2])
def test_same_seed_same_bits(flavour, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for _ in range(3):
            ours, _ = models(n_layers=2)
            ours.train().calculate_loss(batch(rows=64)).backward()
            results.append([p.grad for p in ours.parameters()])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    finally:
        torch.set_num_threads(before)


def test_items_and_lengths_out_of_range_are_refused():
    ours, _ = models()
    with pytest.raises(IndexError, match="items"):
        ours.forward(torch.tensor([[1, N_ITEMS]]), torch.tensor([2]))
    with pytest.raises(IndexError, match="1 to"):
        ours.forward(torch.tensor([[1, 2], [0, 0]]), torch.tensor([2, 0]))
    long = torch.ones(1, 500, dtype=torch.int64)
    with pytest.raises(IndexError, match="1 to"):
        ours.forward(long, torch.tensor([500]))


def test_arguments_that_do_not_fit_are_refused():
    ours, _ = models()
    seq = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(IndexError, match="offsets"):
        ours.forward(seq, torch.tensor([3, 5]))
    with pytest.raises(IndexError, match="chosen"):
        ours._encode(Ragged.of_rows(seq, torch.tensor([3, 1]), torch.tensor([[True] * 3, [False, True, False]])))
    assert ours.forward(seq.int(), torch.tensor([3, 3])).isfinite().all()
    if native.has_cross_entropy():
        h, items = torch.randn(3, 16), torch.randn(5, 16)
        with pytest.raises(ValueError, match="fit together"):
            native.cross_entropy(h, items, torch.tensor([1, 2]), torch.ones(3), True, True)
        with pytest.raises(TypeError, match="int64"):
            native.cross_entropy(h, items, torch.tensor([1, 2, 3]).int(), torch.ones(3), True, True)


def test_many_sequences_are_encoded_in_parts(monkeypatch):
    ours, _ = (model.eval() for model in models())
    rows = batch(rows=50)
    with torch.no_grad():
        whole = ours.forward(rows["item_id_list"], rows["item_length"])
        monkeypatch.setattr("recbole_raserec.kernels.encoder.TOKENS", 7)
        assert torch.equal(ours.forward(rows["item_id_list"], rows["item_length"]), whole)


def test_sizes_that_do_not_fit_go_through_torch():
    assert not Architecture(size=20, inner=32, heads=2, layers=1, epsilon=1e-12).fits()
    assert not SASRec(options(), Ids()).double().compiled()
    assert not build(SASRec, **SIZES, hidden_act="relu").compiled()
    model = disturb(SASRec(options(**SIZES), Ids())).double().train()
    rows = batch()
    assert model.calculate_loss(rows).dtype == torch.float64


def test_no_sequences():
    ours, _ = models()
    weights = list(ours.trm_encoder.parameters())
    flat = [torch.zeros_like(w) for w in weights] + [torch.ones(64), torch.zeros(64)]
    empty = torch.zeros(0, dtype=torch.int64)
    ragged = Ragged(empty, torch.zeros(1, dtype=torch.int64), empty, torch.zeros(1, dtype=torch.int64), 0)
    out = encode(ragged, ours._architecture, ours.item_embedding.weight, ours.position_embedding.weight, flat)
    assert out.shape == (0, 64)
    out.sum().backward()


def test_duorec_trains_on_all_views():
    model = disturb(DuoRec(options(**SIZES, contrast="us"), Ids()), scale=0.1).train()
    assert model.compiled()
    model.calculate_loss(batch(rows=16)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_without_a_library_everything_goes_through_torch(monkeypatch):
    monkeypatch.setattr(native, "_runs", lambda name: False)
    native.loaded.cache_clear()
    try:
        assert native.loaded() is None
        assert not SASRec(options(**SIZES), Ids()).compiled()
        h, items, targets = torch.randn(5, 16), torch.randn(20, 16), torch.arange(5)
        assert linear_cross_entropy(h, items, targets, precision="auto") == linear_cross_entropy(h, items, targets)
    finally:
        native.loaded.cache_clear()


def test_the_installed_library_is_found_from_a_source_tree(monkeypatch, tmp_path):
    """A source tree has metadata of its own, which come first, and no libraries."""

    class Installed:
        def __init__(self, root):
            self.root = root

        def locate_file(self, name):
            return self.root / name

    found = native.loaded()
    real = next(path for folder in native._folders() for path in folder.glob(found.name + ".*"))
    kernels = tmp_path / "site" / "recbole_raserec" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / real.name).write_bytes(real.read_bytes())
    roots = [Installed(tmp_path / "tree"), Installed(tmp_path / "site")]
    monkeypatch.setattr(native.importlib.metadata, "distributions", lambda name: roots)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "tree" / "native.py"))
    native.loaded.cache_clear()
    try:
        again = native.loaded()
        assert again is not None
        assert again.name == found.name
        assert again is not found
    finally:
        native.loaded.cache_clear()


def test_a_broken_or_older_library_is_not_used(monkeypatch, tmp_path):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    for name in native.NAMES:
        (tmp_path / (name + suffix)).write_bytes(b"not a library")
    monkeypatch.setattr(native, "_folders", lambda: iter([tmp_path]))
    native.loaded.cache_clear()
    assert native.loaded() is None
    monkeypatch.undo()
    monkeypatch.setattr(native, "INTERFACE", -1)
    native.loaded.cache_clear()
    assert native.loaded() is None
    monkeypatch.undo()
    native.loaded.cache_clear()
    assert native.loaded() is not None
