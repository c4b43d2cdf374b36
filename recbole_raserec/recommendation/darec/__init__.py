"""DARec: a language model as backbone."""

from recbole_raserec.recommendation.darec.injection import find_collaborator, take_collaborator
from recbole_raserec.recommendation.darec.language_model import load_pretrained
from recbole_raserec.recommendation.darec.model import DARec

__all__ = [
    "DARec",
    "find_collaborator",
    "load_pretrained",
    "take_collaborator",
]
