"""Every sequential model of RecBole through the backbone interface: same scores, or refused with the reason.

The models are built on a tiny random data set and then disturbed, so that no bias, padding row or gate is left at an
initial value at which two different formulas agree.
"""

from __future__ import annotations

import copy
import pkgutil
import random
from pathlib import Path

import pytest
import torch
from backbone_helpers import BATCH, LENGTH, MIXED, N_ITEMS, OPTIONS, Built, batch_of, close, interaction_of, write_data
from recbole.model import sequential_recommender
from recbole.utils import get_model
from torch import nn

from recbole_raserec.config import REFUSED, TRIMMABLE
from recbole_raserec.errors import ConfigError
from recbole_raserec.recommendation import backbone as module
from recbole_raserec.recommendation.backbone import ADAPTERS, Backbone, wrap_backbone

#: Models without full_sort_predict. (Both hold a mask of MAX_ITEM_LIST_LENGTH columns.)
PAIRWISE_ONLY = {"DIN", "DIEN"}


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Atomic files: interactions with times, items with a multi-valued feature `class`."""
    return write_data(tmp_path_factory.mktemp("data"))


_built: dict = {}


@pytest.fixture
def built(request: pytest.FixtureRequest, data_path: Path) -> Built:
    """The model named by the test's parameter; built once, copied for each test."""
    name = request.param
    if name not in _built:
        _built[name] = Built(name, data_path)
    return copy.deepcopy(_built[name])


ALL = sorted([*ADAPTERS, *REFUSED])
VARIANTS = [variant for variant in OPTIONS if "/" in variant]
each_supported = pytest.mark.parametrize("built", sorted([*ADAPTERS, *VARIANTS]), indirect=True)
each_ranking = pytest.mark.parametrize("built", sorted({*ALL, *VARIANTS} - PAIRWISE_ONLY), indirect=True)


def test_registries_cover_every_model_of_recbole():
    files = {info.name for info in pkgutil.iter_modules(sequential_recommender.__path__)}
    assert {name.lower() for name in ALL} == files
    assert not set(ADAPTERS) & set(REFUSED)
    assert TRIMMABLE.issubset(ALL)


@each_supported
def test_scores_equal_the_models_own(built: Built):
    wrapped = wrap_backbone(built.model, built.config, built.dataset)
    batch = batch_of(MIXED, seed=5)
    lengths = batch["item_length"].clone()
    with torch.no_grad():
        own = built.model.full_sort_predict(interaction_of(batch)).view(len(MIXED), -1)
        h = wrapped.encode(batch["item_id_list"], batch["item_length"], batch["user_id"])
        ours = h @ wrapped.item_vectors().T
        bias = wrapped.item_bias()
        if bias is not None:
            ours = ours + bias
    assert h.shape == (len(MIXED), wrapped.hidden_size)
    assert wrapped.item_vectors().shape == (N_ITEMS, wrapped.hidden_size)
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-5)
    assert torch.equal(batch["item_length"], lengths)
    assert wrapped.model is built.model


@each_supported
def test_encode_trains(built: Built):
    wrapped = wrap_backbone(built.model, built.config, built.dataset).train()
    batch = batch_of(MIXED)
    wrapped.scores(batch["item_id_list"], batch["item_length"], batch["user_id"]).logsumexp(1).sum().backward()
    table = built.model.IL_emb if hasattr(built.model, "IL_emb") else getattr(built.model, wrapped.item_table)
    assert float(table.weight.grad.abs().sum()) > 0
    reached = [name for name, weight in built.model.named_parameters() if weight.grad is not None]
    idle = {name for name, _ in built.model.named_parameters()} - set(reached)
    assert len(idle) < len(reached), f"no gradient: {sorted(idle)}"


@each_supported
def test_user_ids_are_asked_for(built: Built):
    wrapped = wrap_backbone(built.model, built.config, built.dataset)
    batch = batch_of(MIXED)
    if wrapped.needs_user:
        with pytest.raises(ValueError, match="user"):
            wrapped.encode(batch["item_id_list"], batch["item_length"])
    else:
        with torch.no_grad():
            without = wrapped.encode(batch["item_id_list"], batch["item_length"])
            assert torch.equal(without, wrapped.encode(batch["item_id_list"], batch["item_length"], batch["user_id"]))


