"""Histories follow the times as they stand in the file, for every way data come in."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from conftest import write_log
from hypothesis import given
from hypothesis import strategies as st
from recbole.config import Config as RecBoleConfig
from recbole.data import create_dataset
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.quick_start import run_recbole

from recbole_raserec.config import Config
from recbole_raserec.data.dataset import SequenceDataset
from recbole_raserec.data.preparation.log import in_time_order
from recbole_raserec.data.splits import get_dataset_class, prepare_data
from recbole_raserec.quick_start import run_recbole_raserec

NOW = 1_700_000_000


def shuffled(gap: int = 60, start: int = NOW, users: int = 40, length: int = 8) -> list[tuple[int, int, int]]:
    """Item k of user u is (7 u + k) % 50, k-th in time; rows in random order."""
    rows = [(u, (7 * u + k) % 50, start + gap * k) for u in range(users) for k in range(length)]
    return [rows[k] for k in np.random.default_rng(0).permutation(len(rows))]


def histories(built) -> dict[str, list[str]]:
    """Items of each user as they follow each other: history and target of the last part."""
    last = built[-1]
    rows = last[np.arange(len(last))] if hasattr(last, "store") else last.inter_feat
    found = {}
    for user, item, window, length in zip(
        *(rows[f].numpy() for f in ("user_id", "item_id", "item_id_list", "item_length"))
    ):
        items = last.id2token("item_id", [*window[:length], item])
        found[last.id2token("user_id", user)] = [str(each) for each in items]
    return found


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=40), st.sampled_from([1, 60, 200])
)
def test_the_order_is_that_of_a_stable_sort_by_exact_times(rows, gap):
    groups, times = np.array(rows).T
    times = NOW + gap * times
    order, otherwise = in_time_order(groups, times)
    exact, rounded = (np.lexsort((t, groups)) for t in (times, times.astype(np.float32)))
    result = np.arange(len(rows)) if order is None else order
    assert (groups[result] == groups).all()  # each user keeps the places
    assert (result[np.argsort(groups, kind="stable")] == exact).all()
    assert otherwise == len(np.unique(groups[exact][exact != rounded]))


@pytest.mark.parametrize(("gap", "start"), [(60, NOW), (1, NOW), (60 * 10**9, NOW * 10**9), (1, NOW * 10**9)])
@pytest.mark.parametrize("kind", [SequenceDataset, SequentialDataset])
def test_unsorted_files_give_histories_in_order(small_config, kind, gap, start):
    config = small_config("SASRec", log=shuffled(gap, start))
    found = histories(kind(config).build())
    assert found == {f"u{u}": [f"i{(7 * u + k) % 50}" for k in range(8)] for u in range(40)}


def test_general_models_leave_the_last_items_out(small_config):
    config = small_config("BPR", log=shuffled())
    train, valid, test = get_dataset_class(config)(config).build()
    for part, k in ((valid, 6), (test, 7)):
        users, items = (part.id2token(field, part.inter_feat[field].numpy()) for field in ("user_id", "item_id"))
        assert dict(zip(users, items)) == {f"u{u}": f"i{(7 * u + k) % 50}" for u in range(40)}
    assert len(train) == 40 * 6


def test_equal_times_keep_the_order_of_the_file(small_config):
    log = [
        (0, 5, NOW),
        (1, 3, NOW + 60),
        (0, 2, NOW),
        (1, 4, NOW),
        (0, 9, NOW),
        (1, 6, NOW),
        (0, 1, NOW - 1),
        (1, 8, NOW),
    ]
    found = histories(SequenceDataset(small_config("SASRec", log=log)).build())
    assert found == {"u0": ["i1", "i5", "i2", "i9"], "u1": ["i4", "i6", "i8", "i3"]}


@pytest.mark.parametrize("keep", ["first", "last"])
def test_repeats_are_dropped_along_exact_times(small_config, keep):
    log = [(0, i, NOW + t) for i, t in ((1, 50), (2, 40), (1, 10), (3, 30), (4, 20), (2, 60))] + [(1, 5, 1), (1, 6, 2)]
    found = histories(SequenceDataset(small_config("SASRec", log=log, rm_dup_inter=keep)).build())
    assert found["u0"] == (["i1", "i4", "i3", "i2"] if keep == "first" else ["i4", "i3", "i1", "i2"])


@pytest.mark.parametrize("by_user", [False, True])
def test_sorted_files_are_read_as_recbole_reads_them(small_config, by_user):
    log = sorted(shuffled(), key=lambda row: (row[0], row[2]) if by_user else (row[2], row[0]))
    for model, kind in (("SASRec", SequenceDataset), ("BPR", Dataset)):
        config = small_config(model, log=log)
        alone = RecBoleConfig(
            f"recbole:{model}" if model == "SASRec" else model, "tiny",
            config_dict={name: config[name] for name in ("MAX_ITEM_LIST_LENGTH", "load_col", "eval_args")}
            | {"data_path": str(config["data_path"])[: -len("/tiny")], "train_neg_sample_args": None},
        )  # fmt: skip
        assert not hasattr(alone, "training_options")
        theirs, ours = create_dataset(alone), kind(config)
        assert (theirs.field2id_token["item_id"] == ours.field2id_token["item_id"]).all()
        for a, b in zip(theirs.build(), ours.build()):
            for field in a.inter_feat.columns:
                assert torch.equal(a.inter_feat[field], b[np.arange(len(b))][field]), (model, field)


def test_the_log_names_the_users_whom_recbole_orders_otherwise(small_config, caplog):
    caplog.set_level(logging.INFO)
    prepare_data(small_config("SASRec", log=sorted(shuffled(), key=lambda row: -row[2])))
    lines = [record.getMessage() for record in caplog.records if "follow the times" in record.getMessage()]
    assert len(lines) == 1
    assert "40 of 40 users' interactions" in lines[0]
    caplog.clear()
    prepare_data(small_config("SASRec", log=sorted(shuffled(), key=lambda row: row[2])))
    assert "follow the times" not in caplog.text


def test_pairs_of_ml_100k_are_no_longer_inverted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = Config("SASRec", "ml-100k", config_dict={"checkpoint_dir": str(tmp_path)}, argv=[])
    dataset = SequenceDataset(config)
    users, times = (dataset.inter_feat[field].to_numpy() for field in ("user_id", "timestamp"))
    order = np.argsort(users, kind="stable")
    assert (np.diff(times[order])[np.diff(users[order]) == 0] >= 0).all()
    assert "907 of 943 users' interactions follow the times" in caplog.text


def test_recbole_runs_our_models_on_the_same_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["run"])
    write_log(tmp_path, "shop", shuffled())
    given_ = {
        "data_path": str(tmp_path), "epochs": 1, "hidden_size": 8, "inner_size": 8, "backbone": "SASRec",
        "ram_epochs": 1, "ram_inner_size": 8, "top_k": 3, "show_progress": False,
        "checkpoint_dir": str(tmp_path / "own"), "MAX_ITEM_LIST_LENGTH": 8, "state": "WARNING",
    }  # fmt: skip
    theirs = run_recbole("RaSeRec", "shop", config_dict={**given_, "checkpoint_dir": str(tmp_path / "recbole")})
    ours = run_recbole_raserec("RaSeRec", "shop", config_dict=given_, argv=[])["metrics"]["ours"]["test"]["seen_kept"]
    assert theirs["test_result"] == {name: pytest.approx(ours[name], abs=1e-4) for name in theirs["test_result"]}
