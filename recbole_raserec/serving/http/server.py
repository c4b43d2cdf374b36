"""The life of a server: its address, the first load, signals, the last save."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

from recbole_raserec.errors import ConfigError, MissingExtraError, RaSeRecError
from recbole_raserec.serving.http.settings import LOG, JsonLines, Settings


def serve(
    directory: Union[str, Path], settings: Optional[Settings] = None, host: str = "127.0.0.1", port: int = 8000,
    device: Optional[str] = None, read_only: bool = False, public: bool = False,
) -> None:  # fmt: skip
    """Serve a checkpoint until SIGTERM or SIGINT: then running requests finish, and what changed is saved.

    Port 0 is any free one; the default device is a GPU if there is one. With `read_only` nothing is written into the
    directory, and there is no token: all changes are refused. A `host` that other machines reach needs a token for
    reading, or `public`.

    Raises:
        ConfigError: other machines could read without a token, and that is not said to be wanted.
        RaSeRecError: the address is taken, the checkpoint is not fit or in use by another process.
        MissingExtraError: the packages of the extra `serve` are not installed.
    """
    settings = settings or Settings()
    if read_only:
        settings = settings.model_copy(update={"token": None})
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("serve", error.name or "uvicorn", "`recbole-raserec serve` stands on it") from None
    from recbole_raserec.serving.http.app import create_app
    from recbole_raserec.serving.http.connections import Connection
    from recbole_raserec.serving.http.limits import LOOPBACK
    from recbole_raserec.serving.recommender import Recommender

    if settings.trusted_hosts is None:
        settings = settings.model_copy(update={"trusted_hosts": ",".join([*LOOPBACK, host])})
    with _json_log(), _bind(host, port) as listening:
        reached = ipaddress.ip_address(listening.getsockname()[0].partition("%")[0])
        if not (reached.is_loopback or public or settings.read_token):
            problem = f"host: {host} is reached by other machines, which could ask about every user without a token"
            raise ConfigError([f"{problem}; give --read_token_file=FILE, or --public if that is wanted."])
        recommender = Recommender.load(directory, device, journal=not read_only)
        if read_only:
            recommender.live.read_journal()
        app = create_app(recommender, settings)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, lifespan="off", ws="none",
            timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
            http=partial(Connection, settings, {}),  # called as the class would be
        )  # fmt: skip
        # uvicorn raises the signal that ended it once more, for what handled it before: nothing, here.
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        address, bound = listening.getsockname()[:2]
        address = f"[{address}]" if ":" in address else address
        line = f"serving {recommender.name} ({recommender.dataset}) at http://{address}:{bound}"

        class Server(uvicorn.Server):
            async def startup(self, sockets: Any = None) -> None:
                await super().startup(sockets=sockets)
                print(line, flush=True)  # only now are connections taken

        try:
            app.state.service.start()
            sys.setswitchinterval(0.0005)  # the threads of a large request hold up those of a small one for less
            try:
                Server(config).run(sockets=[listening])
            finally:
                app.state.service.stop()
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
        problem = f"host, port: nothing can listen on {host}:{port} ({error.strerror}); give others."
        raise ConfigError([problem]) from None
    return found


@contextlib.contextmanager
def _json_log() -> Iterator[None]:
    """All loggers write lines of JSON to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    LOG.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # its warnings are told by `Connection`
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)
