"""`prepare` from JSON lines, Parquet and DataFrames; columns guessed by name; files named as the data set of a run."""

from __future__ import annotations

import datetime
import gzip
import json

import numpy as np
import pandas as pd
import polars as pl
import pytest
from conftest import random_log
from convert_helpers import as_recbole_reads, rows

import recbole_raserec
from recbole_raserec.config import Config
from recbole_raserec.data.preparation import convert, ensure_dataset, prepare
from recbole_raserec.errors import ConfigError, DatasetError

ROWS = [("9", "a", 1.0, 10.0), ("7", "a", 4.0, 20.0), ("7", "b", 5.0, 30.0)]


def written(summary):
    return rows(as_recbole_reads(summary.path))


@pytest.fixture
def log():
    return pd.DataFrame({"userId": [9, 7, 7], "asin": ["a", "a", "b"], "stars": [1, 4, 5], "ts": [10, 20, 30]})


@pytest.mark.parametrize("end", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_kind_of_file_is_known_by_its_name(log, tmp_path, end, packed):
    path = tmp_path / f"My log{end}"
    if end == ".parquet":
        pl.from_dict(log.to_dict("list")).write_parquet(path)
    elif end in (".csv", ".tsv"):
        log.to_csv(path, sep="\t" if end == ".tsv" else ",", index=False)
    else:
        log.to_json(path, orient="records", lines=True)
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path = path.with_name(path.name + ".gz")
    summary = prepare(path, output=str(tmp_path / "data"))
    assert summary.path == tmp_path / "data" / "My_log" / "My_log.inter"
    assert written(summary) == ROWS
    assert "user = userId, item = asin, rating = stars, time = ts" in summary.text().splitlines()[0]
    assert "\n" not in summary.how


@pytest.mark.parametrize("kind", [pd.DataFrame, pl.DataFrame])
def test_frames(kind, tmp_path):
    dates = [datetime.datetime(2020, 1, day) for day in (1, 2, 3)]
    table = kind({"customer_id": [9, 7, 7], "product_id": ["a", "a", "b"], "date": dates})
    summary = recbole_raserec.prepare(table, output=str(tmp_path), name="shop")
    first = 1577836800.0
    assert written(summary) == [("9", "a", first), ("7", "a", first + 86400), ("7", "b", first + 2 * 86400)]
    with pytest.raises(ConfigError, match="--name is not given"):
        prepare(table, output=str(tmp_path))


def test_ids_beside_missing_ones_stay_whole_numbers_and_missing_ones_are_bad_rows(tmp_path):
    table = pd.DataFrame({"user": [9, np.nan, 7], "item": ["a", "a", None], "time": [1.0, 2.0, 3.0]})
    summary = prepare(table, output=str(tmp_path), name="holes", max_bad=0.7)
    assert written(summary) == [("9", "a", 1.0)]
    assert summary.bad_lines == 2
    assert "row 2: the user is ''" in summary.first_bad
    large = pl.DataFrame({"user": [2**60 + 1, None], "item": [1, 2], "time": [1, 2]})
    assert written(prepare(large, output=str(tmp_path), name="large", max_bad=0.5)) == [(str(2**60 + 1), "1", 1.0)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("uid,sku,asin,ts", "sku and asin may both be the item column .*uid, sku, asin, ts.*--item_col"),
        ("what,when,where", "no time column .*no header; the first line is what, when, where.*--time_col"),
        ("who,item_id,ts", "no user column .*who, item_id, ts.*--user_col"),
        ("user_id,item_id,date,time", "date and time may both be the time column .*--time_col"),
    ],
)
def test_what_cannot_be_guessed_is_asked_for(tmp_path, names, message):
    path = tmp_path / "x.csv"
    path.write_text(f"{names}\n" + ",".join("1" for _ in names.split(",")) + "\n")
    with pytest.raises(DatasetError, match=message):
        prepare(path, output=str(tmp_path))


