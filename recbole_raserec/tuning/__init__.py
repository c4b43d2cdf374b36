"""Searches over options."""

from recbole_raserec.tuning.tune import tune_hyper_parameters

__all__ = [
    "tune_hyper_parameters",
]
