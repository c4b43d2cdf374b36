"""Reading and splitting a log: what RecBole does in Python loops, and its very result."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.utils import FeatureSource

from recbole_raserec.config.config import Config
from recbole_raserec.data import dataset as loading
from recbole_raserec.data.dataset import LEFT_OUT, SequenceDataset, leave_out
from recbole_raserec.errors import DatasetError

TOKENS = ["7", "07", "a b", "NA", "", "nan", "ü", "-1", "1e3", "x" * 40]


def write_odd_log(directory, rows: int = 400, header: str = "user_id:token\titem_id:token\ttimestamp:float\tr:float"):
    rng = np.random.default_rng(0)
    lines = [header]
    for row in range(rows):
        user, item = rng.choice(TOKENS[:8]), rng.choice(TOKENS)
        time = repr(rng.random() * 10.0 ** int(rng.integers(-8, 12)))
        lines.append(f"{user}\t{item}\t{time}\t{'' if row % 50 == 0 else rng.integers(1, 6)}")
        if row % 97 == 0:
            lines.append("")
    path = directory / "odd" / "odd.inter"
    path.parent.mkdir()
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def odd_config(workdir, **options):
    base = {
        "data_path": str(workdir), "state": "ERROR", "load_col": {"inter": ["user_id", "item_id", "timestamp", "r"]},
        "user_inter_num_interval": "[3,inf)", "item_inter_num_interval": "[3,inf)",
    }  # fmt: skip
    return Config("SASRec", "odd", config_dict={**base, **options}, argv=[])


@pytest.mark.parametrize("chunk", [37, 1 << 19])
@pytest.mark.parametrize("columns", [["user_id", "item_id", "timestamp", "r"], ["item_id", "timestamp", "user_id"]])
def test_a_table_is_read_as_recbole_reads_it(workdir, monkeypatch, columns, chunk):
    monkeypatch.setattr(loading, "CHUNK", chunk)
    path = write_odd_log(workdir)
    config = odd_config(workdir, load_col={"inter": columns})
    ours, theirs = SequenceDataset(config), SequentialDataset(config)
    assert set(ours.field2id_token["item_id"]) == set(theirs.field2id_token["item_id"])
    pd.testing.assert_frame_equal(ours.inter_feat, theirs.inter_feat, check_exact=True)
    for name in ("field2type", "field2source", "field2seqlen", "field2bucketnum", "field2token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    raw = ours._load_feat(str(path), FeatureSource.INTERACTION)
    pd.testing.assert_frame_equal(raw, Dataset._load_feat(ours, str(path), FeatureSource.INTERACTION))
    assert raw["user_id"].isna().any()  # "NA", "nan" and nothing
    strings = raw["item_id"].dropna()
    assert len({id(value) for value in strings}) == strings.nunique()


def test_lists_in_a_table_go_recboles_way(workdir):
    path = write_odd_log(workdir, header="user_id:token\titem_id:token\ttimestamp:float\tr:token_seq")
    config = odd_config(workdir)
    ours, theirs = SequenceDataset(config), SequentialDataset(config)
    assert ours.field2type["r"].value == "token_seq"
    assert list(map(list, ours.inter_feat["r"])) == list(map(list, theirs.inter_feat["r"]))
    path.write_text(path.read_text(encoding="utf-8").replace("r:token_seq", "r:tokens"), encoding="utf-8")
    with pytest.raises(DatasetError, match="tokens"):
        SequenceDataset(config)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=40), st.sampled_from(sorted(LEFT_OUT)))
def test_leave_one_out_is_recboles(groups, mode):
    groups = np.array(groups, dtype=np.int64)
    dataset = object.__new__(Dataset)
    wanted = dataset._split_index_by_leave_one_out(dataset._grouped_index(groups), sum(LEFT_OUT[mode]))
    if mode == "valid_only":
        wanted = [*wanted, []]
    elif mode == "test_only":
        wanted = [wanted[0], [], wanted[1]]
    for numbers in (groups, groups * 10**9 - 5):  # counted, and sorted
        assert [part.tolist() for part in leave_out(numbers, mode)] == wanted


SPLITS = [*({"LS": mode} for mode in LEFT_OUT), {"RS": [6, 2, 2]}]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("order", ["TO", "RO"])
def test_the_split_is_recboles(small_config, split, order):
    config = small_config("SASRec")
    config["eval_args"] = {"split": split, "order": order, "group_by": "user", "mode": "full"}
    parts = []
    for kind in (SequenceDataset, SequentialDataset):
        torch.manual_seed(3)
        if order == "RO":  # RecBole refuses it for sequential data sets in build(); the split itself must not care
            dataset = kind(config)
            dataset._change_feat_format()
            dataset.shuffle()
            (mode, value), *_ = split.items()
            one_by_one = mode == "LS"
            parts.append(
                dataset.leave_one_out("user_id", value) if one_by_one else dataset.split_by_ratio(value, "user_id")
            )
        else:
            parts.append(kind(config).build())
    for ours, theirs in zip(*parts):
        assert len(ours) == len(theirs)
        for field in ("user_id", "item_id", "timestamp", "item_length"):
            assert torch.equal(ours.inter_feat[field], theirs.inter_feat[field])


@pytest.mark.parametrize("mode", ["all", None])
def test_an_unknown_split_is_refused_as_recbole_does(small_config, mode):
    dataset = SequenceDataset(small_config("SASRec"))
    dataset._change_feat_format()
    with pytest.raises(NotImplementedError):
        dataset.leave_one_out("user_id", mode)
    with pytest.raises(ValueError, match="group"):
        dataset.leave_one_out(None, "valid_only")


BOUNDS = st.sampled_from([None, "[2,inf)", "[3,5]", "(1,4)", "[0,3]", "[1,2];[4,9]", "[100,inf)"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=40), BOUNDS, BOUNDS)
def test_the_filter_is_recboles(rows, users, items):
    """Round by round, upper bounds included, where the order of removal decides what is left."""
    left = []
    for kind in (SequenceDataset, Dataset):
        dataset = object.__new__(kind)
        dataset.logger = logging.getLogger("quiet")
        dataset.config = {"user_inter_num_interval": users, "item_inter_num_interval": items}
        dataset.uid_field, dataset.iid_field, dataset.user_feat, dataset.item_feat = "u", "i", None, None
        table = pd.DataFrame({"u": [f"u{u}" for u, _ in rows], "i": [f"i{i}" for _, i in rows], "n": range(len(rows))})
        dataset.inter_feat = table
        dataset._filter_by_inter_num()
        left.append(dataset.inter_feat.reset_index(drop=True))
    pd.testing.assert_frame_equal(*left)


def test_nothing_left_is_an_error(workdir):
    write_odd_log(workdir)
    for kind in (SequenceDataset, SequentialDataset):
        with pytest.raises(DatasetError, match="none of its 400 interactions are left"):
            kind(odd_config(workdir, user_inter_num_interval="[1000,inf)"))
