"""Our GRU4Rec and NARM against RecBole's with the same weights, their one pass over all prefixes, and runs of them."""

from __future__ import annotations

import pytest
import torch
from conftest import random_log, write_log
from recbole.model.sequential_recommender.gru4rec import GRU4Rec as RecBoleGRU4Rec
from recbole.model.sequential_recommender.narm import NARM as RecBoleNARM
from test_packed import epoch_gradients, loaders
from test_sasrec import check, close
from tiny_models import LENGTH, N_ITEMS, Ids, batch, build, disturb, options

from recbole_raserec.quick_start import run_recbole_raserec
from recbole_raserec.recommendation.recurrent import NARM, GRU4Rec

KINDS = [(RecBoleGRU4Rec, GRU4Rec), (RecBoleNARM, NARM)]
each_kind = pytest.mark.parametrize(("peer", "kind"), KINDS, ids=["GRU4Rec", "NARM"])


def pair(peer, kind, **changes):
    """RecBole's model and ours with the same weights."""
    theirs, ours = build(peer, **changes), build(kind, **changes)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.zero_()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@each_kind
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("loss_type", ["CE", "BPR"])
@pytest.mark.parametrize(("longest", "width"), [(LENGTH, LENGTH), (3, LENGTH), (3, 3)])
def test_parity_on_padded_and_trimmed_batches(peer, kind, layers, loss_type, longest, width):
    models = pair(peer, kind, num_layers=layers, n_layers=layers, loss_type=loss_type)
    check(*models, batch(longest=longest, width=width))


@each_kind
def test_same_seed_same_initial_weights(peer, kind):
    weights = []
    for model in (peer, kind):
        torch.manual_seed(5)
        weights.append(model(options(), Ids()).state_dict())
    assert list(weights[0]) == list(weights[1])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@each_kind
def test_all_positions_in_one_pass(peer, kind):
    model = build(kind).eval()
    seq = torch.randint(1, N_ITEMS, (5, LENGTH), generator=torch.Generator().manual_seed(3))
    together = model.encode_positions(seq)
    for length in range(1, LENGTH + 1):
        assert close(together[:, length - 1], model(seq[:, :length], torch.full((5,), length)))
    predicted = torch.rand(seq.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    assert close(model.encode_predicted(seq, torch.full((5,), LENGTH), predicted), together[predicted])


@each_kind
def test_gradient_of_an_epoch_equals_one_window_per_target(small_config, peer, kind):
    dropout = {"dropout_probs": [0.0, 0.0]} if kind is NARM else {"dropout_prob": 0.0}
    config, packed, prefix = loaders(
        small_config, kind.__name__, MAX_ITEM_LIST_LENGTH=14, train_batch_size=24, embedding_size=8, hidden_size=12,
        softmax_precision="float32", **dropout,
    )  # fmt: skip
    torch.manual_seed(0)
    epoch_gradients(disturb(kind(config, packed.dataset)), packed, prefix)


@each_kind
@pytest.mark.parametrize("options", [{}, {"training": "packed", "regeneration": "personalised"}])
def test_it_trains_and_is_a_backbone(workdir, options, peer, kind):
    write_log(workdir / "data", "tiny", random_log(0))
    given = {
        "data_path": "data", "embedding_size": 8, "hidden_size": 8, "MAX_ITEM_LIST_LENGTH": 6, "epochs": 2,
        "threads": 1, "show_progress": False, "state": "WARNING", "checkpoint_dir": "saved", "train_batch_size": 64,
        "ram_epochs": 1, "top_k": 3, "backbone": kind.__name__, "regen_pretrained": False, "regen_hidden_size": 8,
        "regen_epochs": 1, "regen_inner_size": 8, "regen_personal_epochs": 1, **options,
    }  # fmt: skip
    record = run_recbole_raserec("RaSeRec", "tiny", config_dict=given, argv=[])
    assert set(record["metrics"]["ours"]["test"]) == {"seen_kept", "seen_removed"}
