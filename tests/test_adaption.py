"""DARec's dynamic adaption: `tune` searches the adapters' sizes, goes on, and writes a file that a run takes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import yaml
from conftest import random_log
from darec_helpers import small, tiny_llm, write_data

pytest.importorskip("transformers", reason="needs the extra llm")
pytest.importorskip("optuna", reason="needs the extra tune")

from recbole_raserec.cli import main as cli
from recbole_raserec.config.config import Config
from recbole_raserec.tuning.space import SPACES, options_of, read_space


def test_the_shipped_space_has_two_adapters_in_each_layer_of_minilm():
    space, problems = read_space(SPACES / "DARec.yaml")
    assert not problems
    assert len(space) == 12
    assert options_of(dict.fromkeys(space, 8)) == {"adapter_sizes": [[8, 8]] * 6}


@pytest.fixture
def tiny(workdir):
    """The command over two layers of two adapters with the sizes 0, 4 and 8."""
    write_data(workdir, random_log(0))
    (workdir / "space.yaml").write_text("adapter_sizes[2][2]: {type: int, low: 0, high: 8, step: 4}\n")
    options = {**small(workdir, tiny_llm(workdir)), "epochs": 1}
    del options["adapter_sizes"]
    words = ["tune", "--model=DARec", "--dataset=tiny", "--output=out", "--space=space.yaml"]
    words += [f"--{name}={value}" for name, value in options.items()]
    return SimpleNamespace(words=words, directory=workdir, options=options)


@pytest.mark.parametrize("sampler", ["gp", "random"])
def test_a_search_goes_on_where_it_stopped_and_writes_what_a_run_reads(tiny, sampler, capsys):
    def search(trials):
        assert cli.main([*tiny.words, f"--sampler={sampler}", f"--trials={trials}"]) == 0
        record = json.loads((tiny.directory / "out" / "study.json").read_text())
        return [(options_of(trial["options"])["adapter_sizes"], trial["value"]) for trial in record["trials"]]

    first = search(1)
    found = search(3)
    assert found[:1] == first
    assert len(found) == 3
    assert all(size in (0, 4, 8) for sizes, _ in found for pair in sizes for size in pair)
    assert search(3) == found  # nothing left to do
    best = tiny.directory / "out" / "best.yaml"
    assert yaml.safe_load(best.read_text())["adapter_sizes"] == max(found, key=lambda trial: trial[1])[0]
    config = Config(config_file_list=[str(best)], argv=[])
    assert (config["model"], len(config["adapter_sizes"])) == ("DARec", 2)
    assert "adapter_sizes" in capsys.readouterr().out


def test_uniform_adapters_of_the_usual_size_come_first(tiny):
    (tiny.directory / "space.yaml").write_text("adapter_sizes[2][2]: {type: int, low: 0, high: 64, step: 32}\n")
    assert cli.main([*tiny.words, "--trials=1"]) == 0
    (trial,) = json.loads((tiny.directory / "out" / "study.json").read_text())["trials"]
    assert options_of(trial["options"]) == {"adapter_sizes": [[32, 32], [32, 32]]}
    assert trial["state"] == "complete"


def test_another_number_of_layers_fails_its_trials(tiny, capsys):
    (tiny.directory / "space.yaml").write_text("adapter_sizes[3][2]: {type: int, low: 0, high: 8, step: 4}\n")
    assert cli.main([*tiny.words, "--trials=1"]) == 2
    assert "3 entries, but the language model has 2 layers" in capsys.readouterr().err
