"""Files without pickle: written atomically, read with checks; formats, not models."""

from recbole_raserec.storage.checkpoint import (
    BEST,
    FEATURES,
    HISTORIES,
    ITEM_TEXT,
    ITEMS,
    MANIFEST,
    MEMORY,
    STATE,
    dense_tensors,
    live_parts,
    load_weights,
    read_ids,
    read_manifest,
    read_weights,
    save_parts,
    write_checkpoint,
)
from recbole_raserec.storage.files import (
    ARRAYS,
    MODEL_VERSIONS,
    data_fingerprint,
    fingerprint,
    load_named,
    named_tensors,
    part_of,
    plain,
    raw_format,
    raw_stem,
    read_arrays,
    read_json,
    read_tensors,
    replacing,
    sha256,
    sync_directory,
    unwritable,
    version_of,
    write_arrays,
    write_json,
    write_tensors,
)
from recbole_raserec.storage.locks import locked, try_lock

__all__ = [
    "ARRAYS", "BEST", "FEATURES", "HISTORIES", "ITEMS", "ITEM_TEXT", "MANIFEST", "MEMORY", "MODEL_VERSIONS",
    "STATE", "data_fingerprint", "dense_tensors", "fingerprint", "live_parts", "load_named", "load_weights",
    "locked", "named_tensors", "part_of", "plain", "raw_format", "raw_stem", "read_arrays", "read_ids", "read_json",
    "read_manifest", "read_tensors", "read_weights", "replacing", "save_parts", "sha256", "sync_directory",
    "try_lock", "unwritable", "version_of", "write_arrays", "write_checkpoint", "write_json", "write_tensors",
]  # fmt: skip
