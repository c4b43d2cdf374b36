"""All-positions training: every target once, true contexts, the same gradient as one window per target."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import random_log, write_log
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import disturb

from recbole_raserec.data.dataset import SequenceDataset
from recbole_raserec.data.loaders import PACKED_TARGETS, SAME_TARGET, BucketLoader, PackedLoader, PackedWindows
from recbole_raserec.data.sequences import SequenceStore
from recbole_raserec.data.splits import prepare
from recbole_raserec.recommendation.duorec import DuoRec
from recbole_raserec.recommendation.sasrec import SASRec


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
def test_every_target_once_with_its_true_context(lengths, max_length, seed, sparse):
    """`lengths`: interactions of each user. Training rows are all but the last two, or any choice of rows."""
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    store = SequenceStore(users, rng.integers(1, 100, len(users)), len(lengths) + 1, 100)
    index = np.arange(len(users)) - store.offsets[users]
    chosen = (index > 0) & (index < store.lengths()[users] - 2)
    if sparse:
        chosen = (index > 0) & (rng.random(len(users)) < 0.3)
    rows = rng.permutation(np.flatnonzero(chosen))  # in any order
    who, where = users[rows], index[rows]
    windows = PackedWindows(store, who, where, max_length)
    assert sorted(windows.row) == list(range(len(rows)))
    assert windows.offsets[0] == 0
    assert windows.offsets[-1] == len(rows)
    assert len(windows.offsets) == len(windows) + 1
    for number in range(len(windows)):
        user, start, length = windows.user[number], windows.start[number], windows.length[number]
        assert 1 <= length <= max_length
        assert start >= 0
        assert start + length < store.lengths()[user]
        part = slice(windows.offsets[number], windows.offsets[number + 1])
        assert (np.diff(windows.column[part]) > 0).all()
        for row, column in zip(windows.row[part], windows.column[part]):
            assert who[row] == user
            assert 0 <= column < length
            assert start + column + 1 == where[row]  # the inputs up to `column` end right before the target
            seen = column + 1
            assert seen == where[row] if start == 0 else seen >= max(max_length // 2, 1)
    if not sparse:
        assert (np.diff(windows.offsets) > 0).all()  # no window for nothing
        for user in set(who):
            inputs = where[who == user].max()
            if inputs <= max_length:
                assert (windows.user == user).sum() == 1


def loaders(small_config, model="SASRec", same_target=False, **changes):
    config = small_config(model, **changes)
    packed, prefix = (
        prepare(config, SequenceDataset, trim=True, same_target=same_target, packed=packed) for packed in (True, False)
    )
    assert isinstance(packed.train, PackedLoader)
    assert type(prefix.train) is BucketLoader
    return config, packed, prefix


def pairs(batch):
    """(context, target) of every target of a packed batch, in row-major order."""
    targets = batch[PACKED_TARGETS]
    return [
        (tuple(batch["item_id_list"][line, : column + 1].tolist()), int(targets[line, column]))
        for line, column in targets.nonzero().tolist()
    ]


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize(("max_length", "batch_size"), [(14, 32), (4, 16), (4, 7), (1, 5)])
def test_an_epoch(small_config, max_length, batch_size, copies):
    """Each target once an epoch, after a suffix of its history, in batches of about `train_batch_size` targets."""
    options = {"MAX_ITEM_LIST_LENGTH": max_length, "train_batch_size": batch_size, "packed_copies": copies}
    _, packed, prefix = loaders(small_config, **options)
    train = prefix.train._dataset
    users, positions, targets = train.windows()
    store = train.store
    epochs = []
    for _ in range(2):
        batches = list(packed.train)
        found = [pair for batch in batches for pair in pairs(batch)]
        epochs.append(found)
        assert Counter(target for _, target in found) == Counter(targets.tolist())
        contexts = Counter((*context[-1:], target) for context, target in found)
        last = store.items[store.offsets[users] + positions - 1]
        assert contexts == Counter(zip(last.tolist(), targets.tolist()))
        sizes = [int((batch[PACKED_TARGETS] > 0).sum()) for batch in batches]
        assert len(batches) == len(packed.train)
        short = sorted(sizes)[0]
        assert sum(abs(size - batch_size) >= max_length for size in sizes) <= (batch_size - short >= max_length)
        for batch in batches:
            assert batch["item_id_list"].shape == batch[PACKED_TARGETS].shape
            assert batch["item_id_list"].shape[1] == int(batch["item_length"].max())
            beyond = torch.arange(batch["item_id_list"].shape[1]) >= batch["item_length"][:, None]
            assert not batch["item_id_list"][beyond].any()
            assert not batch[PACKED_TARGETS][beyond].any()
            assert (batch["item_id_list"][~beyond] > 0).all()
    assert epochs[0] != epochs[1]
    if max_length == 14:  # no history is cut: the contexts are the whole prefixes
        whole = [
            (tuple(store.items[store.offsets[u] : store.offsets[u] + p].tolist()), int(t))
            for u, p, t in zip(users, positions, targets)
        ]
        assert Counter(epochs[0]) == Counter(whole)


@pytest.mark.parametrize(("batch_size", "copies"), [(100_000, 1), (24, 1), (24, 4)])
@pytest.mark.parametrize("size", [8, 32])  # the compiled kernels take the second
def test_gradient_of_an_epoch_equals_one_window_per_target(small_config, batch_size, copies, size):
    config, packed, prefix = loaders(
        small_config, MAX_ITEM_LIST_LENGTH=14, train_batch_size=batch_size, hidden_size=size, inner_size=3 * size // 2,
        softmax_precision="float32",
        hidden_dropout_prob=0.0, attn_dropout_prob=0.0, packed_copies=copies,
    )  # fmt: skip
    torch.manual_seed(0)
    model = disturb(SASRec(config, packed.dataset))
    epoch_gradients(model, packed, prefix)


def epoch_gradients(model, packed, prefix):
    """Both forms: the same loss and gradient of an epoch, as means over its targets."""
    sums, gradients = [], []
    for loader in (packed.train, prefix.train):
        model.zero_grad()
        total = 0.0
        for batch in loader:
            count = len(model.encode_batch(batch)[1])
            loss = model.calculate_loss(batch) * count / len(prefix.train._dataset)
            loss.backward()
            total += loss.item()
        sums.append(total)
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert sums[0] == pytest.approx(sums[1], abs=1e-5)
    for (name, _), a, b in zip(model.named_parameters(), *gradients):
        assert b.any(), name
        assert (a - b).abs().max() < 1e-5, name


def test_copies_spread_a_sequence_over_the_epoch(small_config):
    """With copies a batch holds targets of more users, and the targets of a user lie in more batches."""
    log = random_log(2, users=60, longest=30)
    users_per_batch = {}
    for copies in (1, 8):
        _, packed, _ = loaders(small_config, log=log, train_batch_size=40, packed_copies=copies)
        loader = packed.train
        plans = []
        for batch in loader.batches():
            users_per_batch.setdefault(copies, []).append(len(set(loader._windows.user[loader._plan.window[batch]])))
            plans.append(loader._plan.slots)
        if copies > 1:
            next(iter(loader.batches()))
            assert not np.array_equal(loader._plan.slots, plans[0])  # dealt out again
    assert np.mean(users_per_batch[8][:-1]) > 2 * np.mean(users_per_batch[1][:-1])


def test_partners_stand_in_the_order_of_the_targets(small_config):
    """Each packed target's partner is a window of the same target, another one wherever there is another."""
    log = random_log(5, users=40, items=60, longest=12)
    config, packed, prefix = loaders(small_config, "DuoRec", True, log=log, train_batch_size=64)
    train = prefix.train._dataset
    train.trim = False
    everything = train[np.arange(len(train))]
    windows: dict = {}
    for seq, length, target in zip(everything["item_id_list"], everything["item_length"], everything["item_id"]):
        windows.setdefault(int(target), []).append(tuple(seq[: int(length)].tolist()))
    others = 0
    for batch in packed.train:
        own = pairs(batch)
        partner = batch[SAME_TARGET + "item_id_list"]
        lengths = batch[SAME_TARGET + "item_length"]
        assert len(partner) == len(lengths) == len(own)
        for (context, target), seq, length in zip(own, partner, lengths):
            window = tuple(seq[: int(length)].tolist())
            candidates = windows[target]
            assert window in candidates
            mine = [c for c in candidates if c[-len(context) :] == context or context[-len(c) :] == c]
            if len(mine) == 1 and len(candidates) > 1:
                assert window != mine[0]
                others += 1
    assert others > 50
    model = DuoRec(config, packed.dataset)
    h, targets = model.encode_batch(batch)
    assert targets.tolist() == [target for _, target in own]
    assert len(h) == len(model._same_target(batch)) == len(targets)
    assert torch.isfinite(model.calculate_loss(batch))


