"""DARec: a language model as backbone."""

from recbole_raserec.recommendation.darec.injection import find_collaborative_model
from recbole_raserec.recommendation.darec.language_model import load_pretrained
from recbole_raserec.recommendation.darec.model import DARec

__all__ = ["DARec", "find_collaborative_model", "load_pretrained"]
