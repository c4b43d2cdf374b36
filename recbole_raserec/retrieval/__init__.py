"""Stage iii: the memory, its search, and the heads that read it (RaSeRec)."""

from recbole_raserec.retrieval.knn_head import KNNRaSeRec, neighbour_weights, raserec_class
from recbole_raserec.retrieval.memory import MemoryBank
from recbole_raserec.retrieval.raserec import RaSeRec
from recbole_raserec.retrieval.stage import TRAINING_BUFFERS, fine_tune

__all__ = [
    "TRAINING_BUFFERS",
    "KNNRaSeRec",
    "MemoryBank",
    "RaSeRec",
    "fine_tune",
    "neighbour_weights",
    "raserec_class",
]
