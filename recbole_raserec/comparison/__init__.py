"""Models by data sets by seeds under one protocol, each a run of its own process."""

from recbole_raserec.comparison.driver import compare, run_command

__all__ = [
    "compare",
    "run_command",
]
