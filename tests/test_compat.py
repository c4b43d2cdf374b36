"""Every mend of compat.py against the break it mends, and RecBole's own train, save, reload, evaluate, resume."""

from __future__ import annotations

import contextlib
import importlib.machinery
import inspect
import io
import os
import pickle
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from recbole_raserec import compat

compat.apply()

ROOT = Path(__file__).resolve().parents[1]
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


def run_python(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


# ------------------------------------------------------------------------------------------------------- the machinery


def test_the_list_names_each_mend_once_with_its_reason():
    mends = compat.mends()
    assert len({mend.name for mend in mends}) == len(mends) >= 10
    assert all(len(mend.reason) > 40 and isinstance(mend.active, bool) for mend in mends)


def test_apply_twice_changes_nothing():
    import recbole.trainer.trainer as trainer
    from recbole.data.dataset import Dataset

    def state():
        return sys.meta_path[:], trainer.torch, trainer.amp, Dataset._fill_nan, Dataset._from_scratch

    before = state()
    compat.apply()
    assert state() == before


@pytest.mark.skipif(
    compat._at_least("numpy", "2") or compat._without_pkg_resources(),
    reason="here RecBole cannot be imported before its mends",
)
def test_modules_imported_before_apply_are_mended_too():
    done = run_python(
        "import recbole.quick_start, recbole.trainer.trainer as trainer, torch, sys\n"
        "old = recbole.quick_start.load_data_and_model\n"
        "sys.path.insert(0, '.')\n"
        "from recbole_raserec import compat\n"
        "compat.apply()\n"
        "assert trainer.torch.load is not torch.load\n"
        "assert recbole.quick_start.load_data_and_model is not old\n"
        "assert recbole.quick_start.quick_start.load_data_and_model is recbole.quick_start.load_data_and_model\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_mended_module_keeps_its_loader_and_source():
    import recbole.trainer.trainer as trainer

    assert isinstance(trainer.__spec__.loader, importlib.machinery.SourceFileLoader)
    assert "class Trainer" in inspect.getsource(trainer)


# ---------------------------------------------------------------------------------------------------------- numpy, ray


def test_numpy_names_are_given_back_and_none_is_replaced():
    module = types.ModuleType("numpy")
    module.bool_, module.float64, module.complex128, module.str_ = np.bool_, np.float64, np.complex128, np.str_
    module.float_ = "already there"
    compat._numpy_names(module)
    assert (module.bool8, module.complex_, module.unicode_) == (np.bool_, np.complex128, np.str_)
    assert module.float_ == "already there"


HIDE_PKG_RESOURCES = """
import importlib.machinery, sys
class Hide(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "pkg_resources" else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Hide
sys.path.insert(0, ".")
"""


def test_quick_start_imports_without_pkg_resources():
    done = run_python(
        HIDE_PKG_RESOURCES + "import recbole_raserec.compat as compat\n"
        "compat.apply()\n"
        "import recbole.quick_start\n"
        "assert 'pkg_resources' not in sys.modules\n"
        "assert {mend.name: mend.active for mend in compat.mends()}['pkg-resources']\n"
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_ray_alone_does_not_import_without_pkg_resources():
    done = run_python(HIDE_PKG_RESOURCES + "import ray")
    assert "No module named 'pkg_resources'" in done.stderr


# --------------------------------------------------------------------------------------------------------------- torch


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


class _Calls:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "attack",
    [
        lambda path: _Calls(os.mkdir, path),
        lambda path: _Calls(eval, f"__import__('os').mkdir({path!r})"),
        lambda path: _Calls(subprocess.Popen, ["mkdir", path]),
        lambda path: _Calls(torch.serialization.os.makedirs, path),
    ],
    ids=["os.mkdir", "eval", "Popen", "makedirs"],
)
def test_a_checkpoint_cannot_call_functions(tmp_path, attack, protocol):
    import recbole.trainer.trainer as trainer

    target = tmp_path / "made"
    torch.save({"config": attack(str(target))}, tmp_path / "foreign.pth", pickle_protocol=protocol)
    with pytest.raises(pickle.UnpicklingError, match="neither a value nor a class that RecBole writes"):
        trainer.torch.load(tmp_path / "foreign.pth")
    assert not target.exists()


def test_a_checkpoint_cannot_reach_functions_through_a_dotted_name():
    from recbole_raserec.recbole_checkpoint import CheckpointUnpickler

    # find_class("recbole.trainer.trainer", "os.getcwd"), called without arguments.
    stream = b"\x80\x04\x8c\x17recbole.trainer.trainer\x8c\x09os.getcwd\x93)R."
    assert pickle.loads(stream) == os.getcwd()
    with pytest.raises(pickle.UnpicklingError, match=r"os\.getcwd"):
        CheckpointUnpickler(io.BytesIO(stream)).load()


def test_a_checkpoint_cannot_import_modules(tmp_path, monkeypatch):
    import recbole.trainer.trainer as trainer

    (tmp_path / "stranger.py").write_text("class Thing: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import stranger

    torch.save({"config": stranger.Thing()}, tmp_path / "foreign.pth")
    del sys.modules["stranger"]
    with pytest.raises(pickle.UnpicklingError, match=r"stranger\.Thing"):
        trainer.torch.load(tmp_path / "foreign.pth")
    assert "stranger" not in sys.modules


def test_weights_only_is_honoured_when_asked_for(tmp_path, sasrec):
    import recbole.trainer.trainer as trainer

    torch.save({"w": torch.ones(2)}, tmp_path / "plain.pth")
    assert torch.equal(trainer.torch.load(tmp_path / "plain.pth", weights_only=True)["w"], torch.ones(2))
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        trainer.torch.load(sasrec[1], weights_only=True)


def test_grad_scaler_does_not_warn():
    import recbole.trainer.trainer as trainer

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler = trainer.amp.GradScaler(enabled=False)
    assert not scaler.is_enabled()


# ------------------------------------------------------------------------------------------------------- pandas, scipy


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


def test_agg_len_gives_a_length_per_row():
    module = types.ModuleType("dataset")
    compat._pandas_agg_len(module)
    column = pd.Series([[1], [1, 2], []])
    assert list(module.len(column)) == [1, 2, 0]
    assert list(column.map(module.len)) == [1, 2, 0]


def test_dok_update_sets_the_values():
    import recbole.model.abstract_recommender  # noqa: F401  (the mend waits for it)
    from scipy.sparse import dok_matrix

    matrix = dok_matrix((2, 3), dtype=np.float32)
    matrix._update({(0, 1): 1, (1, 2): 5})
    assert matrix.toarray().tolist() == [[0, 1, 0], [0, 0, 5]]
    assert (matrix > 0).sum() == 2


# ------------------------------------------------------------------------------------ the models that the mends are for

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


def test_sequential_models_do_not_turn_anomaly_detection_on():
    imports = "import recbole.model.sequential_recommender, torch; print(torch.is_anomaly_enabled())"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        for code in (f"import recbole_raserec; {imports}", imports)
    ]
    assert runs[0].stdout.strip().splitlines()[-1] == "False", runs[0].stderr
    if runs[1].returncode == 0:  # RecBole alone, where it can be imported without a mend
        assert runs[1].stdout.strip().splitlines()[-1] == "True"
