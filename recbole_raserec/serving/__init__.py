"""A finished run at work: recommendations, explanations, a memory that lives on."""

from recbole_raserec.serving.loading import load_checkpoint
from recbole_raserec.serving.recommender import Recommender

__all__ = [
    "Recommender",
    "load_checkpoint",
]
