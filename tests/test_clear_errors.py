"""What was a traceback or a hang on the command line of 0.1.0: one error that names the option or the line."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from config_helpers import write

from recbole_raserec.cli.main import main
from recbole_raserec.config.sources import read_yaml
from recbole_raserec.data.catalogue import read_titles
from recbole_raserec.data.dataset import SequenceDataset
from recbole_raserec.data.preparation.log import check_rows, exact_integers
from recbole_raserec.errors import ConfigError, DatasetError, InputError
from recbole_raserec.serving.inputs import as_device
from recbole_raserec.storage import unwritable

HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"
RUN = ["run", "--model=SASRec", "--dataset=shop", "--data_path=.", "--epochs=1"]


def lines() -> list[str]:
    draw = random.Random(0)
    return [f"u{u}\ti{draw.randrange(25)}\t{k}" for u in range(20) for k in range(1, 6)]


@pytest.fixture
def shop(workdir, monkeypatch):
    """Writes the data set `shop` into the working directory, its lines changed where asked."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def build(*changed: str, name: str = "shop", header: str = HEADER, end: str = "\n") -> Path:
        (workdir / name).mkdir(exist_ok=True)
        path = workdir / name / f"{name}.inter"
        rows = lines()
        rows[50 : 50 + len(changed)] = changed
        path.write_text(header + "\n".join(rows) + end, encoding="utf-8")
        return path

    (workdir / "file").write_text("x", encoding="utf-8")
    build()
    return build


def error_of(capsys, words: list[str]) -> str:
    """What the command line says of these words; it ends with exit code 2 and in seconds."""
    started = time.monotonic()
    assert main(words) == 2
    assert time.monotonic() - started < 10
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("u6\ti3\tnan", "line 52: timestamp is 'nan'"),
        ("u6\ti3\tinf", "line 52: timestamp is 'inf'"),
        ("u6\ti3\t-inf", "line 52: timestamp is '-inf'"),
        ("u6\ti3\t1e999", "line 52: timestamp is '1e999'"),
        ("u6\ti3\t", "line 52: timestamp is ''"),
        ("u6\ti3\tNULL", "line 52: timestamp is 'NULL'"),
        ("u6\ti3\tabc", "line 52: timestamp is 'abc'"),
        ("u6\ti3", "line 52: 2 columns, but the header names 3"),
        ("u6\ti3\t5\t6", "line 52: 4 columns, but the header names 3"),
        ("u6", "line 52: 1 columns"),
        ("u6\t[PAD]\t5", "line 52: item_id is [PAD]"),
        ("[PAD]\ti3\t5", "line 52: user_id is [PAD]"),
        ('u6\t"i3\t5', 'line 52: item_id is "i3, whose quote does not close the field'),
        ('"u6\ti3\t5', 'line 52: user_id is "u6, whose quote'),
        ('u6\t"i"3\t5', "line 52: item_id"),
    ],
)
@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_a_line_at_fault_is_named(shop, capsys, line, said, model):
    shop(line)
    assert said in error_of(capsys, ["run", f"--model={model}", *RUN[2:]])


def test_faults_are_found_far_inside_a_file_and_in_its_last_line(shop, monkeypatch):
    monkeypatch.setattr("recbole_raserec.data.preparation.log._BLOCK", 64)
    required = {"user_id": "token", "item_id": "token", "timestamp": "float"}
    path = shop()
    check_rows(path, required)
    check_rows(shop(end=""), required)
    check_rows(shop(end="\r\n"), required)
    check_rows(shop('u6\t"i3"\t5', "", 'u7\ti"3\t5', "u8\tx[PAD]\t5"), required)
    for last in ("\nu6\ti3", "\nu6\ti3\n", "\nu6\ti3\t4\t5"):
        shop(end=last)
        with pytest.raises(DatasetError, match=r"line 102: . columns"):
            check_rows(path, required)
    shop(header=HEADER.replace("\t", ","))
    path.write_text(path.read_text().replace("\t", ",").replace("i3,", "i3,,"))
    with pytest.raises(DatasetError, match="4 columns"):
        check_rows(path, required, ",")
    path.write_text("\n".join(["user_id:token::item_id:token", "a::b", "a"]))
    with pytest.raises(DatasetError, match="line 3: 1 columns"):
        check_rows(path, {}, "::")


