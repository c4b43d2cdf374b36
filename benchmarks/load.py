"""Clients at a running server, some of them updating: errors, latency and requests a second.

    recbole-raserec serve DIR --token_file=token.txt &
    python benchmarks/load.py DIR --token_file=token.txt --clients=64 --seconds=60 --json out.json

Updates change the served checkpoint: serve a copy. Every client waits for an answer before it asks again. Client and
server share the machine, so that the figures are lower bounds of what the server does alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


async def ask(reader: Any, writer: Any, host: str, path: str, body: Any, token: str) -> tuple[int, bytes]:
    """One request over a connection that stays open: status and body."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    )
    writer.write(f"{head}Authorization: Bearer {token}\r\n\r\n".encode() + content)
    await writer.drain()
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    size = next(int(line.partition(":")[2]) for line in lines if line.lower().startswith("content-length:"))
    return int(lines[0].split()[1]), await reader.readexactly(size)


async def client(number: int, args: argparse.Namespace, items: list[str], done: list[tuple[str, float, str]]) -> None:
    """Ask until the time is over: (what, seconds, error or nothing) of each request."""
    rng, place = np.random.default_rng(number), urlsplit(args.url)
    what = "update" if number < args.writers else "recommend"
    end, connection = time.perf_counter() + args.seconds, None
    while time.perf_counter() < end:
        history = [items[n] for n in rng.integers(0, len(items), int(rng.integers(1, args.longest + 1)))]
        body: Any = {"sequences": [history], "k": 10}
        if what == "update":
            body = {"events": [{"user": f"load-{number}-{rng.integers(100)}", "item": item} for item in history[:5]]}
        started, error = time.perf_counter(), ""
        try:
            if connection is None:
                connection = await asyncio.open_connection(place.hostname, place.port)
            call = ask(*connection, place.netloc, f"/{what}", body, args.bearer)
            status, answer = await asyncio.wait_for(call, 60)
            if status != 200:
                error = f"{status} {json.loads(answer).get('message', '')}"
            elif what == "recommend" and len(json.loads(answer)["results"][0]["items"]) != 10:
                error = "not ten items"
        except (OSError, EOFError, ValueError, asyncio.TimeoutError) as problem:
            error, connection = repr(problem), None
        done.append((what, time.perf_counter() - started, error))
        if error:
            await asyncio.sleep(0.1)
    if connection is not None:
        connection[1].close()


async def load(args: argparse.Namespace, items: list[str]) -> dict[str, Any]:
    """All clients at once; the figures by kind of request."""
    done: list[tuple[str, float, str]] = []
    started = time.perf_counter()
    await asyncio.gather(*(client(number, args, items, done) for number in range(args.clients)))
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {"clients": args.clients, "writers": args.writers, "seconds": seconds}
    for what in ("recommend", "update"):
        times = np.array([each for kind, each, error in done if kind == what and not error]) * 1000
        errors = [error for kind, _, error in done if kind == what and error]
        found[what] = {"requests": len(times), "a_second": len(times) / seconds, "errors": len(errors)}
        if len(times):
            found[what].update({f"p{share}_ms": float(np.percentile(times, share)) for share in (50, 99)})
        if errors:
            found[what]["such_as"] = errors[0]
    return found


def main() -> None:
    """Put a server under load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="that is served: its items are asked for")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--token_file", type=Path, metavar="FILE", help="needed where there are writers")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--writers", type=int, default=4, help="clients among them that update")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--longest", type=int, default=50, help="items of a history, at most")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    args.bearer = args.token_file.read_text(encoding="utf-8").strip() if args.token_file else ""
    from recbole_raserec.storage.checkpoint import read_ids

    found = asyncio.run(load(args, read_ids(args.checkpoint)["items"][1:]))
    print(json.dumps(found, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(1 if found["recommend"]["errors"] or found["update"]["errors"] else 0)


if __name__ == "__main__":
    main()
