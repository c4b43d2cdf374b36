"""The command line."""

from recbole_raserec.cli.main import parse_run, take_own

__all__ = [
    "parse_run",
    "take_own",
]
