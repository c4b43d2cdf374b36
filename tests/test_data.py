"""The lazy data set against RecBole's; the loaders' promises about an epoch."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.dataloader import TrainDataLoader
from recbole.data.dataset import SequentialDataset
from recbole.model.sequential_recommender.bert4rec import BERT4Rec

from recbole_raserec.config.config import Config
from recbole_raserec.data.dataset import POSITION, SequenceDataset
from recbole_raserec.data.loaders import PACKED_TARGETS, SAME_TARGET, SAME_TARGET_ROWS, BucketLoader, SameTarget
from recbole_raserec.data.sequences import SequenceStore
from recbole_raserec.data.splits import prepare


@pytest.mark.parametrize("split", [{"LS": "valid_and_test"}, {"RS": [0.8, 0.1, 0.1]}])
def test_same_windows_in_the_same_order_as_recbole(small_config, split):
    config = small_config("SASRec", eval_args={"split": split, "order": "TO", "group_by": "user", "mode": "full"})
    theirs = SequentialDataset(config).build()
    ours = SequenceDataset(config).build()
    for a, b in zip(theirs, ours):
        assert len(a) == len(b) > 0
        everything = b[np.arange(len(b))]
        for field in a.inter_feat.columns:
            assert torch.equal(a.inter_feat[field], everything[field]), field
        assert torch.equal(a.inter_feat["item_id_list"], b.inter_feat["item_id_list"])  # as a whole, on demand


def test_trimmed_windows_lose_padding_only(small_config):
    config = small_config("SASRec")
    train = SequenceDataset(config).build()[0]
    rows = np.array([5, 0, 7, 3])
    full = train[rows]
    train.trim = True
    cut = train[rows]
    width = cut["item_id_list"].shape[1]
    assert width == int(full["item_length"].max()) < full["item_id_list"].shape[1]
    assert torch.equal(full["item_id_list"][:, :width], cut["item_id_list"])
    assert not full["item_id_list"][:, width:].any()


def test_positions_count_the_whole_history(small_config):
    config = small_config("SASRec", MAX_ITEM_LIST_LENGTH=4)
    train = SequenceDataset(config).build()[0]
    users, positions, targets = train.windows()
    store = train.store
    assert (store.items[store.offsets[users] + positions] == targets).all()
    assert positions.max() > 4
    batch = train[np.arange(len(train))]
    assert torch.equal(batch["item_length"], batch[POSITION].clamp(max=4))


def test_inter_matrix_equals_recbole(small_config):
    config = small_config("SASRec")
    theirs, ours = SequentialDataset(config).build()[0], SequenceDataset(config).build()[0]
    assert (theirs.inter_matrix("csr") != ours.inter_matrix("csr")).nnz == 0


def test_seen_is_the_history_before_each_target(small_config):
    config = small_config("SASRec")
    splits = prepare(config, SequenceDataset, trim=True)
    store = splits.dataset.store
    for phase, data, cut in (("valid", splits.valid, 2), ("test", splits.test, 1)):
        users, positions, _ = data._dataset.windows()
        for user, position in zip(users, positions):
            history = store.items[store.offsets[user] : store.offsets[user + 1]]
            assert position == len(history) - cut
            assert set(splits.seen[phase][user].indices) == set(history[:position])


def test_general_models_have_the_same_seen_items(small_config):
    from recbole.data.dataset import Dataset

    log = [(u, (u * 3 + 2 * k) % 25, k) for u in range(20) for k in range(4 + u % 5)]  # no repeats
    sequential = prepare(small_config("SASRec", log=log), SequenceDataset, trim=True)
    general = prepare(small_config("BPR", log=log), Dataset, trim=False)
    for phase in ("valid", "test"):
        assert (sequential.seen[phase] != general.seen[phase]).nnz == 0


def test_an_epoch_is_a_permutation_in_batches_of_like_length(small_config):
    config = small_config("SASRec", train_batch_size=16)
    splits = prepare(config, SequenceDataset, trim=True)
    loader = splits.train
    assert isinstance(loader, BucketLoader)
    epochs = [list(loader.batches()) for _ in range(2)]
    for batches in epochs:
        assert len(batches) == len(loader)
        assert sorted(np.concatenate(batches)) == list(range(len(loader._dataset)))
    assert not np.array_equal(np.concatenate(epochs[0]), np.concatenate(epochs[1]))
    lengths = loader._lengths
    spread = np.mean([lengths[b].max() - lengths[b].min() for b in epochs[0]])
    mixed = [np.random.default_rng(k).permutation(len(lengths))[:16] for k in range(20)]
    assert spread < np.mean([lengths[b].max() - lengths[b].min() for b in mixed]) / 2
    batch = next(iter(loader))
    assert batch["item_id_list"].shape[1] == int(batch["item_length"].max())


def test_same_target_partners(small_config):
    config = small_config("DuoRec")
    splits = prepare(config, SequenceDataset, trim=True, same_target=True)
    batch = next(iter(splits.train))
    assert batch[SAME_TARGET + "item_id_list"].shape[0] == len(batch)
    assert int(batch[SAME_TARGET + "item_length"].min()) >= 1
    assert SAME_TARGET_ROWS not in batch.columns


@pytest.mark.parametrize("training", ["prefix", "packed"])
@pytest.mark.parametrize("share", [0.25, 0.001])
def test_a_share_of_the_rows_has_partners(small_config, training, share):
    config = small_config("DuoRec", contrast_share=share, training=training)
    splits = prepare(config, SequenceDataset, trim=True, same_target=True, packed=training == "packed")
    train = splits.train._dataset
    users, positions, targets = train.windows()
    reached, drawn = {int(t): set() for t in set(targets)}, []
    for user, position, target in zip(users, positions, targets):
        history = train.store.items[train.store.offsets[user] :][:position]
        reached[int(target)].add(tuple(history[-train.max_item_list_len :].tolist()))
    for batch in splits.train:
        packed = batch[PACKED_TARGETS] if training == "packed" else None
        own = batch["item_id"] if packed is None else packed[packed > 0]
        rows = batch[SAME_TARGET_ROWS]
        assert len(rows) == max(round(share * len(own)), 1)
        assert (rows.diff() > 0).all()
        assert rows[-1] < len(own)
        drawn.append(rows.tolist())
        for target, window, length in zip(
            own[rows], batch[SAME_TARGET + "item_id_list"], batch[SAME_TARGET + "item_length"], strict=True
        ):
            assert tuple(window[: int(length)].tolist()) in reached[int(target)]
    assert len({tuple(rows) for rows in drawn}) > 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 2**31))
def test_a_partner_shares_the_target_and_is_another_row(targets, seed):
    targets = np.array(targets)
    rows = np.arange(len(targets))
    partner = SameTarget(targets).sample(rows, torch.Generator().manual_seed(seed))
    assert (targets[partner] == targets).all()
    alone = np.bincount(targets, minlength=6)[targets] == 1
    assert ((partner == rows) == alone).all()


def test_every_partner_can_be_drawn():
    generator = torch.Generator().manual_seed(0)
    sampler = SameTarget(np.array([1, 2, 1, 1, 1]))
    drawn = {int(sampler.sample(np.array([2]), generator)[0]) for _ in range(200)}
    assert drawn == {0, 3, 4}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), max_size=7), min_size=1, max_size=6), st.integers(1, 5))
def test_store_windows_against_slices(histories, longest):
    users = np.repeat(np.arange(1, len(histories) + 1), [len(h) for h in histories])
    items = np.concatenate([np.array(h, dtype=np.int64) for h in histories])
    store = SequenceStore(users, items, len(histories) + 1, 10)
    queries = [(u + 1, p) for u, h in enumerate(histories) for p in range(1, len(h))]
    if not queries:
        return
    who, where = np.array(queries).T
    item_seq, lengths = store.windows(who, where, longest)
    for row, (u, p) in enumerate(queries):
        expected = histories[u - 1][max(0, p - longest) : p]
        assert list(item_seq[row, : lengths[row]]) == expected
        assert not item_seq[row, lengths[row] :].any()


def test_store_refuses_unsorted_users():
    with pytest.raises(ValueError, match="sorted"):
        SequenceStore(np.array([2, 1]), np.array([1, 1]), 3, 2)


def test_amazon_beauty_splits_as_published(real_data, workdir):
    config = Config("SASRec", "amazon-beauty", config_dict={"data_path": str(real_data), "state": "ERROR"}, argv=[])
    splits = prepare(config, SequenceDataset, trim=True)
    assert (splits.dataset.user_num - 1, splits.dataset.item_num - 1) == (22_363, 12_101)
    sizes = [len(data._dataset) for data in (splits.train, splits.valid, splits.test)]
    assert sizes == [131_413, 22_363, 22_363]
    assert splits.seen["test"].nnz - splits.seen["valid"].nnz == 22_363  # 5-core data without repeats


def test_masking_models_get_batches_of_like_weight(small_config):
    """BERT4Rec's loss is a mean over a batch's masked items; of windows of one item none counts."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([np.full(400, 3), rng.integers(3, 60, 60)])
    log = [(user, int(rng.integers(0, 25)), time) for user, length in enumerate(lengths) for time in range(length)]
    config = small_config("BERT4Rec", log=log, MAX_ITEM_LIST_LENGTH=50, train_batch_size=64)
    train = SequenceDataset(config).build()[0]
    loader = BucketLoader(config, train, None, shuffle=True)
    batches = list(loader.batches())
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(train)))
    window = train.inter_feat["item_length"].numpy()
    weights = np.array([(window[rows] - 1).sum() for rows in batches])
    assert weights.min() > 0.5 * weights.mean()
    assert weights.max() < 1.6 * weights.mean()
    assert abs(len(batches) - len(loader)) <= 0.1 * len(loader) + 1
    spans = [np.ptp(window[rows]) for rows in batches]
    assert np.median(spans) < 10  # of like length all the same
    for rows in batches:
        loss_rows = loader.collate_fn(rows)
        assert (loss_rows["MASK_INDEX"] > 0).any()


