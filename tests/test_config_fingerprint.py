"""Options of the backbone and of the retrieval stage, and which of them decide a fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recbole
import recbole.model.general_recommender
import recbole.model.sequential_recommender
from recbole.model.abstract_recommender import GeneralRecommender, SequentialRecommender
from recbole.utils import ModelType

from recbole_raserec.config import sources
from recbole_raserec.config.config import Config
from recbole_raserec.retrieval.raserec import RaSeRecOptions

RECBOLE = Path(recbole.__file__).parent
SHIPPED = sorted(path for path in sources.PROPERTIES.rglob("*.yaml") if path.parent.name != "tune")
MODELS = sorted(
    name
    for package, base in (
        (recbole.model.general_recommender, GeneralRecommender),
        (recbole.model.sequential_recommender, SequentialRecommender),
    )
    for name, value in vars(package).items()
    if isinstance(value, type) and issubclass(value, base) and value.__module__.startswith(package.__name__ + ".")
)


@pytest.mark.parametrize("backbone", ["DuoRec", "SASRec", "GRU4Rec", "BERT4Rec", "FEARec", "FPMC"])
def test_configuration_of_the_backbone_is_that_of_a_run_of_its_own(backbone):
    shared = ["--seed=7", "--checkpoint_dir='1'", "--learning_rate=0.01"]
    config = Config("RaSeRec", "amazon-beauty", argv=[*shared, f"--backbone={backbone}", "--top_k=3", "--alpha=0.9"])
    alone = Config(backbone, "amazon-beauty", argv=shared)
    assert config.for_backbone().explain() == alone.explain()
    assert config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    assert not set(RaSeRecOptions.model_fields) & set(config.for_backbone().explain())


def test_backbone_may_learn_by_another_loss_than_the_retrieval_stage():
    config = Config("RaSeRec", "ml-100k", argv=["--backbone=SASRec", "--loss_type=BPR"])
    assert (config["loss_type"], config["train_neg_sample_args"]["distribution"]) == ("CE", "none")
    backbone = config.for_backbone()
    assert (backbone["loss_type"], backbone["train_neg_sample_args"]["distribution"]) == ("BPR", "uniform")


def test_only_a_model_with_a_backbone_has_one():
    with pytest.raises(ValueError, match="no backbone"):
        Config("SASRec", "ml-100k", argv=[]).for_backbone()


CHANGES = {
    "backbone_checkpoint": "x",
    "freeze_backbone": False,
    "memory": "both",
    "memory_min_length": 2,
    "memory_max_length": 9,
    "memory_thin": 0.9,
    "memory_span": 4,
    "memory_min_support": 3,
    "memory_frequency_weight": 0.5,
    "memory_scope": "past",
    "memory_text": 0.5,
    "transition_head": True,
    "transition_neighbours": 9,
    "repeat_share": True,
    "retrieve_by": "target",
    "memory_refresh": 2,
    "memory_regenerated": False,
    "cache_neighbours": False,
    "top_k": 5,
    "similarity": "dot",
    "index": "flat",
    "ivf_lists": 64,
    "ivf_probes": 4,
    "head": "both",
    "ram": "single",
    "alpha": 0.25,
    "learnable_alpha": True,
    "beta": 0.5,
    "attn_tau": 2.0,
    "ram_heads": 1,
    "ram_inner_size": 128,
    "ram_dropout": 0.1,
    "ram_learning_rate": 0.01,
    "ram_weight_averaging": 0.9,
    "ram_weight_decay": 0.01,
    "ram_train_batch_size": 8,
    "ram_epochs": 3,
    "ram_stopping_step": 1,
    "ram_valid_metric": "Recall@10",
}


def test_every_option_of_the_retrieval_stage_is_tried_below():
    assert set(CHANGES) == set(RaSeRecOptions.model_fields) - {"backbone"}


@pytest.mark.parametrize("name", CHANGES)
def test_options_of_the_retrieval_stage_leave_the_backbone_alone(name):
    before, after = (Config("RaSeRec", "ml-100k", config_dict=given, argv=[]) for given in ({}, {name: CHANGES[name]}))
    assert before.for_backbone().training_options() == after.for_backbone().training_options()
    changed = before.training_options() != after.training_options()
    # the first is a path: its content counts, not its name; the last counts with regeneration only
    assert changed == (name not in ("backbone_checkpoint", "cache_neighbours", "memory_regenerated"))


@pytest.mark.parametrize(
    "given",
    [
        {"learning_rate": 0.01},
        {"seed": 1},
        {"hidden_size": 32},
        {"valid_metric": "Recall@10"},
        {"valid_protocol": "seen_removed"},
        {"tau": 0.5},
        {"MAX_ITEM_LIST_LENGTH": 10},
        {"eval_args": {"mode": {"valid": "uni100", "test": "full"}}},
        {"n_layers": 1},
    ],
)
def test_options_that_decide_the_weights_decide_the_fingerprint(given):
    before, after = (Config("RaSeRec", "ml-100k", config_dict=options, argv=[]) for options in ({}, given))
    assert before.training_options() != after.training_options()
    assert before.for_backbone().training_options() != after.for_backbone().training_options()


@pytest.mark.parametrize(
    "given",
    [
        {"checkpoint_dir": "x"},
        {"show_progress": False},
        {"eval_batch_size": 3},
        {"eval_memory_mb": 64},
        {"topk": [10]},
        {"use_gpu": False},
        {"metrics": ["NDCG"]},
        {"result_file": "r.json"},
        {"resume": False},
        {"threads": 1},
        {"gpu_id": "1"},
        {"data_path": "x"},
        {"state": "DEBUG"},
        {"eval_args": {"mode": {"valid": "full", "test": "uni100"}}},
        {"learning_rate": 0.001},
        {"valid_protocol": "auto"},
        {"lmd": 0.1},
    ],
    ids=str,
)
def test_options_that_do_not_decide_the_weights_leave_the_fingerprint(given):
    before, after = (Config("DuoRec", "planted", config_dict=options, argv=[]) for options in ({}, given))
    assert json.dumps(before.training_options()) == json.dumps(after.training_options())
