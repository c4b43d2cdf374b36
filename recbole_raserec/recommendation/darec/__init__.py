"""DARec: a language model as backbone."""

from recbole_raserec.recommendation.darec.language_model import load_pretrained
from recbole_raserec.recommendation.darec.model import DARec

__all__ = ["DARec", "load_pretrained"]
