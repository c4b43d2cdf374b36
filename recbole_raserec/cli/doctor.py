"""The command `doctor`: what this installation consists of, what it makes use of, and whether it works; or whether a
checkpoint is what was written."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

import recbole_raserec
from recbole_raserec.compat import all_patches
from recbole_raserec.errors import ConfigError, RaSeRecError

#: What is reported, needed first.
PACKAGES = (
    "recbole", "torch", "numpy", "pandas", "scipy", "faiss-cpu", "faiss-gpu", "safetensors", "setuptools", "ray",
)  # fmt: skip
#: Extra of this package -> a module that only it brings.
EXTRAS = {
    "baselines": "kmeans_pytorch", "docs": "mkdocs", "frames": "polars", "llm": "transformers", "plots": "matplotlib",
    "serve": "fastapi", "tune": "optuna",
}  # fmt: skip


class Check(NamedTuple):
    """One part of the self-test: whether it `passed`, what it found, how long it took."""

    name: str
    passed: bool
    found: str
    seconds: float

    def __str__(self) -> str:
        return f"self-test {self.name}: {'ok' if self.passed else 'FAILED'} ({self.found}, {self.seconds:.1f} s)"


@click.command(short_help="report the installation, and test it in ten seconds; or check a checkpoint")
@click.argument("directory", required=False)
@click.option("--repair", is_flag=True, help="replace a damaged journal of DIRECTORY by what can be read of it")
@click.option("--json", "as_json", is_flag=True, help="print it as JSON")
@click.option("--no_self_test", is_flag=True, help="report only")
def doctor(directory: str | None, repair: bool, as_json: bool, no_self_test: bool) -> None:
    """Report the installation and test it. With DIRECTORY, a checkpoint: check its files and its journal of updates."""
    if directory or repair:
        from recbole_raserec.serving import check_directory

        if not directory:
            raise ConfigError(["--repair: needs the directory of a checkpoint; recbole-raserec doctor DIR --repair"])
        click.echo("\n".join(check_directory(Path(directory), repair)))
        return
    found, checks = environment(), []
    if not as_json:
        click.echo(text(found))
    for check in [] if no_self_test else self_test():
        checks.append(check)
        if not as_json:
            click.echo(str(check))
    if as_json:
        click.echo(json.dumps({**found, "self_test": [check._asdict() for check in checks]}, indent=2))
    if failed := [check.name for check in checks if not check.passed]:
        remedy = "install the package again, or report what is above."
        raise RaSeRecError(f"self-test failed: {', '.join(failed)}; {remedy}")


def environment() -> dict[str, Any]:
    """Versions, processor, GPU, faiss, kernels, patches and extras, JSON-able."""
    import faiss
    import torch

    from recbole_raserec.kernels import has_cross_entropy, loaded

    kernels = loaded()
    capability = getattr(getattr(torch.backends, "cpu", None), "get_cpu_capability", lambda: "unknown")()
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "recbole-raserec": recbole_raserec.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "extras": {name: importlib.util.find_spec(module) is not None for name, module in EXTRAS.items()},
        "cpu": {
            "name": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instructions": capability,
            "kernels": None if kernels is None else kernels.name.removeprefix("_native_"),
            "bfloat16": has_cross_entropy(),
        },
        "gpu": [{"name": gpu.name, "memory_gb": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
        "faiss": {"options": faiss.get_compile_options().strip(), "gpus": getattr(faiss, "get_num_gpus", lambda: 0)()},
        "patches": {patch.name: {"active": patch.active, "reason": patch.reason} for patch in all_patches()},
    }


def _processor() -> str:
    """The processor's name where the system tells it, else the kind of machine."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def text(found: dict[str, Any]) -> str:
    """`environment` for a terminal."""
    cpu, faiss = found["cpu"], found["faiss"]
    kernels = f"compiled for {cpu['kernels']}" if cpu["kernels"] else "none (torch takes their place; slower)"
    kernels += ", bfloat16 softmax" if cpu["bfloat16"] else ""
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_gb']} GiB)" for gpu in found["gpu"]) or "none"
    there, missing = ([name for name, has in found["extras"].items() if has == wanted] for wanted in (True, False))
    lines = [
        f"recbole-raserec {found['recbole-raserec']}, Python {found['python']}, {found['platform']}",
        "packages  " + ", ".join(f"{name} {version}" for name, version in found["packages"].items()),
        f"extras    {', '.join(there) or 'none'}" + (f"; not installed: {', '.join(missing)}" if missing else ""),
        f"CPU       {cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['instructions']}",
        f"kernels   {kernels}",
        f"GPU       {gpus}",
        f"faiss     {faiss['options'] or 'no options'}, {faiss['gpus']} GPUs",
        "patches of RecBole",
    ]
    for name, patch in found["patches"].items():
        reason = patch["reason"].split(". ")[0].rstrip(".")
        line = f"{'active' if patch['active'] else 'not needed':<10} {name}: {reason}"
        lines += textwrap.wrap(line, 110, initial_indent="  ", subsequent_indent=" " * 13)
    return "\n".join(lines)


