"""RecBole's own train, save, reload, evaluate and resume under the patches, and the models that need them."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from recbole_raserec.compat import apply
from recbole_raserec.compat import patches as compat

apply()


N_USERS, N_ITEMS = 30, 25


# ----------------------------------------------------------------------------------------------- a data set for RecBole


def write_data_set(folder: Path) -> None:
    """RecBole atomic files of a data set `tiny`, with missing values in every kind of item column."""
    rng = np.random.default_rng(0)
    inter = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(N_USERS):
        items = rng.permutation(N_ITEMS)[:8]
        inter += [f"u{user}\ti{item}\t{1 + item % 5}\t{time}" for time, item in enumerate(items)]
    item = ["item_id:token\tclass:token_seq\tbrand:token\tprice:float"]
    for i in range(N_ITEMS):
        classes = "" if i % 7 == 0 else f"c{i % 3} c{3 + i % 2}"
        item.append(f"i{i}\t{classes}\t{'' if i % 5 == 0 else f'b{i % 4}'}\t{'' if i % 6 == 0 else float(i)}")

    def vectors(names: list[str]) -> list[str]:
        return [f"{name}\t" + " ".join(f"{x:.3f}" for x in rng.normal(size=64)) for name in names]

    entities = [f"e{i}" for i in range(N_ITEMS)]
    files = {
        "inter": inter,
        "item": item,
        "link": ["item_id:token\tentity_id:token", *(f"i{i}\te{i}" for i in range(N_ITEMS))],
        "kg": [
            "head_id:token\trelation_id:token\ttail_id:token",
            *(f"e{i}\tr{i % 3}\te{(7 * i + 1) % N_ITEMS}" for i in range(N_ITEMS)),
        ],
        "ent": ["ent_id:token\tent_vec:float_seq", *vectors(entities)],
        "rel": ["rel_id:token\trel_vec:float_seq", *vectors(["r0", "r1", "r2"])],
    }
    (folder / "tiny").mkdir()
    for suffix, lines in files.items():
        (folder / "tiny" / f"tiny.{suffix}").write_text("\n".join(lines) + "\n")


INTER = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
ITEM = {**INTER, "item": ["item_id", "class", "brand", "price"]}
KNOWLEDGE = {
    "load_col": {
        **INTER,
        "kg": ["head_id", "relation_id", "tail_id"],
        "link": ["item_id", "entity_id"],
        "ent": ["ent_id", "ent_vec"],
        "rel": ["rel_id", "rel_vec"],
    },
    "additional_feat_suffix": ["ent", "rel"],
    "alias_of_entity_id": ["ent_id"],
    "alias_of_relation_id": ["rel_id"],
    "preload_weight": {"ent_id": "ent_vec", "rel_id": "rel_vec"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with the data set, where RecBole may write its logs and checkpoints."""
    folder = tmp_path_factory.mktemp("recbole")
    write_data_set(folder)
    cwd, argv = os.getcwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["recbole"]  # RecBole's Config reads the command line
    yield folder
    os.chdir(cwd)
    sys.argv = argv


def options(folder: Path, **more) -> dict:
    return {
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "saved"),
        "epochs": 1,
        "state": "ERROR",
        "show_progress": False,
        "use_gpu": False,
        "train_neg_sample_args": None,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
        "MAX_ITEM_LIST_LENGTH": 6,
        "metrics": ["Recall", "NDCG"],
        "topk": [5],
        "valid_metric": "NDCG@5",
        "load_col": INTER,
        **more,
    }


PAIRWISE = {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1, "dynamic": False}}


def train(folder: Path, model: str, **more) -> dict:
    from recbole.quick_start import run_recbole

    return run_recbole(model=model, dataset="tiny", config_dict=options(folder, **more))


