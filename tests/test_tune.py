"""Searches: what is searched, what is shared between trials, what is pruned, taken up again, and left behind."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, random_log, write_log

optuna = pytest.importorskip("optuna", reason="searches need optuna")

from recbole_raserec import cli, plots, stages, tune  # noqa: E402
from recbole_raserec.config import Config  # noqa: E402
from recbole_raserec.errors import CheckpointError, ConfigError, MissingExtraError, RaSeRecError  # noqa: E402
from recbole_raserec.quick_start import run_recbole_raserec  # noqa: E402
from recbole_raserec.recommendation.trainer import ResumableTrainer  # noqa: E402
from recbole_raserec.retrieval.memory import MemoryBank  # noqa: E402
from recbole_raserec.serving.checkpoint import MANIFEST  # noqa: E402
from recbole_raserec.tuning import study as study_module  # noqa: E402
from recbole_raserec.tuning.space import SPACES, Parameter, check_space, read_space  # noqa: E402
from recbole_raserec.tuning.study import finished, next_trial, only_process, pruner  # noqa: E402

#: A search of the retrieval options in a few seconds.
QUICK = {
    "backbone": "SASRec", "MAX_ITEM_LIST_LENGTH": 8, "train_batch_size": 64, "hidden_size": 16, "inner_size": 16,
    "n_layers": 1, "ram_inner_size": 16, "epochs": 1, "ram_epochs": 2,
}  # fmt: skip
SPACE = {"alpha": {"type": "float", "low": 0.1, "high": 0.9}, "top_k": {"type": "int", "low": 2, "high": 6}}


def search(directory, space=SPACE, model="RaSeRec", trials=3, **given):
    """A search in `directory`: its `record`, the text it `printed`, the epochs it `trained` by model, the `searched`
    neighbours by K, and how often it read a test split before and after its first table (`tested`)."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    made = SimpleNamespace(trained=[], searched=[], tested=[], directory=directory, output=directory / "out")
    if not (directory / "tiny").exists():
        write_log(directory, "tiny", random_log(0))
    (directory / "space.yaml").write_text(yaml.safe_dump(space), encoding="utf-8")
    options = {**(QUICK if model == "RaSeRec" else {}), **given}
    own = {name: options.pop(name) for name in ("sampler", "pruner") if name in options}
    printed, before = io.StringIO(), os.getcwd()
    train_epoch, search_memory = ResumableTrainer._train_epoch, MemoryBank.search
    evaluate, collect_ranks, prepare_data = stages.evaluate, stages.collect_ranks, stages.prepare_data
    tests: list = []

    def training(self, data, epoch_idx, *args, **kwargs):
        made.trained.append((self.config["model"], epoch_idx))
        return train_epoch(self, data, epoch_idx, *args, **kwargs)

    def searching(self, queries, top_k, *args, **kwargs):
        made.searched.append(top_k)
        return search_memory(self, queries, top_k, *args, **kwargs)

    def preparing(*args, **kwargs):
        splits = prepare_data(*args, **kwargs)
        tests.append(splits.test)
        return splits

    def watched(function):
        def reading(model, data, *args, **kwargs):
            if any(data is test for test in tests):
                made.tested.append("Test figures" in printed.getvalue())
            return function(model, data, *args, **kwargs)

        return reading

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(ResumableTrainer, "_train_epoch", training)
        patch.setattr(MemoryBank, "search", searching)
        patch.setattr(stages, "prepare_data", preparing)
        patch.setattr(stages, "evaluate", watched(evaluate))
        patch.setattr(stages, "collect_ranks", watched(collect_ranks))
        os.chdir(directory)
        try:
            options = {"data_path": ".", **options}
            made.record = tune.tune_hyper_parameters(
                model, "tiny", "out", trials, "space.yaml", **own, config_dict=options, argv=[]
            )
        finally:
            os.chdir(before)
    made.printed = printed.getvalue()
    return made


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Three trials over alpha and top_k, undisturbed."""
    return search(tmp_path_factory.mktemp("shared"))


def without_seconds(record):
    return [{name: value for name, value in trial.items() if name != "seconds"} for trial in record["trials"]]


def unfinished(directory):
    """The model directories that no later run takes for finished."""
    return {path.name for path in Path(directory, "saved").glob("*-tiny-*") if not (path / MANIFEST).exists()}


# ------------------------------------------------------------------ what trials share, and what they do not read


def test_trials_share_the_backbone_and_the_neighbours(shared):
    asked = [trial["options"]["top_k"] for trial in shared.record["trials"]]
    assert asked[0] < max(asked)  # a search for what the first trial asks for would not have been enough
    assert shared.trained.count(("SASRec", 0)) == 1
    assert [epoch for model, epoch in shared.trained if model == "RaSeRec"] == [0, 1] * 3
    best = shared.record["trials"][shared.record["best"]]
    # training and validation once, for the largest top_k of the space; the test once, by the best trial
    assert shared.searched == [6, 6, best["options"]["top_k"]]


def test_trials_are_the_runs_they_stand_for(shared, tmp_path):
    """Shared searches and stages change nothing: each trial's value is that of a plain run of its options."""
    write_log(tmp_path, "tiny", random_log(0))
    trial = shared.record["trials"][0]
    given = {**QUICK, **trial["options"], "data_path": str(tmp_path), "checkpoint_dir": str(tmp_path / "saved")}
    given = {**given, "show_progress": False, "state": "WARNING"}
    with contextlib.redirect_stdout(io.StringIO()):
        record = run_recbole_raserec("RaSeRec", "tiny", config_dict=given, argv=[])
    assert record["metrics"]["ours"]["valid"]["seen_kept"]["ndcg@10"] == trial["value"]


