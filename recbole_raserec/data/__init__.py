"""Interactions as sequences, their splits, and the batches of a training."""

from recbole_raserec.data.catalogue import Catalogue, Features, Histories, catalogue_of, read_features, title_column
from recbole_raserec.data.dataset import POSITION, SEQUENCE, WEIGHT, SequenceDataset, item_counts
from recbole_raserec.data.item_text import (
    ItemFeatures,
    computes_in_bfloat16,
    item_features,
    item_tokens,
    model_source,
    reading,
)
from recbole_raserec.data.loaders import (
    PACKED_TARGETS,
    SAME_TARGET,
    SAME_TARGET_ROWS,
    BucketLoader,
    PackedWindows,
    RowLoader,
)
from recbole_raserec.data.patterns import Patterns, mine_patterns
from recbole_raserec.data.regenerated import ORIGINS, Regenerated, joined, training_hash
from recbole_raserec.data.sequences import SequenceStore, pad_lists, pad_rows
from recbole_raserec.data.splits import Splits, check_same_options, check_same_split, prepare_data

__all__ = [
    "ORIGINS", "PACKED_TARGETS", "POSITION", "SAME_TARGET", "SAME_TARGET_ROWS", "SEQUENCE", "WEIGHT",
    "BucketLoader", "Catalogue", "Features", "Histories", "ItemFeatures", "PackedWindows", "Patterns",
    "Regenerated", "RowLoader", "SequenceDataset", "SequenceStore", "Splits", "catalogue_of", "check_same_options",
    "check_same_split", "computes_in_bfloat16", "item_counts", "item_features", "item_tokens", "joined",
    "mine_patterns", "model_source", "pad_lists", "pad_rows", "prepare_data", "read_features", "reading",
    "title_column", "training_hash",
]  # fmt: skip
