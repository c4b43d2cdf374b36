"""This package on a GPU: what it computes against the CPU, its speed against RecBole and RecTools on the same card.

    python benchmarks/gpu.py --data_path=DIR
    python benchmarks/gpu.py --data_path=DIR --only=tests,search --minutes=3 --output=DIR

Sections: `tests` (results against the CPU's, each with its tolerance), `epochs` (SASRec, DuoRec, BSARec and GRU4Rec of
amazon-beauty, in float32 and bfloat16), `search` (faiss on the CPU beside torch on the card), `quality` (a whole run
against the CPU's figures) and `compile` (epochs through torch.compile). Each writes its results when it ends; at the
deadline the rest is skipped, and named. Each model of each side has a process of its own, and what follows a fault a
fresh one: a row says that it failed, and the rest goes on. Without a GPU the program says what it would do, and ends.
`--device=cpu` runs all of it on the CPU, to try it out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional, Union

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import BATCH, config_of, recbole_loaders  # noqa: E402

Row = dict[str, Any]

#: What a part does: what a row is about, and what gives the row, or several.
Job = tuple[Row, Callable[[], Union[Row, list[Row]]]]

#: Section -> its parts with their limits in seconds; and what it does.
PARTS = {
    "tests": {"checks": 150},
    "epochs": {"ours": 120, "recbole": 80, "rectools": 60},
    "search": {"search": 60},
    "quality": {"quality": 120},
    "compile": {"compiled": 90},
}
ABOUT = {
    "tests": "compare ranking, losses, the retrieval module, search, models, training, data-parallel steps and whole "
    "runs on the GPU with the CPU",
    "epochs": "time epochs of SASRec, DuoRec, BSARec and GRU4Rec against RecBole and RecTools, float32 and bfloat16",
    "search": "time exact searches by faiss on the CPU and by torch on the GPU",
    "quality": "train SASRec and search its memory on the GPU, and compare NDCG@10 with the CPU's figures",
    "compile": "time epochs of SASRec through torch.compile",
}
#: Seconds after which a timed epoch is cut short and scaled.
LIMIT = 6.0
#: Model -> form of training, and options. DuoRec's contrast needs a window for each target.
MODELS: dict[str, dict[str, Any]] = {
    "SASRec": {"training": "packed"},
    "DuoRec": {"training": "prefix", "contrast": "us_x"},
    "BSARec": {"training": "packed"},
    "GRU4Rec": {"training": "packed"},
}
PRECISIONS = ("float32", "bfloat16")
#: Part -> its models, where each has a process of its own.
SEPARATE = {"ours": tuple(MODELS), "recbole": ("SASRec", "GRU4Rec", "DuoRec")}
FAILED = 3  # status of a process one of whose jobs failed
FAULTS = 8  # of a process, after which it is not started again
#: Entries of a memory, and numbers of queries at a time.
SEARCHES = ((131_413, (1, 32, 1024, 20_000)), (1_000_000, (1, 32, 1024)))
#: Largest relative difference of the figures of one seed from the mean of the CPU's three.
QUALITY = 0.04


# ------------------------------------------------------------------ sections, each in a process of its own


def checks(args: argparse.Namespace) -> Iterator[Job]:
    """Results of the device against the CPU's."""
    from benchmarks.gpu_checks import CHECKS

    def run(check: Any) -> Row:
        started = time.perf_counter()
        error, tolerance = check(args.device, args.data_path)
        seconds = round(time.perf_counter() - started, 2)
        return {"ok": bool(error <= tolerance), "error": error, "tolerance": tolerance, "seconds": seconds}

    for name, check in CHECKS.items():
        if args.check in name:
            yield {"check": name}, partial(run, check)


