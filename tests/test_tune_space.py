"""Spaces of searches, shipped and wrong ones, and the words of the command."""

from __future__ import annotations

import re
import sys

import pytest
from conftest import ROOT

pytest.importorskip("optuna", reason="searches need optuna")

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from tune_helpers import QUICK, SPACE, search

import recbole_raserec.tuning
from recbole_raserec.cli import main as cli
from recbole_raserec.config.config import Config
from recbole_raserec.errors import ConfigError
from recbole_raserec.tuning import tune
from recbole_raserec.tuning.space import SPACES, check_space, options_of, read_space, rounded, values

# ------------------------------------------------------------------ spaces


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_spaces_are_right(path, tmp_path):
    if path.stem == "DARec":
        pytest.importorskip("transformers", reason="needs the extra llm")
    space, problems = read_space(path)
    assert not problems
    named = path.stem if path.stem != "regeneration" else "SASRec"
    options = {"regeneration": True} if path.stem == "regeneration" else {}
    config = Config(named, "ml-100k", config_dict=options, argv=[])
    assert check_space(config, space, path) == []
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all("}  " in line and "# " in line for line in lines if not line.startswith("#"))


def test_all_problems_of_a_space_come_at_once_and_before_anything_runs(tmp_path):
    wrong = {
        "alpah": {"type": "float", "low": 0.1, "high": 0.9},
        "alpha": {"type": "float", "low": 0.5, "high": 1.5},
        "top_k": {"type": "int", "low": 9, "high": 3},
        "beta": {"type": "float", "low": 0, "high": 1, "log": True},
        "ram_dropout": {"type": "float", "low": 0.0, "high": 0.5, "step": 0.3},
        "ram": {"type": "categorical", "choices": ["dual", "singel"]},
        "ram_heads": {"type": "categorical", "choices": [1, 3]},
        "attn_tau": {"type": "uniform", "low": 1, "high": 2},
        "ram_epochs": {"type": "int", "low": 1.5, "high": 2, "stpe": 1},
        "lmd": {"type": "float", "low": 0.1, "high": 0.9},
        "seed": {"type": "int", "low": 1, "high": 9},
        "threads": {"type": "int", "low": 1, "high": 2},
        "regen_gamma": {"type": "float", "low": 0.1, "high": 0.9},
        "head": {"type": "categorical", "choices": []},
    }
    with pytest.raises(ConfigError) as error:
        search(tmp_path, wrong, trials=0, sampler="tep", pruner="hyperband", ram_epochs=1, data_path="nowhere")
    words = [
        "trials: 0 is not an integer >= 1", "sampler: 'tep' is unknown; did you mean tpe?",
        "pruner: 'hyperband' is unknown; choose one of median", "alpah: 0.1 is not an option; did you mean alpha?",
        "alpha: 1.5 is not a number in [0, 1]", "top_k: low: 9 is not below high: 3", "beta: low: 0 has no logarithm",
        "ram_dropout: step: 0.3 does not lead from low: 0.0 to high: 0.5", "did you mean single?",
        "16 is not divisible by ram_heads: 3", "attn_tau: 'uniform' is no space", "stpe: is no key of type int",
        "did you mean step?", "ram_epochs: low: 1.5 is not an integer", "lmd: 0.1 is an option of other models",
        "seed: decides what is measured", "threads: changes nothing of what is trained",
        "regen_gamma: counts only with regeneration", "head: choices: [] is not a list of values",
    ]  # fmt: skip
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, str(error.value)
    assert len(error.value.problems) == len(words) - 1, error.value  # step's guess stands in the sentence before
    assert sum("space.yaml" in problem for problem in error.value.problems) == len(words) - 4
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "space.yaml"}


def test_wrong_options_and_a_missing_space_are_reported_together(workdir):
    with pytest.raises(ConfigError) as error:
        tune.tune_hyper_parameters("GRU4Rec", "tiny", None, config_dict={}, argv=[])
    assert [problem.split(":")[0] for problem in error.value.problems] == ["output", "space"]
    assert "none is shipped for GRU4Rec, only for DARec, DuoRec, RaSeRec, SASRec" in str(error.value)
    with pytest.raises(ConfigError, match=r"'RaSeRek' does not exist; did you mean RaSeRec\?"):
        tune.tune_hyper_parameters("RaSeRec", "tiny", "out", space="RaSeRek", config_dict={}, argv=[])
    with pytest.raises(ConfigError, match="epochs"):
        tune.tune_hyper_parameters("RaSeRec", "tiny", "out", config_dict={"epochs": 0}, argv=[])
    (workdir / "space.yaml").write_text("learning_rate: {type: float, low: 0.001, high: 0.1}")
    with pytest.raises(ConfigError, match="learning_rate: the grid sampler tries every value"):
        tune.tune_hyper_parameters("SASRec", "tiny", "out", None, "space.yaml", "grid", config_dict={}, argv=[])


