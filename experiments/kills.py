"""Killed commands and full disks: does the next one end with the same figures, and is anything lost or left behind?

    python experiments/kills.py
    python experiments/kills.py --kills=20 --seed=1 --output=kills.json

Four commands are killed (SIGKILL) at random moments, again and again, and then run to their end: `run` (RaSeRec over
SASRec), `regenerate`, `prepare` and `serve`, which takes updates, forgets users and saves meanwhile. After each kill of
a server its directory is read: what was acknowledged must be there, to the last event, and at most the one request that
was not answered beside it; at its end it must score as a checkpoint that was given the same changes without a kill. In
a fifth kind the disk is full: the command must say so in one line, without a traceback, a server must refuse with 503
and leave no directory behind, and with room again the same command must end as all others. For that a file system in
memory is mounted in a namespace of this process's own (`unshare`, no root needed); where that is not allowed, the kind
is left out, and the result says so.

Counted are kills by kind, and `different` figures, `failed` commands, `lost` updates, `left` files and
`unnamed` full disks. All of these are to be 0; exit code 1 otherwise. Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

KINDS = ("run", "regenerate", "prepare", "serve", "full disk")
PROBLEMS = ("different", "failed", "lost", "left", "unnamed")
DISK_MB = 64
TOKEN = "a-token"
SMALL = (
    "--hidden_size=16", "--inner_size=16", "--n_layers=1", "--epochs=3", "--MAX_ITEM_LIST_LENGTH=8", "--threads=1",
    "--use_gpu=false", "--show_progress=false", "--checkpoint_dir=saved", "--data_path=data", "--dataset=small",
)  # fmt: skip
COMMANDS = {
    "run": ("run", "--model=RaSeRec", "--backbone=SASRec", "--ram_inner_size=16", "--ram_epochs=3", "--top_k=5",
            "--result_file=record.json", *SMALL),
    "regenerate": ("regenerate", "--output=made", "--regen_layers=1", "--regen_inner_size=16", "--regen_epochs=3",
                   "--regen_conditions=2", "--MAX_ITEM_LIST_LENGTH=8", *(w for w in SMALL if w.startswith(
                       ("--hidden", "--threads", "--use", "--show", "--check", "--data")))),
    "prepare": ("prepare", "--input=raw.csv", "--output=made", "--name=raw", "--k_core=2", "--overwrite"),
}  # fmt: skip


def write_data(folder: Path, rows: int) -> None:
    """A small data set, and a raw file of `rows` lines."""
    draw = random.Random(0)
    (folder / "data" / "small").mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(150):
        start = draw.randrange(40)
        lines += [f"u{user}\ti{(start + step) % 40}\t{step}" for step in range(draw.randrange(6, 14))]
    (folder / "data" / "small" / "small.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    raw = [f"{draw.randrange(rows // 20)},{draw.randrange(500)},{draw.randrange(10**9)}" for _ in range(rows)]
    (folder / "raw.csv").write_text("\n".join(["user,item,time", *raw]) + "\n", encoding="utf-8")


# ------------------------------------------------------------------ commands as forks: nothing is imported again


class Command:
    """The command line in a process of its own, in `folder`; what it prints is in `log`."""

    def __init__(self, words: Sequence[str], folder: Path, log: Path):
        self.log, self.code = log, None
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            with open(log, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(folder)
            from recbole_raserec.cli.main import main

            code = main(list(words))
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def ended(self, wait: bool = False) -> bool:
        """Whether it has ended; `code` is then its exit code, or minus its signal."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def kill(self, number: int = signal.SIGKILL) -> bool:
        """Send it a signal and wait for its end; False if it had ended before."""
        if self.ended():
            return False
        os.kill(self.pid, number)
        self.ended(wait=True)
        return True

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def asked(function: Callable[[], Any], folder: Path) -> Any:
    """What a function returns, called in a process of its own; JSON."""
    answer = folder / "answer.json"
    pid = os.fork()
    if not pid:
        try:
            answer.write_text(json.dumps(function()), encoding="utf-8")
        except BaseException:
            answer.write_text(json.dumps({"error": traceback.format_exc()}), encoding="utf-8")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return json.loads(answer.read_text(encoding="utf-8"))


