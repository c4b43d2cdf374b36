"""Whole runs of DARec on a small log: checkpoints, resuming, as a backbone, options that do not fit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra llm")

from conftest import random_log
from darec_helpers import small, tiny_llm, write_data

from recbole_raserec.config.config import Config
from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.quick_start import run_recbole_raserec
from recbole_raserec.recommendation.stage import train_model
from recbole_raserec.serving.live import load_checkpoint
from recbole_raserec.serving.recommender import Recommender


def run(workdir, model="DARec", **options):
    options = small(workdir, tiny_llm(workdir), **options)
    return run_recbole_raserec(model, "tiny", config_dict=options, argv=[])


CHECKPOINTED = [{}, {"history": "tokens", "context_mask": "bias", "collaborative": "SASRec"}, {"item_head": "text"}]


@pytest.mark.parametrize("options", CHECKPOINTED)
def test_a_run_and_its_checkpoint(workdir, options):
    write_data(workdir, random_log(0))
    record = run(workdir, **options)
    assert set(record["metrics"]["base"]["test"]) == {"seen_kept", "seen_removed"}
    [directory] = workdir.glob("saved/DARec-*")
    checkpoint = load_checkpoint(directory)
    config = Config("DARec", "tiny", config_dict=small(workdir, tiny_llm(workdir), **options), argv=[])
    again = train_model(config)  # found, not trained
    assert again.metrics["test"] == record["metrics"]["base"]["test"]
    seq, length = torch.tensor([[3, 4, 5]]), torch.tensor([3])
    with torch.no_grad():
        assert torch.equal(checkpoint.model.forward(seq, length), again.model.forward(seq, length))
    assert len(Recommender.load(directory).recommend([["i1", "i2"]], k=3).items[0]) == 3


def test_a_killed_run_goes_on_as_if_nothing_had_been(workdir, monkeypatch):
    from recbole_raserec.training.trainer import ResumableTrainer

    write_data(workdir, random_log(0))
    whole = run(workdir, epochs=3)
    train = ResumableTrainer._train_epoch

    def killed(self, data, epoch, *rest, **options):
        if epoch == 2:
            raise KeyboardInterrupt
        return train(self, data, epoch, *rest, **options)

    monkeypatch.setattr(ResumableTrainer, "_train_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(workdir, epochs=3, checkpoint_dir=str(workdir / "other"))
    monkeypatch.setattr(ResumableTrainer, "_train_epoch", train)
    again = run(workdir, epochs=3, checkpoint_dir=str(workdir / "other"))
    assert again["metrics"] == whole["metrics"]


def test_raserec_over_darec(workdir):
    write_data(workdir, random_log(0))
    record = run(workdir, "RaSeRec", backbone="DARec", top_k=4, ram_epochs=1, ram_inner_size=16)
    assert set(record["metrics"]) == {"base", "ours"}
    [directory] = workdir.glob("saved/RaSeRec-*")
    assert len(Recommender.load(directory).recommend([["i1", "i2"]], k=3).items[0]) == 3


def test_options_that_do_not_fit_are_said(workdir):
    write_data(workdir, random_log(0))
    with pytest.raises(ConfigError, match="hard_similarity: collaborative needs vectors"):
        run(workdir, hard_similarity="collaborative")
    with pytest.raises(ConfigError, match="adapter_sizes"):
        run(workdir, adapter_sizes=[-1, 2])
    with pytest.raises(ConfigError, match=r"collaborative: nothing is neither"):
        run(workdir, collaborative="nothing")
    for name in ("RaSeRec", "DARec", "STAMP"):
        with pytest.raises(ConfigError, match=rf"collaborative: {name} is neither .* SASRec"):
            run(workdir, collaborative=name)
    with pytest.raises(ConfigError, match=r"collaborative_layers: \[7\]"):
        run(workdir, collaborative="SASRec", collaborative_layers=[7])


def test_a_checkpoint_as_backbone_brings_its_collaborative_model_or_none(workdir):
    write_data(workdir, random_log(0))
    for vectors in (None, "GRU4Rec"):
        run(workdir, collaborative=vectors, checkpoint_dir=str(workdir / str(vectors)))
        [directory] = (workdir / str(vectors)).glob("DARec-*")
        record = run(
            workdir, "RaSeRec", backbone="DARec", backbone_checkpoint=str(directory), top_k=4, ram_epochs=1,
            collaborative="SASRec", checkpoint_dir=str(workdir / f"over-{vectors}"),
        )  # fmt: skip
        assert set(record["metrics"]) == {"base", "ours"}
        assert not list((workdir / f"over-{vectors}").glob("SASRec-*"))


def test_a_collaborative_model_of_another_split_is_refused(workdir):
    write_data(workdir, random_log(0))
    split = {"eval_args": {"split": {"RS": [0.6, 0.2, 0.2]}}}
    options = {"data_path": str(workdir), "checkpoint_dir": str(workdir / "saved"), "show_progress": False}
    run_recbole_raserec("SASRec", "tiny", config_dict={**options, "epochs": 1, "hidden_size": 32, **split}, argv=[])
    [directory] = workdir.glob("saved/SASRec-*")
    with pytest.raises(CheckpointError, match=r"collaborative: .*another split"):
        run(workdir, collaborative=str(directory))
