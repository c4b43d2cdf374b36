"""Raw files into atomic files: filters, options, the files read and written, and their order in RecBole."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from convert_helpers import rows
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_raserec.data.preparation import atomic
from recbole_raserec.data.preparation.convert import Options, k_core, prepare
from recbole_raserec.errors import ConfigError, DatasetError

# ---------------------------------------------------------------- filters


def slow_k_core(pairs, k):
    while True:
        kept = [(u, i) for u, i in pairs if sum(u == v for v, _ in pairs) >= k and sum(i == j for _, j in pairs) >= k]
        if kept == pairs:
            return kept
        pairs = kept


@settings(max_examples=100, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=40),
    k=st.integers(0, 4),
)
def test_k_core_against_the_definition(pairs, k):
    users, items = np.array([u for u, _ in pairs], dtype=int), np.array([i for _, i in pairs], dtype=int)
    mask = k_core(users, items, k)
    assert list(zip(users[mask], items[mask])) == slow_k_core(pairs, k)


def test_duplicates_are_dropped_before_the_k_core(convert):
    text = "a,x,1,3\na,x,2,1\na,y,1,2\nb,x,1,1\nb,y,1,2\nc,z,1,1\nc,z,1,2\n"
    summary, table = convert(text, k_core=2, drop_duplicates=True)
    assert rows(table) == [("a", "x", 2, 1), ("a", "y", 1, 2), ("b", "x", 1, 1), ("b", "y", 1, 2)]
    assert (summary.duplicates_dropped, summary.k_core_dropped, summary.read) == (2, 1, 7)
    summary, table = convert(text, overwrite=True)
    assert (summary.repeated, summary.duplicates_dropped, len(table)) == (2, 0, 7)
    with pytest.raises(DatasetError, match="--k_core=9 leaves none of the 7"):
        convert(text, k_core=9, overwrite=True)


# ---------------------------------------------------------------- options and files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "excel"}, "--format=excel: choose one of auto, sequences, ratings, json, parquet, amazon"),
        ({"name": "../x"}, "--name=../x"),
        ({"name": "ml-100k"}, "choose another"),
        ({"k_core": -1}, "--k_core=-1"),
        ({"max_bad": 3.0}, "--max_bad=3.0"),
        ({"max_bad": float("nan")}, "--max_bad=nan"),
        ({"encoding": "utf-ate"}, "--encoding=utf-ate"),
        ({"format": "amazon", "sep": ","}, "--sep"),
        ({"format": "sequences", "header": True}, "--header"),
        ({"format": "sequences", "time_col": "3"}, "--time_col=3"),
        ({"time_col": ""}, "--time_col= is empty"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    given = {"input": str(tmp_path / "absent"), "format": "ratings", "output": str(tmp_path), "name": "d", **options}
    with pytest.raises(ConfigError) as error:
        prepare(Options(**given))
    assert message in str(error.value)


def test_all_wrong_options_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        prepare(Options(str(tmp_path), "xml", str(tmp_path), "a/b", k_core=-2))
    assert len(error.value.problems) == 3


def test_input_missing_or_a_directory(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        prepare(Options(str(tmp_path / "no"), "ratings", str(tmp_path), "d"))
    with pytest.raises(DatasetError, match="is a directory"):
        prepare(Options(str(tmp_path), "ratings", str(tmp_path), "d"))


def test_an_existing_file_survives_unless_overwrite(convert):
    path = convert("u,i,5,1\n")[0].path
    before = path.read_bytes()
    with pytest.raises(DatasetError, match="--overwrite"):
        convert("u,j,5,1\n")
    assert path.read_bytes() == before
    convert("u,j,5,1\n", overwrite=True)
    assert path.read_bytes() != before


def test_an_interrupted_write_leaves_the_old_file_and_no_other(convert, monkeypatch):
    path = convert("u,i,5,1\n")[0].path
    before = path.read_bytes()
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(DatasetError, match="cannot be written: no space left"):
        convert("u,j,5,1\n", overwrite=True)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_output_that_is_a_file(convert, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(DatasetError, match="cannot be written"):
        convert("u,i,5,1\n")


def test_big_files_are_written_in_blocks(convert, monkeypatch):
    monkeypatch.setattr(atomic, "_ROWS", 7)
    text = "".join(f"u{n % 3},i{n},{n % 5}.5,{n}.25\n" for n in range(50))
    _, table = convert(text)
    assert sorted(table["timestamp"]) == [n + 0.25 for n in range(50)]
    assert list(table.groupby("user_id").size()) == [17, 17, 16]


def test_recbole_keeps_the_order_of_times_it_cannot_tell_apart(convert):
    """32-bit times: seconds of today that differ by less than 128 tie, and the file's order must decide."""
    from recbole.data.interaction import Interaction

    order = np.random.default_rng(0).permutation(60)
    _, table = convert("".join(f"u,i{n},5,{1400000000 + 3 * n}\n" for n in order))
    import torch

    times = torch.tensor(table["timestamp"].to_numpy()).float()
    assert len(times.unique()) < 10
    log = Interaction(
        {"user": torch.zeros(60), "time": times, "row": torch.tensor([int(i[1:]) for i in table["item_id"]])}
    )
    log.sort(by="time")
    log.sort(by=["user", "time"])
    assert log["row"].tolist() == list(range(60))
