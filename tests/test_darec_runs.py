"""Whole runs of DARec on a small log: checkpoints, resuming, as a backbone, options that do not fit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra llm")

from conftest import random_log
from darec_helpers import small, tiny_llm, write_data

from recbole_raserec.config.config import Config
from recbole_raserec.errors import ConfigError
from recbole_raserec.quick_start import run_recbole_raserec
from recbole_raserec.recommendation.stage import train_model
from recbole_raserec.serving.live import load_checkpoint
from recbole_raserec.serving.recommender import Recommender


def run(workdir, model="DARec", **options):
    options = {**small(workdir, tiny_llm(workdir)), **options}
    return run_recbole_raserec(model, "tiny", config_dict=options, argv=[])


CHECKPOINTED = [{"weight_averaging": 0.9}, {"history": "tokens", "context_mask": "dual"}, {"item_vectors": "text"}]


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
    recommender = Recommender.load(directory)
    assert len(recommender.recommend([["i1", "i2"]], k=3).items[0]) == 3
    new = [{"item_id": "new", "title": "w1 w2 w3", "kind": "red"}]
    recommender.add_items(new)
    assert recommender.score([["i1", "new"]]).shape == (1, again.model.n_items)


def test_a_killed_run_goes_on_as_if_nothing_had_been(workdir, monkeypatch):
    from recbole_raserec.training.trainer import ResumableTrainer

    write_data(workdir, random_log(0))
    more = {"history": "items", "align_weight": 0.1, "hard_weight": 0.1, "weight_averaging": 0.9}
    whole = run(workdir, epochs=3, **more)
    train = ResumableTrainer._train_epoch

    def killed(self, data, epoch, *rest, **options):
        if epoch == 2:
            raise KeyboardInterrupt
        return train(self, data, epoch, *rest, **options)

    monkeypatch.setattr(ResumableTrainer, "_train_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(workdir, epochs=3, checkpoint_dir=str(workdir / "other"), **more)
    monkeypatch.setattr(ResumableTrainer, "_train_epoch", train)
    again = run(workdir, epochs=3, checkpoint_dir=str(workdir / "other"), **more)
    assert again["metrics"] == whole["metrics"]


def test_raserec_over_darec(workdir):
    write_data(workdir, random_log(0))
    record = run(workdir, "RaSeRec", backbone="DARec", top_k=4, ram_epochs=1, ram_inner_size=16)
    assert set(record["metrics"]) == {"base", "ours"}
    [directory] = workdir.glob("saved/RaSeRec-*")
    assert len(Recommender.load(directory).recommend([["i1", "i2"]], k=3).items[0]) == 3


def test_options_that_do_not_fit_are_said(workdir):
    write_data(workdir, random_log(0))
    with pytest.raises(ConfigError, match="adapter_sizes"):
        run(workdir, adapter_sizes=[-1, 2])
    with pytest.raises(ConfigError, match=r"item_vectors: .* is not one of text, both"):
        run(workdir, item_vectors="id")
    with pytest.raises(ConfigError, match=r"llm: .* set item_text_encoder"):
        run(workdir, llm="some/model")
    with pytest.raises(ConfigError, match=r"item_text_encoder: tfidf is no language model"):
        run(workdir, item_text_encoder="tfidf")
    (workdir / "tiny" / "tiny.item").unlink()
    with pytest.raises(ConfigError, match=r"tiny.item, which is not there; bring the file"):
        run(workdir)


def test_a_checkpoint_as_backbone(workdir):
    write_data(workdir, random_log(0))
    run(workdir)
    [directory] = (workdir / "saved").glob("DARec-*")
    record = run(
        workdir, "RaSeRec", backbone="DARec", backbone_checkpoint=str(directory), top_k=4, ram_epochs=1,
        checkpoint_dir=str(workdir / "over"),
    )  # fmt: skip
    assert set(record["metrics"]) == {"base", "ours"}