def self_test() -> Iterator[Check]:
    """Kernels, search, and the whole pipeline on a small log, in some ten seconds."""
    for name, test in _TESTS.items():
        started = time.perf_counter()
        try:
            passed, found = test()
        except Exception as error:  # any error is what the test found
            place = traceback.extract_tb(error.__traceback__)[-1]
            passed, found = False, f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        yield Check(name, passed, found, time.perf_counter() - started)


def _kernels() -> tuple[bool, str]:
    import torch

    from recbole_raserec.kernels import has_cross_entropy, linear_cross_entropy

    torch.manual_seed(0)
    h, items, targets = torch.randn(40, 64), torch.randn(500, 64), torch.randint(1, 500, (40,))
    exact = torch.nn.functional.cross_entropy(h.double() @ items.double().t(), targets)
    gaps = {}
    for precision in ("float32", *(("bfloat16",) if has_cross_entropy() else ())):
        loss = linear_cross_entropy(h, items, targets, precision=precision)
        gaps[precision] = abs(float(loss) - float(exact)) / float(exact)
    passed = gaps["float32"] < 1e-5 and gaps.get("bfloat16", 0) < 1e-2
    return passed, "softmax loss off by " + ", ".join(f"{gap:.1e} in {name}" for name, gap in gaps.items())


def _search() -> tuple[bool, str]:
    import numpy as np

    from recbole_raserec.retrieval import MemoryBank

    rng = np.random.default_rng(0)
    keys = rng.standard_normal((5000, 32)).astype(np.float32)
    found = {}
    for kind in ("flat", "ivf", "hnsw"):
        bank = MemoryBank(32, "dot", kind, ivf_probes=64)
        bank.add(keys, np.ones(5000, np.int32), np.arange(5000, dtype=np.int32), np.ones(5000, np.int32))
        ids = bank.search(keys[:100], 10, None, None).ids
        exact = np.argsort(-(keys[:100] @ keys.T), axis=1)[:, :10]
        found[kind] = float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), exact.tolist())]))
    passed = found["flat"] > 0.999 and min(found.values()) > 0.8
    return passed, "recall@10 " + ", ".join(f"{kind} {value:.3f}" for kind, value in found.items())


def _pipeline() -> tuple[bool, str]:
    import numpy as np

    from recbole_raserec.serving import Recommender

    rng = np.random.default_rng(0)
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(150):
        start = rng.integers(40)
        rows += [f"u{user}\ti{(start + step) % 40}\t{step}" for step in range(rng.integers(6, 14))]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(os.chdir, os.getcwd())
        os.chdir(folder)  # RecBole's log files and what it opens go there
        (folder / "doctor").mkdir()
        (folder / "doctor" / "doctor.inter").write_text("\n".join(rows) + "\n", encoding="utf-8")
        options = {
            "data_path": str(folder), "checkpoint_dir": f"{folder}/saved", "show_progress": False, "state": "ERROR",
            "backbone": "SASRec", "hidden_size": 32, "inner_size": 64, "epochs": 5, "ram_epochs": 1, "use_gpu": False,
            "training": "packed", "learning_rate": 0.01, "log_wandb": False,
        }  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            record = recbole_raserec.run_recbole_raserec("RaSeRec", "doctor", config_dict=options, argv=[])
        value = record["metrics"]["ours"]["test"]["seen_kept"]["ndcg@10"]
        (directory,) = folder.glob("saved/RaSeRec-*")
        recommender = Recommender.load(directory, "cpu")
        reason = recommender.explain([f"i{number}" for number in range(5)], 1).items[0]
        recommender.update([("new", "i1"), ("new", "i2"), ("new", "i3")])
        after = recommender.recommend(users=["new"], k=3)[0]
    passed = value > 0.3 and reason.backbone + reason.retrieval == reason.score and len(after) == 3
    return passed, f"trained, NDCG@10 {value:.3f}; reloaded, explained, updated: i1 i2 i3 -> {' '.join(after)}"


_TESTS: dict[str, Callable[[], tuple[bool, str]]] = {"kernels": _kernels, "search": _search, "pipeline": _pipeline}
