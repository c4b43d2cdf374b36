"""What the tests of the comparison share: a stand-in for the runner, and a short call."""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from conftest import random_log, write_log
from scipy.sparse import csr_matrix

from recbole_raserec.comparison import runner
from recbole_raserec.comparison.driver import compare
from recbole_raserec.evaluation.protocols import Ranks
from recbole_raserec.evaluation.ranks import write_ranks

#: Stands in for the runner: writes what a run writes, notes start and end in a journal, and can be told to fail,
#: to die, or to wait for a file.
STAND_IN = """
import ast, json, os, pathlib, random, shutil, sys, time
words = dict(word[2:].split("=", 1) for word in sys.argv[1:])
target = pathlib.Path(words["result_file"])
orders = pathlib.Path(__file__).with_suffix(".json")
orders = json.loads(orders.read_text()) if orders.exists() else {}
journal = pathlib.Path(__file__).with_suffix(".journal")
def note(what):
    with open(journal, "a") as file:
        file.write(json.dumps([what, words["model"], words["dataset"], int(words["seed"]), time.time(), words]) + "\\n")
note("start")
order = orders.get(f"{words['model']}-{words['seed']}", "")
if order == "fail":
    print("something went wrong")
    print("error: no memory left")
    raise SystemExit(2)
if order == "die":
    os.kill(os.getpid(), 9)
until = time.time() + 90
while order.startswith("/") and not os.path.exists(order):
    if time.time() > until:
        raise SystemExit(3)
    time.sleep(0.02)
time.sleep(orders.get("sleep", 0))
ours = words["model"] == "RaSeRec"
metrics = {}
draw = random.Random(words["model"] + words["seed"])
for who in ["base", "ours"][: 1 + ours]:
    values = {
        protocol: {f"{m}@{k}": round(draw.random(), 6) for m in ("recall", "ndcg") for k in (5, 10, 20)}
        for protocol in ("seen_kept", "seen_removed")
    }
    before = {protocol: {name: value / 2 for name, value in of.items()} for protocol, of in values.items()}
    metrics[who] = {"valid": before, "test": values}
options = {key: ast.literal_eval(words[key]) for key in ("topk",) if key in words}
options = {"topk": [5, 10, 20], "metrics": ["Recall", "NDCG"], "threads": words.get("threads"), **options}
options.update(user_inter_num_interval="[0,inf)", item_inter_num_interval="[0,inf)", valid_metric="NDCG@10")
options["eval_args"] = {
    "split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": {"valid": "full", "test": "full"}
}
protocol = {
    "split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "ranking": "every item of the data set",
    "seen_items": {"seen_kept": "kept_items", "seen_removed": "removed_items"}, "seen_means": "all before",
    "ties": "lower id", "validation_in_history": True, "validation_in_memory": ours,
}
record = {
    "model": words["model"], "dataset": words["dataset"], "metrics": metrics, "protocol": protocol, "options": options,
    "seconds": {"recommendation": 1.0, "this_run": 2.5, **({"retrieval": 0.5} if ours else {})},
    "parameters": {"base": 1000, **({"ours": 1234} if ours else {})}, "peak_memory_mb": 321.0, "versions": {},
}
note("end")
copy = f"{words['ranks_file']}.{os.getpid()}"
shutil.copy(pathlib.Path(__file__).with_name("ours.npz" if ours else "base.npz"), copy)
os.replace(copy, words["ranks_file"])
part = target.with_suffix(f".{os.getpid()}")
part.write_text(json.dumps(record))
os.replace(part, target)
"""

MODELS = "SASRec,BPR,RaSeRec:backbone=SASRec"


class StandIn:
    """The stand-in below a directory: what it is to do (`order`), and what it did (`notes`)."""

    def __init__(self, directory):
        self.script = directory / "runner.py"
        self.script.write_text(STAND_IN)
        self.command = (sys.executable, "-S", str(self.script))
        for name, seed in (("base", 0), ("ours", 1)):
            kept = torch.from_numpy(np.random.default_rng(seed).integers(1, 30, 20))
            ranks = Ranks(kept, kept - 1 + (kept == 1), *[torch.arange(20)] * 3)
            seen = dict.fromkeys(("valid", "test"), csr_matrix(np.tri(20, dtype=bool)))
            write_ranks(directory / f"{name}.npz", {"base": ranks}, [f"u{number}" for number in range(20)], seen)

    def order(self, **orders):
        self.script.with_suffix(".json").write_text(json.dumps(orders))

    def notes(self, what="start"):
        journal = self.script.with_suffix(".journal")
        lines = journal.read_text().splitlines() if journal.exists() else []
        return [note[1:] for note in map(json.loads, lines) if note[0] == what]

    def started(self):
        return [(model, seed) for model, _, seed, *_ in self.notes()]


def prepared(directory, patch):
    """A directory with data and the stand-in, which takes the place of the runs."""
    write_log(directory / "data", "tiny", random_log(0))
    write_log(directory / "data", "other", random_log(1))
    made = StandIn(directory)
    patch.setattr(runner, "COMMAND", made.command)
    patch.setattr(runner, "_PAUSE", 0.01)
    return made


def go(models=MODELS, datasets="tiny", seeds=2, output="out", jobs=1, argv=()):
    return compare(models, datasets, seeds, output, jobs, argv=["--data_path=data", *argv])
