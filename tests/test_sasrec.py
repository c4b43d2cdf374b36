"""Our SASRec against RecBole's with the same weights: scores, losses, gradients."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.sasrec import SASRec as RecBoleSASRec
from tiny_models import LENGTH, N_ITEMS, Ids, batch, build, options

from recbole_raserec.kernels.dropout import FastDropout
from recbole_raserec.recommendation.sasrec import SASRec

TOLERANCE = 1e-5


def pair(**changes):
    """RecBole's model and ours with the same weights."""
    theirs = build(RecBoleSASRec, **changes)
    ours = build(SASRec, **changes)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.zero_()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def close(a, b):
    return float((a - b).detach().abs().max()) <= TOLERANCE


def check(theirs, ours, interaction):
    """Same loss and gradients in training mode, same scores in evaluation mode."""
    losses = [model.train().calculate_loss(interaction) for model in (theirs, ours)]
    assert close(*losses)
    for model, loss in zip((theirs, ours), losses):
        model.zero_grad()
        loss.backward()
    for (name, a), (other, b) in zip(theirs.named_parameters(), ours.named_parameters()):
        assert name == other
        # one item attends to itself alone: no query or key matters
        assert a.grad.any() or int(interaction["item_length"].max()) == 1, name
        assert close(a.grad, b.grad), name
    theirs.eval(), ours.eval()
    with torch.no_grad():
        scores = ours.full_sort_predict(interaction)
        assert scores.shape == (len(interaction), N_ITEMS)
        assert close(theirs.full_sort_predict(interaction), scores)
        assert close(theirs.predict(interaction), ours.predict(interaction))
        users, items, bias = ours.full_sort_vectors(interaction)
        assert bias is None
        assert torch.equal(users @ items.T, scores)


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize(("longest", "width"), [(LENGTH, LENGTH), (3, LENGTH), (3, 3), (1, 1)])
def test_parity_on_padded_and_trimmed_batches(n_layers, longest, width):
    check(*pair(n_layers=n_layers), batch(longest=longest, width=width))


@pytest.mark.parametrize("hidden_act", ["gelu", "relu", "swish", "tanh", "sigmoid"])
def test_parity_for_every_activation(hidden_act):
    check(*pair(hidden_act=hidden_act), batch())


@pytest.mark.parametrize("n_heads", [1, 4, 8])
def test_parity_for_heads(n_heads):
    check(*pair(n_heads=n_heads), batch())


@pytest.mark.parametrize("width", [LENGTH, 4])
def test_parity_of_the_pairwise_loss(width):
    check(*pair(loss_type="BPR"), batch(longest=4, width=width))


def test_trimming_changes_nothing():
    _, model = pair()
    padded = batch(longest=3)
    cut = Interaction({**padded.interaction, "item_id_list": padded["item_id_list"][:, :3]})
    assert close(model.full_sort_predict(padded), model.full_sort_predict(cut))
    assert close(model.calculate_loss(padded), model.calculate_loss(cut))


def test_dropout_acts_in_the_same_places_and_not_in_evaluation():
    theirs, ours = pair(hidden_dropout_prob=0.5, attn_dropout_prob=0.3)
    calls: list[Counter] = []
    for model, kind in ((theirs, torch.nn.Dropout), (ours, FastDropout)):
        count: Counter = Counter()
        for name, module in model.named_modules():
            if isinstance(module, kind):
                module.register_forward_hook(
                    lambda module, _, __, name=name, count=count: count.update({(name, module.p): 1})
                )
        model.train().calculate_loss(batch())
        calls.append(count)
    assert calls[0] == calls[1]
    assert sum(calls[0].values()) == 1 + 3 * 2
    interaction = batch()
    assert not torch.equal(ours.full_sort_predict(interaction), ours.full_sort_predict(interaction))
    theirs.eval(), ours.eval()
    assert close(theirs.full_sort_predict(interaction), ours.full_sort_predict(interaction))


@pytest.mark.parametrize("n_layers", [1, 3])
def test_all_positions_in_one_pass(n_layers):
    _, model = pair(n_layers=n_layers)
    seq = torch.randint(1, N_ITEMS, (5, LENGTH), generator=torch.Generator().manual_seed(3))
    together = model.encode_positions(seq)
    for length in range(1, LENGTH + 1):
        lengths = torch.full((5,), length)
        assert close(together[:, length - 1], model(seq * (torch.arange(LENGTH) < length), lengths))
        assert close(together[:, length - 1], model(seq[:, :length], lengths))


def test_state_dicts_are_interchangeable():
    theirs, ours = pair()
    assert list(theirs.state_dict()) == list(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_same_seed_same_initial_weights():
    weights = []
    for kind in (RecBoleSASRec, SASRec):
        torch.manual_seed(5)
        weights.append(kind(options(), Ids()).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
