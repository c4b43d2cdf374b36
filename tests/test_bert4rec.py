"""Our BERT4Rec against RecBole's with the same weights, and the loss in low precision."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.model.sequential_recommender.bert4rec import BERT4Rec as RecBoleBERT4Rec
from tiny_models import disturb

from recbole_raserec.config import get_model
from recbole_raserec.data.dataset import SequenceDataset
from recbole_raserec.data.loaders import BucketLoader
from recbole_raserec.kernels import native
from recbole_raserec.recommendation.bert4rec import BERT4Rec


@pytest.fixture
def built(small_config):
    """RecBole's model and ours with the same weights, and a loader of masked batches."""

    def build(**changes):
        given = {"hidden_dropout_prob": 0, "attn_dropout_prob": 0, "mask_ratio": 0.3, "softmax_precision": "float32"}
        config = small_config("BERT4Rec", MAX_ITEM_LIST_LENGTH=20, **{**given, **changes})
        train = SequenceDataset(config).build()[0]
        loader = BucketLoader(config, train, None, shuffle=True)  # the models read names that the masking sets
        models = []
        for kind in (RecBoleBERT4Rec, BERT4Rec):
            torch.manual_seed(3)
            models.append(disturb(kind(config, train), scale=0.1))
        return models, loader

    return build


def gradients(model, batch):
    model.zero_grad()
    loss = model.train().calculate_loss(batch)
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters()}


def test_the_name_gives_this_class():
    assert get_model("BERT4Rec") is BERT4Rec


def test_same_seed_same_initial_weights(built):
    (theirs, ours), _ = built()
    weights = theirs.state_dict(), ours.state_dict()
    assert list(weights[0]) == list(weights[1])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("loss_type", ["CE", "BPR"])
@pytest.mark.parametrize("changes", [{}, {"n_layers": 1, "n_heads": 1}, {"hidden_act": "relu"}, {"ft_ratio": 1.0}])
def test_same_loss_and_gradients(built, changes, loss_type):
    (theirs, ours), loader = built(**changes)
    for model in (theirs, ours):
        model.loss_type = loss_type  # its loader needs no sampler here: the masking draws the negatives
    random.seed(0)
    for rows in (np.arange(0, 40, 3), np.arange(40, 120)):
        whole = TrainDataLoader.collate_fn(loader, rows)  # padded to the longest of all, as RecBole does
        assert (whole["MASK_INDEX"] > 0).sum() > len(rows) / 4
        (loss, expected), (other, found) = gradients(theirs, whole), gradients(ours, whole)
        assert other == pytest.approx(loss, rel=1e-5)
        for name, gradient in expected.items():
            assert (gradient is None) == (found[name] is None), name
            if gradient is not None:
                assert torch.allclose(gradient, found[name], atol=1e-5), name


def test_same_scores(built):
    (theirs, ours), loader = built()
    batch = TrainDataLoader.collate_fn(loader, np.arange(64))
    assert batch["item_length"].min() == 1
    theirs.eval(), ours.eval()
    with torch.no_grad():
        scores = ours.full_sort_predict(batch)
        assert torch.allclose(theirs.full_sort_predict(batch), scores, atol=1e-5)
        assert torch.allclose(theirs.predict(batch), ours.predict(batch), atol=1e-5)
        h, items, bias = ours.full_sort_vectors(batch)
        assert torch.equal(h @ items.t() + bias, scores)
        assert torch.allclose(theirs(batch["item_id_list"]), ours(batch["item_id_list"]), atol=1e-5)


@pytest.mark.parametrize("loss_type", ["CE", "BPR"])
def test_a_batch_without_a_mask_that_counts_has_no_loss(built, loss_type):
    (theirs, ours), loader = built()
    theirs.loss_type = ours.loss_type = loss_type
    lengths = loader.dataset.inter_feat["item_length"].numpy()
    batch = loader.collate_fn(np.flatnonzero(lengths == 1))
    assert len(batch) > 1
    assert not batch["MASK_INDEX"].any()
    assert np.isnan(theirs.calculate_loss(batch).item())
    loss, found = gradients(ours, batch)
    assert loss == 0.0
    assert not any(gradient is not None and gradient.any() for gradient in found.values())


@pytest.mark.skipif(not native.has_cross_entropy(), reason="no compiled kernel with products in bfloat16 here")
def test_the_bias_keeps_its_digits_in_low_precision(built):
    """With item and user vectors that bfloat16 holds, the scores are the biases: 1 in 2**16 and not 1 in 2**8."""
    (_, ours), loader = built(softmax_precision="bfloat16")
    with torch.no_grad():
        ours.item_embedding.weight.zero_()
        ours.output_bias.uniform_(3, 9, generator=torch.Generator().manual_seed(0))
        ours.output_bias[1] = 30.0  # the likely item
    random.seed(0)
    batch = loader.collate_fn(np.arange(100))
    targets = batch[ours.POS_ITEMS][batch["MASK_INDEX"] > 0]
    expected = -torch.log_softmax(ours.output_bias.detach().double(), dim=0)[targets].mean().item()
    assert ours.calculate_loss(batch).item() == pytest.approx(expected, rel=1e-6)


def test_rows_have_no_weights():
    """Personalised regeneration asks for `weighted_loss`, which masked training does not have; FEARec's loss has it."""
    assert hasattr(get_model("FEARec"), "weighted_loss")
    assert not hasattr(BERT4Rec, "weighted_loss")
