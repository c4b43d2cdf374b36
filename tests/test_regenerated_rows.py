"""Nothing of validation and test enters regenerated rows, and they enter nothing but the training split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_log
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.dataset import SequentialDataset
from regeneration_helpers import QUICK, as_rows

from recbole_raserec.data.dataset import POSITION, SequenceDataset
from recbole_raserec.data.loaders import PACKED_TARGETS, PackedLoader
from recbole_raserec.data.patterns import mine_patterns
from recbole_raserec.data.regenerated import ORIGINS, Regenerated, joined
from recbole_raserec.data.sequences import SequenceStore
from recbole_raserec.data.splits import prepare_data
from recbole_raserec.recommendation.stage import train_model
from recbole_raserec.regeneration.inference import combine, first_of_each, generate
from recbole_raserec.regeneration.pairs import Sequences, make_pairs, pieces, training_sequences
from recbole_raserec.regeneration.regenerator import Regenerator
from recbole_raserec.regeneration.stage import regenerate


class Split:
    """As much of a training split as stage i reads: all but the last two items of each history."""

    def __init__(self, histories: list[list[int]], n_items: int):
        users = np.repeat(np.arange(1, len(histories) + 1), [len(row) for row in histories])
        self.store = SequenceStore(users, np.concatenate(histories), len(histories) + 1, n_items)
        positions = np.concatenate([np.arange(len(row)) for row in histories])
        ends = np.repeat([len(row) for row in histories], [len(row) for row in histories])
        self._rows = np.flatnonzero((positions > 0) & (positions < ends - 2))
        self._users, self._positions = users, positions

    def windows(self):
        rows = self._rows
        return self._users[rows], self._positions[rows], self.store.items[rows]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_what_users_do_last_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    histories = [rng.integers(1, 12, rng.integers(2, 14)).tolist() for _ in range(25)]
    other = [[*row[:-2], *rng.integers(1, 12, 2).tolist()] for row in histories]
    torch.manual_seed(seed)
    model = Regenerator(12, size=8, inner_size=8, layers=1, conditions=2, longest=6, pattern_length=4)
    found = []
    for rows in (histories, other):
        whole = training_sequences(Split(rows, 12))
        for user, row in enumerate(rows, start=1):
            mine = np.flatnonzero(whole.users == user)
            kept = whole.items[whole.offsets[mine[0]] : whole.offsets[mine[0] + 1]].tolist() if len(mine) else []
            assert kept == (row[:-2] if len(row) > 3 else [])  # a single item has no target to learn
        read = pieces(whole, 6)
        pairs = make_pairs(read, whole, 4, 2, 4, 5, seed)
        data = combine(whole, read, pairs.patterns, generate(model, read, 0.3, 0.5, seed))
        found.append((pairs.sequence, pairs.pattern, pairs.patterns.items, data.items, data.offsets, data.users))
    for a, b in zip(*found):
        np.testing.assert_array_equal(a, b)


def test_in_the_whole_stage_too(small_config):
    """Two logs that differ in validation and test items alone: the same regenerated rows, the same ids."""
    rng = np.random.default_rng(0)
    rows = [(0, item, time) for time, item in enumerate([*range(25), 0, 1])]  # every item, in a training split
    other = list(rows)
    for user in range(1, 30):
        items = rng.integers(0, 25, rng.integers(4, 12)).tolist()
        changed = [*items[:-2], *rng.integers(0, 25, 2).tolist()]
        rows += [(user, item, time) for time, item in enumerate(items)]
        other += [(user, item, time) for time, item in enumerate(changed)]
    found = []
    for number, log in enumerate((rows, other)):
        config = small_config("SASRec", log=log, **QUICK, regen_pretrained=False, checkpoint_dir=f"saved-{number}")
        found.append(regenerate(config).data)
    assert len(found[0])
    for name in ("items", "offsets", "users", "origin"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_each_sequence_once_with_its_origin(seed):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, 6, rng.integers(1, 5)).tolist() for _ in range(20)]
    original = Sequences(
        np.concatenate(rows), np.concatenate([[0], np.cumsum([len(row) for row in rows])]), np.arange(1, 21)
    )
    patterns = mine_patterns(original.items, original.offsets, 3, 2)
    generated = np.sort(rng.integers(0, 6, (20, 3, 4)), axis=2)[:, :, ::-1].copy()
    data = combine(original, original, patterns, generated)
    found, taken = as_rows(data), {tuple(row) for row in rows}
    wanted = []
    for pattern in patterns.as_dict():
        if pattern not in taken:
            taken.add(pattern)
            wanted.append((pattern, 0, "pattern"))
    for user, ways in enumerate(generated, start=1):
        for way in ways:
            row = tuple(way[way > 0].tolist())
            if len(row) > 1 and row not in taken:
                taken.add(row)
                wanted.append((row, user, "generated"))
    assert list(zip(found, data.users.tolist(), (ORIGINS[number] for number in data.origin))) == wanted


def test_the_same_items_with_another_cut_are_another_sequence():
    assert first_of_each(np.array([1, 2, 1, 2, 1, 2]), np.array([0, 2, 4, 5, 6])).tolist() == [True, False, True, True]


def test_the_same_rows_in_another_numbering():
    old = {"users": ["[PAD]", "a", "b"], "items": ["[PAD]", "x", "y", "z"]}
    new = {"users": ["[PAD]", "b"], "items": ["[PAD]", "z", "x", "w"]}
    data = Regenerated(
        np.array([1, 3, 1, 2, 3, 1]), np.array([0, 2, 4, 6]), np.array([1, 0, 2]), np.array([2, 1, 2], np.uint8),
        np.arange(6, dtype=np.float32), old,
    )  # fmt: skip
    assert data.with_ids_of(dict(old)) is data
    found = data.with_ids_of(new)
    assert as_rows(found) == [(2, 1), (1, 2)]  # the row with y is gone
    assert found.users.tolist() == [0, 1]  # a is no user
    assert found.origin.tolist() == [2, 2]
    assert found.weights.tolist() == [0, 1, 4, 5]
    assert found.vocabulary == new


def test_a_model_with_item_features_gets_its_own_numbers(small_config):
    options = {"regeneration": True, "regen_pretrained": False, "regen_epochs": 1, "regen_hidden_size": 8}
    config = small_config("GRU4RecF", selected_features=["kind"], load_col={
        "inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "kind"],
    }, **options)  # fmt: skip
    folder = Path(config["data_path"])
    rows = "".join(f"i{item}\tk{item % 3}\n" for item in [77, *reversed(range(25))])  # one without interactions
    (folder / "tiny.item").write_text("item_id:token\tkind:token\n" + rows)
    regenerate(config)
    made = regenerate(config)  # found again
    plain = prepare_data(config.without_regeneration())
    assert plain.vocabulary()["items"] != made.data.vocabulary["items"]
    with_it = prepare_data(config, made.data).train._dataset
    first = len(plain.train._dataset)
    tokens = plain.vocabulary()["items"]
    wanted = [
        made.data.vocabulary["items"][item]
        for start, stop in zip(made.data.offsets, made.data.offsets[1:])
        for item in made.data.items[start + 1 : stop]
    ]
    found = [tokens[item] for item in with_it.inter_feat["item_id"][first:].tolist()]
    assert found == wanted
    outcome = train_model(config, regenerated=made)
    assert outcome.seconds >= 0


def test_rows_join_the_training_split(small_config, extra):
    train, valid, _ = SequenceDataset(small_config("SASRec")).build()
    both = joined(train, extra)
    assert both.original is train
    size = len(train)
    assert len(both) == size + 2 + 1 + 8
    before, after = train[np.arange(size)], both[np.arange(size)]
    for field in before.columns:
        assert torch.equal(before[field], after[field]), field
    new = both[np.arange(size, len(both))]
    windows = [row[:length].tolist() for row, length in zip(new["item_id_list"], new["item_length"])]
    tail = [7, 7, 7, 7, 8, 9, 10, 11]
    assert windows == [[3], [3, 4], [1], *(tail[:length] for length in range(1, 9))]
    assert new["item_id"].tolist() == [4, 5, 2, 7, 7, 7, 8, 9, 10, 11, 12]
    assert new["user_id"].tolist() == [0, 0, 2, *[5] * 8]
    assert new[POSITION].tolist() == [1, 2, 1, *range(1, 9)]
    assert not valid.original
    assert both.user_num == train.user_num
    assert (both.inter_matrix("csr") != train.inter_matrix("csr")).nnz == 0


def test_packed_batches_hold_every_row_once(small_config, extra):
    config = small_config("SASRec", training="packed")
    train = joined(SequenceDataset(config).build()[0], extra)
    loader = PackedLoader(config, train, None, shuffle=True)
    found = []
    for batch in loader:
        for items, targets in zip(batch["item_id_list"].tolist(), batch[PACKED_TARGETS].tolist()):
            found += [(tuple(items[: k + 1]), target) for k, target in enumerate(targets) if target]
    store, (rows, positions, targets) = train.store, train.windows()
    wanted = []
    for row, position, target in zip(rows, positions, targets):
        history = store.items[store.offsets[row] :][:position].tolist()
        wanted.append((tuple(history), int(target)))
    short = [pair for pair in wanted if len(pair[0]) <= 8]
    assert sorted(pair for pair in found if pair in set(short)) == sorted(short)
    assert len(found) == len(wanted)


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "BERT4Rec", "DIEN", "FOSSIL", "TransRec"])
def test_validation_test_and_ids_stay_as_they_are(small_config, model):
    options = {
        "regeneration": True,
        "regen_pretrained": False,
        "regen_epochs": 1,
        "regen_hidden_size": 8,
        "regen_heads": 1,
    }
    config = small_config(model, **options)
    made = regenerate(config)
    plain, with_it = prepare_data(config.without_regeneration()), prepare_data(config, made.data)
    assert plain.vocabulary() == with_it.vocabulary()
    assert plain.fingerprint == with_it.fingerprint
    for name in ("valid", "test"):
        a, b = (getattr(splits, name)._dataset for splits in (plain, with_it))
        for field in a.inter_feat.columns:
            if not field.startswith("neg_"):  # DIEN draws them
                assert torch.equal(a.inter_feat[field], b.inter_feat[field])
        assert (plain.seen[name] != with_it.seen[name]).nnz == 0
    added = len(with_it.train._dataset) - len(plain.train._dataset)
    assert added == int((np.diff(made.data.offsets) - 1).sum()) > 0
    outcome = train_model(config, regenerated=made)
    assert 0 <= outcome.metrics["test"]["seen_kept"]["ndcg@10"] <= 1


def test_labels_of_regenerated_rows(small_config, extra):
    log = [(user, item, time) for user, item, time in random_log(0)]
    config = small_config("SASRec", log=log)
    train = SequenceDataset(config).build()[0]
    from recbole.data.interaction import Interaction

    for feat in (train.inter_feat, train._log):
        feat.update(Interaction({train.label_field: torch.zeros(len(feat))}))
    both = joined(train, extra)
    assert both.inter_feat[train.label_field][len(train) :].eq(1).all()
    assert not both.inter_feat[train.label_field][: len(train)].any()


@pytest.mark.parametrize("longest", [4, 50])
def test_sequences_of_recboles_own_windows(small_config, longest):
    """Windows are cut to the longest; put together they are the histories."""
    config = small_config("SASRec", MAX_ITEM_LIST_LENGTH=longest)
    ours = training_sequences(SequenceDataset(config).build()[0])
    theirs = training_sequences(SequentialDataset(config).build()[0])
    for name in ("items", "offsets", "users"):
        np.testing.assert_array_equal(getattr(theirs, name), getattr(ours, name))
    assert ours.lengths().max() > 4