def long_log(items):
    """Histories of so many items each."""
    return [(user, (user * 7 + 3 * step) % 50, step) for user in range(20) for step in range(items)]


@pytest.mark.parametrize(
    ("items", "options", "form"),
    [
        (30, {}, "packed"),
        (29, {}, "prefix"),
        (30, {"training": "prefix"}, "prefix"),
        (29, {"training": "packed"}, "packed"),
        (30, {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform"}}, "prefix"),
    ],
)
def test_the_form_of_training_where_none_is_named(small_config, caplog, items, options, form):
    from recbole_raserec.recommendation import train_model

    given_ = {"log": long_log(items), "epochs": 1, "hidden_size": 16, "state": "INFO", **options}
    with caplog.at_level("INFO"):
        made = train_model(config := small_config("SASRec", **given_))
    assert config["training"] == form
    assert isinstance(made.splits.train, PackedLoader) == (form == "packed")
    said = [record.message for record in caplog.records if record.message.startswith("training: packed")]
    expected = ["training: packed, as histories have 30 items on average; auto: from 30 on"]
    assert said == (expected if form == "packed" and not options else [])
    named = small_config("SASRec", **{**given_, "training": form})
    assert train_model(named).directory == made.directory  # what was trained so is found


def test_the_retrieval_stage_knows_the_form(tiny_run, tmp_path):
    write_log(tmp_path, "tiny", long_log(40))
    made = tiny_run()
    assert made.record["options"]["training"] == "packed"
    again = tiny_run(training="packed")
    assert again.trained == []
    assert again.ours.directory == made.ours.directory
