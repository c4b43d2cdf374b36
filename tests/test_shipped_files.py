"""Every shipped file of options loads, and a run goes by it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import recbole
import yaml
from conftest import ROOT, random_log, write_log
from darec_helpers import write_items
from pipeline_helpers import SIZES, TINY, figures, run, small

from recbole_raserec.config.config import Config


@pytest.mark.parametrize("path", sorted((ROOT / "properties" / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_file_loads_and_runs(tiny_run, tmp_path, path):
    if path.stem == "DARec":
        pytest.importorskip("transformers", reason="needs the extra llm")
        write_items(tmp_path)
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    if options.get("training") == "auto":
        options["training"] = "prefix"  # what it comes to for short histories
    made = tiny_run(path.stem, **({"backbone": options["backbone"]} if "backbone" in options else {}))
    given = {*TINY, *SIZES}
    used = made.record["options"]
    assert {key: used[key] for key in options if key not in given} == {
        key: value for key, value in options.items() if key not in given
    }
    assert all(math.isfinite(v) for v in figures(made.record)["base"]["test"]["seen_kept"].values())


def stand_in(directory, name):
    """Generated histories under a data set's name, with a user and an item too rare for a 5-core."""
    rows = random_log(3, users=60, items=30, longest=20)
    rows += [(900, item, 2000 + item) for item in range(4)] + [(0, 900, 5000)]
    write_log(directory, name, rows)


def ml_100k_cut(directory):
    """The first hundred users of RecBole's own copy."""
    source = Path(recbole.__file__).parent / "dataset_example" / "ml-100k" / "ml-100k.inter"
    head, *lines = source.read_text(encoding="utf-8").splitlines()
    path = directory / "ml-100k" / "ml-100k.inter"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join([head, *(line for line in lines if int(line.split("\t")[0]) <= 100)]) + "\n")


@pytest.mark.parametrize("path", sorted((ROOT / "properties" / "dataset").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_data_set_file_loads_and_runs(tmp_path, path):
    name = path.stem
    if name == "ml-100k":
        ml_100k_cut(tmp_path)
    elif name != "planted":
        stand_in(tmp_path, name)
    where = ROOT / "dataset" if name == "planted" else tmp_path
    sizes = {key: TINY[key] for key in ("ram_inner_size", "epochs", "ram_epochs")}
    options = {**sizes, **small("SASRec"), "backbone": "SASRec", "train_batch_size": 2048}
    made = run(tmp_path, dataset=name, data_path=str(where), **options)
    expected = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {key: made.record["options"][key] for key in expected} == expected
    vocabulary = made.base.splits.vocabulary()
    if "user_inter_num_interval" in expected:
        assert "u900" not in vocabulary["users"]
        assert "i900" not in vocabulary["items"]
        offsets = made.base.splits.dataset.store.offsets
        assert (offsets[2:] - offsets[1:-1]).min() >= 5
    assert len(vocabulary["users"]) > 50
    for who in ("base", "ours"):
        assert 0 < figures(made.record)[who]["test"]["seen_removed"]["recall@20"] < 1


def test_the_overall_file_is_what_a_run_starts_from(small_config):
    overall = yaml.safe_load((ROOT / "properties" / "overall.yaml").read_text(encoding="utf-8"))
    config = small_config("SASRec")
    changed = {"data_path", "checkpoint_dir", "show_progress", "MAX_ITEM_LIST_LENGTH"}  # by the fixture
    assert isinstance(config, Config)
    for key, value in overall.items():
        if key not in changed:
            assert config[key] == value, key