@pytest.mark.parametrize("loss_type", ["CE", "BPR"])
def test_what_a_mask_cannot_count_is_left_out(small_config, loss_type):
    """RecBole's BERT4Rec has the same loss and gradient of what is left."""
    sizes = {"hidden_dropout_prob": 0, "attn_dropout_prob": 0, "MAX_ITEM_LIST_LENGTH": 40}
    config = small_config("BERT4Rec", mask_ratio=0.3, **sizes)
    dataset = SequenceDataset(config)
    train = dataset.build()[0]
    loader = BucketLoader(config, train, None, shuffle=True)
    rows = np.arange(0, len(train), 3)
    random.seed(0)  # above `ft_ratio`: any item may be masked, not the last alone
    whole = TrainDataLoader.collate_fn(loader, rows)
    random.seed(0)
    part = loader.collate_fn(rows)
    counted = whole["MASK_INDEX"] > 0
    assert len(part) == int(counted.any(dim=1).sum()) < len(whole)
    assert 1 < part["MASK_INDEX"].shape[1] == int(counted.sum(dim=1).max()) < whole["MASK_INDEX"].shape[1]
    model = BERT4Rec(config, dataset)
    model.loss_type = loss_type  # its loader needs no sampler here: the transform draws the negatives
    losses = [model.calculate_loss(batch) for batch in (whole, part)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in losses]
    for one, other in zip(*gradients):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.allclose(one, other, atol=1e-6)


def test_a_batch_without_a_mask_stays_as_it_is(small_config):
    """RecBole counts no masked first item, so that windows of one item have none."""
    train = SequenceDataset(config := small_config("BERT4Rec")).build()[0]
    loader = BucketLoader(config, train, None)
    rows = np.flatnonzero(train.inter_feat["item_length"].numpy() == 1)
    batch = loader.collate_fn(rows)
    assert not batch["MASK_INDEX"].any()
    assert len(batch) == len(rows) > 1