def test_no_trial_reads_a_test_pair_and_the_best_is_tested_once(shared):
    assert shared.tested == [True, True]  # backbone and module of the best trial, when all trials were over
    assert shared.printed.count("seen items removed from the ranking") == 1
    best = json.loads((shared.output / "best.json").read_text())
    assert best["trial"] == shared.record["best"]
    assert best["record"]["metrics"]["ours"]["valid"]["seen_kept"]["ndcg@10"] == max(
        trial["value"] for trial in shared.record["trials"]
    )
    assert len(unfinished(shared.directory)) == 2  # those of the other trials


def test_the_same_command_again_only_prints(shared, tmp_path):
    shutil.copytree(shared.directory, tmp_path / "copy")
    again = search(tmp_path / "copy")
    assert (again.trained, again.searched, again.tested) == ([], [], [])
    assert again.record == shared.record
    assert again.printed == shared.printed[shared.printed.index("\nRaSeRec-tiny:") :]


def test_the_same_seed_gives_the_same_trials(shared, tmp_path):
    same = search(tmp_path)
    assert without_seconds(same.record) == without_seconds(shared.record)
    assert (same.output / "best.yaml").read_text() == (shared.output / "best.yaml").read_text()


def test_more_trials_go_on_from_there(shared, tmp_path):
    shutil.copytree(shared.directory, tmp_path / "copy")
    more = search(tmp_path / "copy", trials=4)
    assert [model for model, _ in more.trained] == ["RaSeRec", "RaSeRec"]
    assert len(more.searched) == (more.record["best"] == 3)  # the test, of a new best one
    assert without_seconds(more.record)[:3] == without_seconds(shared.record)


# ------------------------------------------------------------------ interrupted and killed