def test_integers_that_floats_cannot_hold_are_read_as_integers(shop):
    times = [2**60 + k for k in range(3)]
    path = shop(*(f"u6\ti3\t{each}" for each in times))
    read = exact_integers(path, "timestamp", np.array([2.0**60]), "\t", "utf-8")
    assert read.dtype == np.int64
    assert read[50:53].tolist() == times
    shop("u6\ti3\t1.5e60")
    assert exact_integers(path, "timestamp", np.array([2.0**60]), "\t", "utf-8").tolist() == [2.0**60]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["---seed=2"], ["---seed=2", "write --seed=2"]),
        (["--MAX_ITEM_LIST_LENGTH=1000000000"], ["MAX_ITEM_LIST_LENGTH: 1000000000", "<= 100000"]),
        (["--ITEM_ID_FIELD=user_id"], ["ITEM_ID_FIELD: 'user_id' is USER_ID_FIELD too"]),
        (["--TIME_FIELD=item_id"], ["TIME_FIELD: 'item_id' is ITEM_ID_FIELD too"]),
        (["--user_inter_num_interval=[1000,inf)"], ["none of its 100", "user_inter_num_interval: '[1000,inf)'"]),
        (["--val_interval={'timestamp':'(9e99,inf)'}"], ["none of its 100", "val_interval", "(9e99,inf)"]),
        (["--val_interval={'time':'(9,inf)'}"], ["val_interval: time is no column", "timestamp"]),
        (["--checkpoint_dir=file"], ["checkpoint_dir: file cannot be written"]),
        (["--log_dir=file/x"], ["log_dir: file/x cannot be written", "file is a file"]),
        (["--result_file=file/x.json"], ["result_file: file/x.json cannot be written"]),
        (["--result_file=/tmp"], ["result_file: /tmp is a directory; name a file"]),
        (["--ranks_file=shop"], ["ranks_file: shop is a directory"]),
        (["--nproc=1000"], ["nproc: 1000", "cores"]),
        (["--model=RaSeRec", "--top_k=1000000"], ["top_k: 1000000", "<= 100000"]),
        (["--config_files=bomb.yaml"], ["config_files: 'bomb.yaml'", "aliases"]),
    ],
)
def test_options_of_a_run(shop, workdir, capsys, words, parts):
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    bomb += "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9))
    write(workdir, bomb, "bomb.yaml")
    given = [word for word in RUN if not words[0].startswith("--model") or not word.startswith("--model")]
    said = error_of(capsys, [*given, *words])
    assert not [part for part in parts if part not in said], said


def test_nothing_is_read_or_made_before_an_output_is_refused(shop, workdir, monkeypatch, capsys):
    monkeypatch.setattr(SequenceDataset, "__init__", lambda *_: pytest.fail("the data were read"))
    before = sorted(os.listdir(workdir))
    error_of(capsys, [*RUN, "--result_file=new/file/", "--checkpoint_dir=file/below"])
    assert sorted(os.listdir(workdir)) == before


def test_one_item_cannot_be_ranked(shop, capsys):
    shop(name="one").write_text(HEADER + "".join(f"u{u}\ti1\t{k}\n" for u in range(9) for k in range(5)))
    assert "one item alone, i1" in error_of(capsys, [*RUN[:2], "--dataset=one", "--data_path=."])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--name=../x"], "--name=../x: use letters"),
        (["--name=a b"], "use letters"),
        (["--name=ml-100k"], "RecBole always reads its own copy"),
        (["--name=shop", "--output=."], "--name=shop: that is the data set itself"),
        (["--name=shop", "--output=new/.."], "--name=shop: that is the data set itself"),
        (["--name=other", "--output=."], "is another data set"),
        (["--output=file"], "output: file/shop-regenerated cannot be written"),
    ],
)
def test_regenerate_is_as_strict_as_prepare(shop, capsys, words, part):
    shop(name="other")
    given = ["regenerate", "--dataset=shop", "--data_path=.", *([] if "--output" in words[-1] else ["--output=out"])]
    assert part in error_of(capsys, [*given, *words])


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "--input=shop/shop.inter", "--format=ratings", "--name=x"],
        ["recommend", "nothing", "--items=i1"],
        ["explain", "nothing", "--items=i1"],
        ["export", "nothing", "--vectors"],
        ["tune", "--model=SASRec", "--dataset=shop", "--data_path=.", "--trials=1"],
        ["compare", "--models=SASRec", "--datasets=shop", "--data_path=.", "--seeds=1"],
    ],
)
def test_outputs_are_tried_at_the_start(shop, capsys, words):
    if words[0] == "tune":
        pytest.importorskip("optuna")
    assert "file/x" in error_of(capsys, [*words, "--output=file/x/y"])


def test_what_can_be_written_is_tried_without_a_trace(tmp_path):
    assert unwritable("output", tmp_path / "a" / "b") == unwritable("output", tmp_path, folder=True) == []
    assert not list(tmp_path.iterdir())
    assert "directory" in unwritable("output", tmp_path)[0]
    assert "cannot be written" in unwritable("output", tmp_path / ("n" * 300))[0]
    if os.path.exists("/dev/null"):
        assert "no regular file" in unwritable("output", "/dev/null")[0]


@pytest.mark.parametrize("name", ["xyz", "cuda:99", "meta", "cpu cpu"])
def test_devices_that_are_not_there(name):
    with pytest.raises(InputError, match=f"device: {name} cannot be used"):
        as_device(name)
    assert as_device("cpu").type == "cpu"


def test_aliases_may_repeat_what_is_not_much(tmp_path):
    path = write(tmp_path, "a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: 3}\n")
    assert read_yaml(path)["c"] == {"x": [1, 2], "y": 3}
    with pytest.raises(ConfigError, match="aliases"):
        read_yaml(write(tmp_path, "a: &a [*a]\n"))


def test_descriptions_of_any_length(shop, workdir):
    from recbole_raserec.config import Config

    long = "word " * 40_000
    write(
        workdir / "shop",
        "item_id:token\ttitle:token_seq\n" + "".join(f"i{i}\t{long}\n" for i in range(25)),
        "shop.item",
    )
    assert read_titles(workdir / "shop" / "shop.item", ["i3"]) == [long.strip()]
    columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title"]}
    config = Config("SASRec", "shop", config_dict={"data_path": ".", "load_col": columns}, argv=[])
    assert len(SequenceDataset(config).item_feat["title"][3]) == 40_000
