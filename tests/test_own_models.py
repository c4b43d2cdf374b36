"""Models of the user's own, named `package.module:Class`: looked up, as a backbone, and in every command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys

import pytest
import yaml
from conftest import ROOT, random_log, write_log
from recbole.model.abstract_recommender import GeneralRecommender, SequentialRecommender
from torch import nn

from recbole_raserec import Recommender, compare, run_recbole_raserec
from recbole_raserec.cli import main as cli
from recbole_raserec.comparison.plan import Problems, parse_specs
from recbole_raserec.config import Config, get_model, model_versions, name_of, short_name, trims
from recbole_raserec.config.sources import folder_of
from recbole_raserec.errors import CheckpointError, ConfigError, RaSeRecError
from recbole_raserec.recommendation import SASRec

PAGE = (ROOT / "docs" / "own_models.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
SIZES = ["--data_path=data", "--MAX_ITEM_LIST_LENGTH=8", "--epochs=2", "--train_batch_size=64", "--hidden_size=16"]
STAGE = ["--ram_inner_size=16", "--ram_epochs=1", "--top_k=4"]


@pytest.fixture
def example(workdir, monkeypatch):
    """The page's model as a module in the working directory, with a small log in `data`."""
    (workdir / "mymodel.py").write_text(EXAMPLE, encoding="utf-8")
    write_log(workdir / "data", "tiny", random_log(0))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield workdir
    sys.modules.pop("mymodel", None)


def module(directory, name, text):
    """A module in the working directory with these lines behind the imports."""
    head = "from recbole.model.abstract_recommender import *\nfrom recbole_raserec import SASRec\n"
    (directory / f"{name}.py").write_text(head + text, encoding="utf-8")


def problem(model=None, **given):
    with pytest.raises(ConfigError) as caught:
        Config(model or "RaSeRec", "ml-100k", config_dict=given, argv=[])
    return caught.value.problems[0]


def test_the_example_is_as_short_as_the_page_says_and_every_command_of_it_is_run():
    assert len(EXAMPLE.splitlines()) <= 40
    commands = re.findall(r"^recbole-raserec (\w+)", PAGE, re.MULTILINE)
    assert commands == ["run", "run", "compare", "tune", "serve"]


def test_in_every_command(example, capsys):
    own = "mymodel:Decay"
    assert cli.main(["run", f"--model={own}", "--dataset=tiny", "--half_life=5", *SIZES]) == 0
    assert "Decay" in capsys.readouterr().out
    assert cli.main(["run", "--model=RaSeRec", f"--backbone={own}", "--dataset=tiny", *SIZES, *STAGE]) == 0
    printed = capsys.readouterr().out
    assert "mymodel" not in printed
    names = sorted(path.parent.name for path in (example / "saved").glob("*/checkpoint.json"))
    assert [name.split("-")[0] for name in names] == ["Decay", "Decay", "RaSeRec"]
    assert not any(":" in name or "." in name for name in names)
    saved = example / "saved" / names[-1]
    manifest = json.loads((saved / "checkpoint.json").read_text(encoding="utf-8"))
    assert (manifest["backbone"], manifest["backbone_options"]["model"]) == (own, own)

    specs = f"{own},RaSeRec:backbone={own}:top_k=4"
    words = [*SIZES, *STAGE[:-1], "--ram_epochs=1"]
    assert cli.main(["compare", f"--models={specs}", "--datasets=tiny", "--seeds=2", "--output=out", *SIZES[:-1]]) == 0
    content = json.loads((example / "out" / "compare.json").read_text(encoding="utf-8"))
    assert [(row["model"], row["base"]) for row in content["datasets"]["tiny"]["rows"]] == [
        (own, None), (f"RaSeRec:backbone={own}:top_k=4", own)
    ]  # fmt: skip
    assert all(":" not in path.name for path in (example / "out" / "cells").iterdir())

    (example / "space.yaml").write_text("half_life: {type: int, low: 1, high: 4}\n", encoding="utf-8")
    given = ["--dataset=tiny", "--trials=2", "--space=space.yaml", "--output=search", *words]
    if importlib.util.find_spec("optuna"):
        assert cli.main(["tune", "--model=RaSeRec", f"--backbone={own}", *given]) == 0
        best = yaml.safe_load((example / "search" / "best.yaml").read_text(encoding="utf-8"))
        assert (best["backbone"], best["half_life"] in range(1, 5)) == (own, True)

    recommender = Recommender.load(saved, "cpu")
    history = [recommender.items[1:4]]
    assert len(recommender.recommend(history, k=5).items[0]) == 5
    assert recommender.encode(history).shape == (1, 16)


