"""Every sequential and general model of RecBole, for one epoch, through this package's runner: which of them work.

    python experiments/recbole_models.py

runs each model in a process of its own on a cut of ml-100k (it comes with RecBole; no download) and writes
docs/recbole_models.md, the table, and docs/recbole_models.json, the figures. Models that worked before are taken from
the latter as long as the settings are the same, so an interrupted sweep goes on where it stopped; models named with
--models are run in any case.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

import recbole
import recbole.model.general_recommender
import recbole.model.sequential_recommender
from recbole.model.abstract_recommender import AbstractRecommender
from recbole_cut import COMMON, DATASET, EXTRA, LONGEST, REGENERATED, write_cut

from recbole_raserec.evaluation.protocols import SEEN_KEPT, SEEN_REMOVED
from recbole_raserec.quick_start import run_recbole_raserec
from recbole_raserec.storage.checkpoint import read_manifest
from recbole_raserec.storage.files import read_json, replacing, write_json

ROOT = Path(__file__).resolve().parents[1]
OURS = dict.fromkeys(("SASRec", "DuoRec", "GRU4Rec", "NARM", "BERT4Rec", "FEARec", "BSARec", "RaSeRec"), "sequential")
KINDS = {
    "sequential": recbole.model.sequential_recommender,
    "general": recbole.model.general_recommender,
}


def recbole_models() -> dict[str, str]:
    """{name: kind} of the sequential and general models of the installed RecBole.

    RecBole looks a model up in the module that has its name in lower case; a class counts if it is found that way.
    """
    models = {}
    for kind, package in KINDS.items():
        for module in pkgutil.iter_modules(package.__path__):
            members = vars(importlib.import_module(f"{package.__name__}.{module.name}")).items()
            for name, member in members:
                own = inspect.isclass(member) and issubclass(member, AbstractRecommender)
                if own and name.lower() == module.name and member.__name__ == name:
                    models[name] = kind
    return models


def all_models() -> dict[str, str]:
    """{name: kind} of the table's rows: RecBole's models and this package's."""
    return dict(sorted({**OURS, **recbole_models()}.items(), key=lambda row: (row[1] == "general", row[0].lower())))


def run_model(name: str, data_path: Path, work: Path, options: Optional[dict[str, Any]] = None) -> dict[str, Any]:
    """Train and test one model in this process: all runs of one that trains in stages. Then do the last run again,
    which takes the finished one up from its checkpoint, and hold its figures against the first.

    Args:
        name: of the model.
        data_path: the directory that :func:`write_cut` wrote into.
        work: directory of the checkpoints, one below it for each stage.
        options: options over those of the table.

    Returns:
        {"seconds": processor time of the training runs, protocol: NDCG@10 on the test split}.

    Raises:
        RuntimeError: the figures differ.
    """
    extra = EXTRA.get(name, {})
    stages = extra if isinstance(extra, tuple) else (extra,)
    started = time.process_time()
    for number, stage in enumerate(stages):
        saved = Path(work) / f"saved-{number}"
        given = {**COMMON, **stage, **(options or {}), "data_path": str(data_path), "checkpoint_dir": str(saved)}
        if number:
            runs = sorted((Path(work) / f"saved-{number - 1}").glob(f"{name}-{DATASET}-*"))
            plain = [path for path in runs if not read_manifest(path)["options"].get("regeneration")]
            given["pre_model_path"] = str(plain[0])
        record = run_recbole_raserec(model=name, dataset=DATASET, config_dict=given, argv=[])
    seconds = round(time.process_time() - started, 3)
    figures = record["metrics"].get("ours", record["metrics"].get("base"))["test"]
    again = run_recbole_raserec(model=name, dataset=DATASET, config_dict=given, argv=[])
    if again["metrics"] != record["metrics"]:
        different = again["metrics"].get("ours", again["metrics"].get("base"))["test"]
        raise RuntimeError(f"reloaded from its checkpoint it scores {different}, trained it scored {figures}")
    return {"seconds": seconds, **{protocol: figures[protocol]["ndcg@10"] for protocol in (SEEN_KEPT, SEEN_REMOVED)}}


def _child(name: str, data_path: Path, work: Path, answer: Path, options: dict[str, Any]) -> None:
    """The process of one model: its output goes to a file, its result or error to `answer`."""
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    log = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        result = {"works": True, **run_model(name, data_path, work, options)}
    except BaseException as error:
        traceback.print_exc()
        result = {"works": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    write_json(answer, result)


def run_apart(name: str, data_path: Path, work: Path, timeout: float, options: dict[str, Any]) -> dict[str, Any]:
    """:func:`run_model` in a process of its own, ended after `timeout` seconds: {"works": bool, ...}."""
    # A forked process has RecBole's modules already, whose import takes longer than many a model.
    context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else "spawn")
    answer = work / "answer.json"
    process = context.Process(target=_child, args=(name, data_path, work, answer, options))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return {"works": False, "error": f"not done after {timeout:.0f} seconds"}
    return read_json(answer) if answer.exists() else {"works": False, "error": f"ended with code {process.exitcode}"}


