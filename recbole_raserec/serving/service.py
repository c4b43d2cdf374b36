"""The command ``serve``: its options and limits, and the life of a server from the first load to the last save."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

from recbole_raserec.distributed.launch import cores
from recbole_raserec.errors import ConfigError, MissingExtraError, RaSeRecError

TOKEN_VARIABLE = "RECBOLE_RASEREC_TOKEN"

LOG = logging.getLogger("recbole_raserec.serve")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the service; the limits are the largest values that a request may have.

    Attributes:
        token: for the calls that change something; None: they are refused.
        workers: threads that answer reading calls; 0: one a core, at most 4. Changes have a thread of their own.
        save_every: seconds between saves, when there were changes; 0: only at the end.
        drain_seconds: that running requests have to finish in when the server stops.
        body_seconds: in which a request must have arrived. max_body: bytes of it.
    """

    token: Optional[str] = dataclasses.field(default=None, repr=False)
    workers: int = 0
    save_every: float = 300.0
    drain_seconds: float = 30.0
    body_seconds: float = 30.0
    max_body: int = 8 << 20
    max_sequences: int = 1024
    max_history: int = 10_000
    max_k: int = 1000
    max_candidates: int = 100_000
    max_events: int = 10_000
    max_concurrent: int = 128

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("workers", "save_every") else 1
            if field.name != "token" and not least <= value < 1 << 40:  # NaN is neither
                problems.append(f"{field.name}: {value} is no such number; give one from {least} on.")
        if self.token is not None and not (self.token and self.token.isascii() and self.token.isprintable()):
            problems.append("token: is empty, or not of printable ASCII characters; HTTP headers carry no others.")
        if problems:
            raise ConfigError(problems)


HELP = {
    "workers": "threads that answer reading calls (default: one a core, at most 4)",
    "save_every": "seconds between saves when there were changes; 0: only at the end",
    "drain_seconds": "that running requests have to finish in when the server stops",
    "body_seconds": "in which the body of a request must have arrived",
    "max_body": "bytes of a request", "max_sequences": "histories a request", "max_history": "items of a history",
    "max_k": "items recommended", "max_candidates": "candidates, and excluded items",
    "max_events": "events an update", "max_concurrent": "requests at a time",
}  # fmt: skip

SERVE_HELP = f"""\
The token is better in a file or in the variable {TOKEN_VARIABLE}: a command line is seen by every user of the
machine and stays in the shell's history. A --token wins over a --token_file, and that over the variable. Without a
token, update, forget and save are refused.

examples:
  recbole-raserec serve saved/RaSeRec-ml-100k-...
  recbole-raserec serve saved/RaSeRec-ml-100k-... --port=9000 --token_file=token.txt --max_k=100"""