def freeze_dropout(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def loss_and_gradients(built: Built, batch: dict, length: int) -> list:
    """Loss and all gradients as one vector, in train mode without dropout, the same random draws in each call."""
    random.seed(11)
    interaction = built.transform(built.dataset, interaction_of(batch, length))
    built.model.zero_grad()
    loss = built.model.calculate_loss(interaction)
    if torch.isnan(loss):  # BERT4Rec, when no item but the first of a sequence was masked: a sum over nothing
        return [torch.tensor(-1.0)]
    loss.backward()
    return [loss.detach(), torch.cat([w.grad.flatten() for w in built.model.parameters() if w.grad is not None])]


def same_when_cut(built: Built) -> bool:
    """Whether scores, loss and gradients survive the cut, over batches with longest sequence 1, 2, 4, 9."""
    freeze_dropout(built.model)
    for seed, lengths in enumerate([[1] * BATCH, [1, 2, 2, 1, 2, 2], [4, 1, 2, 3, 4, 4], [9, 1, 2, 5, 7, 9]]):
        batch, longest = batch_of(lengths, seed), max(lengths)
        try:
            built.model.eval()
            with torch.no_grad():
                one, other = (built.model.full_sort_predict(interaction_of(batch, n)) for n in (LENGTH, longest))
            if not close(other, one):
                return False
            built.model.train()
            one, other = (loss_and_gradients(built, batch, n) for n in (LENGTH, longest))
            if not all(close(b, a) for a, b in zip(one, other)):
                return False
        except (RuntimeError, IndexError):  # a parameter per position
            return False
    return True


@each_ranking
def test_trimmable_models_are_those_that_stay_the_same(built: Built):
    name = type(built.model).__name__
    assert same_when_cut(built) == (name in TRIMMABLE)
    if name in ADAPTERS:
        wrapped = wrap_backbone(built.model, built.config, built.dataset)
        assert wrapped.trims == (name in TRIMMABLE)
        if wrapped.trims:
            batch = batch_of([4, 1, 2, 3, 4, 4])
            with torch.no_grad():
                whole, cut = (
                    wrapped.eval().scores(batch["item_id_list"][:, :length], batch["item_length"], batch["user_id"])
                    for length in (LENGTH, 4)
                )
            assert close(cut, whole)


@each_ranking
def test_untrimmed_batches_run(built: Built):
    """The other half of the test above: "not the same when cut" must not stand for "does not run at all"."""
    batch = batch_of([9, 1, 2, 5, 7, 9])
    with torch.no_grad():
        assert torch.isfinite(built.model.full_sort_predict(interaction_of(batch))).all()
    if type(built.model).__name__ != "FEARec":  # its loss looks the batch up in the training data
        freeze_dropout(built.model.train())
        one, again = (loss_and_gradients(built, batch, LENGTH) for _ in range(2))
        assert len(one) > 1
        assert all(close(a, b) for a, b in zip(one, again))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_models_name_the_reason(name: str):
    model = type(name, (nn.Module,), {"__module__": "recbole.model"})()
    with pytest.raises(ConfigError) as caught:
        wrap_backbone(model, {}, None)
    message = str(caught.value)
    assert "backbone" in message
    assert f"{name} cannot" in message
    assert REFUSED[name] in message
    assert "SASRec" in message.split("These work")[1]


def unlisted(name: str, scored: str):
    """A model that RecBole does not have: GRU4Rec's vector, ranked in its own way."""
    base = get_model("GRU4Rec")
    ways = {
        "dot": lambda self, h: h @ self.item_embedding.weight.T,
        "cosine": lambda self, h: nn.functional.normalize(h) @ nn.functional.normalize(self.item_embedding.weight).T,
        "short": lambda self, h: h @ self.item_embedding.weight[:-1].T,
        "nan": lambda self, h: h @ self.item_embedding.weight.T * float("nan"),
    }

    def full_sort_predict(self, interaction):
        return ways[scored](self, self.forward(interaction["item_id_list"], interaction["item_length"]))

    return type(name, (base,), {"full_sort_predict": full_sort_predict})


@pytest.mark.parametrize("built", ["GRU4Rec"], indirect=True)
@pytest.mark.parametrize(("scored", "reason"), [("cosine", "differ"), ("short", "shape"), ("nan", "differ")])
def test_unknown_model_that_scores_otherwise_is_refused(built: Built, scored: str, reason: str):
    built.model.__class__ = unlisted("Mine", scored)
    with pytest.raises(ConfigError, match=f"backbone: Mine cannot.*{reason}"):
        wrap_backbone(built.model, built.config, built.dataset)


@pytest.mark.parametrize("built", ["GRU4Rec"], indirect=True)
def test_unknown_model_that_scores_by_dot_product_works(built: Built):
    built.model.__class__ = unlisted("Mine", "dot")
    wrapped = wrap_backbone(built.model, built.config, built.dataset)
    assert type(wrapped) is Backbone
    assert not wrapped.trims  # it has not said so
    type(built.model).trims = True
    assert wrap_backbone(built.model, built.config, built.dataset).trims


@pytest.mark.parametrize("built", ["Caser"], indirect=True)
def test_unknown_model_with_another_forward_is_refused(built: Built):
    built.model.__class__ = type("Mine", (type(built.model),), {})
    with pytest.raises(ConfigError, match=r"backbone: Mine cannot.*failed"):
        wrap_backbone(built.model, built.config, built.dataset)


@pytest.mark.parametrize("built", ["SASRec"], indirect=True)
def test_wrapping_leaves_modes_and_generators_alone(built: Built):
    built.model.train()
    built.model.dropout.eval()
    modes = [part.training for part in built.model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    wrap_backbone(built.model, built.config, built.dataset)
    assert torch.equal(torch.rand(3), expected)
    assert [part.training for part in built.model.modules()] == modes


@pytest.mark.parametrize("built", ["CORE"], indirect=True)
def test_core_keeps_user_and_item_vectors_alike(built: Built):
    wrapped = wrap_backbone(built.model, built.config, built.dataset)
    batch = batch_of(MIXED)
    with torch.no_grad():
        h = wrapped.encode(batch["item_id_list"], batch["item_length"])
        v = wrapped.item_vectors()
    expected = torch.full((1,), built.model.temperature**-0.5)
    torch.testing.assert_close(h.norm(dim=1), expected.expand(len(h)))
    torch.testing.assert_close(v.norm(dim=1), expected.expand(len(v)))


def test_documented_table_is_the_registries():
    page = Path(__file__).parents[1] / "docs" / "backbones.md"
    assert module.table() in page.read_text(encoding="utf-8")
