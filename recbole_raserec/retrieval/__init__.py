"""Stage iii: the memory, its search, and the heads that read it (RaSeRec)."""

from recbole_raserec.retrieval.heads import interpolate, neighbour_weights
from recbole_raserec.retrieval.memory import MemoryBank
from recbole_raserec.retrieval.raserec import TRAINING_BUFFERS, RaSeRec
from recbole_raserec.retrieval.stage import fine_tune

__all__ = ["TRAINING_BUFFERS", "MemoryBank", "RaSeRec", "fine_tune", "interpolate", "neighbour_weights"]
