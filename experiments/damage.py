"""Damaged checkpoints: is each refused with one error, or are its answers those of the sound one?

    python experiments/damage.py
    python experiments/damage.py --mutations=300 --seed=1 --output=damage.json

A small RaSeRec is trained, served, saved and updated again, so that there are saved parts and a journal; so is a SASRec
that reads the items' texts. Then one thing at a time is changed in a copy of a directory: bits, bytes, lengths, values
of the JSON files (swapped ids, reversed counts, other options, keys taken away), whole files exchanged, removed, or
replaced by a directory, a pipe, a device or a file of a terabyte, lines of the journal. Some changes are `forged`: a
value that makes no sense, with all checksums made again. The copy is loaded as `serve --read_only` does and asked for
recommendations, scores, histories and an explanation.

Each mutation ends as `refused` (an error of this package), `identical` (the same answers), `different`, `traceback`
(any other error) or `hang` (no answer in --seconds). One process loads them all; its peak memory, over each load, is
compared with that of a load of the sound directory. The counts are written as JSON, with what was done wherever it
should not have ended so. Exit code 1 if there is such a case, or the memory is 1.5 times as much or more. Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

#: How each mutation may end; the first two are as it should be.
ENDS = ("refused", "identical", "different", "traceback", "hang")
MEMORY = 1.5
SIZES = {"hidden_size": 16, "inner_size": 16, "n_layers": 1, "epochs": 1, "MAX_ITEM_LIST_LENGTH": 8}
RUNS = {
    "RaSeRec": {**SIZES, "backbone": "SASRec", "ram_inner_size": 16, "ram_epochs": 1, "top_k": 5, "head": "both"},
    "SASRec": {**SIZES, "item_vectors": "both"},
}
#: What a value becomes that makes no sense, in a manifest whose checksum is made again.
FORGED: list[tuple[str, Any]] = [
    ("model", "os"), ("model", "os:path"), ("model", ""), ("model", 7), ("options", []), ("options", {}),
    ("backbone_options", []), ("fingerprint", None), ("options.top_k", 1e9), ("options.top_k", 10**9),
    ("options.hidden_size", 10**6), ("options.inner_size", 10**9), ("options.n_layers", 10**8), ("options.n_heads", 0),
    ("options.n_heads", 10**7), ("options.hidden_act", "none"), ("options.MAX_ITEM_LIST_LENGTH", 10**9),
    ("options.MAX_ITEM_LIST_LENGTH", -1), ("options.alpha", "x"), ("options.ram_inner_size", 10**9),
    ("backbone_options.hidden_size", 10**6), ("backbone_options.n_layers", 10**8), ("backbone_options.model", "os"),
    ("parts", []), ("parts", {"directory": "../..", "users": 3, "items": 3, "applied": 0}), ("files", {}), ("files", 3),
]  # fmt: skip


def prepare(folder: Path) -> dict[str, Path]:
    """Two served checkpoints, with saved parts, changes in the journal, and one that nothing was done with."""
    from recbole_raserec import Recommender, run_recbole_raserec

    draw = random.Random(0)
    (folder / "small").mkdir(parents=True)
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(60):
        start = draw.randrange(40)
        rows += [f"u{user}\ti{(start + step) % 40}\t{step}" for step in range(draw.randrange(6, 14))]
    (folder / "small" / "small.inter").write_text("\n".join(rows) + "\n", encoding="utf-8")
    titles = [f"i{item}\tThing {item} of {['red', 'blue', 'green'][item % 3]}" for item in range(40)]
    lines = ["item_id:token\ttitle:token_seq", *titles]
    (folder / "small" / "small.item").write_text("\n".join(lines) + "\n", encoding="utf-8")
    made = {}
    for model, options in RUNS.items():
        given = {"data_path": str(folder), "checkpoint_dir": str(folder / "saved"), "show_progress": False, **options}
        with contextlib.redirect_stdout(io.StringIO()):
            run_recbole_raserec(model, "small", config_dict={"state": "ERROR", "use_gpu": False, **given}, argv=[])
        newest = max((folder / "saved").glob(f"{model}-*/checkpoint.json"), key=lambda path: path.stat().st_mtime)
        made[f"{model} as trained"] = newest.parent
        made[f"{model} served"] = folder / f"{model}-served"
        shutil.copytree(newest.parent, made[f"{model} served"])
        recommender = Recommender.load(made[f"{model} served"], "cpu", journal=True)
        recommender.update([(f"new {n}", f"i{(n * 7 + step) % 40}") for n in range(9) for step in range(4)])
        recommender.save()
        if model == "SASRec":
            recommender.add_items([{"item_id": "brand new", "title": "A new thing of red"}])
        for n in range(6):
            recommender.update([(f"late {n}", f"i{(n * 3 + step) % 40}", float(n)) for step in range(3)])
        recommender.forget("late 2")
        recommender.close()
    return made


def answers(directory: Path) -> str:
    """What a checkpoint answers, after what its journal holds."""
    from recbole_raserec import Recommender

    recommender = Recommender.load(directory, "cpu")
    recommender.live.read_journal()
    histories: list[Any] = [["i1", "i2", "i3"], ["i30"], ["i5"] * 12, []]
    users = ["u3", "u17", "new 4", "late 1", "late 5", "late 2"]
    found = recommender.recommend(histories, k=8)
    said: list[Any] = [found.items, [x.tolist() for x in found.scores], recommender.users, recommender.items]
    said += [recommender.score(users=users).tolist(), [row.tolist() for row in recommender.stored(users)]]
    said += [recommender.titles, recommender.catalogue.counts.tolist(), recommender.live.n_memories]
    if recommender.live.n_memories:
        said.append(recommender.explain(["i1", "i2", "i3"], 3).to_dict())
    return json.dumps(said)


# ------------------------------------------------------------------ mutations


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all parts of a JSON value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in parts for place in places(part, (*path, key)))]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def other(value: Any, draw: random.Random) -> Any:
    """Another value in the place of this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list) and len(value) > 1:
        first, second = draw.sample(range(len(value)), 2)
        swapped = list(value)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        return draw.choice([swapped, value[::-1], value[:-1], [*value, value[0]], []])
    if isinstance(value, (int, float)):
        return draw.choice([value + 1, value - 1, -value, 0, value * 2, 10**9, 1e9, 1e308, None, str(value)])
    if isinstance(value, str):
        return draw.choice([value[::-1], value[:-1], value + "x", "", "relu", "os", None, 5, value.upper()])
    return draw.choice([None, 1, "x", [], {}, True])


