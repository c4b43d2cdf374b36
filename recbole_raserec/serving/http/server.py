"""The command ``serve``: its options and limits, and the life of a server from the first load to the last save."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from recbole_raserec.errors import ConfigError, MissingExtraError, RaSeRecError
from recbole_raserec.serving.http.service import Service
from recbole_raserec.serving.http.settings import HELP, LOG, TOKEN_VARIABLE, Settings

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


def serve(args: argparse.Namespace) -> None:
    """Run ``serve`` until SIGTERM or SIGINT: then running requests finish, and what changed is saved.

    Raises:
        RaSeRecError: an option is wrong, the address is taken, the checkpoint is not fit or in use by another process.
        MissingExtraError: the packages of the extra ``serve`` are not installed.
    """
    settings = settings_of(args)
    try:
        import uvicorn

        from recbole_raserec.serving.http.app import create_app
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