def sweep(
    models: Iterable[str], settings: dict[str, Any], figures: Path, work: Path, jobs: int, timeout: float
) -> dict[str, Any]:
    """Run the models, add each result to the file `figures` as it comes, and return all of them."""
    results = known_results(figures, settings)
    options = {name: value for name, value in settings["options"].items() if name in REGENERATED}
    data_path = work / "data"
    write_cut(data_path, settings["users"])

    def one(name: str) -> None:
        results[name] = run_apart(name, data_path, work / name, timeout, options)
        write_json(figures, {"settings": settings, "models": {key: results[key] for key in sorted(results)}})
        verdict = "works" if results[name]["works"] else results[name]["error"]
        print(f"{name:12} {results[name].get('seconds', ''):>6} {verdict}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, models))
    return results


def known_results(figures: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a former sweep of the same settings found; nothing if there was none."""
    if not figures.exists():
        return {}
    former = read_json(figures)
    return former["models"] if former["settings"] == json.loads(json.dumps(settings)) else {}


def note(name: str, result: dict[str, Any]) -> str:
    """The last column: why a model does not work, whose class it is, the options it was given."""
    parts = [] if result["works"] else [result["error"].replace("|", "\\|")]
    if name in OURS:
        parts.append("this package's")
    extra = EXTRA.get(name, {})
    if isinstance(extra, tuple):
        parts.append(f"{len(extra)} runs, each from the one before: " + ", ".join(s["train_stage"] for s in extra))
        extra = {key: value for key, value in extra[0].items() if key != "train_stage"}
    shown = []
    for key, value in extra.items():
        if key == "load_col":
            shown.append("load_col with " + ", ".join(f".{suffix}" for suffix in value if suffix != "inter"))
        else:
            shown.append(f"{key}: {json.dumps(value)}")
    if shown:
        parts.append(f"`{'; '.join(shown)}`")
    if "preload_weight" in extra:
        parts.append("random vectors")
    return "; ".join(parts)


def table(results: dict[str, Any], settings: dict[str, Any]) -> str:
    """The page with the table."""
    models = {name: kind for name, kind in all_models().items() if name in results}
    works = sum(results[name]["works"] for name in models)
    regenerated = settings["options"].get("regeneration")
    if regenerated:
        title, what = "# RecBole's sequential models on regenerated data", "Each sequential model"
        how, flag = " with `regeneration: true` (mined and generated patterns as training rows)", " --regeneration"
    else:
        title, what = "# RecBole's models through this runner", "Each sequential and each general model"
        how = flag = ""
    given = ", ".join(f"`{name}: {value}`" for name, value in sorted(settings["options"].items()))
    lines = [
        title,
        "",
        f"{what} of RecBole {settings['recbole']}, and this package's own but for DARec, trained for",
        f"one epoch by `run_recbole_raserec`{how} on the last {LONGEST} interactions of the first",
        f"{settings['users']} users of ml-100k (5-core, leave-one-out, all items ranked):",
        f"**{works} of {len(models)} work**. A model works if it trains, is evaluated and saved, and gives the same",
        "figures when its finished run is taken up again; the figures themselves, after one epoch on a cut, say",
        f"nothing of its worth. Options of all: {given}. Remade by",
        "",
        f"    python experiments/recbole_models.py --users={settings['users']}{flag}",
        "",
        "- NDCG@10 on the test split, with the seen items kept in the ranking and removed from it.",
        "- Seconds: processor time of the run, data set and evaluation included.",
        "- Note: why not; or the options given beyond the model's defaults.",
        "",
        "| Model | Kind | Works | Seconds | NDCG@10 seen kept | NDCG@10 seen removed | Note |",
        "|---|---|---|--:|--:|--:|---|",
    ]
    for name, kind in models.items():
        result = results[name]
        numbers = ["", "", ""]
        if result["works"]:
            numbers = [f"{result['seconds']:.1f}", f"{result[SEEN_KEPT]:.4f}", f"{result[SEEN_REMOVED]:.4f}"]
        cells = [name, kind, "yes" if result["works"] else "no", *numbers, note(name, result)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="", help="run these (A,B,...) whatever is known; default: all not known")
    parser.add_argument("--users", type=int, default=100, help="users of the cut")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a model may take")
    parser.add_argument("--regeneration", action="store_true", help="the sequential ones, on regenerated data")
    parser.add_argument("--output", help="without .md and .json; default: a page of docs/")
    parser.add_argument("--work", help="keep checkpoints and the output of each model in this directory")
    args = parser.parse_args(argv)

    options = REGENERATED if args.regeneration else {}
    args.output = args.output or str(ROOT / "docs" / ("regenerated_models" if options else "recbole_models"))
    settings = {"recbole": recbole.__version__, "users": args.users, "options": {**COMMON, **options}}
    figures, page = Path(f"{args.output}.json").resolve(), Path(f"{args.output}.md").resolve()
    known = {name: kind for name, kind in all_models().items() if not options or kind == "sequential"}
    asked = [name for name in args.models.split(",") if name]
    unknown = [name for name in asked if name not in known]
    if unknown:
        parser.error(f"--models: {', '.join(unknown)} is no sequential or general model; choose of {', '.join(known)}")
    done = known_results(figures, settings)
    models = asked or [name for name in known if not done.get(name, {}).get("works")]
    with contextlib.ExitStack() as stack:
        work = args.work or stack.enter_context(tempfile.TemporaryDirectory())
        results = sweep(models, settings, figures, Path(work).resolve(), args.jobs, args.timeout)
    with replacing(page) as part:
        part.write_text(table(results, settings), encoding="utf-8")
    failed = [name for name in models if not results[name]["works"]]
    print(f"{len(models) - len(failed)} of {len(models)} work; table: {page}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
