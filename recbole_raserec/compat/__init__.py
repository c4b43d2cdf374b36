"""What RecBole 1.2.1 needs to run on the libraries of today: patches of its modules, made as they are imported."""

from recbole_raserec.compat import patches as _patches  # noqa: F401
from recbole_raserec.compat import registration as _registration  # noqa: F401
from recbole_raserec.compat.import_hooks import all_patches, apply
from recbole_raserec.compat.patches import load_checkpoint
from recbole_raserec.compat.recbole_checkpoint import read_recbole_checkpoint

__all__ = ["all_patches", "apply", "load_checkpoint", "read_recbole_checkpoint"]
