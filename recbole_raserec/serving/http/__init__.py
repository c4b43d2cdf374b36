"""The service over HTTP; needs the extra `serve`, of which nothing is imported before it is used."""

from recbole_raserec.serving.http.server import serve
from recbole_raserec.serving.http.settings import READ_TOKEN_VARIABLE, TOKEN_VARIABLE, Settings, find_token

__all__ = ["READ_TOKEN_VARIABLE", "TOKEN_VARIABLE", "Settings", "find_token", "serve"]
