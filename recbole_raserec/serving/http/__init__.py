"""The service over HTTP; needs the extra `serve`."""

from recbole_raserec.serving.http.server import SERVE_HELP, add_serve, serve

__all__ = [
    "SERVE_HELP",
    "add_serve",
    "serve",
]
