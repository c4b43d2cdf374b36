"""DR4SR+: the implicit gradient against the exact one, scores that find the useful rows, weighted rows in losses."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recbole_raserec.config import get_model
from recbole_raserec.data.dataset import WEIGHT
from recbole_raserec.data.regenerated import ORIGINS, Regenerated, joined
from recbole_raserec.data.splits import prepare_data
from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.quick_start import run_recbole_raserec
from recbole_raserec.recommendation.base import row_weights
from recbole_raserec.regeneration.personaliser import (
    STATE,
    Bilevel,
    Learner,
    Personaliser,
    hessian_product,
    implicit_direction,
    row_slopes,
    scorer_loss,
    shifted,
)
from recbole_raserec.storage.files import write_tensors


@pytest.fixture
def problem():
    """Weighted ridge regression: the inner optimum, and the outer loss there, in closed form."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(30, generator=generator, dtype=torch.float64)
    xo = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    yo = torch.randn(20, generator=generator, dtype=torch.float64)

    def rows(theta):
        return (x @ theta - y) ** 2 + 0.1 * theta.square().sum()

    def optimum(weights):
        w = weights / 30
        ridge = 0.1 * w.sum() * torch.eye(4, dtype=x.dtype)
        return torch.linalg.solve(x.T @ (w[:, None] * x) + ridge, x.T @ (w * y))

    return rows, optimum, lambda theta: ((xo @ theta - yo) ** 2).mean()


def test_the_implicit_gradient_against_the_exact_one(problem):
    rows, optimum, outer = problem
    weights = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    (exact,) = torch.autograd.grad(outer(optimum(weights)), weights)
    theta = optimum(weights).detach().requires_grad_()
    fixed = weights.detach()

    def inner():
        return (fixed * rows(theta)).mean()

    direction = implicit_direction([theta], lambda: outer(theta), inner, 2000, 0.05)
    slopes = row_slopes([theta], direction, lambda: rows(theta))
    (found,) = torch.autograd.grad(scorer_loss(weights, slopes), weights)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-8)


def test_the_hessian_product_against_autograd(problem):
    rows, _, _ = problem
    theta = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def loss():
        return (rows(theta) ** 1.5).mean()

    direction = torch.tensor([0.3, -1.0, 0.2, 2.0], dtype=torch.float64)
    exact = torch.autograd.functional.hessian(lambda t: (rows(t) ** 1.5).mean(), theta.detach()) @ direction
    torch.testing.assert_close(hessian_product([theta], loss, [direction])[0], exact, rtol=1e-3, atol=1e-6)


def test_shifted_parameters_come_back_to_the_bit():
    x = torch.rand(100).requires_grad_()
    before = x.detach().clone()
    with shifted([x], [torch.rand(100)], 0.1):
        assert not torch.equal(x, before)
    assert torch.equal(x, before)


class Linear(torch.nn.Module):
    """As much of SASRec as the bilevel problem asks for: rows are (vector, target)."""

    softmax_precision = "auto"

    def __init__(self, size, items):
        super().__init__()
        self.table = torch.nn.Parameter(0.01 * torch.randn(items, size))

    def encode_batch(self, batch):
        return batch[0], batch[1]

    def item_vectors(self):
        return self.table

    def weighted_loss(self, h, targets, weights):
        losses = F.cross_entropy(h @ self.table.t(), targets, reduction="none")
        weights = torch.ones_like(losses) if weights is None else weights
        return (weights * losses).mean()


def test_it_finds_the_rows_that_help():
    """Regenerated rows of one half of the space are right, those of the other have random targets."""
    torch.manual_seed(0)
    truth = torch.randn(6, 8)
    model, scorer = Linear(8, 6), Personaliser(8)

    def original(count):
        h = torch.randn(count, 8)
        return h, (h @ truth.t()).argmax(1)

    def batches(noisy):
        while True:
            h, targets = original(64)
            if noisy:
                bad = h[:, 0] > 0
                targets = torch.where(bad, torch.randint(0, 6, (64,)), targets)
            yield h, targets

    losses = []
    learner = Learner(model, scorer, Bilevel(every=2, learning_rate=5e-3, model_rate=5e-2))
    inner = itertools.islice(batches(True), 600)
    learner.learn(inner, batches(False), lambda b: torch.ones(64, dtype=torch.bool), losses.append)
    h, _ = original(2000)
    with torch.no_grad():
        score = scorer.score(h)
    assert float(score[h[:, 0] < -0.3].mean()) > float(score[h[:, 0] > 0.3].mean()) + 0.3
    assert np.mean(losses[-50:]) < np.mean(losses[:50])


# -- weighted rows ----------------------------------------------------------------------------------------------------


