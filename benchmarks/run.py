"""Speed and memory against RecBole 1.2.1 itself, side by side in one run, on the same work.

    python benchmarks/run.py --list
    python benchmarks/run.py sasrec-epoch --data_path=DIR --json out.json
    python benchmarks/run.py --table results/benchmarks > docs/speed.md

Each side runs in a process of its own, one after the other, so that its peak memory is its own. A peer that needs
minutes is timed on a stated number of batches and scaled to the epoch.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import decoding, epochs, memory, mining, preparation, ranking, retrieval, serving
from benchmarks.common import Side

#: Figures of a side that have a place of their own in the record.
KNOWN = ("seconds", "peak_mb", "note", "versions", "ids", "far")

GROUPS = (decoding, epochs, memory, mining, preparation, ranking, retrieval, serving)
CASES = {name: case for group in GROUPS for name, case in group.CASES.items()}


def main() -> None:
    """Run one benchmark, or list them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=sorted(CASES))
    parser.add_argument("--list", action="store_true", help="name the benchmarks")
    parser.add_argument("--table", metavar="DIR", type=Path, help="print the JSON files of DIR as a page")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--data_path", default="dataset", help="directory that contains <dataset>/<dataset>.inter")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of both sides (0: the library's choice)")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        print(
            page([json.loads(file.read_text(encoding="utf-8")) for file in sorted(args.table.glob("*.json"))]), end=""
        )
        if (gpu := args.table.parent / "gpu.json").exists():
            print("\n" + on_a_gpu(json.loads(gpu.read_text(encoding="utf-8"))), end="")
        return
    if args.list or not args.name:
        for name, case in sorted(CASES.items()):
            print(f"{name:<20} {case.work}")
        return
    case = CASES[args.name]
    if args.side:
        _one_side(case.ours if args.side == "ours" else case.peer, args)
        return
    sides = {side: _spawn(side, args) for side in ("ours", "peer")}
    record = {
        "name": args.name,
        "ratio": sides["peer"]["seconds"] / sides["ours"]["seconds"],
        **{f"{side}_seconds": figures["seconds"] for side, figures in sides.items()},
        **{f"{side}_peak_mb": figures["peak_mb"] for side, figures in sides.items()},
        "work": case.work,
        "notes": {side: figures["note"] for side, figures in sides.items()},
        "extra": {side: {k: v for k, v in figures.items() if k not in KNOWN} for side, figures in sides.items()},
        "versions": sides["ours"]["versions"],
    }
    print(f"\n{args.name}: {case.work}\n{'':<8}{'seconds':>10}{'peak MiB':>10}  note")
    for side, figures in sides.items():
        print(f"{side:<8}{figures['seconds']:>10.2f}{figures['peak_mb']:>10.0f}  {figures['note']}")
    print(f"{'ratio':<8}{record['ratio']:>9.1f}x")
    if case.check:
        record["checked"] = case.check(sides["ours"], sides["peer"])
        print(f"checked  {record['checked']}")
    if args.json:
        Path(args.json).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def page(records: list[dict[str, Any]]) -> str:
    """The records as a Markdown page: a table, and a note on each side."""
    lines = [
        "# Speed and memory",
        "",
        "Peer and ours side by side in one run, each in a process of its own, on the same work:",
        "`python benchmarks/run.py NAME --data_path=DIR --json results/benchmarks/NAME.json`. This page is printed by",
        "`python benchmarks/run.py --table results/benchmarks`. The peer is RecBole 1.2.1 itself unless the work says",
        "otherwise; for serving it is the same model without retrieval, which does less: the ratio is below 1.",
        "`serve-latency-*` was run with `RASEREC_CHECKPOINT=DIR` of a trained RaSeRec of amazon-beauty; without it the",
        "weights are random.",
        "Measured on two cores of virtual machines on AMD EPYC servers with AVX-512 BF16.",
        "",
        "| benchmark | ours, s | peer, s | ratio | ours, MiB | peer, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        seconds = f"{record['ours_seconds']:.2f} | {record['peer_seconds']:.2f} | **{record['ratio']:.1f}x**"
        memory = f"{record['ours_peak_mb']:.0f} | {record['peer_peak_mb']:.0f}"
        lines.append(f"| {record['name']} | {seconds} | {memory} |")
    for record in records:
        lines += ["", f"**{record['name']}**: {record['work']}.", ""]
        lines += [f"- {side}: {record['notes'][side]}" for side in ("ours", "peer")]
        lines += [f"- checked: {record['checked']}"] if "checked" in record else []
    made_with: dict[str, list[str]] = {}
    for record in records:
        words = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
        made_with.setdefault(words, []).append(record["name"])
    lines += [""]
    lines += [f"- {', '.join(names) if len(made_with) > 1 else 'all'}: {words}." for words, names in made_with.items()]
    return "\n".join(lines) + "\n"


def on_a_gpu(record: dict[str, Any]) -> str:
    """What `benchmarks/gpu.py` measured, as a section of the page: searches and the epochs that ended."""
    from benchmarks.gpu import table

    sections = record["sections"]
    epochs = [row for name in ("epochs", "compile") for row in sections.get(name, []) if "seconds" in row]
    names = ("entries", "queries", "faiss_s", "torch_s", "ratio")
    lines = [
        "## On a GPU",
        "",
        "{card}, {threads} CPU threads, torch {versions[torch]}, CUDA {cuda}:".format(**record),
        f"`{record['command']}`. In full, with what failed: [gpu.md](../results/gpu.md).",
        "",
        "Exact search with the guard, 20 neighbours a query, by faiss on the CPU and by torch on the card; both found",
        "the same. A run whose vectors are on a GPU searches there, unless queries times entries are fewer than",
        "262,144.",
        "",
        *table(sections.get("search", []), names),
        "Epochs of amazon-beauty on the same card, batches of 512 targets, seconds:",
        "",
        *table(epochs, ("model", "side", "form", "precision", "seconds", "first", "peak_mb")),
    ]
    if not any(row["side"] == "ours" and "compile" not in row["form"] for row in epochs):
        lines += ["Our epochs on the card without torch.compile: not measured yet.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _spawn(side: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, args.name, "--side", side, "--data_path", args.data_path]
    command += ["--threads", str(args.threads)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.strip().splitlines()[-1])


def _one_side(work: Side, args: argparse.Namespace) -> None:
    import torch

    from recbole_raserec.evaluation.report import versions

    if args.threads:
        torch.set_num_threads(args.threads)
    started = time.perf_counter()
    figures = work(args.data_path)
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures["whole"] = time.perf_counter() - started
    print(json.dumps({**figures, "versions": versions()}))


if __name__ == "__main__":
    main()
