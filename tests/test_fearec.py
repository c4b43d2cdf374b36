"""Our FEARec against RecBole's with the same weights: scores, losses, gradients."""

from __future__ import annotations

import contextlib
import io
import random

import numpy as np
import pytest
import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.fearec import FEARec as RecBoleFEARec
from tiny_models import disturb

from recbole_raserec.config import get_model
from recbole_raserec.data.dataset import SequenceDataset
from recbole_raserec.recommendation.fearec import FEARec

VARIANTS = [
    {},
    {"n_layers": 3, "n_heads": 1, "global_ratio": 0.6},
    {"global_ratio": 0.3, "hidden_act": "relu"},
    {"topk_factor": 3},
    {"MAX_ITEM_LIST_LENGTH": 9},
    {"dual_domain": True, "std": True, "spatial_ratio": 0.3, "global_ratio": 0.6},
    {"contrast": "us"},
    {"contrast": "un", "sim": "cos", "tau": 0.5},
    {"contrast": "su"},
    {"contrast": "us_x"},
    {"loss_type": "BPR", "train_neg_sample_args": None},
]


@pytest.fixture
def built(small_config):
    """RecBole's model and ours with the same weights, and batches as RecBole makes them."""

    def build(**changes):
        given = {"hidden_dropout_prob": 0, "attn_dropout_prob": 0, "softmax_precision": "float32", "n_heads": 2}
        config = small_config("FEARec", **{"MAX_ITEM_LIST_LENGTH": 12, **given, **changes})
        train = SequenceDataset(config).build()[0]
        models = []
        for kind in (RecBoleFEARec, FEARec):
            torch.manual_seed(3)
            with contextlib.redirect_stdout(io.StringIO()):  # RecBole prints its frequencies
                models.append(disturb(kind(config, train), scale=0.1))
        loader = TrainDataLoader(config, train, None, shuffle=False)
        return models, [loader.collate_fn(rows) for rows in (np.arange(0, 96, 4), np.arange(3, 9))]

    return build


@pytest.mark.parametrize("changes", VARIANTS)
def test_same_loss_and_gradients(built, changes):
    (theirs, ours), batches = built(**changes)
    for batch in batches:
        batch.update(Interaction({"neg_item_id": batch["item_id"].flip(0)}))
        found = []
        for model in (theirs, ours):
            random.seed(1)
            model.zero_grad()
            loss = model.train().calculate_loss(batch)
            loss.backward()
            found.append((loss.item(), {name: weight.grad for name, weight in model.named_parameters()}))
        (loss, expected), (other, gradients) = found
        assert other == pytest.approx(loss, rel=1e-5)
        for name, gradient in expected.items():
            if gradient is None or not gradient.any():
                assert gradients[name] is None or not gradients[name].any(), name
            else:
                assert torch.allclose(gradient, gradients[name], atol=1e-5), name


@pytest.mark.parametrize("changes", VARIANTS[:7])
def test_same_scores(built, changes):
    (theirs, ours), batches = built(**changes)
    theirs.eval(), ours.eval()
    for batch in batches:
        with torch.no_grad():
            scores = ours.full_sort_predict(batch)
            assert torch.allclose(theirs.full_sort_predict(batch), scores, atol=1e-5)
            assert torch.allclose(theirs.predict(batch), ours.predict(batch), atol=1e-5)
            h, items, bias = ours.full_sort_vectors(batch)
            assert bias is None
            assert torch.allclose(h @ items.t(), scores, atol=1e-6)


def test_same_seed_same_initial_weights_and_same_target_rows(built):
    (theirs, ours), _ = built()
    weights = theirs.state_dict(), ours.state_dict()
    assert list(weights[0]) == list(weights[1])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert theirs.same_item_index.keys() == ours.same_item_index.keys()
    for item, rows in theirs.same_item_index.items():
        assert np.array_equal(rows, ours.same_item_index[item])


def test_float64_weights_are_used_as_they_are(built):
    (_, ours), (batch, _) = built()
    ours.double().eval()
    with torch.no_grad():
        assert ours(batch["item_id_list"], batch["item_length"]).dtype == torch.float64


def test_the_name_gives_this_class():
    assert get_model("FEARec") is FEARec
