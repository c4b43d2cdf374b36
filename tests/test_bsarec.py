"""BSARec's filter against its Fourier transform, what its states may know, and what it has in common with SASRec."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_log, write_log
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.interaction import Interaction
from tiny_models import LENGTH, N_ITEMS, batch, build

from recbole_raserec.config.config import Config
from recbole_raserec.errors import ConfigError
from recbole_raserec.quick_start import run_recbole_raserec
from recbole_raserec.recommendation.bsarec import BSARec, FrequencyFilter, low_pass
from recbole_raserec.recommendation.sasrec import SASRec

TOLERANCE = 1e-5


def sequences(rows: int = 5) -> torch.Tensor:
    return torch.randint(1, N_ITEMS, (rows, LENGTH), generator=torch.Generator().manual_seed(3))


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 60), cutoff=st.integers(1, 40), seed=st.integers(0, 9))
def test_the_low_pass_is_that_of_the_fourier_transform(length, cutoff, seed):
    x = np.random.default_rng(seed).normal(size=(length, 3))
    spectrum = np.fft.rfft(x, axis=0)
    spectrum[cutoff:] = 0
    wanted = np.fft.irfft(spectrum, n=length, axis=0)
    assert np.abs(low_pass(length, cutoff).numpy() @ x - wanted).max() < 1e-5


def test_all_frequencies_are_the_sequence_and_one_is_its_mean():
    assert torch.allclose(low_pass(9, 5), torch.eye(9), atol=1e-6)
    assert torch.allclose(low_pass(9, 1), torch.full((9, 9), 1 / 9), atol=1e-6)


def test_the_filter_with_beta_one_leaves_the_sequence():
    part = FrequencyFilter(8, 0.0, 1e-12)
    with torch.no_grad():
        part.beta.fill_(-1.0)  # its square counts
    x, low = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    assert torch.allclose(part(x, low), part.LayerNorm(2 * x), atol=1e-5)


@pytest.mark.parametrize("scope", ["causal", "window"])
def test_without_the_filter_it_is_sasrec(scope):
    model = build(BSARec, filter_weight=0.0, filter_scope=scope, contrast="none")
    plain = build(SASRec, native_kernels=False)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("filters.")})
    interaction = batch()
    assert torch.allclose(
        model.eval().full_sort_predict(interaction), plain.eval().full_sort_predict(interaction), atol=TOLERANCE
    )
    assert float(model.calculate_loss(interaction).detach()) == pytest.approx(
        float(plain.calculate_loss(interaction).detach()), rel=1e-5
    )


@pytest.mark.parametrize("scope", ["causal", "window"])
@pytest.mark.parametrize("width", [3, LENGTH])
def test_padding_changes_nothing(scope, width):
    model = build(BSARec, filter_scope=scope).eval()
    seq = sequences()
    seq[:, 3:] = 0
    lengths = torch.tensor([1, 2, 3, 3, 2])
    cut = seq[:, :width] * (torch.arange(width) < lengths[:, None])
    padded = torch.nn.functional.pad(cut, (0, LENGTH - width))
    assert torch.allclose(model(cut, lengths), model(padded, lengths), atol=TOLERANCE)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_one_causal_pass_gives_all_prefixes(n_layers):
    model = build(BSARec, n_layers=n_layers).eval()
    seq = sequences()
    together = model.encode_positions(seq)
    for length in range(1, LENGTH + 1):
        lengths = torch.full((5,), length)
        assert torch.allclose(together[:, length - 1], model(seq[:, :length], lengths), atol=TOLERANCE)


def test_in_a_window_a_position_sees_later_ones_and_is_refused_for_one_pass():
    causal, window = (build(BSARec, filter_scope=scope).eval() for scope in ("causal", "window"))
    window.load_state_dict(causal.state_dict())
    seq, lengths = sequences(), torch.full((5,), LENGTH)
    assert not torch.allclose(causal(seq, lengths), window(seq, lengths), atol=1e-3)
    with pytest.raises(ConfigError, match="filter_scope: causal"):
        window.encode_positions(seq)


@pytest.mark.parametrize("scope", ["causal", "window"])
@pytest.mark.parametrize("contrast", ["none", "un"])
def test_every_weight_learns(scope, contrast):
    model = build(BSARec, filter_scope=scope, contrast=contrast)
    rows = batch()
    model.calculate_loss(Interaction({**rows.interaction})).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


def run(workdir, **options):
    options = {
        "data_path": "data", "hidden_size": 8, "inner_size": 8, "MAX_ITEM_LIST_LENGTH": 6, "epochs": 2, "threads": 1,
        "show_progress": False, "state": "WARNING", "checkpoint_dir": "saved", "train_batch_size": 64, "ram_epochs": 1,
        "top_k": 3, **options,
    }  # fmt: skip
    return run_recbole_raserec(options.pop("model"), "tiny", config_dict=options, argv=[])


@pytest.mark.parametrize("form", [{"training": "packed"}, {"filter_scope": "window"}])
def test_it_trains_and_is_a_backbone(workdir, form):
    write_log(workdir / "data", "tiny", random_log(0))
    record = run(workdir, model="RaSeRec", backbone="BSARec", **form)
    assert set(record["metrics"]["ours"]["test"]) == {"seen_kept", "seen_removed"}


def test_a_window_with_packed_is_refused(workdir):
    write_log(workdir / "data", "tiny", random_log(0))
    with pytest.raises(ConfigError, match=r"filter_scope: window .*training: prefix"):
        run(workdir, model="BSARec", filter_scope="window", training="packed")
    assert Config("BSARec", "tiny", argv=[])["filter_scope"] == "causal"
