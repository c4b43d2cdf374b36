"""Options: how they are declared, where they come from, what they may be, and which classes they name."""

from recbole_raserec.config.checks import (
    check_run,
    evaluation_problems,
    selection_protocol,
)
from recbole_raserec.config.config import (
    Config,
    saved_config,
)
from recbole_raserec.config.options import (
    ENCODERS,
    MINING,
    REGENERATION,
    RETRIEVAL_MODEL,
    SEEN_KEPT,
    SEEN_REMOVED,
    Count,
    Dropout,
    Dropouts,
    EncoderOptions,
    LearningOptions,
    Loss,
    ModelName,
    Names,
    Natural,
    Numbers,
    Options,
    Positive,
    PositiveShare,
    Precision,
    SequentialOptions,
    Several,
    Share,
    Sizes,
    Text,
    Weight,
    option,
    regeneration_options,
    trains_regenerator,
)
from recbole_raserec.config.sources import (
    MODELS,
    PROPERTIES,
    REFUSED,
    SUPPORTED,
    TRIMMABLE,
    get_model,
    get_trainer_class,
    parse_value,
    read_yaml,
    trims,
)

__all__ = [
    "ENCODERS", "MINING", "MODELS", "PROPERTIES", "REFUSED", "REGENERATION", "RETRIEVAL_MODEL", "SEEN_KEPT",
    "SEEN_REMOVED", "SUPPORTED", "TRIMMABLE", "Config", "Count", "Dropout", "Dropouts", "EncoderOptions",
    "LearningOptions", "Loss", "ModelName", "Names", "Natural", "Numbers", "Options", "Positive", "PositiveShare",
    "Precision", "SequentialOptions", "Several", "Share", "Sizes", "Text", "Weight", "check_run", "evaluation_problems",
    "get_model", "get_trainer_class", "option", "parse_value", "read_yaml", "regeneration_options",
    "saved_config", "selection_protocol", "trains_regenerator", "trims",
]  # fmt: skip