def test_served_and_missing(example, capsys):
    from serve_helpers import Server

    assert cli.main(["run", "--model=RaSeRec", "--backbone=mymodel:Decay", "--dataset=tiny", *SIZES, *STAGE]) == 0
    (saved,) = (path.parent for path in (example / "saved").glob("RaSeRec-*/checkpoint.json"))
    if importlib.util.find_spec("fastapi"):
        server = Server(saved, example / "log.txt")
        try:
            body = {"sequences": [["i1", "i2"]], "k": 3}
            status, answer = server.wait().post("/recommend", body)[:2]
            assert (status, len(answer["items"][0])) == (200, 3) if "items" in answer else status == 200
        finally:
            server.process.kill()
            server.process.wait()
    (example / "mymodel.py").unlink()
    sys.modules.pop("mymodel")
    importlib.invalidate_caches()
    with pytest.raises(CheckpointError, match=r"module mymodel cannot be imported .*PYTHONPATH"):
        Recommender.load(saved, "cpu")


def test_classes_in_python(example):
    sys.path.append(str(example))
    import mymodel

    options = dict(word[2:].split("=") for word in [*SIZES, *STAGE])
    given = {**options, "backbone": mymodel.Decay, "show_progress": False}
    record = run_recbole_raserec("RaSeRec", "tiny", config_dict=given, argv=[])
    assert record["backbone"] == "mymodel:Decay"
    for name in ("ram_inner_size", "ram_epochs", "top_k"):
        del given[name]
    del given["backbone"]
    alone = run_recbole_raserec(mymodel.Decay, "tiny", config_dict=given, argv=[])
    assert alone["metrics"]["base"] == record["metrics"]["base"]
    assert len(list((example / "saved").glob("Decay-*"))) == 1  # found again
    assert [spec.label for spec in parse_specs([mymodel.Decay, "BPR"], Problems())] == ["mymodel:Decay", "BPR"]


def test_a_local_class_runs_where_it_was_given(example):
    class Here(SASRec):
        pass

    config = Config(Here, "tiny", config_dict={"data_path": "data"}, argv=[])
    assert config.model == f"{__name__}:test_a_local_class_runs_where_it_was_given.<locals>.Here"
    assert get_model(config.model) is Here
    assert short_name(config.model) == "Here"


def test_names():
    assert name_of(SASRec) == "SASRec"
    assert Config("recbole_raserec.recommendation:SASRec", "ml-100k", argv=[]).model == "SASRec"
    assert Config("RaSeRec", "ml-100k", argv=["--backbone=recbole_raserec:DuoRec"])["backbone"] == "DuoRec"
    specs = "a.b:C:x=1,RaSeRec:backbone=a.b:C:top_k=3,RaSeRec:backbone=SASRec:top_k=3"
    problems = Problems()
    assert [(spec.model, spec.options) for spec in parse_specs(specs, problems)] == [
        ("a.b:C", {"x": "1"}),
        ("RaSeRec", {"backbone": "a.b:C", "top_k": "3"}),
        ("RaSeRec", {"backbone": "SASRec", "top_k": "3"}),
    ]
    assert not problems.found


def test_what_is_wrong_with_a_name(example):
    module(example, "wrong", "class Net(SequentialRecommender):\n    pass\nclass Plain:\n    pass\n")
    module(example, "broken", "raise OSError('no disk')\n")
    start = "model: wrong:Nett (in config_dict): the module wrong has no Nett; did you mean wrong:Net?"
    with pytest.raises(ConfigError) as caught:
        Config(None, "ml-100k", config_dict={"model": "wrong:Nett"}, argv=[])
    assert caught.value.problems == [start]
    assert "the module wrong has no Zebra; its models: " in problem("wrong:Zebra")
    assert "Plain is not a model; derive it from recbole." in problem("wrong:Plain")
    assert "module broken cannot be imported (OSError: no disk)" in problem("broken:Net")
    assert "module nowhere.at cannot be imported (ModuleNotFoundError: " in problem("nowhere.at:Net")
    assert "or write package.module:Class" in problem("wrong.Net")
    assert "backbone: nowhere:Net (in config_dict): the module nowhere " in problem(backbone="nowhere:Net")


class Bad(SequentialRecommender):
    options = {"size": 3}  # noqa: RUF012


class General(GeneralRecommender):
    pass


def test_what_is_wrong_with_a_class():
    assert "Bad.options is no subclass of recbole_raserec.config.Options" in problem(f"{__name__}:Bad")
    assert "not a sequential model that can stand alone" in problem(backbone=f"{__name__}:General")


def test_options_from_a_file_beside_the_module(example):
    module(example, "withfile", "class Net(SequentialRecommender):\n    pass\n")
    (example / "Net.yaml").write_text("size: 7\nlearning_rate: 0.5\n", encoding="utf-8")
    config = Config("withfile:Net", "ml-100k", argv=["--size=8"])
    assert (config["size"], config["learning_rate"], config["loss_type"]) == (8, 0.5, "CE")
    assert "did you mean size?" in problem("withfile:Net", sise=3)
    sys.modules.pop("withfile")