def test_an_interrupted_search_goes_on_with_the_trials_that_are_missing(shared, tmp_path, monkeypatch):
    train_epoch, calls = ResumableTrainer._train_epoch, []

    def interrupted(self, *args, **kwargs):
        calls.append(self.config["model"])
        if len(calls) == 5:  # the backbone's one, the first trial's two, the second epoch of the second trial
            raise KeyboardInterrupt
        return train_epoch(self, *args, **kwargs)

    monkeypatch.setattr(ResumableTrainer, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path)
    monkeypatch.setattr(ResumableTrainer, "_train_epoch", train_epoch)
    rest = search(tmp_path)
    assert [epoch for _, epoch in rest.trained] == [1, 0, 1]
    assert without_seconds(rest.record) == without_seconds(shared.record)


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a signal of POSIX systems")
def test_a_killed_search_goes_on(shared, tmp_path):
    write_log(tmp_path, "tiny", random_log(0))
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE), encoding="utf-8")
    words = [sys.executable, "-m", "recbole_raserec.cli", "tune", "--model=RaSeRec", "--dataset=tiny", "--output=out"]
    words += ["--data_path=.", "--trials=3", "--space=space.yaml", *(f"--{k}={v}" for k, v in QUICK.items())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("saved/RaSeRec-*/state.safetensors"))) < 2:
            assert process.poll() is None, (tmp_path / "output.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    rest = search(tmp_path)
    assert 1 <= len(rest.trained) <= 4
    assert without_seconds(rest.record) == without_seconds(shared.record)


def test_a_directory_holds_one_search(shared, tmp_path):
    shutil.copytree(shared.directory, tmp_path / "copy")
    with pytest.raises(ConfigError, match="another study: seed of options is 2020 there and 5 here") as error:
        search(tmp_path / "copy", seed=5)
    assert "Name another directory" in str(error.value)
    with pytest.raises(ConfigError, match="sampler is 'tpe' there and 'random' here"):
        search(tmp_path / "copy", sampler="random")
    with pytest.raises(ConfigError, match="high of top_k of space is 6 there and 5 here"):
        search(tmp_path / "copy", space={**SPACE, "top_k": {**SPACE["top_k"], "high": 5}})
    with only_process(tmp_path / "copy" / "out"), pytest.raises(ConfigError, match="another process"):
        search(tmp_path / "copy")
    log = random_log(0)
    write_log(tmp_path / "copy", "tiny", [(log[0][0], (log[0][1] + 1) % 25, log[0][2]), *log[1:]])
    with pytest.raises(CheckpointError, match="trials on other data"):
        search(tmp_path / "copy", trials=4)
    (tmp_path / "copy" / "out" / "study.db").write_text("no study")
    with pytest.raises(ConfigError, match="cannot be opened as a study"):
        search(tmp_path / "copy")


# ------------------------------------------------------------------ pruned and failed trials


class SecondTrial(optuna.pruners.BasePruner):
    """Ends trial 1 after its second epoch."""

    def prune(self, study, trial):
        return trial.number == 1 and trial.last_step == 2


def test_nothing_of_a_pruned_trial_counts_as_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "pruner", lambda name: SecondTrial())
    made = search(tmp_path, trials=2, ram_epochs=3)
    first, second = made.record["trials"]
    assert (first["state"], second["state"], second["value"]) == ("complete", "pruned", None)
    assert (list(first["epochs"]), list(second["epochs"])) == (["1", "2", "3"], ["1", "2"])
    assert made.record["best"] == 0
    assert "trial 1: pruned after epoch 2" in made.printed
    (left,) = unfinished(tmp_path)
    assert left.startswith("RaSeRec-tiny-")
    options = {**QUICK, "ram_epochs": 3, **second["options"], "data_path": str(tmp_path), "show_progress": False}
    monkeypatch.chdir(tmp_path)
    figures = []
    for folder in ("saved", "elsewhere"):  # continued from what it left, and from nothing
        record = run_recbole_raserec("RaSeRec", "tiny", config_dict={**options, "checkpoint_dir": folder}, argv=[])
        figures.append(record["metrics"])
    assert figures[0] == figures[1]
    assert not unfinished(tmp_path)


