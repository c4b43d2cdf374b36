"""The journey of a new user with a CSV: five commands in a fresh virtual environment, timed and checked.

    python experiments/journey.py
    python experiments/journey.py --csv=ratings.csv --python=python3.12 --output=results/journey_ml-100k.md

makes a CSV of the MovieLens-100k that comes with RecBole (`userId,movieId,rating,timestamp`), unless one is given, and
types what a new user would: pip install, run, recommend, explain, serve, the last three as the command before printed
them. No file is edited. What each command took, seconds and seconds of processors, and what it printed, goes to
`--output`; the exit code is 1 if one failed, or if all of them took more than `--limit` seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import recbole

ROOT = Path(__file__).resolve().parents[1]
RUN = "recbole-raserec run --model=RaSeRec --backbone=SASRec --dataset=ratings.csv"
#: Behind it all commands of pip; from Python 3.12 on RecBole comes alone.
INSTALL = ("pip install -c constraints.txt '.[serve]'", "pip install --no-deps recbole==1.2.1")


def write_csv(path: Path) -> None:
    """The interactions of RecBole's ml-100k as MovieLens' own CSV has them."""
    source = Path(recbole.__file__).parent / "dataset_example" / "ml-100k" / "ml-100k.inter"
    table = pd.read_csv(source, sep="\t")
    table.columns = ["userId", "movieId", "rating", "timestamp"]
    table.to_csv(path, index=False)


class Journey:
    """Commands typed in `folder`, with the programs of the virtual environment `venv` before all others."""

    def __init__(self, folder: Path, venv: Path):
        self.folder, self.steps = folder, list[dict[str, Any]]()
        path = os.pathsep.join([str(venv / "bin"), os.environ.get("PATH", "")])
        unset = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        self.environment = {**{k: v for k, v in os.environ.items() if k not in unset}, "PATH": path}

    def type(self, command: str, cwd: Path | None = None) -> str:
        """Run a command to its end: what it printed."""
        began = clocks()
        words = [str(word) for word in shlex.split(command)]
        done = subprocess.run(words, cwd=cwd or self.folder, env=self.environment, capture_output=True, text=True)
        printed = done.stdout + done.stderr
        self.note(command, began, printed)
        if done.returncode:
            raise SystemExit(f"{command} failed with exit code {done.returncode}:\n{printed[-3000:]}")
        return printed

    def serve(self, command: str) -> None:
        """Start a service, ask it once, and end it; counted is the time until the answer."""
        began = clocks()
        words = shlex.split(f"{command} --port=0")
        process = subprocess.Popen(words, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            url = re.search(r"http://\S+", line)
            if not url:
                raise SystemExit(f"{command} did not start: {line}")
            body = json.dumps({"sequences": [["50", "172", "181"]], "k": 3}).encode()
            request = urllib.request.Request(f"{url[0]}/recommend", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                found = json.load(answer)
        finally:
            process.terminate()
            process.wait(60)
        assert len(found["results"][0]["items"]) == 3, found
        self.note(command, began, f"{line}POST /recommend: {json.dumps(found['results'][0])}")

    def note(self, command: str, began: tuple[float, float], printed: str) -> None:
        """Keep what a command took and printed."""
        seconds, cpu = (now - before for now, before in zip(clocks(), began))
        lines = [line.replace(str(self.folder), "~") for line in printed.splitlines() if line.strip()]
        self.steps.append({"command": command, "seconds": seconds, "cpu": cpu, "lines": lines})
        print(f"{seconds:7.1f} s  {command}", flush=True)


def clocks() -> tuple[float, float]:
    """Seconds by the clock, and those of processors that ended processes took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def following(printed: str) -> str:
    """The command that the last one told to type next."""
    found = re.findall(r"[Nn]ext: (recbole-raserec .*)", printed)
    if not found:
        raise SystemExit(f"no next command in:\n{printed[-2000:]}")
    return found[-1]


def travel(folder: Path, python: str, csv: Path | None) -> Journey:
    """All five commands, each checked."""
    subprocess.run([python, "-m", "venv", str(folder / "venv")], check=True)
    journey = Journey(folder, folder / "venv")
    if csv is None:
        write_csv(folder / "ratings.csv")
    else:
        (folder / "ratings.csv").write_bytes(csv.read_bytes())
    for command in INSTALL:
        journey.type(command, ROOT)
    installed, first = journey.steps.pop(), journey.steps[0]
    first.update({name: first[name] + installed[name] for name in ("seconds", "cpu", "lines")})
    printed = journey.type(RUN)
    assert "user = userId, item = movieId" in printed
    assert "RaSeRec" in printed
    recommended = journey.type(following(printed))
    assert len(re.findall(r"^ *\d+\. ", recommended, re.MULTILINE)) == 10, recommended
    explained = journey.type(following(recommended))
    journey.serve(following(explained))
    return journey


def report(journey: Journey, version: str, command: str) -> str:
    """The journey as Markdown."""
    total, cpu = (sum(step[name] for step in journey.steps) for name in ("seconds", "cpu"))
    lines = ["# A new user with a CSV: five commands", "", f"`{command}`", ""]
    lines += [
        f"Python {version}, {os.cpu_count()} cores, ml-100k as `ratings.csv`, a fresh environment, no file edited."
    ]
    lines += [
        "The last three commands are those that the command before printed. Other work on the machine: on average"
    ]
    lines += [f"{os.getloadavg()[2]:.1f} processes were running or waiting for a core.", ""]
    lines += ["| | command | seconds | seconds of processors |", "|---|---|---|---|"]
    for number, step in enumerate(journey.steps, start=1):
        lines.append(f"| {number} | `{step['command']}` | {step['seconds']:.1f} | {step['cpu']:.1f} |")
    lines += [f"| | all | {total:.1f} | {cpu:.1f} |", ""]
    for step in journey.steps[1:]:
        kept = step["lines"] if len(step["lines"]) <= 16 else [*step["lines"][:1], "...", *step["lines"][-15:]]
        lines += ["```", f"$ {step['command']}", *(line[:160].rstrip() for line in kept), "```", ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="a CSV of interactions (default: RecBole's ml-100k)")
    parser.add_argument("--python", default=sys.executable, help="makes the virtual environment")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "journey_ml-100k.md")
    parser.add_argument("--limit", type=float, default=300, help="seconds (default: 300)")
    given = parser.parse_args(argv)
    version = subprocess.run(
        [given.python, "-c", "import platform; print(platform.python_version())"], capture_output=True, text=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        journey = travel(Path(folder), given.python, given.csv)
    given.output.write_text(report(journey, version, "python experiments/journey.py"), encoding="utf-8")
    total = sum(step["seconds"] for step in journey.steps)
    print(f"{total:7.1f} s in all; written to {given.output}")
    return int(total > given.limit)


if __name__ == "__main__":
    sys.exit(main())