def test_a_value_that_needs_another_searched_option_is_let_through(workdir):
    """ivf_lists: 4 alone goes with none of the default ivf_probes: 8; the search has smaller ones."""
    space = {"ivf_lists": CategoricalDistribution((4, 128)), "ivf_probes": IntDistribution(1, 16)}
    config = Config("RaSeRec", "tiny", config_dict={}, argv=[])
    assert check_space(config, space, workdir) == []
    alone = check_space(config, {"ivf_lists": space["ivf_lists"]}, workdir)
    assert len(alone) == 1
    assert "ivf_probes: 8 is more than ivf_lists: 4" in alone[0]


def test_a_given_option_is_not_searched(tmp_path):
    made = search(tmp_path, {**SPACE, "ram_epochs": {"type": "int", "low": 5, "high": 9}}, trials=1)
    assert list(made.record["space"]) == ["alpha", "top_k"]
    assert "given and therefore not searched: ram_epochs" in made.printed
    assert [model for model, _ in made.trained].count("RaSeRec") == QUICK["ram_epochs"]
    with pytest.raises(ConfigError, match=r"every option of space\.yaml is given"):
        search(tmp_path, {"top_k": SPACE["top_k"]}, top_k=3)


def test_values():
    assert values(FloatDistribution(0.1, 0.7, step=0.1)) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert values(IntDistribution(1, 9, step=4)) == [1, 5, 9]
    assert values(FloatDistribution(0.1, 0.7)) is None
    assert rounded(FloatDistribution(0.0, 1.0), 0.123456789) == 0.123457
    assert rounded(FloatDistribution(0.0, 0.99999999), 0.999999989) == 0.99999999  # not 1, which is above


def test_the_entries_of_a_list_are_parameters(workdir):
    path = workdir / "space.yaml"
    path.write_text("alpha: {type: float, low: 0.1, high: 0.9}\nsizes[2][3]: {type: int, low: 0, high: 8, step: 4}\n")
    space, problems = read_space(path)
    assert not problems
    assert list(space) == ["alpha", *(f"sizes[{a}][{b}]" for a in range(2) for b in range(3))]
    drawn = dict(zip(space, [0.5, *range(6)]))
    assert options_of(drawn) == {"alpha": 0.5, "sizes": [[0, 1, 2], [3, 4, 5]]}
    assert options_of({"n[0]": 1, "n[1]": 2}) == {"n": [1, 2]}


# ------------------------------------------------------------------ the command


def test_the_command_hands_over_its_options(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        "recbole_raserec.tuning.tune_hyper_parameters", lambda *args, **options: calls.append((args, options))
    )
    words = ["--model=RaSeRec", "-d", "shop", "--trials=7", "--output=o", "--space=s.yaml", "--pruner=none", "--seed=1"]
    assert cli.main(["tune", *words]) == 0
    own = {"model": "RaSeRec", "dataset": "shop", "trials": 7, "output": "o", "space": "s.yaml", "pruner": "none"}
    assert calls == [((), {**own, "sampler": "tpe", "config_file_list": None, "argv": ["--seed=1"]})]
    assert cli.main(["tune", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{name} " in printed for name in ("output", "trials", "space", "sampler", "pruner"))


def test_wrong_words_are_one_message(capsys, workdir):
    assert cli.main(["tune", "--model=SASRec", "--dataset=tiny", "--trials=few", "--space=5"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 3 problems")
    assert all(word in error for word in ("output: is not given", "trials: 'few'", "space: '5' does not exist"))


def test_without_optuna_there_is_one_message(capsys, monkeypatch):
    monkeypatch.setattr(recbole_raserec, "tuning", recbole_raserec.tuning)  # put back what the import replaces
    for name in ("", ".tune", ".study", ".space"):
        monkeypatch.delitem(sys.modules, f"recbole_raserec.tuning{name}")
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert cli.main(["tune", "--model=RaSeRec", "--dataset=x", "--output=o"]) == 2
    message = "error: optuna is not installed, and options are searched with it: pip install 'recbole-raserec[tune]'\n"
    assert capsys.readouterr().err == message


def test_no_other_command_imports_optuna():
    package = ROOT / "recbole_raserec"
    wanted = re.compile(r"^( *)(?:from|import) (?:optuna|sqlalchemy|recbole_raserec\.tun(?:e|ing))\b", re.M)
    found = {path.relative_to(package).as_posix(): wanted.findall(path.read_text()) for path in package.rglob("*.py")}
    found = {name: indents for name, indents in found.items() if indents and not name.startswith("tuning/")}
    assert found == {"cli/main.py": ["    "], "__init__.py": ["    "]}  # inside of the command, and for type checkers