def change_json(path: Path, draw: random.Random) -> str:
    """Change one value of a JSON file, or take it away."""
    value = json.loads(path.read_text(encoding="utf-8"))
    place = draw.choice([place for place in places(value) if place])
    holder, key = at(value, place[:-1]), place[-1]
    if isinstance(holder, dict) and draw.random() < 0.2:
        del holder[key]
    else:
        holder[key] = other(holder[key], draw)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return ".".join(map(str, place))


def change_bytes(path: Path, draw: random.Random) -> str:
    """Flip a bit, or overwrite, cut, add or repeat some bytes."""
    data = bytearray(path.read_bytes())
    start = draw.randrange(max(1, len(data)))
    stop = min(len(data), start + draw.choice([1, 4, 64]))
    how = draw.choice(["flip", "flip", "flip", "zeros", "random", "cut", "cut out", "add", "repeat", "empty"])
    if how == "flip" and data:
        data[start] ^= 1 << draw.randrange(8)
    elif how == "zeros":
        data[start:stop] = bytes(stop - start)
    elif how == "random":
        data[start:stop] = draw.randbytes(stop - start)
    elif how == "cut":
        del data[start:]
    elif how == "cut out":
        del data[start:stop]
    elif how == "add":
        data += draw.randbytes(draw.choice([1, 100, 100_000]))
    elif how == "repeat":
        data[start:start] = data[start:stop]
    else:
        data.clear()
    path.write_bytes(data)
    return f"{how} {start}:{stop}"


def change_file(path: Path, draw: random.Random, others: list[Path]) -> str:
    """Remove a file, or put something else in its place."""
    how = draw.choice(["removed", "directory", "pipe", "zero", "terabyte", "exchanged", "exchanged", "exchanged"])
    named = [each for each in others if each.name.split("-")[0] == path.name.split("-")[0] and each != path]
    content = draw.choice(named or others).read_bytes() if how == "exchanged" else b""
    path.unlink()
    if how == "directory":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "zero":
        path.symlink_to("/dev/zero")
    elif how == "terabyte":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    elif how == "exchanged":
        path.write_bytes(content)
    return how


def change_lines(path: Path, draw: random.Random) -> str:
    """Take lines of the journal away, exchange or repeat them."""
    lines = path.read_bytes().splitlines(keepends=True)
    first, second = sorted(draw.sample(range(len(lines)), 2))
    how = draw.choice(["without", "swapped", "repeated", "until", "from"])
    if how == "without":
        del lines[first]
    elif how == "swapped":
        lines[first], lines[second] = lines[second], lines[first]
    elif how == "repeated":
        lines.insert(second, lines[first])
    else:
        lines = lines[:second] if how == "until" else lines[second:]
    path.write_bytes(b"".join(lines))
    return f"{how} {first}, {second}"