@pytest.fixture
def weighted():
    rng = np.random.default_rng(0)
    return Regenerated(
        np.array([3, 4, 5, 1, 2, 7, 8]), np.array([0, 3, 5, 7]), np.array([0, 2, 5]), np.array([1, 2, 2], np.uint8),
        rng.random(7).astype(np.float32),
    )  # fmt: skip


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("training", ["prefix", "packed"])
@pytest.mark.parametrize("model", ["SASRec", "DuoRec"])
def test_the_loss_is_the_weighted_mean(small_config, weighted, model, training, kernels):
    sizes = {"hidden_size": 16, "inner_size": 16, "n_layers": 1, "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
    options = {"softmax_precision": "float32", "native_kernels": kernels, "training": training, **sizes}
    if model == "DuoRec":
        options["contrast"] = "none"
    config = small_config(model, **options)
    splits = prepare_data(config, weighted)
    torch.manual_seed(0)
    net = get_model(model)(config, splits.dataset)
    total = torch.zeros(())
    for batch in splits.train:
        h, targets = net.encode_batch(batch)
        losses = F.cross_entropy(h @ net.item_vectors().t(), targets, reduction="none")
        weights = row_weights(batch)
        torch.testing.assert_close(net.calculate_loss(batch), (losses * weights).mean())
        total = total + weights.sum()
    assert float(total) == pytest.approx(len(splits.train._dataset), rel=1e-5)  # their mean is 1


def test_weights_reach_their_own_rows(small_config, weighted):
    train = prepare_data(small_config("SASRec")).train._dataset
    both = joined(train, weighted)
    rows = both[np.arange(len(both))]
    weights = rows[WEIGHT].numpy()
    inner = weighted.weights[[1, 2, 4, 6]]  # not the first of a sequence
    np.testing.assert_allclose(weights, weights[0] * np.concatenate([np.ones(len(train)), inner]), rtol=1e-6)
    assert weights.mean() == pytest.approx(1, rel=1e-5)
    assert row_weights(train[np.arange(3)]) is None


@pytest.mark.parametrize("model", ["SASRec", "DuoRec"])
def test_in_the_pipeline(tiny, model, tmp_path):
    quick = {"regen_personal_epochs": 1, "regen_personal_every": 2}
    whole = tiny(model, regeneration="personalised", **quick)
    weights = whole.data.data.weights
    assert 0 <= weights.min() < weights.max() <= 1
    found = whole.data.report["weights"]
    assert set(found["mean_by_origin"]) == set(ORIGINS[1:])
    targets = np.ones(len(weights), dtype=bool)
    targets[whole.data.data.offsets[:-1]] = False
    assert found["deciles"] == pytest.approx(np.quantile(weights[targets], np.linspace(0, 1, 11)).tolist())
    plain = tiny(model, regeneration=True, **quick)
    assert plain.record["metrics"]["base"] == whole.record["metrics"]["base"]
    assert plain.record["metrics"]["ours"] != whole.record["metrics"]["ours"]
    assert len(list(tmp_path.glob("saved/regeneration-*"))) == 1  # one set, weighed or not
    again = tiny(model, regeneration="personalised", **quick)
    assert again.trained == []
    assert again.record["metrics"] == whole.record["metrics"]


def test_it_goes_on_after_the_last_pass(tiny, tmp_path, monkeypatch):
    options = {"regeneration": "personalised", "regen_personal_epochs": 3, "regen_personal_every": 2}
    whole = tiny("SASRec", **options)
    (directory,) = tmp_path.glob("saved/personalised-*")
    shutil.rmtree(directory)
    learn, passes = Learner.learn, []

    def killed(self, *args):
        passes.append(self.steps)
        if len(passes) == 3:
            raise KeyboardInterrupt
        learn(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "learn", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny("SASRec", **options)
    monkeypatch.setattr(Learner, "learn", lambda self, *args: (passes.append(self.steps), learn(self, *args)))
    again = tiny("SASRec", **options)
    assert passes[3:] == passes[2:3] != [0]  # one pass was left
    np.testing.assert_array_equal(again.data.data.weights, whole.data.data.weights)
    assert not (directory / STATE).exists()


@pytest.mark.parametrize("damage", ["truncated", "of another model"])
def test_a_damaged_state_is_refused(tiny, tmp_path, damage):
    options = {"regeneration": "personalised", "regen_personal_epochs": 1, "regen_personal_every": 2}
    tiny("SASRec", **options)
    (directory,) = tmp_path.glob("saved/personalised-*")
    shutil.rmtree(directory)
    write_tensors(directory / STATE, {"model.x": torch.ones(2)}, {"passes": 1, "steps": 1, "losses": [], "seconds": 1})
    if damage == "truncated":
        (directory / STATE).write_bytes((directory / STATE).read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"personaliser-state.*does not fit this run.*delete it"):
        tiny("SASRec", **options)


def test_a_series_that_diverges_is_told(tiny):
    options = {"regen_personal_epochs": 1, "regen_personal_every": 1, "regen_personal_rate": 1e30}
    with pytest.raises(ConfigError, match=r"regen_personal_rate: 1e\+30 with regen_personal_terms: 3: .* lower them"):
        tiny("SASRec", regeneration="personalised", **options)


def test_other_models_do_not_weigh(tmp_path):
    options = {"regeneration": "personalised", "backbone": "SASRec", "loss_type": "BPR"}
    with pytest.raises(ConfigError, match="loss_type: CE; it is BPR"):
        run_recbole_raserec("RaSeRec", "tiny", config_dict=options, argv=[])
    with pytest.raises(ConfigError, match="not in that of STAMP"):
        run_recbole_raserec("STAMP", "tiny", config_dict={"regeneration": "personalised"}, argv=[])
    with pytest.raises(ConfigError, match=r"regeneration: 'often' .* is not true, false or personalised"):
        run_recbole_raserec("GRU4Rec", "tiny", config_dict={"regeneration": "often"}, argv=[])