def test_pruners():
    study = optuna.create_study(direction="maximize")
    for name, first_end in (("none", None), ("median", 3), ("halving", 4)):
        study.pruner = pruner(name)
        for _ in range(5):
            trial = study.ask()
            for step in range(1, 9):
                trial.report(0.5, step)
                trial.should_prune()
            study.tell(trial, 0.5)
        trial = study.ask()
        ends = []
        for step in range(1, 9):
            trial.report(0.1, step)
            ends += [step] if trial.should_prune() else []
        study.tell(trial, 0.1)
        assert (ends or [None])[0] == first_end, name


def test_options_that_do_not_go_together_fail_their_trial_alone(tmp_path):
    space = {name: {"type": "categorical", "choices": choices} for name, choices in
             (("hidden_size", [16, 24]), ("n_heads", [2, 3]))}  # fmt: skip
    made = search(
        tmp_path, space, "SASRec", trials=None, sampler="grid", epochs=1, inner_size=16, n_layers=1,
        MAX_ITEM_LIST_LENGTH=8,
    )  # fmt: skip
    ends = {tuple(trial["options"].values()): trial["state"] for trial in made.record["trials"]}
    assert ends == {(16, 2): "complete", (16, 3): "failed", (24, 2): "complete", (24, 3): "complete"}
    (failed,) = (trial for trial in made.record["trials"] if trial["state"] == "failed")
    assert "16 is not divisible by n_heads: 3" in failed["reason"]
    assert made.trained == [("SASRec", 0)] * 3
    rows = list(csv.DictReader((made.output / "trials.csv").open(encoding="utf-8")))
    assert [row["state"] for row in rows] == [trial["state"] for trial in made.record["trials"]]
    assert rows[failed["number"]]["reason"] == failed["reason"]
    assert rows[failed["number"]]["value"] == ""
    over = Config("RaSeRec", "tiny", [made.output / "best.yaml"], {"backbone": "SASRec"}, argv=[])
    assert over["model"] == "RaSeRec"
    best = made.record["trials"][made.record["best"]]["options"]
    assert {name: over.for_backbone()[name] for name in space} == best


def test_a_loss_that_is_not_a_number_fails_a_trial_and_a_defect_ends_the_search(tmp_path, monkeypatch):
    raised = [ValueError("Training loss is nan"), ValueError("a defect")]

    def training(self, *args, **kwargs):
        raise raised.pop(0)

    monkeypatch.setattr(ResumableTrainer, "_train_epoch", training)
    small = {"epochs": 1, "hidden_size": 16, "inner_size": 16, "n_layers": 1, "MAX_ITEM_LIST_LENGTH": 8}
    space = {"learning_rate": {"type": "float", "low": 0.001, "high": 0.1, "log": True}}
    with pytest.raises(ValueError, match="a defect"):
        search(tmp_path, space, "SASRec", trials=2, **small)
    raised.append(ValueError("Training loss is nan"))
    with pytest.raises(RaSeRecError, match=r"none of the 2 trials in out came to its end: Training loss is nan$"):
        search(tmp_path, space, "SASRec", trials=2, **small)


# ------------------------------------------------------------------ what is left behind


