"""Shared fixtures: small generated data sets and quick configurations."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import recbole_raserec  # noqa: F401  RecBole is patched before a test imports it

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    """Small tensors are slower on many threads."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """Run in an empty directory: RecBole writes logs below the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def real_data():
    """Directory of the real data sets; the test is skipped where they are absent."""
    path = Path(os.environ.get("RASEREC_DATA", ROOT.parent / "shared" / "datasets"))
    if not (path / "amazon-beauty" / "amazon-beauty.inter").is_file():
        pytest.skip(f"amazon-beauty is not below {path}; set RASEREC_DATA to the directory that holds it")
    return path


def write_log(directory: Path, name: str, rows) -> Path:
    """Write (user, item, time) rows as `<directory>/<name>/<name>.inter`."""
    path = Path(directory) / name / f"{name}.inter"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    lines += [f"u{u}\ti{i}\t{t}" for u, i, t in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def random_log(seed: int, users: int = 30, items: int = 25, longest: int = 14, repeats: bool = True):
    """Random histories of 3 to `longest` items; rows in random order."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        length = int(rng.integers(3, longest + 1))
        picks = rng.integers(0, items, length) if repeats else rng.permutation(items)[:length]
        times = rng.permutation(1000)[:length]
        rows += [(user, int(i), int(t)) for i, t in zip(picks, np.sort(times))]
    order = rng.permutation(len(rows))
    return [rows[k] for k in order]


@pytest.fixture
def small_config(workdir):
    """Factory: a Config on a generated log. `small_config("SASRec", seed=1, hidden_size=16, ...)`."""
    from recbole_raserec.config.config import Config

    def build(model: str, log_seed: int = 0, log=None, **options):
        write_log(workdir, "tiny", random_log(log_seed) if log is None else log)
        base = {
            "data_path": str(workdir),
            "MAX_ITEM_LIST_LENGTH": 8,
            "show_progress": False,
            "epochs": 2,
            "train_batch_size": 32,
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "checkpoint_dir": str(workdir / "saved"),
            "state": "WARNING",
        }
        return Config(model, "tiny", config_dict={**base, **options}, argv=[])

    return build


@pytest.fixture(autouse=True)
def _keep_visible_devices(monkeypatch):
    # RecBole writes the variable at every configuration; it must not leak from these tests.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))


@pytest.fixture
def extra():
    """Three regenerated rows."""
    from recbole_raserec.data.regenerated import Regenerated

    return Regenerated(
        np.array([3, 4, 5, 1, 2, 7, 7, 7, 7, 8, 9, 10, 11, 12]), np.array([0, 3, 5, 14]), np.array([0, 2, 5]),
        np.array([1, 2, 2], np.uint8),
    )  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    """Runs a pipeline with stage i on a small log."""
    from pipeline_helpers import run
    from regeneration_helpers import QUICK

    write_log(tmp_path, "tiny", random_log(0))

    def build(model="RaSeRec", **options):
        given_ = {**QUICK, "MAX_ITEM_LIST_LENGTH": 8, "data_path": str(tmp_path), **options}
        if model == "RaSeRec":
            given_ = {"backbone": "SASRec", "ram_epochs": 1, "ram_inner_size": 16, "top_k": 4, **given_}
        return run(tmp_path, model, "tiny", **given_)

    return build


@pytest.fixture(params=["_native_avx512", "_native_avx2"])
def flavour(request, monkeypatch):
    """Each library of compiled kernels that this processor runs."""
    from recbole_raserec.kernels import native

    assert request.param in native.NAMES
    if not native._runs(request.param):
        pytest.skip(f"{request.param} does not run here")
    monkeypatch.setattr(native, "_runs", lambda name: name == request.param)
    native.loaded.cache_clear()
    yield native.loaded()
    native.loaded.cache_clear()


@pytest.fixture(scope="session")
def planted_run(tmp_path_factory):
    """The run of PLANTED, once a session."""
    from pipeline_helpers import PLANTED, run

    return run(tmp_path_factory.mktemp("planted-run"), **PLANTED, result_file="result.json")


@pytest.fixture
def tiny_run(tmp_path):
    """Factory of runs on a generated log, all below one directory."""
    from pipeline_helpers import TINY, run, small

    write_log(tmp_path, "tiny", random_log(0))

    def build(model="RaSeRec", **options):
        reader = options.get("backbone", TINY["backbone"]) if model == "RaSeRec" else model
        given = {**(TINY if model == "RaSeRec" else {"epochs": 1}), **small(reader), **options}
        return run(tmp_path, model, "tiny", data_path=str(tmp_path), **given)

    return build


@pytest.fixture(scope="module")
def served(planted_run, tmp_path_factory):
    """A recommender behind an application: what reads only is asked of this one."""
    from serve_helpers import application

    with application(planted_run, tmp_path_factory.mktemp("served") / "checkpoint") as made:
        yield made


@pytest.fixture
def stand_in(workdir, monkeypatch):
    """What a comparison starts in place of its runs."""
    from compare_helpers import prepared

    return prepared(workdir, monkeypatch)


@pytest.fixture
def directory(planted_run, tmp_path):
    """A copy of the shared run's checkpoint, for a test that changes it."""
    shutil.copytree(planted_run.ours.directory, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def convert(tmp_path):
    """Write `text` to a file, convert it, and return (summary, table of the result)."""
    from convert_helpers import as_recbole_reads

    from recbole_raserec.data.preparation.convert import Options, prepare

    def run(text, form="ratings", **options):
        source = tmp_path / "raw.txt"
        source.write_bytes(text if isinstance(text, bytes) else text.encode())
        given = {"input": str(source), "format": form, "output": str(tmp_path / "out"), "name": "d", **options}
        summary = prepare(Options(**given))
        return summary, as_recbole_reads(summary.path)

    return run