def forge(directory: Path, draw: random.Random) -> str:
    """A value that makes no sense, under a checksum that fits."""
    from recbole_raserec.storage.files import sealed, sha256

    manifest = json.loads((directory / "checkpoint.json").read_text(encoding="utf-8"))
    name, value = draw.choice([*FORGED, ("ids", "users"), ("ids", "items")])
    if name == "ids":
        (path,) = directory.glob("live-*/ids.json" if manifest["parts"] else "ids.json")
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), value: []}), encoding="utf-8")
        manifest["files"]["ids.json"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    else:
        holder, _, key = name.rpartition(".")
        if holder and not isinstance(manifest.get(holder), dict):
            manifest[holder] = {}
        (manifest[holder] if holder else manifest)[key] = value
    text = json.dumps(sealed(manifest), ensure_ascii=False)
    (directory / "checkpoint.json").write_text(text, encoding="utf-8")
    return f"{name} = {value!r}"


KINDS: dict[str, Callable[..., str]] = {"bytes": change_bytes, "values": change_json, "files": change_file,
                                        "lines": change_lines, "forged": forge}  # fmt: skip


def mutate(directory: Path, others: list[Path], draw: random.Random) -> tuple[str, str]:
    """One change of a directory: its kind, and what was done."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    files = [path for path in files if path.name not in (".lock", "journal.lock", "journal.pid", "state.safetensors")]
    kind = draw.choices(["bytes", "values", "files", "lines", "forged"], [5, 5, 2, 1, 1])[0]
    journal = directory / "journal.jsonl"
    if kind == "lines" and not journal.is_file():
        kind = "values"
    if kind == "forged":
        return kind, forge(directory, draw)
    chosen = [path for path in files if path.suffix == ".json"] if kind == "values" else files
    path = journal if kind == "lines" else draw.choice(chosen)
    done = KINDS[kind](path, draw, others) if kind == "files" else KINDS[kind](path, draw)
    return kind, f"{path.relative_to(directory)}: {done}"


# ------------------------------------------------------------------ the process that loads


def peak(reset: bool = False) -> int:
    """Most bytes of memory this process had since the last reset; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10
    return 0


def load_all(pipe: Any) -> None:
    """Answer each directory that comes through the pipe with how it ended, what it said, and the peak memory."""
    import logging

    import torch

    from recbole_raserec.errors import RaSeRecError

    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    while True:
        directory = pipe.recv()
        peak(reset=True)
        try:
            end, said = "answered", answers(Path(directory))
        except RaSeRecError as error:
            end, said = "refused", f"{type(error).__name__}: {error}"
        except BaseException as error:
            end, said = "traceback", f"{type(error).__name__}: {error}"
        pipe.send((end, said, peak()))


class Loader:
    """The process that loads; another one after a hang."""

    def __init__(self, seconds: float):
        self.seconds, self._start = seconds, multiprocessing.get_context("spawn")
        self.process: Any = None

    def ask(self, directory: Path) -> tuple[str, str, int]:
        """How a directory ends, what it says, and the peak memory."""
        wait = self.seconds
        if self.process is None:
            self.pipe, theirs = self._start.Pipe()
            self.process = self._start.Process(target=load_all, args=(theirs,), daemon=True)
            self.process.start()
            wait += 120  # for imports
        self.pipe.send(str(directory))
        with contextlib.suppress(EOFError):
            if self.pipe.poll(wait):
                return self.pipe.recv()
        self.process.kill()
        self.process.join()
        self.process = None
        return "hang", "", 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20, help="after which a load has hung")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "damage.json")
    args = parser.parse_args(argv)
    started, here = time.monotonic(), os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        folder, loader = Path(name), Loader(args.seconds)
        os.chdir(folder)
        try:
            made = prepare(folder)
            sound = {}
            for _ in range(3):  # the first loads import
                for state, directory in made.items():
                    end, sound[state], memory = loader.ask(directory)
                    assert end == "answered", sound[state]
            counts: dict[str, Counter[str]] = {}
            failures, highest = [], 0.0
            for number in range(args.mutations):
                draw = random.Random(f"{args.seed} {number}")
                state = draw.choice(sorted(made))
                copy = folder / "copy"
                shutil.copytree(made[state], copy)
                others = sorted(path for each in made.values() for path in each.rglob("*") if path.is_file())
                kind, done = mutate(copy, others, draw)
                end, said, used = loader.ask(copy)
                highest = max(highest, used / memory)
                if end == "answered":
                    end = "identical" if said == sound[state] else "different"
                counts.setdefault(kind, Counter())[end] += 1
                if end not in ENDS[:2] or used >= MEMORY * memory:
                    said = said.replace(str(copy), "DIR") if end == "traceback" else ""
                    failures.append({"mutation": number, "of": state, "done": done, "end": end, "said": said[:300]})
                    print(failures[-1], flush=True)
                shutil.rmtree(copy)
        finally:
            os.chdir(here)
            if loader.process is not None:
                loader.process.kill()
    total = sum(counts.values(), Counter())
    result = {
        "arguments": f"--mutations={args.mutations} --seed={args.seed}",
        "total": {end: total[end] for end in ENDS},
        "kinds": {kind: {end: found[end] for end in ENDS} for kind, found in sorted(counts.items())},
        "sound_load_mb": round(memory / 2**20),
        "peak_memory": round(highest, 3),
        "failures": failures,
        "seconds": round(time.monotonic() - started),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("total", "peak_memory", "seconds")}))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
