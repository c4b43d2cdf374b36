"""Stage i: a regenerated training set (DR4SR), and its personalisation (DR4SR+)."""

from recbole_raserec.regeneration.personaliser import personalise
from recbole_raserec.regeneration.stage import regenerate, regenerate_dataset

__all__ = ["personalise", "regenerate", "regenerate_dataset"]
