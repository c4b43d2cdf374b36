"""What tests of whole runs share; their fixtures are in conftest.py."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from recbole_raserec import quick_start
from recbole_raserec.config import get_model
from recbole_raserec.config.sources import keys_read_by
from recbole_raserec.evaluation.report import report_stages
from recbole_raserec.training.trainer import ResumableTrainer

#: The run most tests share: a few seconds, and long enough for retrieval to pay.
PLANTED = {
    "backbone": "SASRec",
    "training": "packed",
    "native_kernels": False,  # figures are to be the same on every processor
    "softmax_precision": "float32",
    "hidden_size": 32,
    "inner_size": 64,
    "hidden_dropout_prob": 0.2,
    "attn_dropout_prob": 0.2,
    "learning_rate": 0.005,
    "epochs": 6,
    "ram_inner_size": 64,
    "ram_dropout": 0.2,
    "ram_learning_rate": 0.003,
    "ram_epochs": 4,
    "alpha": 0.2,
}

#: One epoch of everything on a log of 30 users.
TINY = {
    "backbone": "SASRec",
    "MAX_ITEM_LIST_LENGTH": 8,
    "ram_inner_size": 16,
    "train_batch_size": 64,
    "epochs": 1,
    "ram_epochs": 1,
    "top_k": 5,
}
SIZES = {"hidden_size": 16, "inner_size": 16, "embedding_size": 16}


def small(model):
    """Those of :data:`SIZES` that the model reads; the others would be refused."""
    return {name: size for name, size in SIZES.items() if name in keys_read_by(get_model(model))}


def run(directory, model="RaSeRec", dataset="planted", **options):
    """A run below `directory`: `record`, the text it `printed`, the epochs it `trained` by model, `base` and `ours`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    kept = {"trained": []}
    report, train_epoch = report_stages, ResumableTrainer._train_epoch

    def reporting(config, stages, data, seconds):
        base, *more = stages.values()
        kept.update(base=base, ours=more[-1] if more else None, stages=stages, data=data)
        return report(config, stages, data, seconds)

    def training(self, data, epoch_idx, *args, **kwargs):
        kept["trained"].append((self.config["model"], epoch_idx))
        return train_epoch(self, data, epoch_idx, *args, **kwargs)

    printed = io.StringIO()
    options = {"show_progress": False, "state": "WARNING", "data_path": str(ROOT / "dataset"), **options}
    before = os.getcwd()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(quick_start, "report_stages", reporting)
        patch.setattr(ResumableTrainer, "_train_epoch", training)
        os.chdir(directory)
        try:
            record = quick_start.run_recbole_raserec(model, dataset, config_dict=options, argv=[])
            for outcome in filter(None, (kept["base"], kept["ours"])):
                outcome.directory = outcome.directory.resolve()
        finally:
            os.chdir(before)
    return SimpleNamespace(record=record, printed=printed.getvalue(), saved=directory / "saved", **kept)


def figures(record):
    """Base and ours, every metric of both protocols."""
    return record["metrics"]