def files_of(folder: Path) -> list[str]:
    """Names of all files below, without what is random in them, and without logs."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    kept = (name for name in names if "/log" not in f"/{name}" and name != "raw.csv")
    return sorted(re.sub(r"[0-9a-f]{12,}", "*", name) for name in kept)


def figures_of(kind: str, folder: Path) -> Any:
    """What a command made, to compare."""
    if kind == "run":
        return json.loads((folder / "record.json").read_text(encoding="utf-8"))["metrics"]
    paths = sorted((folder / "made").rglob("*.inter"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


class Bench:
    """All that is counted, and the sound outcome of each command."""

    def __init__(self, folder: Path, seed: int, disk: Path | None):
        self.folder, self.draw, self.disk = folder, random.Random(seed), disk
        self.kills: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.examples: list[str] = []
        self.acknowledged = 0
        self.sound: dict[str, tuple[float, Any, list[str]]] = {}
        self._number = 0
        write_data(folder / "source", 20_000)

    def problem(self, kind: str, what: str) -> None:
        self.problems[kind] += 1
        self.examples.append(f"{kind}: {what}"[:600])
        print(self.examples[-1], flush=True)

    def fresh(self, where: Path | None = None) -> Path:
        self._number += 1
        target = (where or self.folder) / f"case-{self._number}"
        shutil.copytree(self.folder / "source", target)
        return target

    def measure(self, kinds: Collection[str]) -> None:
        """Each of these commands once, undisturbed."""
        for kind, words in COMMANDS.items():
            if kind not in kinds:
                continue
            folder = self.fresh()
            begun = time.monotonic()
            command = Command(words, folder, self.folder / "log")
            command.ended(wait=True)
            if command.code:
                raise SystemExit(f"{kind} fails undisturbed:\n{command.said()[-2000:]}")
            self.sound[kind] = time.monotonic() - begun, figures_of(kind, folder), files_of(folder)
            if kind == "run":
                (made,) = folder.glob("saved/RaSeRec-*")
                shutil.copytree(made, self.folder / "checkpoint")
            shutil.rmtree(folder)

    def complete(self, kind: str, folder: Path) -> None:
        """Run a command to its end, and compare what it leaves with the sound outcome."""
        command = Command(COMMANDS[kind], folder, self.folder / "log")
        command.ended(wait=True)
        _, figures, files = self.sound[kind]
        if command.code:
            self.problem("failed", f"{kind} with {command.code}: {command.said()[-400:]}")
        elif figures_of(kind, folder) != figures:
            self.problem("different", kind)
        elif (found := files_of(folder)) != files:
            left = Counter(found) - Counter(files), Counter(files) - Counter(found)
            self.problem("left", f"{kind}: more {sorted(left[0])}, fewer {sorted(left[1])}")
        shutil.rmtree(folder)

    def kill_command(self, kind: str, most: int) -> None:
        """Kill a command one to four times in one folder, then let it end."""
        folder, seconds = self.fresh(), self.sound[kind][0]
        for _ in range(min(most, self.draw.randint(1, 4))):
            command = Command(COMMANDS[kind], folder, self.folder / "log")
            time.sleep(self.draw.uniform(0, seconds))
            if not command.kill():
                if command.code:
                    self.problem("failed", f"{kind} with {command.code}: {command.said()[-400:]}")
                break
            self.kills[kind] += 1
        self.complete(kind, folder)

    def fill_for_command(self) -> None:
        """A command on a disk with too little room, and again when there is enough."""
        assert self.disk is not None
        kind, folder = self.draw.choice(list(COMMANDS)), self.fresh(self.disk)
        with full(self.disk, self.draw.randrange(300_000)):
            command = Command(COMMANDS[kind], folder, self.folder / "log")
            command.ended(wait=True)
            said = command.said()
        if command.code:
            self.kills["full disk"] += 1
            if "Traceback" in said or "no room on the disk" not in said:
                self.problem("unnamed", f"{kind} with {command.code}: {said[-500:]}")
        self.complete(kind, folder)

    # -------------------------------------------------------------- servers

    def serve(self, kills: int, on_disk: bool = False) -> None:
        """Kill a server that is updated, several times in one directory; or let its disk be full meanwhile."""
        folder = (self.disk if on_disk and self.disk else self.folder) / f"served-{self._number}"
        self._number += 1
        shutil.copytree(self.folder / "checkpoint", folder)
        done: list[Any] = []  # changes that are known to be there
        for number in range(kills + 1):
            server = Server(folder, self.folder)
            if server.port is None:
                self.problem("failed", f"serve: {server.command.said()[-400:]}")
                break
            client = Client(server.port, self.draw.random())
            if on_disk:
                time.sleep(self.draw.uniform(0, 0.5))
                with full(folder.parent, self.draw.randrange(60_000)):
                    time.sleep(self.draw.uniform(0.5, 1.5))
                    live = len(list(folder.glob("live-*")))
                if live > 2 or client.strange:
                    self.problem("left" if live > 2 else "failed", f"full disk: {live} directories, {client.strange}")
                self.kills["full disk"] += 1
                time.sleep(0.3)
            else:
                time.sleep(self.draw.uniform(0, 1.5))
            server.command.kill(signal.SIGTERM if number == kills else signal.SIGKILL)
            self.kills["serve"] += 0 if on_disk or number == kills else 1
            client.join()
            if server.command.code not in (0, -signal.SIGKILL):
                self.problem("failed", f"serve ended with {server.command.code}: {server.command.said()[-400:]}")
            self.acknowledged += len(client.done)
            done += client.done
            state = asked(lambda: state_of(folder), self.folder)
            if "error" in state:
                self.problem("failed", state["error"][-500:])
                break
            if state["users"] != after(done):
                if client.open is not None and state["users"] == after([*done, client.open]):
                    done.append(client.open)
                else:
                    self.problem("lost", f"{after(done)} became {state['users']}")
                    break
        else:
            self._compare(folder, done)
        shutil.rmtree(folder)

    def _compare(self, folder: Path, done: list[Any]) -> None:
        """A server that ended against one that was never killed."""

        def expected() -> Any:
            from recbole_raserec import Recommender

            recommender = Recommender.load(self.folder / "checkpoint", "cpu")
            for change in done:
                recommender.forget(change["user"]) if "user" in change else recommender.update(change["events"])
            return {**score(recommender)}

        found, wanted = asked(lambda: state_of(folder), self.folder), asked(expected, self.folder)
        near = found["memories"] == wanted["memories"] and all(
            abs(a - b) <= 1e-5 * max(1, abs(b)) for a, b in zip(found["scores"], wanted["scores"])
        )
        if not near:
            self.problem("different", f"serve: {found['memories']} memories, {wanted['memories']} expected")
        names = re.compile(r"checkpoint\.json|(model|state)\.safetensors|journal\.(jsonl|lock|pid)|live-\*/.*|\.lock")
        files = files_of(folder)
        strange = [name for name in files if not names.fullmatch(name)]
        if strange or sum(name == "live-*/ids.json" for name in files) > 1:
            self.problem("left", f"serve: {strange or files}")


@contextlib.contextmanager
def full(disk: Path, room: int) -> Any:
    """Leave no more than `room` bytes of a disk."""
    ballast = disk / "ballast"
    for spare in range(room, room + (1 << 24), 1 << 14):  # a server may be writing meanwhile
        with contextlib.suppress(OSError), open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(disk).free - spare))
            break
    try:
        yield
    finally:
        ballast.unlink()


class Server:
    """`serve` of a directory on a free port, `port`; None if it does not start."""

    def __init__(self, directory: Path, folder: Path):
        words = ["serve", str(directory), "--port=0", "--device=cpu", "--save_every=1", f"--token={TOKEN}"]
        self.command, self.port = Command(words, folder, folder / "log"), None
        while not self.command.ended() and self.port is None:
            time.sleep(0.05)
            found = re.search(r"http://127.0.0.1:(\d+)", self.command.said()) if self.command.log.is_file() else None
            self.port = int(found[1]) if found else None


class Client(threading.Thread):
    """Updates, forgets and saves until its server is dead: `done` was acknowledged, `open` was not answered."""

    def __init__(self, port: int, seed: float):
        super().__init__()
        self.port, self._draw = port, random.Random(seed)
        self.done: list[Any] = []
        self.open: Any = None
        self.strange: list[str] = []
        self.start()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                route, body = self._next()
                self.open = None if route == "/save" else body
                headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
                connection.request("POST", route, json.dumps(body), headers)
                answer = connection.getresponse()
                said = answer.read()
                if answer.status == 200 and self.open is not None:
                    self.done.append(self.open)
                elif answer.status not in (200, 503):
                    self.strange.append(f"{route} {answer.status} {said[:200]!r}")
                self.open = None

    def _next(self) -> tuple[str, Any]:
        user, chance = f"w{self._draw.randrange(20)}", self._draw.random()
        if chance < 0.05:
            return "/save", {}
        if chance < 0.1:
            return "/forget", {"user": user}
        events = [{"user": user, "item": f"i{self._draw.randrange(40)}"} for _ in range(self._draw.randint(1, 4))]
        return "/update", {"events": events}


def after(changes: list[Any]) -> dict[str, list[str]]:
    """Histories of the users that the changes leave."""
    users: dict[str, list[str]] = {}
    for change in changes:
        if "user" in change:
            users.pop(change["user"], None)
        for event in change.get("events", ()):
            users.setdefault(event["user"], []).append(event["item"])
    return users


def score(recommender: Any) -> dict[str, Any]:
    users = sorted(user for user in recommender.users if user.startswith("w"))
    scores = recommender.score(users=users).ravel().tolist() if users else []
    rows = recommender.stored(users) if users else []
    histories = {user: [recommender.items[item] for item in row] for user, row in zip(users, rows)}
    return {"users": histories, "memories": recommender.live.n_memories, "scores": scores}


def state_of(directory: Path) -> dict[str, Any]:
    """What a directory holds, its journal included."""
    from recbole_raserec import Recommender

    recommender = Recommender.load(directory, "cpu")
    recommender.live.read_journal()
    return score(recommender)


def load_modules() -> None:
    """Import what the forks need, without starting threads."""
    import torch

    torch.set_num_threads(1)
    for name in ("quick_start", "serving.recommender", "serving.http.app", "regeneration", "data.preparation"):
        __import__(f"recbole_raserec.{name}")
    __import__("uvicorn")


def with_disk(argv: Sequence[str]) -> int:
    """This script again, in a namespace with a disk that can be filled; without one where that is not allowed."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, str(Path(__file__).resolve()), *argv]
        space = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        mount = [*space, f'mount -t tmpfs -o size={DISK_MB}m tmpfs "$0" && exec "$@"', name]
        try:
            allowed = subprocess.run([*mount, "true"], capture_output=True, check=False).returncode == 0
        except OSError:
            allowed = False
        return subprocess.call([*mount, *command, f"--disk={name}"] if allowed else [*command, "--disk="])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "kills.json")
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of them, separated by commas")
    parser.add_argument("--disk", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.disk is None:
        return with_disk(sys.argv[1:] if argv is None else argv)
    started, output = time.monotonic(), args.output.absolute()
    load_modules()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), args.seed, Path(args.disk) if args.disk else None)
        kinds = [kind for kind in args.kinds.split(",") if kind != "full disk" or bench.disk]
        bench.measure(COMMANDS if "full disk" in kinds else {*kinds, *(["run"] if "serve" in kinds else [])})
        share = -(-args.kills // len(kinds))
        for kind in kinds:
            while (left := share - bench.kills[kind]) > 0:
                if kind == "serve":
                    bench.serve(min(left, 5))
                elif kind != "full disk":
                    bench.kill_command(kind, left)
                elif bench.draw.random() < 0.6:
                    bench.fill_for_command()
                else:
                    bench.serve(min(left, 3), on_disk=True)
            print(f"{kind}: {bench.kills[kind]} kills", flush=True)
    result = {
        "arguments": f"--kills={args.kills} --seed={args.seed}",
        "kills": {kind: bench.kills[kind] for kind in KINDS},
        "full_disk": "a file system in memory" if bench.disk else "left out: none could be mounted",
        "acknowledged_changes": bench.acknowledged,
        "problems": {kind: bench.problems[kind] for kind in PROBLEMS},
        "examples": bench.examples[:20],
        "seconds": round(time.monotonic() - started),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("kills", "problems", "acknowledged_changes", "seconds")}))
    return 1 if bench.examples else 0


if __name__ == "__main__":
    raise SystemExit(main())
