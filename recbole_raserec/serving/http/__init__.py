"""The service over HTTP; needs the extra `serve`."""

from recbole_raserec.serving.http.server import serve, serve_options

__all__ = [
    "serve",
    "serve_options",
]
