"""Every patch of RecBole against the break it is for."""

from __future__ import annotations

import importlib.machinery
import inspect
import io
import os
import pickle
import subprocess
import sys
import types
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from recbole_raserec.compat import all_patches, apply
from recbole_raserec.compat import patches as compat
from recbole_raserec.errors import ConfigError

apply()


def run_python(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


# ------------------------------------------------------------------------------------------------------- the machinery


def test_the_list_names_each_patch_once_with_its_reason():
    patches = all_patches()
    assert len({patch.name for patch in patches}) == len(patches) >= 10
    assert all(len(patch.reason) > 40 and isinstance(patch.active, bool) for patch in patches)


def test_apply_twice_changes_nothing():
    import recbole.trainer.trainer as trainer
    from recbole.data.dataset import Dataset

    def state():
        return sys.meta_path[:], trainer.torch, trainer.amp, Dataset._fill_nan, Dataset._from_scratch

    before = state()
    apply()
    assert state() == before


@pytest.mark.skipif(
    compat._at_least("numpy", "2") or compat._without_pkg_resources() or compat._without_ray(),
    reason="here RecBole cannot be imported before its patches",
)
def test_modules_imported_before_apply_are_patched_too():
    done = run_python(
        "import recbole.quick_start, recbole.trainer.trainer as trainer, torch, sys\n"
        "old = recbole.quick_start.load_data_and_model\n"
        "sys.path.insert(0, '.')\n"
        "from recbole_raserec import compat\n"
        "compat.apply()\n"
        "assert trainer.torch.load is not torch.load\n"
        "assert recbole.quick_start.load_data_and_model is old\n"
        "assert old.__code__.co_filename.endswith('import_hooks.py')\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_patched_module_keeps_its_loader_and_source():
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


def test_metrics_work_before_any_configuration_is_made():
    done = run_python(
        "import recbole_raserec, torch; from recbole_raserec.evaluation.protocols import metrics_from_ranks\n"
        "options = {'metrics': ['NDCG', 'MRR'], 'topk': 2, 'metric_decimal_place': 4, 'eval_args': {'mode': 'full'}}\n"
        "print(metrics_from_ranks(torch.tensor([1, 3]), options))"
    )
    assert done.stdout.strip() == "{'ndcg@2': 0.5, 'mrr@2': 0.5}", done.stderr


def test_quick_start_imports_without_pkg_resources():
    done = run_python(
        HIDE_PKG_RESOURCES + "import recbole_raserec.compat as compat\n"
        "compat.apply()\n"
        "import recbole.quick_start\n"
        "assert 'pkg_resources' not in sys.modules\n"
        "assert {patch.name: patch.active for patch in compat.all_patches()}['pkg-resources']\n"
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.skipif(compat._without_ray(), reason="ray is not installed")
def test_ray_alone_does_not_import_without_pkg_resources():
    done = run_python(HIDE_PKG_RESOURCES + "import ray")
    assert "No module named 'pkg_resources'" in done.stderr


HIDE = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: None if name == {name!r} else find(name, *rest)
sys.path.insert(0, ".")
"""


def test_quick_start_imports_without_ray_and_its_stand_in_stays_hidden():
    done = run_python(
        HIDE.format(name="ray") + "import importlib.util, recbole_raserec\n"
        "from recbole.quick_start import quick_start\n"
        "assert quick_start.tune.report(ndcg=1.0) is None\n"
        "assert 'ray' not in sys.modules and importlib.util.find_spec('ray') is None\n"
        "from recbole_raserec.compat import all_patches\n"
        "assert {patch.name: patch.active for patch in all_patches()}['no-ray']\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(compat._without_ray(), reason="ray is not installed")
def test_a_ray_that_is_installed_is_the_one_that_recbole_sees():
    done = run_python(
        "import recbole_raserec, ray.tune; from recbole.quick_start import quick_start as q; assert q.tune is ray.tune"
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_recbole_is_one_error_with_its_remedy():
    done = run_python(HIDE.format(name="recbole") + "import recbole_raserec")
    wanted = "ModuleNotFoundError: RecBole is not installed; pip install --no-deps recbole==1.2.1"
    assert done.stderr.strip().splitlines()[-1] == wanted


# --------------------------------------------------------------------------------------------------------------- torch


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
    from recbole_raserec.compat.patches import CheckpointUnpickler

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


def test_grad_scaler_does_not_warn():
    import recbole.trainer.trainer as trainer

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler = trainer.amp.GradScaler(enabled=False)
    assert not scaler.is_enabled()


def test_an_exhaustive_search_draws_from_a_generator():
    module = types.SimpleNamespace(np=np)
    compat._hyperopt_generator(module)
    assert module.np.random.RandomState(3).integers(0, 9, 2).shape == (2,)  # hyperopt calls this
    assert module.np.array is np.array
    assert np.random.RandomState is not module.np.random.RandomState


def test_a_directory_that_another_process_made_in_between_is_there(tmp_path, monkeypatch):
    from recbole.utils import ensure_dir, utils

    monkeypatch.setattr(utils.os.path, "exists", lambda path: False)  # as it was a moment ago
    ensure_dir(str(tmp_path))
    ensure_dir(str(tmp_path / "deep" / "new"))
    (tmp_path / "log").write_text("mine")
    for there in ("log", "log/SASRec"):
        with pytest.raises(ConfigError, match=r"log.* move the file"):
            ensure_dir(str(tmp_path / there))
    assert (tmp_path / "log").read_text() == "mine"
    assert (tmp_path / "deep" / "new").is_dir()


def test_sequential_models_do_not_turn_anomaly_detection_on():
    imports = "import recbole.model.sequential_recommender, torch; print(torch.is_anomaly_enabled())"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        for code in (f"import recbole_raserec; {imports}", imports)
    ]
    assert runs[0].stdout.strip().splitlines()[-1] == "False", runs[0].stderr
    if runs[1].returncode == 0:  # RecBole alone, where it can be imported without a patch
        assert runs[1].stdout.strip().splitlines()[-1] == "True"


# ------------------------------------------------------------------------------------------------------- pandas, scipy


def test_agg_len_gives_a_length_per_row():
    module = types.ModuleType("dataset")
    compat._pandas_agg_len(module)
    column = pd.Series([[1], [1, 2], []])
    assert list(module.len(column)) == [1, 2, 0]
    assert list(column.map(module.len)) == [1, 2, 0]


def test_tensors_do_not_share_the_read_only_arrays_of_a_frame():
    module = types.ModuleType("dataset")
    compat._pandas_read_only(module)
    numbers, mine = np.arange(3), np.arange(3)
    numbers.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = [module.torch.LongTensor(given) for given in (numbers, mine, [0, 1, 2])]
    for tensor in tensors:
        tensor[0] = 7
    assert (numbers[0], mine[0], tensors[0].dtype) == (0, 7, torch.int64)
    assert module.torch.FloatTensor([0.5]).dtype == torch.float32


def test_dok_update_sets_the_values():
    import recbole.model.abstract_recommender  # noqa: F401  (the patch waits for it)
    from scipy.sparse import dok_matrix

    matrix = dok_matrix((2, 3), dtype=np.float32)
    matrix._update({(0, 1): 1, (1, 2): 5})
    assert matrix.toarray().tolist() == [[0, 1, 0], [0, 0, 5]]
    assert (matrix > 0).sum() == 2


@pytest.mark.parametrize("size", [8, 14, 16, 19, 40])
def test_the_gradients_of_caser_are_those_of_double_precision(size):
    """Wrong without the patch where the processor has AVX-512."""
    from recbole.model.sequential_recommender.caser import Caser

    names = {"USER_ID_FIELD": "u", "ITEM_ID_FIELD": "i", "LIST_SUFFIX": "s", "ITEM_LIST_LENGTH_FIELD": "n"}
    sizes = {"MAX_ITEM_LIST_LENGTH": 40, "embedding_size": size, "nh": 8, "nv": 4, "dropout_prob": 0, "reg_weight": 0}
    config = {**names, **sizes, "NEG_PREFIX": "neg_", "device": "cpu", "loss_type": "CE"}
    torch.manual_seed(0)
    model = Caser(config, types.SimpleNamespace(user_num=9, num=lambda field: 20))
    batch = {"is": torch.randint(1, 20, (5, 40)), "u": torch.arange(5), "i": torch.arange(1, 6)}
    found, wanted = [], []
    for kind, grads in ((torch.float32, found), (torch.float64, wanted)):
        model.to(kind).zero_grad()
        model.calculate_loss(batch).backward()
        grads += [parameter.grad.double().clone() for parameter in model.parameters()]
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