def timed(
    net: Any, loss: Callable[[Any], Any], loader: Any, args: argparse.Namespace, amp: bool, warm: float, fused: bool
) -> Row:
    """Seconds of an epoch as RecBole's Trainer makes it, after `warm` epochs; the peak of the card's memory."""
    import torch

    cuda = args.device == "cuda"
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, **({"fused": True} if fused else {}))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    whole = len(loader)

    def epoch(batches: Iterable[Any]) -> tuple[float, int, float]:
        count, total, started = 0, 0.0, time.perf_counter()
        for batch in batches:
            batch = batch.to(args.device)
            optimizer.zero_grad()
            with torch.autocast(args.device, torch.bfloat16, enabled=amp):
                value = loss(batch)
            total += value.item()
            value.backward()
            optimizer.step()
            count += 1
            if time.perf_counter() - started > LIMIT:
                break
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started, count, total / max(count, 1)

    first = [epoch(itertools.islice(loader, int(whole * warm)) if warm < 1 else loader)]
    first += [epoch(loader) for _ in range(int(warm) - 1)]
    seconds, count, mean = epoch(loader)
    row = {"seconds": seconds * whole / count, "batches": whole, "timed": count, "loss": mean, "first": first[0][0]}
    if cuda:
        row["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def ours(args: argparse.Namespace) -> Iterator[Job]:
    """Epochs of this package: the model's usual form, and of SASRec one window per target."""
    forms = [MODELS[args.model]] + ([{"training": "prefix"}] if args.model == "SASRec" else [])
    for options, precision in itertools.product(forms, PRECISIONS):
        about = {"model": args.model, "side": "ours", "precision": precision, "form": options["training"]}
        yield about, partial(our_epoch, args, args.model, options, precision)


def our_epoch(
    args: argparse.Namespace, model: str, options: dict[str, Any], precision: str, compiled: bool = False
) -> Row:
    import torch

    from recbole_raserec.config import get_model
    from recbole_raserec.data.splits import prepare_data

    softmax = {"softmax_precision": "float32" if precision == "float32" else "auto"}
    config = config_of(model, args.data_path, args.dataset, train_batch_size=BATCH, **softmax, **options)
    splits = prepare_data(config)
    torch.manual_seed(0)
    net = get_model(model)(config, splits.train._dataset).to(args.device)
    net.train()
    if compiled:
        net._run_layers = torch.compile(net._run_layers, dynamic=True)
    return timed(net, net.calculate_loss, splits.train, args, precision == "bfloat16", 2, fused=True)


def recbole(args: argparse.Namespace) -> Iterator[Job]:
    """Epochs of RecBole's own classes on its own batches; DuoRec, which it lacks, as its encoder and torch's loss."""
    from recbole.utils import get_model

    from benchmarks.epochs import padded_duorec

    if args.model == "DuoRec":
        net, train = padded_duorec(args.data_path, args.dataset)
    else:
        config = config_of(args.model, args.data_path, args.dataset, train_batch_size=BATCH)
        train, _, _ = recbole_loaders(config)
        net = get_model(args.model)(config, train._dataset)
    net.to(args.device).train()
    for precision in PRECISIONS:
        about = {"model": args.model, "side": "RecBole", "precision": precision, "form": "prefix, padded"}
        yield about, partial(timed, net, net.calculate_loss, train, args, precision == "bfloat16", 0.1, False)


def rectools(args: argparse.Namespace) -> Iterator[Job]:
    """Epochs of RecTools' SASRec: all positions of a history in one pass, softmax loss, as many targets a step."""
    import numpy as np
    import pandas as pd
    import torch
    from pytorch_lightning import Callback, Trainer
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    unique = pd.unique  # pandas 3 takes no tuples, of which RecTools 0.19 makes use
    pd.unique = lambda values: unique(np.asarray(values, dtype=object) if isinstance(values, tuple) else values)
    path = Path(args.data_path) / args.dataset / f"{args.dataset}.inter"
    log = pd.read_csv(path, sep="\t")
    log.columns = [name.split(":")[0] for name in log.columns]
    log = log.sort_values(["user_id", "timestamp"], kind="stable")
    log = log[log.groupby("user_id").cumcount(ascending=False) >= 2]  # the last two are validation and test
    ids = {name: pd.factorize(log[f"{name}_id"])[0] + 1 for name in ("user", "item")}
    columns = {Columns.User: ids["user"], Columns.Item: ids["item"], Columns.Weight: 1.0}
    dataset = Dataset.construct(
        pd.DataFrame({**columns, Columns.Datetime: pd.to_datetime(log["timestamp"].to_numpy("int64"), unit="s")})
    )
    users = log["user_id"].nunique()
    rows = round(BATCH * users / (len(log) - users))
    cuda = args.device == "cuda"

    seconds: list[float] = []  # of each epoch; outside of the callback, which RecTools copies

    class Clock(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self.started = time.perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)

    def run(precision: str) -> Row:
        seconds.clear()
        if cuda:
            torch.cuda.reset_peak_memory_stats()

        def trainer() -> Any:
            return Trainer(
                max_epochs=3, accelerator="gpu" if cuda else "cpu", devices=1, logger=False, callbacks=[Clock()],
                precision="32-true" if precision == "float32" else "bf16-mixed", enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip

        model = SASRecModel(
            n_blocks=2, n_heads=2, n_factors=64, session_max_len=50, dropout_rate=0.5, loss="softmax", lr=1e-3,
            batch_size=rows, dataloader_num_workers=0, get_trainer_func=trainer,
        )  # fmt: skip
        model.fit(dataset)
        peak = {"peak_mb": torch.cuda.max_memory_allocated() / 2**20} if cuda else {}
        return {"seconds": min(seconds[1:]), "first": seconds[0], "batches": -(-users // rows), **peak}

    for precision in PRECISIONS:
        about = {"model": "SASRec", "side": "RecTools", "precision": precision, "form": f"{rows} histories a step"}
        yield about, partial(run, precision)


def compiled(args: argparse.Namespace) -> Iterator[Job]:
    """Epochs with the layers through torch.compile, which takes its time before."""
    for precision in PRECISIONS:
        about = {"model": "SASRec", "side": "ours", "precision": precision, "form": "packed, torch.compile"}
        yield about, partial(our_epoch, args, "SASRec", MODELS["SASRec"], precision, True)


def search(args: argparse.Namespace) -> Iterator[Job]:
    """The guarded exact search of queries on the CPU (faiss) and on the device (torch)."""
    for entries, sizes in SEARCHES if args.device == "cuda" else ((20_000, (1, 100)),):
        yield {"entries": entries}, partial(searches, args.device, entries, sizes)


def searches(device: str, entries: int, sizes: tuple[int, ...]) -> list[Row]:
    import torch

    from benchmarks.gpu_checks import bank_of
    from recbole_raserec.retrieval.index import FlatIndex

    bank, queries, users, positions = bank_of(entries, max(sizes))
    here = bank._prepare()._vectors
    there = torch.tensor(here, device=device)
    rows = []
    for asked in sizes:
        part, row, found = slice(0, asked), {"queries": asked}, {}
        for name, given in (("faiss", queries[part]), ("torch", torch.from_numpy(queries[part]).to(device))):
            row[f"{name}_s"], found[name] = best_of(bank.search, given, 20, users[part], positions[part])
        for name, index in (("faiss", FlatIndex(here)), ("torch", FlatIndex(here, there))):
            row[f"{name}_index_s"], _ = best_of(index.search, queries[part], 32)
        row["same"] = float((found["faiss"].ids == found["torch"].ids).mean())
        rows.append({**row, "ratio": row["faiss_s"] / row["torch_s"]})
    return rows


def best_of(do: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    """The shortest time of three calls after a first one, and the last result."""
    result, seconds = do(*given), []
    for _ in range(3):
        started = time.perf_counter()
        result = do(*given)
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > 6:
            break
    return min(seconds), result


def quality(args: argparse.Namespace) -> Iterator[Job]:
    """SASRec trained to its end, and its neighbours' head, seed 2020; beside the CPU's mean of three seeds."""
    yield {}, partial(compared_run, args)


def compared_run(args: argparse.Namespace) -> list[Row]:
    from recbole_raserec.quick_start import run_recbole_raserec

    known = json.loads((ROOT / "results/comparison_amazon-beauty.json").read_text(encoding="utf-8"))
    means = {row["model"]: row["metrics"] for row in known["datasets"]["amazon-beauty"]["rows"]}
    wanted = {
        "base": means["SASRec:training=packed"], "ours": means["RaSeRec:backbone=SASRec:training=packed:head=knn"],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        options = {"backbone": "SASRec", "training": "packed", "head": "knn", "data_path": args.data_path}
        options.update(checkpoint_dir=directory, show_progress=False, state="ERROR", use_gpu=args.device == "cuda")
        if args.dataset == "planted":
            options.update(epochs=2)
        started = time.perf_counter()
        record = run_recbole_raserec("RaSeRec", args.dataset, config_dict=options, argv=[])
        seconds = time.perf_counter() - started
    rows = []
    for name, label in (("base", "SASRec, packed"), ("ours", "RaSeRec over it, kNN head")):
        row: Row = {"model": label, "seconds": seconds, "ok": True}
        for protocol, values in record["metrics"][name]["test"].items():
            found, cpu = values["ndcg@10"], wanted[name][protocol]["ndcg@10"]["mean"]
            row.update({protocol: found, f"{protocol}_cpu": cpu})
            row["ok"] &= abs(found - cpu) <= QUALITY * cpu
        rows.append(row)
    return rows


WORK: dict[str, Callable[[argparse.Namespace], Iterator[Job]]] = {
    "checks": checks, "ours": ours, "recbole": recbole, "rectools": rectools, "compiled": compiled, "search": search,
    "quality": quality,
}  # fmt: skip


def work(args: argparse.Namespace) -> None:
    """Do the jobs of a part after the first `skip` ones, up to the first that fails; print what they give."""
    for number, (about, do) in enumerate(WORK[args.worker](args)):
        if number < args.skip:
            continue
        print("JOB " + json.dumps(about), flush=True)
        try:
            found = do()
        except Exception as error:  # what a device's fault leaves behind could make the next ones fail
            row = {**about, "ok": False, "failed": f"{type(error).__name__}: {error}"[:600], "trace": causes(error)}
            print("ROW " + json.dumps(row), flush=True)
            sys.exit(FAILED)
        for row in found if isinstance(found, list) else [found]:
            print("ROW " + json.dumps({**about, **row}), flush=True)
        print("DONE", flush=True)


def causes(error: Optional[BaseException]) -> str:
    """The last frames of an error and of those before it, the first cause first."""
    found = []
    while error is not None and len(found) < 4:
        frames = "".join(traceback.format_tb(error.__traceback__, limit=-4))
        found.append(f"{frames}{type(error).__name__}: {error}"[-1500:])
        error = error.__cause__ or error.__context__
    return "\n\n".join(reversed(found))


# ------------------------------------------------------------------ the program


def main() -> None:
    """Run the sections, or say what they would do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", default="dataset", help="directory that contains amazon-beauty/")
    parser.add_argument("--dataset", default="amazon-beauty")
    parser.add_argument("--only", default=",".join(PARTS), help="sections, by comma")
    parser.add_argument("--parts", default="", help="parts of them, by comma: " + ", ".join(WORK))
    parser.add_argument("--check", default="", help="only the tests with this in their names")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which everything ends")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="directory of gpu.json and gpu.md")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--worker", choices=sorted(WORK), help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    import torch

    sections = [name for name in args.only.split(",") if name]
    if unknown := set(sections) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("No GPU: torch sees none here. On one this would:")
        for name in sections:
            print(f"- {name}: {ABOUT[name]}. Skipped.")
        print("The code paths that a GPU takes are tested without one in tests/test_gpu_paths.py.")
        return
    deadline = time.monotonic() + 60 * args.minutes
    record: Row = {"command": "python benchmarks/gpu.py " + " ".join(sys.argv[1:]), **environment(args)}
    record.update(sections={}, skipped=[])
    for section in sections:
        rows: list[Row] = []
        record["sections"][section] = rows
        for part, limit in PARTS[section].items():
            if args.parts and part not in args.parts.split(","):
                continue
            left = deadline - time.monotonic()
            if left < 10:
                record["skipped"].append(f"{section}: {part} (no time left)")
                continue
            started = time.monotonic()
            until = min(started + limit, deadline - 2)
            for model in SEPARATE.get(part, ("",)):
                if ended := run_part(part, args, model, until, rows):
                    record["skipped"].append(f"{section}: {part} {model}".rstrip() + f" ({ended})")
            print(f"-- {section}: {part} took {time.monotonic() - started:.0f} s", flush=True)
            write(record, args.output)
    print(page(record))


def run_part(part: str, args: argparse.Namespace, model: str, until: float, rows: list[Row]) -> Optional[str]:
    """Add the rows of a part's model, each fault in a process of its own; returns why some are missing, or None."""
    done = 0
    for _ in range(FAULTS):
        command = [sys.executable, __file__, "--worker", part, "--device", args.device, "--data_path", args.data_path]
        command += ["--dataset", args.dataset, "--check", args.check, "--model", model, "--skip", str(done)]
        if until - time.monotonic() < 1:
            return "no time left"
        begun, failed = None, False
        with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryDirectory() as directory:  # RecBole logs there
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=directory)
            stop = threading.Timer(until - time.monotonic(), process.kill)
            stop.start()
            assert process.stdout is not None
            for line in process.stdout:
                kind, _, text = line.partition(" ")
                if kind == "JOB":
                    begun = json.loads(text)
                elif kind == "ROW":
                    rows.append(json.loads(text))
                    failed = "failed" in rows[-1]
                    print(shown(rows[-1]), flush=True)
                elif line == "DONE\n":
                    begun, done = None, done + 1
            code = process.wait()
            timed_out = not stop.is_alive()
            stop.cancel()
            if code == 0:
                return None
            if timed_out:
                return "ended: its time was up"
            errors.seek(0)
            told = errors.read()[-1500:]
        if begun is None:  # it failed before its first job, or between two
            return f"failed: {told}"
        if not failed:
            rows.append({**begun, "ok": False, "failed": f"the process died, status {code}", "trace": told})
            print(shown(rows[-1]), flush=True)
        done += 1
    return f"given up after {FAULTS} faults"


def shown(row: Row) -> str:
    """A row in a line."""
    return "  " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


def environment(args: argparse.Namespace) -> Row:
    """The card and the versions."""
    import torch

    from recbole_raserec.evaluation.report import versions

    found: Row = {"versions": versions(), "cpu": platform.processor() or platform.machine()}
    found.update(threads=torch.get_num_threads(), card="none: on the CPU")
    if args.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found.update(card=card.name, card_gb=round(card.total_memory / 2**30), cuda=torch.version.cuda)
    return found


def write(record: Row, output: Path) -> None:
    """The results so far."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "gpu.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (output / "gpu.md").write_text(page(record), encoding="utf-8")


def page(record: Row) -> str:
    """The results as a Markdown page."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    lines = ["# On a GPU", "", f"{record['card']}, {record['threads']} CPU threads; {versions}.", ""]
    lines += ["`" + record["command"] + "`", ""]
    sections = record["sections"]
    if tests := sections.get("tests"):
        good = sum(row["ok"] for row in tests)
        lines += ["## Against the CPU", "", f"{good} of {len(tests)} checks hold.", ""]
        lines += table(tests, ("check", "ok", "error", "tolerance", "seconds", "failed"))
    if epochs := [*sections.get("epochs", []), *sections.get("compile", [])]:
        lines += ["## Training epochs", "", f"Batches of {BATCH} targets; seconds of one epoch, the card's peak.", ""]
        names = ("model", "side", "form", "precision", "graphs", "seconds", "first", "batches", "peak_mb", "failed")
        lines += [*table(epochs, names), *ratios(epochs)]
    if searches := sections.get("search"):
        lines += ["## Exact search", "", "20 neighbours a query, with the guard; `index`: without it.", ""]
        names = (
            "entries",
            "queries",
            "faiss_s",
            "torch_s",
            "ratio",
            "faiss_index_s",
            "torch_index_s",
            "same",
            "failed",
        )
        lines += table(searches, names)
    if runs := sections.get("quality"):
        lines += ["## Quality", "", "NDCG@10 of seed 2020 beside the CPU's mean of three seeds.", ""]
        names = ("model", "seen_kept", "seen_kept_cpu", "seen_removed", "seen_removed_cpu", "ok", "seconds", "failed")
        lines += table(runs, names)
    lines += [f"- skipped: {what}" for what in record["skipped"]]
    lines += ["", *(f"- {remark}" for remark in record.get("remarks", ()))]
    return "\n".join(lines).rstrip() + "\n"


def ratios(epochs: list[Row]) -> list[str]:
    """How many times as long the others take, for each model and precision; against this package's fastest."""
    lines = []
    for model, precision in itertools.product(MODELS, PRECISIONS):
        rows = [row for row in epochs if row["precision"] == precision and "seconds" in row]
        own = min((row["seconds"] for row in rows if row["model"] == model and row["side"] == "ours"), default=None)
        peers = [row for row in rows if row["side"] != "ours" and row["model"] == model]
        if model == "BSARec":  # no peer has it; a SASRec, which it contains, takes less
            peers = [row for row in rows if row["side"] == "RecBole" and row["model"] == "SASRec"]
        for peer in peers if own else []:
            of = "" if peer["model"] == model else f" (its {peer['model']})"
            lines.append(f"- {model}, {precision}: {peer['side']}{of} takes {peer['seconds'] / own:.1f} times as long")
    return [*lines, ""]


def table(rows: list[Row], names: tuple[str, ...]) -> list[str]:
    """Those columns of the rows that any of them has."""
    names = tuple(name for name in names if any(name in row for row in rows))

    def cell(value: Any) -> str:
        text = f"{value:.3g}" if isinstance(value, float) and value < 1000 else f"{value}"
        text = f"{value:.0f}" if isinstance(value, float) and value >= 1000 else text
        return text.replace("\n", " ").replace("|", "/")[:120]

    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell(row.get(name, "")) for name in names) + " |" for row in rows]
    return [*lines, ""]


if __name__ == "__main__":
    main()