def test_best_yaml_is_a_configuration_of_the_best_trial(shared, tmp_path, monkeypatch):
    shutil.copytree(shared.directory, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    trained = []
    monkeypatch.setattr(ResumableTrainer, "_train_epoch", lambda *_, **__: trained.append(1))
    assert cli.main(["--config_files=out/best.yaml", "--result_file=r.json", "--show_progress=false"]) == 0
    assert not trained
    best = shared.record["trials"][shared.record["best"]]
    record = json.loads(Path("r.json").read_text())
    assert {name: record["options"][name] for name in SPACE} == best["options"]
    assert record["metrics"]["ours"]["valid"]["seen_kept"]["ndcg@10"] == best["value"]
    header = [line for line in Path("out/best.yaml").read_text().splitlines() if line.startswith("#")]
    assert header == [
        "# The best of 3 trials of the study RaSeRec-tiny (sampler tpe, pruner median, seed 2020):",
        f"# trial {best['number']}, validation NDCG@10 {best['value']:.6f}, seen items kept in the ranking.",
        "# Searched: alpha, top_k.",
    ]


def test_files_table_and_plots(shared):
    record = shared.record
    assert json.loads((shared.output / "study.json").read_text()) == record
    assert (record["metric"], record["direction"], record["protocol"]) == ("NDCG@10", "maximize", "seen_kept")
    assert sum(record["importances"].values()) == pytest.approx(1)
    rows = list(csv.DictReader((shared.output / "trials.csv").open(encoding="utf-8")))
    for row, trial in zip(rows, record["trials"]):
        assert (int(row["trial"]), float(row["value"]), row["epochs"]) == (trial["number"], trial["value"], "2")
        assert {"alpha": float(row["alpha"]), "top_k": int(row["top_k"])} == trial["options"]
        assert trial["seconds"] > 0
    table = shared.printed[shared.printed.index("RaSeRec-tiny: 3 complete") :].splitlines()
    ranked = sorted(record["trials"], key=lambda trial: -trial["value"])
    assert [line.split()[0] for line in table[4:7]] == [str(trial["number"]) for trial in ranked]
    assert [line.split()[1] for line in table[4:7]] == [f"{trial['value']:.4f}" for trial in ranked]


def test_plots(shared):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    names = {"history.png", "alpha.png", "top_k.png"}
    assert {path.name for path in (shared.output / "plots").iterdir()} == names
    assert all((shared.output / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_without_matplotlib_there_are_no_plots(shared, tmp_path, monkeypatch):
    def missing(*_, **__):
        raise MissingExtraError("plots", "matplotlib", "plots are drawn with it")

    monkeypatch.setattr(plots, "points", missing)
    shutil.copytree(shared.directory, tmp_path / "copy", ignore=shutil.ignore_patterns("plots"))
    assert search(tmp_path / "copy").record == shared.record
    assert not (tmp_path / "copy" / "out" / "plots").exists()


# ------------------------------------------------------------------ spaces


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_spaces_are_right(path, tmp_path):
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
    assert "none is shipped for GRU4Rec, only for DuoRec, RaSeRec, SASRec" in str(error.value)
    with pytest.raises(ConfigError, match=r"'RaSeRek' does not exist; did you mean RaSeRec\?"):
        tune.tune_hyper_parameters("RaSeRec", "tiny", "out", space="RaSeRek", config_dict={}, argv=[])
    with pytest.raises(ConfigError, match="epochs"):
        tune.tune_hyper_parameters("RaSeRec", "tiny", "out", config_dict={"epochs": 0}, argv=[])
    (workdir / "space.yaml").write_text("learning_rate: {type: float, low: 0.001, high: 0.1}")
    with pytest.raises(ConfigError, match="learning_rate: the grid sampler tries every value"):
        tune.tune_hyper_parameters("SASRec", "tiny", "out", None, "space.yaml", "grid", config_dict={}, argv=[])


def test_a_value_that_needs_another_searched_option_is_let_through(workdir):
    """ivf_lists: 4 alone goes with none of the default ivf_probes: 8; the search has smaller ones."""
    space = {"ivf_lists": Parameter("categorical", choices=(4, 128)), "ivf_probes": Parameter("int", 1, 16)}
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
    step = Parameter("float", 0.1, 0.7, step=0.1)
    assert step.values() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert Parameter("int", 1, 9, step=4).values() == [1, 5, 9]
    assert Parameter("float", 0.1, 0.7).values() is None
    assert Parameter("float", 0.0, 0.99999999).rounded(0.999999989) == 0.99999999  # not 1, which is above
    assert Parameter("float", 0.0, 1.0).rounded(0.123456789) == 0.123457


# ------------------------------------------------------------------ samplers


@pytest.fixture
def drawn(monkeypatch):
    """Draws the options of a study without runs, each `told` its value."""
    monkeypatch.setattr(study_module, "_STARTUP", 3)
    space = {
        "x": Parameter("float", 0.01, 1.0, log=True),
        "n": Parameter("int", 1, 5),
        "c": Parameter("categorical", choices=("a", None, True)),
    }

    def draw(kind, trials=6, seed=3, interrupt=False, told=lambda options: options["n"], space=space):
        study = optuna.create_study(direction="minimize")
        grid, found = [{"n": n} for n in range(1, 6)], []
        for number in range(trials):
            trial, options = next_trial(study, space, kind, seed, grid)
            if interrupt:  # asked again before the trial is over
                trial, again = next_trial(study, space, kind, seed, grid)
                assert again == options
            assert trial.number == number
            study.tell(trial, told(options))
            found.append(options)
        assert len(finished(study)) == trials
        return found

    return draw


@pytest.mark.parametrize("kind", ["tpe", "random", "gp"])
def test_what_is_drawn_depends_on_the_seed_and_the_trials_before(drawn, kind):
    once = drawn(kind)
    assert drawn(kind, interrupt=True) == once
    assert len({str(options) for options in once}) == 6
    assert drawn(kind, seed=4)[0] != once[0]
    other = drawn(kind, told=lambda options: -options["n"])
    assert other[:3] == once[:3]
    assert (other == once) == (kind == "random")


def test_the_grid_is_drawn_whole_and_each_once(drawn):
    options = drawn("grid", trials=5, interrupt=True, space={"n": Parameter("int", 1, 5)})
    assert sorted(values["n"] for values in options) == [1, 2, 3, 4, 5]
    assert [values["n"] for values in options] != [1, 2, 3, 4, 5]  # fewer trials spread over it


# ------------------------------------------------------------------ the command


def test_the_command_hands_over_its_options(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(tune, "tune_hyper_parameters", lambda *args, **options: calls.append((args, options)))
    words = ["--model=RaSeRec", "-d", "shop", "--trials=7", "--output=o", "--space=s.yaml", "--pruner=none", "--seed=1"]
    assert cli.main(["tune", *words]) == 0
    own = {"trials": 7, "output": "o", "space": "s.yaml", "pruner": "none"}
    assert calls == [(("RaSeRec", "shop"), {**own, "config_file_list": None, "argv": ["--seed=1"]})]
    assert cli.main(["tune", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{name}=" in printed for name in ("output", "trials", "space", "sampler", "pruner"))


def test_wrong_words_are_one_message(capsys, workdir):
    assert cli.main(["tune", "--model=SASRec", "--dataset=tiny", "--trials=few", "--space=5"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 3 problems")
    assert all(word in error for word in ("output: is not given", "trials: 'few'", "space: '5' does not exist"))


def test_without_optuna_there_is_one_message(capsys, monkeypatch):
    for name in ("recbole_raserec.tune", "recbole_raserec.tuning.study"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert cli.main(["tune", "--model=RaSeRec", "--dataset=x", "--output=o"]) == 2
    message = "error: optuna is not installed, and options are searched with it: pip install 'recbole-raserec[tune]'\n"
    assert capsys.readouterr().err == message


def test_no_other_command_imports_optuna():
    package = ROOT / "recbole_raserec"
    wanted = re.compile(r"^( *)(?:from|import) (?:optuna|sqlalchemy|recbole_raserec\.tun(?:e|ing))\b", re.M)
    found = {path.relative_to(package).as_posix(): wanted.findall(path.read_text()) for path in package.rglob("*.py")}
    found = {name: indents for name, indents in found.items() if indents and not name.startswith("tuning/")}
    inside = " " * 8  # of a function: the search for DARec's adapters imports it when it is called
    assert found == {"cli.py": ["    "], "tune.py": ["", "", ""], "adaption.py": [inside] * 3}
