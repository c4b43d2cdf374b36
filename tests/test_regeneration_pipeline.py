"""Stage i in the pipeline: a row for each stage, killed and resumed, memories of generated sequences."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
from conftest import random_log, write_log
from pipeline_helpers import figures, run
from regeneration_helpers import QUICK, as_rows

from recbole_raserec.config.config import Config
from recbole_raserec.data.regenerated import ORIGINS
from recbole_raserec.errors import ConfigError, DatasetError
from recbole_raserec.regeneration import stage as regenerate_module
from recbole_raserec.regeneration.report import REPORT


def test_one_origin_alone(tiny):
    whole = tiny("SASRec", regeneration=True)
    for rows, origin in (("patterns", "pattern"), ("generated", "generated")):
        part = tiny("SASRec", regeneration=True, regen_rows=rows)
        wanted = [
            row for row, number in zip(as_rows(whole.data.data), whole.data.data.origin) if ORIGINS[number] == origin
        ]
        assert as_rows(part.data.data) == wanted != []
        if rows == "generated":
            assert part.data.directory == whole.data.directory  # nothing was made again
        assert part.record["metrics"]["ours"] != whole.record["metrics"]["ours"]
        assert len(part.stages["base + (i)"].splits.train._dataset) < len(
            whole.stages["base + (i)"].splits.train._dataset
        )


def test_mined_patterns_alone_need_no_regenerator(tmp_path):
    write_log(tmp_path, "tiny", random_log(0))
    sizes = {"regeneration": True, "epochs": 1, "hidden_size": 16, "MAX_ITEM_LIST_LENGTH": 8}

    def tiny(model, **options):
        return run(tmp_path, model, "tiny", data_path=str(tmp_path), **{**sizes, **options})

    first = tiny("GRU4Rec", regen_rows="patterns", regen_heads=7)  # it is not built, so nothing has to divide
    assert len(first.data.data)
    assert set(first.data.data.origin) == {ORIGINS.index("pattern")}
    assert first.trained == [("GRU4Rec", 0)] * 2  # no SASRec either
    assert not list(tmp_path.glob("saved/regenerator-*"))
    other = tiny("GRU4Rec", regen_rows="patterns", seed=7, regen_gamma=0.5)
    assert other.data.directory == first.data.directory  # neither seed nor gamma decides anything
    assert tiny("GRU4Rec", regen_rows="patterns", regen_min_support=3).data.directory != first.data.directory
    with pytest.raises(DatasetError, match=r"regen_rows: generated are wanted.* holds none"):
        tiny("GRU4Rec", regen_rows="generated", regenerated_data=str(tmp_path / first.data.directory))
    with pytest.raises(DatasetError, match="regen_min_support"):
        tiny("GRU4Rec", regen_rows="patterns", regen_min_support=1000)


def test_two_runs_make_a_set_once(tmp_path, monkeypatch):
    """The second waits for the first and takes what it made, whatever its seed."""
    write_log(tmp_path, "tiny", random_log(0))
    given_ = {
        "regeneration": True,
        "regen_rows": "patterns",
        "data_path": str(tmp_path),
        "checkpoint_dir": str(tmp_path),
    }
    configs = [Config("SASRec", "tiny", config_dict={**given_, "seed": seed}, argv=[]) for seed in (1, 2)]
    mine, calls, second = regenerate_module.mine, [], []

    def slow(*args):
        calls.append(args)
        second.append(pool.submit(regenerate_module.regenerate, configs[1]))
        assert not wait(second, timeout=1).done
        return mine(*args)

    monkeypatch.setattr(regenerate_module, "mine", slow)
    with ThreadPoolExecutor(1) as pool:
        first = regenerate_module.regenerate(configs[0])
        assert second[0].result().directory == first.directory
    assert len(calls) == 1


def test_a_row_for_each_stage(tiny):
    whole = tiny()
    names = ["SASRec", "SASRec + (i)", "SASRec + (iii)", "SASRec + (i) + (iii)", "improvement"]
    lines = [line.split("  ")[0] for line in whole.printed.splitlines()]
    assert [line for line in lines if line in names] == [name for _ in range(2) for name in names]
    stages = whole.record["metrics"]["stages"]
    assert list(stages) == ["base", "base + (i)", "base + (iii)", "base + (i) + (iii)"]
    assert stages["base"] == whole.record["metrics"]["base"]
    assert stages["base + (i) + (iii)"] == whole.record["metrics"]["ours"]
    assert stages["base"] != stages["base + (i)"]
    assert whole.record["seconds"]["regeneration"] > 0
    # what was generated is in the memory of the last row alone
    memories = {name: len(outcome.model.memory) for name, outcome in whole.stages.items() if "iii" in name}
    generated = whole.data.data.origin == ORIGINS.index("generated")
    more = int((np.diff(whole.data.data.offsets)[generated] - 1).sum())
    assert memories["base + (i) + (iii)"] == memories["base + (iii)"] + more

    again = tiny()
    assert again.trained == []
    assert figures(again.record) == figures(whole.record)

    plain = tiny(regeneration=False)  # base and stage iii are there already
    assert plain.trained == []
    assert plain.record["metrics"]["ours"] == stages["base + (iii)"]


def test_a_generated_memory_is_barred_from_its_own_users_training(tiny):
    whole = tiny()
    memory = whole.ours.model.memory
    users, positions, _ = whole.base.splits.train._dataset.windows()
    pairs = len(whole.base.splits.train._dataset)
    made = np.arange(pairs, len(memory) - len(whole.base.splits.valid._dataset))
    assert len(made)
    for entry in made:
        user = memory.users[entry]
        training = positions[users == user].max() + 1
        assert memory.positions[entry] == training - 1
        found = memory.search(np.array(memory.keys[[entry]]), len(memory), np.array([user]), np.array([training - 1]))
        assert entry not in found.ids[0]
        found = memory.search(np.array(memory.keys[[entry]]), len(memory), np.array([user]), np.array([training]))
        assert entry in found.ids[0]


def test_it_goes_on_where_it_was_killed(tiny, monkeypatch, tmp_path):
    import shutil

    from recbole_raserec.regeneration import regenerator

    whole = tiny("SASRec")
    (directory,) = tmp_path.glob("saved/regeneration-*")
    kept = json.loads((directory / REPORT).read_text())
    shutil.rmtree(tmp_path / "saved")
    epoch = regenerator._epoch

    def killed(*args):
        if args[5]:  # steps so far: in the second epoch
            raise KeyboardInterrupt
        return epoch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(regenerator, "_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny("SASRec")
    again = tiny("SASRec")
    found = json.loads((directory / REPORT).read_text())
    assert [e["held_out"] for e in found["training"]["epochs"]] == [e["held_out"] for e in kept["training"]["epochs"]]
    assert figures(again.record) == figures(whole.record)
    assert as_rows(again.data.data) == as_rows(whole.data.data)


def test_sets_that_are_generated_otherwise_share_the_regenerator(tiny, monkeypatch, tmp_path):
    from recbole_raserec.regeneration import regenerator

    first = tiny("SASRec")
    monkeypatch.setattr(regenerator, "_epoch", None)  # no training any more
    other = tiny("SASRec", regen_gamma=0.9, regen_temperature=0.7)
    assert other.data.fingerprint != first.data.fingerprint
    assert len(list(tmp_path.glob("saved/regeneration-*"))) == 2
    (trained,) = tmp_path.glob("saved/regenerator-*")
    assert other.data.report["regenerator"] == first.data.report["regenerator"] == trained.name
    assert other.data.report["training"] == first.data.report["training"]


def test_a_set_made_before_is_used(tiny, tmp_path):
    whole = tiny("SASRec")
    given_ = str(whole.data.directory.relative_to("saved")) if whole.data.directory.is_relative_to("saved") else None
    directory = tmp_path / "saved" / given_
    again = tiny("SASRec", regenerated_data=str(directory), checkpoint_dir="elsewhere", regen_gamma=0.9)
    assert figures(again.record) == figures(whole.record)
    assert not list((tmp_path / "elsewhere").glob("regeneration-*"))
    with pytest.raises(ConfigError, match=r"regenerated_data: .*nowhere is no directory"):
        tiny("SASRec", regenerated_data=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("backbone", ["FPMC", "HGN", "Caser"])
def test_memories_of_generated_sequences_under_backbones_with_user_vectors(tmp_path, backbone):
    write_log(tmp_path, "tiny", random_log(0))
    options = {name: value for name, value in QUICK.items() if name.startswith("regen")}
    options.update(regen_pretrained=False, regen_hidden_size=8, MAX_ITEM_LIST_LENGTH=8, epochs=1)
    options.update(data_path=str(tmp_path), ram_epochs=1, ram_inner_size=16, top_k=4)
    whole = run(tmp_path, "RaSeRec", "tiny", backbone=backbone, **options)
    memory = whole.ours.model.memory
    assert len(memory) > len(whole.base.splits.train._dataset) + len(whole.base.splits.valid._dataset)


def test_generated_memories_are_of_the_latest_time(tiny):
    whole = tiny()
    memory, base = whole.ours.model.memory, whole.base.splits
    pairs = len(base.train._dataset)
    made = slice(pairs, len(memory) - len(base.valid._dataset))
    assert (memory.times[made] == memory.times[:pairs].max()).all()


@pytest.mark.parametrize(("model", "layers"), [("GRU4Rec", "num_layers"), ("NARM", "n_layers")])
def test_sizes_of_another_model_are_not_those_of_the_embeddings(model, layers):
    given_ = {"regeneration": True, "hidden_size": 129, layers: 3, "seed": 3}
    config = Config(model, "ml-100k", config_dict=given_, argv=[]).for_embeddings()
    assert (config["hidden_size"], config["seed"], config["model"]) == (64, 3, "SASRec")
    plain = Config("SASRec", "ml-100k", config_dict={"seed": 3}, argv=[])
    assert config.training_options() == plain.training_options()


def test_what_makes_the_data_is_in_their_fingerprint_alone():
    one, two = (
        Config("SASRec", "ml-100k", config_dict={"regeneration": True, **more}, argv=[])
        for more in ({}, {"regenerated_data": "x", "regen_gamma": 0.9, "regen_personal_every": 3})
    )
    assert one.training_options() == two.training_options()
    plain = Config("SASRec", "ml-100k", config_dict={}, argv=[])
    assert one.training_options() == plain.training_options()