def test_preferred_names_win(tmp_path):
    path = tmp_path / "x.jsonl"
    review = {"session_id": 5, "reviewerID": "r", "asin": "b", "parent_asin": "p", "reviewTime": "07 23, 2014",
              "unixReviewTime": 3, "helpful": [1, 2]}  # fmt: skip
    path.write_text(json.dumps(review) + "\nnot json\n")
    summary = prepare(path, output=str(tmp_path), max_bad=0.5)
    assert written(summary) == [("r", "p", 3.0)]
    path.write_text("[" + json.dumps(review) + "]")
    with pytest.raises(DatasetError, match="one JSON list"):
        prepare(path, output=str(tmp_path), overwrite=True)


def test_dates_are_read_and_said(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("user,item,date\n1,2,2014-07-23\n1,3,2014-07-24T10:00:00Z\n")
    summary = prepare(path, output=str(tmp_path))
    assert [time for *_, time in written(summary)] == [1406073600.0, 1406196000.0]
    assert summary.how.endswith("time = date (dates, as seconds since 1970 UTC)")


def test_a_damaged_parquet_file(tmp_path):
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(DatasetError, match="no Parquet file"):
        prepare(tmp_path / "x.parquet", output=str(tmp_path))


def write_csv(path, rows_, header="userId,movieId,timestamp"):
    path.write_text("\n".join([header, *(f"u{u},i{i},{t}" for u, i, t in rows_)]) + "\n")
    return path


def config_of(path, model="SASRec", **options):
    given = {"data_path": str(path.parent / "data"), "checkpoint_dir": str(path.parent / "saved"), **options}
    return Config(model, str(path), config_dict=given, argv=[])


def test_a_file_as_the_data_set(workdir, monkeypatch):
    path = write_csv(workdir / "ratings.csv", random_log(0))
    config = config_of(path)
    assert (config["dataset"], config["dataset_file"]) == ("ratings", str(path))
    inter = ensure_dataset(config)
    assert inter == workdir / "data" / "ratings" / "ratings.inter"
    first = inter.read_text()
    with monkeypatch.context() as patched:  # the same content and options: nothing to do, also for a run derived of it
        patched.setattr(convert, "_prepare", None)
        ensure_dataset(config)
        ensure_dataset(config.with_options({"seed": 3}))
    assert config.training_options() == config_of(path, k_core=3).training_options()
    ensure_dataset(config_of(path, k_core=3))
    assert inter.read_text() != first
    write_csv(path, random_log(1))
    ensure_dataset(config)
    assert inter.read_text() not in (first, "")


def test_a_data_set_that_is_not_of_the_file_is_kept(workdir):
    path = write_csv(workdir / "ratings.csv", random_log(0))
    foreign = workdir / "data" / "ratings" / "ratings.inter"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("somebody's")
    with pytest.raises(DatasetError, match="was not made of"):
        ensure_dataset(config_of(path))
    assert foreign.read_text() == "somebody's"
    foreign.unlink()
    ensure_dataset(config_of(path))
    (workdir / "other").mkdir()
    other = write_csv(workdir / "other" / "ratings.csv", random_log(1))
    with pytest.raises(DatasetError, match=r"was made of .*ratings\.csv, not of"):
        ensure_dataset(config_of(other, data_path=str(workdir / "data")))


def test_files_that_cannot_be_used(workdir):
    with pytest.raises(ConfigError, match=r"dataset: the file .* does not exist .*absent\.csv"):
        config_of(workdir / "absent.csv")
    path = write_csv(workdir / "log.csv", random_log(0), "who,item_id,when")
    with pytest.raises(DatasetError, match=r"no user column.*--user_col(.|\n)*prepare --help"):
        ensure_dataset(config_of(path))
    assert not list((workdir / "data" / "log").glob("[!.]*"))
    ensure_dataset(config_of(path, user_col="who", item_col=2, time_col="when"))


def test_compare_knows_the_file_by_its_name(workdir):
    from recbole_raserec.comparison.plan import make_plan
    from recbole_raserec.comparison.runner import command_words

    path = write_csv(workdir / "ratings.csv", random_log(0))
    plan = make_plan("SASRec", str(path), "1", str(workdir / "out"), argv=[f"--data_path={workdir / 'data'}"])
    assert list(plan.rows) == ["ratings"]
    words = command_words(plan.runs[0], workdir, {})
    assert {"--dataset=ratings", f"--dataset_file={path}"} <= set(words)