def add_serve(parser: argparse.ArgumentParser) -> None:
    """The options of ``serve``."""
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="a finished run; its last line names it")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="(default: 8000; 0: any free one)")
    parser.add_argument("--token_file", type=Path, metavar="FILE", help="that holds the token of changing calls")
    parser.add_argument("--token", metavar="TEXT", help="the token itself; see below")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    for field in dataclasses.fields(Settings):
        if field.name in HELP:
            number: Any = type(field.default)
            default = "" if "default" in HELP[field.name] else f" (default: {field.default})"
            parser.add_argument(
                f"--{field.name}", type=number, metavar="N", default=field.default, help=HELP[field.name] + default
            )


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of the parsed options.

    Raises:
        ConfigError: a value is wrong, or there is no readable token in the file.
    """
    token = args.token
    if token is None and args.token_file is not None:
        try:
            token = args.token_file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError([f"token_file: {args.token_file} cannot be read ({error})."]) from None
    if token is None:
        token = os.environ.get(TOKEN_VARIABLE) or None
    return Settings(token, **{name: getattr(args, name) for name in HELP})


class Service:
    """A recommender at work: threads for reading calls, one for changes, and saves from time to time.

    Args:
        recommender: that keeps a journal. settings: of the server.
    """

    def __init__(self, recommender: Any, settings: Settings):
        self.recommender, self.settings = recommender, settings
        workers = settings.workers or min(4, cores())
        share = (max(1, cores() // workers),)
        self.readers = ThreadPoolExecutor(workers, "read", _threads, share)
        # Changes come one after the other anyway; a save keeps them waiting, and must not keep readers waiting.
        self.writer = ThreadPoolExecutor(1, "write", _threads, share)
        self.ready = True
        self._stopping = threading.Event()
        self._saver: Optional[threading.Thread] = None

    def start(self) -> None:
        """Save every ``save_every`` seconds from now on."""
        if self.settings.save_every:
            self._saver = threading.Thread(target=self._save_repeatedly, name="save", daemon=True)
            self._saver.start()

    def save(self) -> int:
        """Save, if there is anything to; the number of changes that were not saved before."""
        changes = int(self.recommender.unsaved)
        if changes:
            self.recommender.save()
            log("saved", changes=changes)
        return changes

    def stop(self) -> None:
        """Finish what runs, save and let go of the directory.

        Raises:
            OSError: it could not be saved; the journal has everything then.
        """
        self.ready = False
        self._stopping.set()
        self.readers.shutdown()
        self.writer.shutdown()
        if self._saver is not None:
            self._saver.join()
        try:
            self.save()
        finally:
            self.recommender.close()

    def _save_repeatedly(self) -> None:
        while not self._stopping.wait(self.settings.save_every):
            try:
                self.writer.submit(self.save).result()
            except Exception as error:  # the journal has the changes, and the next save may succeed
                log_error("not saved", error)


def serve(args: argparse.Namespace) -> None:
    """Run ``serve`` until SIGTERM or SIGINT: then running requests finish, and what changed is saved.

    Raises:
        RaSeRecError: an option is wrong, the address is taken, the checkpoint is not fit or in use by another process.
        MissingExtraError: the packages of the extra ``serve`` are not installed.
    """
    settings = settings_of(args)
    try:
        import uvicorn

        from recbole_raserec.serving.app import create_app
    except ImportError as error:
        if isinstance(error, MissingExtraError) or error.name not in ("uvicorn", "pydantic"):
            raise
        raise MissingExtraError("serve", error.name, "`recbole-raserec serve` stands on it") from None
    from recbole_raserec.serving.recommender import Recommender

    _log_to_stderr()
    listening = _bind(args.host, args.port)
    with listening:
        recommender = Recommender.load(args.checkpoint, args.device, journal=True)
        app = create_app(recommender, settings)
        service: Service = app.state.service
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, lifespan="off", ws="none",
            timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        )  # fmt: skip
        # uvicorn raises the signal that ended it once more, for whoever handled it before: nobody, here.
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        place = f"serving {recommender.name} ({recommender.dataset}) at {_address(listening)}"

        class Server(uvicorn.Server):
            async def startup(self, sockets: Any = None) -> None:
                await super().startup(sockets=sockets)
                print(place, flush=True)  # only now are connections taken

        try:
            service.start()
            try:
                Server(config).run(sockets=[listening])
            finally:
                service.stop()
        except OSError as error:
            raise RaSeRecError(f"the server ended: {error}; what was acknowledged is in the journal.") from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def log(event: str, **members: Any) -> None:
    """A line of JSON in the log. It has no ids of users or items: logs live longer than a user who is forgotten."""
    LOG.info(json.dumps({"event": event, **members}))


def log_error(event: str, error: BaseException) -> None:
    """The type of an error and where it was raised; without its message, which may have ids."""
    lines = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    LOG.error(json.dumps({"event": event, "error": type(error).__name__, "at": lines[-8:]}))


def _threads(number: int) -> None:
    """Both are settings of the calling thread."""
    import faiss
    import torch

    torch.set_num_threads(number)
    faiss.omp_set_num_threads(number)


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise ConfigError([f"port: {port} is none; give a number from 0 to 65535."])
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError([f"host: {host!r} is no address of this machine ({error})."]) from None
    try:
        if os.name != "nt":  # where it would let two servers have one port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise ConfigError(
            [f"host, port: nothing can listen on {host}:{port} ({error.strerror}); give others."]
        ) from None
    return found


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    line = '{"time": "%(asctime)s", "level": "%(levelname)s", "log": %(message)s}'
    formatter = logging.Formatter(line, "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    LOG.handlers, LOG.propagate = [handler], False
    LOG.setLevel(logging.INFO)
