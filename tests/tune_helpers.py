"""What the tests of searches share: a quick search, watched."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import random_log, write_log

from recbole_raserec.recommendation import stage as recommendation_stage
from recbole_raserec.retrieval.memory import MemoryBank
from recbole_raserec.storage.checkpoint import MANIFEST
from recbole_raserec.training import stage as training_stage
from recbole_raserec.training.trainer import ResumableTrainer
from recbole_raserec.tuning import tune

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
    evaluate, collect_ranks = training_stage.evaluate, training_stage.collect_ranks
    prepare_data = recommendation_stage.prepare_data
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
        patch.setattr(recommendation_stage, "prepare_data", preparing)
        patch.setattr(training_stage, "evaluate", watched(evaluate))
        patch.setattr(training_stage, "collect_ranks", watched(collect_ranks))
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


def unfinished(directory):
    """The model directories that no later run takes for finished."""
    return {path.name for path in Path(directory, "saved").glob("*-tiny-*") if not (path / MANIFEST).exists()}
