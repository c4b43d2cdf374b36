"""DuoRec's contrasts: which views they compare, and the loss against float64 loops."""

from __future__ import annotations

import pytest
import torch
from recbole.model.sequential_recommender.sasrec import SASRec as RecBoleSASRec
from tiny_models import LENGTH, N_ITEMS, batch, build, cross_entropy_loops, nce_loops

from recbole_raserec.data.dataset import WEIGHT
from recbole_raserec.data.loaders import PACKED_TARGETS, SAME_TARGET, SAME_TARGET_ROWS
from recbole_raserec.recommendation.duorec import DuoRec
from recbole_raserec.recommendation.sasrec import SASRec


def views(model, interaction, monkeypatch):
    """The loss, and the views drawn for it: encodings of the batch in their order, encodings of the partners."""
    own, partners = [], []
    encode, ragged = model.encode_batch, model.forward_ragged

    def spy_encode(batch):
        own.append(encode(batch))
        return own[-1]

    def spy_ragged(item_seq, item_seq_len):
        assert torch.equal(item_seq, interaction[SAME_TARGET + "item_id_list"])
        assert torch.equal(item_seq_len, interaction[SAME_TARGET + "item_length"])
        partners.append(ragged(item_seq, item_seq_len))
        return partners[-1]

    monkeypatch.setattr(model, "encode_batch", spy_encode)
    monkeypatch.setattr(model, "forward_ragged", spy_ragged)
    loss = model.calculate_loss(interaction)
    return loss, [h for h, _ in own], partners


@pytest.mark.parametrize("contrast", ["none", "un", "su", "us", "us_x"])
@pytest.mark.parametrize(("sim", "tau"), [("dot", 1.0), ("cos", 0.3)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_loss_against_loops(contrast, sim, tau, dropout, monkeypatch):
    model = build(
        DuoRec, contrast=contrast, sim=sim, tau=tau, lmd=0.7, lmd_sem=0.3, hidden_dropout_prob=dropout,
        attn_dropout_prob=dropout,
    )  # fmt: skip
    interaction = batch()
    torch.manual_seed(1)
    loss, own, partners = views(model, interaction, monkeypatch)
    counts = {"none": (1, 0), "un": (2, 0), "su": (1, 1), "us": (2, 1), "us_x": (2, 1)}
    assert (len(own), len(partners)) == counts[contrast]
    if len(own) == 2:
        assert torch.equal(own[0], own[1]) == (dropout == 0)
    h, other, same = own[0], own[-1], (partners or [None])[0]
    wanted = cross_entropy_loops(h, model.item_vectors(), interaction["item_id"])
    if contrast in ("un", "us"):
        wanted += 0.7 * nce_loops(h, other, tau, sim)
    if contrast in ("su", "us"):
        wanted += 0.3 * nce_loops(h, same, tau, sim)
    if contrast == "us_x":
        wanted += 0.3 * nce_loops(other, same, tau, sim)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("contrast", ["un", "su", "us", "us_x"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_contrast_over_a_share_of_the_rows(contrast, packed, weighted):
    model = build(DuoRec, contrast=contrast, lmd=0.7, lmd_sem=0.3, hidden_dropout_prob=0.0, attn_dropout_prob=0.0)
    interaction = batch()
    if packed:
        later = torch.roll(interaction["item_id_list"], -1, dims=1)
        later[:, -1] = 0
        interaction[PACKED_TARGETS] = later
    h, targets = model.encode_batch(interaction)
    rows = torch.arange(1, len(h), 2)
    assert len(rows) > 1
    for field in ("item_id_list", "item_length"):
        windows = interaction[SAME_TARGET + field]
        interaction[SAME_TARGET + field] = windows[torch.arange(len(rows)) % len(windows)]
    interaction[SAME_TARGET_ROWS] = rows
    weights = torch.linspace(0.5, 2, len(h))
    if weighted:
        placed = weights if not packed else torch.zeros(later.shape).masked_scatter(later > 0, weights)
        interaction[WEIGHT] = placed
    same = model._same_target(interaction)
    wanted = cross_entropy_loops(h, model.item_vectors(), targets, weights if weighted else None)
    some = weights[rows] if weighted else None
    if contrast in ("un", "us"):
        wanted += 0.7 * nce_loops(h, h, weights=weights if weighted else None)
    if contrast in ("su", "us", "us_x"):
        wanted += 0.3 * nce_loops(h[rows], same, weights=some)
    assert model.calculate_loss(interaction).item() == pytest.approx(wanted, rel=1e-5)


def test_every_view_gets_gradient():
    """The contrast pulls on both of its sides: with the recommendation loss taken off, partners move weights too."""
    model = build(DuoRec, contrast="su", lmd_sem=1.0)
    interaction = batch(longest=1, width=1)
    same = SAME_TARGET + "item_id_list"
    interaction["item_id_list"].fill_(2)
    interaction[same].fill_(5)
    interaction[same][0] = 6
    plain = build(DuoRec, contrast="none")
    gradients = []
    for which in (model, plain):
        which.calculate_loss(interaction).backward()
        gradients.append(which.item_embedding.weight.grad)
    moved = (gradients[0] - gradients[1]).abs().max(dim=1).values > 1e-7
    assert moved.nonzero().flatten().tolist() == [2, 5, 6]


@pytest.mark.parametrize("kind", [SASRec, RecBoleSASRec])
def test_without_contrast_it_is_sasrec(kind):
    interaction = batch()
    duorec, sasrec = build(DuoRec, contrast="none"), build(kind)
    losses = [model.calculate_loss(interaction) for model in (duorec, sasrec)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
    assert build(DuoRec).calculate_loss(interaction).item() > losses[0].item() + 1e-3


def test_pairwise_loss_is_sasrecs():
    interaction = batch()
    losses = [build(kind, loss_type="BPR").calculate_loss(interaction).item() for kind in (DuoRec, RecBoleSASRec)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 11])
def test_ragged_rows_are_encoded_as_if_alone(rows):
    model = build(DuoRec).eval()
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.randint(1, LENGTH + 1, (rows,), generator=generator)
    seq = torch.randint(1, N_ITEMS, (rows, LENGTH), generator=generator) * (torch.arange(LENGTH) < lengths[:, None])
    alone = torch.cat([model(seq[row : row + 1], lengths[row : row + 1]) for row in range(rows)])
    assert torch.allclose(model.forward_ragged(seq, lengths), alone, atol=1e-5)


@pytest.mark.parametrize(
    ("contrast", "needed"), [("none", False), ("un", False), ("su", True), ("us", True), ("us_x", True)]
)
def test_who_needs_same_target_windows(contrast, needed):
    assert DuoRec.needs_same_target({"contrast": contrast}) is needed
    interaction = batch()
    for field in ("item_id_list", "item_length"):
        del interaction.interaction[SAME_TARGET + field]
    model = build(DuoRec, contrast=contrast)
    if needed:
        with pytest.raises(KeyError):
            model.calculate_loss(interaction)
    else:
        assert torch.isfinite(model.calculate_loss(interaction))
