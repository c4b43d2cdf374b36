"""Trials that are pruned or fail, and what the samplers draw."""

from __future__ import annotations

import csv

import pytest

optuna = pytest.importorskip("optuna", reason="searches need optuna")

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402
from tune_helpers import QUICK, search, unfinished  # noqa: E402

from recbole_raserec.config.config import Config  # noqa: E402
from recbole_raserec.errors import RaSeRecError  # noqa: E402
from recbole_raserec.quick_start import run_recbole_raserec  # noqa: E402
from recbole_raserec.training.trainer import ResumableTrainer  # noqa: E402
from recbole_raserec.tuning import study as study_module  # noqa: E402
from recbole_raserec.tuning.study import finished, next_trial, pruner  # noqa: E402

# ------------------------------------------------------------------ pruned and failed trials


class SecondTrial(optuna.pruners.BasePruner):
    """Ends trial 1 after its second epoch."""

    def prune(self, study, trial):
        return trial.number == 1 and trial.last_step == 2


def test_nothing_of_a_pruned_trial_counts_as_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "pruner", lambda name: SecondTrial())
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


# ------------------------------------------------------------------ samplers


@pytest.fixture
def drawn(monkeypatch):
    """Draws the options of a study without runs, each `told` its value."""
    monkeypatch.setattr(study_module, "_STARTUP", 3)
    space = {
        "x": FloatDistribution(0.01, 1.0, log=True),
        "n": IntDistribution(1, 5),
        "c": CategoricalDistribution(("a", None, True)),
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
    options = drawn("grid", trials=5, interrupt=True, space={"n": IntDistribution(1, 5)})
    assert sorted(values["n"] for values in options) == [1, 2, 3, 4, 5]
    assert [values["n"] for values in options] != [1, 2, 3, 4, 5]  # fewer trials spread over it