def newest_checkpoint(folder: Path, model: str) -> Path:
    return max((folder / "saved").glob(f"{model}-*.pth"), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def sasrec(folder):
    result = train(folder, "SASRec")
    return result, newest_checkpoint(folder, "SASRec")


# --------------------------------------------------------------------------------------------------- RecBole's own runs


def test_train_save_reload_evaluate(folder, sasrec):
    from recbole.quick_start import load_data_and_model
    from recbole.utils import get_trainer

    result, checkpoint = sasrec
    config, model, _, train_data, _, test_data = load_data_and_model(str(checkpoint))
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.eval_collector.data_collect(train_data)
    again = trainer.evaluate(test_data, load_best_model=True, model_file=str(checkpoint))
    assert dict(again) == dict(result["test_result"])
    trainer.resume_checkpoint(str(checkpoint))
    assert trainer.start_epoch == 1


def test_torch_load_itself_is_as_strict_as_before(sasrec):
    import recbole.trainer.trainer as trainer

    assert trainer.torch.load is not torch.load
    assert trainer.torch.save is torch.save
    if compat._at_least("torch", "2.6"):
        with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
            torch.load(sasrec[1])


def test_weights_only_is_honoured_when_asked_for(tmp_path, sasrec):
    import recbole.trainer.trainer as trainer

    torch.save({"w": torch.ones(2)}, tmp_path / "plain.pth")
    assert torch.equal(trainer.torch.load(tmp_path / "plain.pth", weights_only=True)["w"], torch.ones(2))
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        trainer.torch.load(sasrec[1], weights_only=True)


def test_missing_values_are_filled_though_chained_assignment_does_nothing(folder):
    from recbole.config import Config
    from recbole.data.dataset import SequentialDataset

    with contextlib.ExitStack() as stack:
        if not compat._at_least("pandas", "3"):  # where it is not yet so, have it so
            stack.enter_context(pd.option_context("mode.copy_on_write", True))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error", FutureWarning)
        config = Config(model="SASRecF", dataset="tiny", config_dict=options(folder, load_col=ITEM))
        dataset = SequentialDataset(config)
    items = dataset.item_feat
    names = dataset.id2token("item_id", items["item_id"])
    mean = np.mean([i for i in range(N_ITEMS) if i % 6])
    for row in range(1, N_ITEMS + 1):  # row 0 is the padding item
        i = int(names[row][1:])
        classes, brand, price = items["class"][row], items["brand"][row], items["price"][row]
        assert float(price) == pytest.approx(i if i % 6 else mean)
        assert (int(brand) == 0) == (i % 5 == 0)
        assert (int(classes.sum()) == 0) == (i % 7 == 0)


# ---------------------------------------------------------------------------------- the models that the patches are for

CASES = {
    "LightGCN": PAIRWISE,
    "EASE": PAIRWISE,  # its checkpoint holds scipy and numpy matrices
    "SASRecF": {"load_col": ITEM, "selected_features": ["class"]},  # its checkpoint holds the data set
    "KSR": KNOWLEDGE,
    "SASRecCPR": {"reranker_CAN_NUM": "20"},
}


@pytest.mark.parametrize("model", CASES)
def test_model_runs(folder, model):
    result = train(folder, model, **CASES[model])
    assert set(result["test_result"]) == {"recall@5", "ndcg@5"}
    assert all(0 <= value <= 1 for value in result["test_result"].values())


def test_cpr_predict_is_full_sort_predict_at_the_item(folder):
    from recbole.quick_start import load_data_and_model

    train(folder, "GRU4RecCPR", reranker_CAN_NUM="20")
    _, model, dataset, *_ = load_data_and_model(str(newest_checkpoint(folder, "GRU4RecCPR")))
    model.eval()
    batch = dataset[torch.arange(5)]
    with torch.no_grad():
        scores, all_scores = model.predict(batch), model.full_sort_predict(batch)
    assert torch.equal(scores, all_scores[torch.arange(5), batch["item_id"]])


def test_pretrained_s3rec_is_read_for_fine_tuning(folder):
    # Each model of RecBole which reads a checkpoint does so through its own module's torch.
    load_col = {**INTER, "item": ["item_id", "class"]}
    common = {"load_col": load_col, "item_attribute": "class", "pretrain_epochs": 1, "save_step": 1}
    train(folder, "S3Rec", train_stage="pretrain", **common)
    path = str(folder / "saved" / "S3Rec-tiny-1.pth")
    result = train(folder, "S3Rec", train_stage="finetune", pre_model_path=path, **common)
    assert "ndcg@5" in result["test_result"]
