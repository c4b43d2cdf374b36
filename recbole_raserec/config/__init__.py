"""Options: where they come from, what they may be, and which classes they name."""

from recbole_raserec.config.checks import check_run, evaluation_problems, selection_protocol
from recbole_raserec.config.config import Config
from recbole_raserec.config.options import (
    ENCODERS,
    MINING,
    NOT_TRAINING,
    REGENERATION,
    RETRIEVAL_MODEL,
    SEEN_KEPT,
    SEEN_REMOVED,
    regeneration_options,
    trains_regenerator,
)
from recbole_raserec.config.registry import MODELS, REFUSED, SUPPORTED, TRIMMABLE, get_model, get_trainer_class, trims
from recbole_raserec.config.sources import PROPERTIES, parse_value, read_yaml

__all__ = [
    "ENCODERS",
    "MINING",
    "MODELS",
    "NOT_TRAINING",
    "PROPERTIES",
    "REFUSED",
    "REGENERATION",
    "RETRIEVAL_MODEL",
    "SEEN_KEPT",
    "SEEN_REMOVED",
    "SUPPORTED",
    "TRIMMABLE",
    "Config",
    "check_run",
    "evaluation_problems",
    "get_model",
    "get_trainer_class",
    "parse_value",
    "read_yaml",
    "regeneration_options",
    "selection_protocol",
    "trains_regenerator",
    "trims",
]
