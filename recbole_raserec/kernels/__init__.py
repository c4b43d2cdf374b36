"""Fast exact parts of training: the compiled encoder, losses, dropout, and what bounds the memory of the process."""

from recbole_raserec.kernels.allocator import FreedMemory, keep_freed_memory, peak_memory_mb
from recbole_raserec.kernels.dropout import FastDropout, use_fast_dropout
from recbole_raserec.kernels.encoder import Architecture, Ragged, encode
from recbole_raserec.kernels.losses import info_nce, linear_cross_entropy, multiplies_in_bfloat16
from recbole_raserec.kernels.native import Library, has_cross_entropy, loaded, pointer

__all__ = [
    "Architecture", "FastDropout", "FreedMemory", "Library", "Ragged", "encode", "has_cross_entropy", "info_nce",
    "keep_freed_memory", "linear_cross_entropy", "loaded", "multiplies_in_bfloat16", "peak_memory_mb", "pointer",
    "use_fast_dropout",
]  # fmt: skip
