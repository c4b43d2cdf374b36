"""Attacks on a running service, and what a small request waits meanwhile.

    python experiments/attacks.py saved/RaSeRec-amazon-beauty-... --seconds=20

serves the checkpoint with `--read_only` (nothing in it is changed), and lets one attack after the other run against it
in a process of its own, while a second client asks for ten items after ten others, over a new connection each time.
Both share the machine with the server. The figures go to `--output`; the exit code is 1 if a small request failed, or
its p99 was over `--limit` seconds, during any attack.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

HEAD = b"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
#: What became of the attacker's requests, by status or the way they ended; and the seconds each took.
Outcome = list[tuple[str, float]]


async def send(port: int, data: bytes, wait: float, rest: Optional[Callable[[Any], Awaitable[None]]] = None) -> str:
    """Send `data` over a new connection, then what `rest` sends: the status, closed, or open after `wait` seconds."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return "refused"
    sending = None
    try:
        writer.write(data)
        if rest is not None:
            sending = asyncio.ensure_future(rest(writer))
        line = await asyncio.wait_for(reader.readline(), wait)
        return line.split()[1].decode() if line else "closed"
    except asyncio.TimeoutError:
        return "open"
    except OSError:
        return "closed"
    finally:
        if sending is not None:
            sending.cancel()
        writer.close()


async def repeat(port: int, end: float, clients: int, data: bytes, rest: Any = None) -> Outcome:
    """Clients at the same time, each of which sends again as soon as it was answered."""
    found: Outcome = []

    async def client() -> None:
        while (now := time.perf_counter()) < end:
            how = await send(port, data, max(0.1, end + 15 - now), rest)
            found.append((how, time.perf_counter() - now))
            if how in ("refused", "closed", "408"):  # it held a connection, and takes another
                await asyncio.sleep(1)

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


async def drip(writer: Any) -> None:
    """A byte a second."""
    with contextlib.suppress(OSError):
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(1)


def whole(body: bytes) -> bytes:
    """A request with its body."""
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(body: bytes) -> bytes:
    """The start of a request in chunks."""
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body


def histories(items: list[str], number: int, length: int) -> bytes:
    """So many histories of so many items."""
    rng = np.random.default_rng(0)
    rows = [[items[n] for n in rng.integers(0, len(items), length)] for _ in range(number)]
    return json.dumps({"sequences": rows, "k": 10}, separators=(",", ":")).encode()


def attacks(items: list[str]) -> dict[str, tuple[int, bytes, Any]]:
    """By name: clients, what each of them sends, and what it goes on to send."""
    size = 7_800_000
    longest = size // (1024 * (3 + max(map(len, items[:1000]))))
    large = histories(items, 1024, longest)
    return {
        "none": (0, b"", None),
        "2 requests of 7.8 MB": (2, whole(large + b" " * (size - len(large))), None),
        "2 requests of 89,600 items": (2, whole(histories(items, 896, 90)), None),
        "130 slow bodies": (130, HEAD + b"Content-Length: 1000\r\n\r\n", drip),
        "130 slow bodies of 7.8 MB": (130, HEAD + b"Content-Length: %d\r\n\r\n" % size + b" " * 70_000, drip),
        "200 half headers": (200, HEAD, None),
        "1,000 half headers": (1000, HEAD, None),
        "10 chunks of 17 digits": (10, chunked(b"F" * 17 + b"\r\n{"), None),
        "2 bodies of chunks of one byte": (2, chunked(b"1\r\n \r\n" * 1_000_000 + b"0\r\n\r\n"), None),
        "2 bodies of 20 MB": (2, whole(b" " * 20_000_000), None),
        "4 headers of 1 MB": (4, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 170_000, None),
    }


def attack(port: int, seconds: float, items: list[str], name: str, found: Any) -> None:
    """Run one attack, in a process of its own."""
    clients, data, rest = attacks(items)[name]
    found.put(asyncio.run(repeat(port, time.perf_counter() + seconds, clients, data, rest)))


def ask(port: int, body: bytes) -> tuple[float, str]:
    """Seconds of a small request, and what was wrong with it."""
    started, error = time.perf_counter(), ""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/recommend", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200 or len(json.loads(text)["results"][0]["items"]) != 10:
            error = f"{answer.status} {text[:200].decode()}"
    except (OSError, http.client.HTTPException, ValueError) as problem:
        error = repr(problem)
    finally:
        connection.close()
    return time.perf_counter() - started, error


def measure(port: int, pid: int, seconds: float, items: list[str], name: str) -> dict[str, Any]:
    """The figures of one attack."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=attack, args=(port, seconds, items, name, found))
    process.start()
    time.sleep(2)  # it has begun
    rng, done = np.random.default_rng(1), []
    end = time.perf_counter() + seconds - 2
    while time.perf_counter() < end:
        done.append(ask(port, histories([items[n] for n in rng.integers(0, len(items), 10)], 1, 10)))
        time.sleep(0.02)
    outcome: Outcome = found.get(timeout=120)
    process.join()
    times, errors = np.array([each for each, _ in done]), [error for _, error in done if error]
    status = Path(f"/proc/{pid}/status")
    peak = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) // 1024 if status.is_file() else None  # type: ignore[index]
    return {
        "small_requests": len(done), "errors": len(errors), **({"such_as": errors[0]} if errors else {}),
        "p50": round(float(np.median(times)), 4), "p99": round(float(np.percentile(times, 99)), 4),
        "max": round(float(times.max()), 4), "attacker": dict(Counter(how for how, _ in outcome)),
        "attacker_longest": round(max((each for _, each in outcome), default=0.0), 2), "peak_MiB": peak,
    }  # fmt: skip


def main() -> None:
    """Serve, attack, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=20, help="each attack")
    parser.add_argument("--limit", type=float, default=1.0, help="seconds of a small request's p99")
    parser.add_argument("--attacks", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--output", type=Path, default=Path("results/attacks.json"))
    args = parser.parse_args()
    from recbole_raserec.storage.checkpoint import read_ids

    items = read_ids(args.checkpoint)["items"][1:]
    code = "import sys; from recbole_raserec.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", str(args.checkpoint), "--port=0", "--read_only", "--device=cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    log = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as server:
        try:
            line = server.stdout.readline() if server.stdout else ""
            port = int(line.rpartition(":")[2])
            figures = {}
            for name in args.attacks or attacks(items):
                figures[name] = measure(port, server.pid, args.seconds, items, name)
                print(name, json.dumps(figures[name]), flush=True)
        finally:
            server.terminate()
    wrong = [name for name, each in figures.items() if each["errors"] or each["p99"] > args.limit]
    about = {"command": " ".join(sys.argv), "serving": line.partition(" at ")[0], "cores": os.cpu_count()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(
        json.dumps({**about, "failed": wrong, "attacks": figures}, indent=2) + "\n", encoding="utf-8"
    )
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