def test_options_of_a_model_of_recbole_that_it_derives_from(example):
    module(example, "derived", "from recbole.model.sequential_recommender import NARM\nclass Net(NARM):\n    pass\n")
    config = Config("derived:Net", "ml-100k", argv=[])
    assert config["dropout_probs"] == [0.25, 0.5]
    sys.modules.pop("derived")


def test_entry_points(example, monkeypatch):
    entry = importlib.metadata.EntryPoint("Mine", "mymodel:Decay", "recbole_raserec.models")
    taken = importlib.metadata.EntryPoint("Caser", "mymodel:Decay", "recbole_raserec.models")
    monkeypatch.setattr("recbole_raserec.config.sources.entry_points", lambda group: [entry, taken])
    assert Config("Mine", "ml-100k", argv=[]).model == "mymodel:Decay"
    assert get_model("Caser").__module__.startswith("recbole.")  # names of RecBole keep their meaning
    assert "did you mean Mine?" in problem("Minee")


def test_a_changed_module_is_trained_again(example):
    get_model("mymodel:Decay")
    before = model_versions("mymodel:Decay")
    (example / "mymodel.py").write_text(EXAMPLE + "\n# changed\n", encoding="utf-8")
    assert model_versions("mymodel:Decay") != before
    assert model_versions("SASRec") == []
    assert folder_of("mymodel:Decay") == [str(example)]
    assert folder_of("torch.nn:Linear") == folder_of("SASRec") == []


def variant(example, name, text):
    """A subclass of the example's model in a module of its own, as the backbone of a run."""
    source = f"import torch\nfrom torch import nn\nfrom mymodel import Decay\nclass {name}(Decay):\n"
    (example / f"{name.lower()}.py").write_text(source + text, encoding="utf-8")
    options = dict(word[2:].split("=") for word in [*SIZES, *STAGE])
    options.update(backbone=f"{name.lower()}:{name}", show_progress=False)
    with pytest.raises(ConfigError) as caught:
        run_recbole_raserec("RaSeRec", "tiny", config_dict=options, argv=[])
    assert not list((example / "saved").glob("*/model.safetensors"))  # before any training
    (found,) = caught.value.problems
    assert found.startswith(f"backbone: {name} cannot be a backbone: ")
    return found


def test_conditions_of_a_backbone(example):
    table = "    def __init__(self, *a):\n        super().__init__(*a)\n        self.table = self.item_embedding\n"
    table += "        del self.item_embedding\n"
    assert "neither an embedding named item_embedding nor" in variant(example, "Table", table)
    score = "    def full_sort_predict(self, i):\n        return super().full_sort_predict(i).exp()\n"
    assert "user vectors times item vectors differ" in variant(example, "Score", score)
    padded = "    def forward(self, s, n):\n        return super().forward(s, n) * s.size(1)\n"
    assert "it says trims = True, and a batch cut" in variant(example, "DIN", padded)  # not RecBole's DIN
    state = "    def forward(self, s):\n        return s\n"
    assert "failed with TypeError" in variant(example, "State", state)


def test_names_of_recbole_mean_recbole():
    assert not trims(type("GRU4Rec", (nn.Module,), {}))
    assert trims(get_model("GRU4Rec"))


def test_compare_raises_the_first_error(example, stand_in):
    stand_in.order(**{"BPR-2020": "fail"})
    with pytest.raises(RaSeRecError, match=r"1 of the runs failed(.|\n)*tiny, seed 2020, BPR:\n(.|\n)*no memory left"):
        compare("SASRec,BPR", "tiny", 1, "out", argv=["--data_path=data"])
    rows = json.loads((example / "out" / "compare.json").read_text())["datasets"]["tiny"]["rows"]
    assert [len(row["seeds"]) for row in rows] == [1, 0]
    assert (example / "out" / "compare.txt").is_file()


def test_compare_finds_the_module_from_elsewhere(example, stand_in, monkeypatch):
    (example / "lib").mkdir()
    os.replace(example / "mymodel.py", example / "lib" / "mymodel.py")
    sys.path.append(str(example / "lib"))
    seen = []
    from recbole_raserec.comparison import driver

    run_all = driver.run_all
    monkeypatch.setattr(driver, "run_all", lambda *given: seen.append(given[4]["PYTHONPATH"]) or run_all(*given))
    compare(["mymodel:Decay"], "tiny", 1, "out", argv=["--data_path=data"])
    assert str(example / "lib") in seen[0].split(os.pathsep)
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "Net", type("Net", (SASRec,), {"__module__": "__main__"}), raising=False)
    with pytest.raises(ConfigError, match="lies in the program itself"):
        compare([main.Net], "tiny", 1, "out", argv=["--data_path=data"])
