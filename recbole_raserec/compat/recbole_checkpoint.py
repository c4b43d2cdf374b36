"""Reading the checkpoints of RecBole's Trainer (pickles) without running what a foreign file might ask for."""

from __future__ import annotations

import enum
import os
import pickle
import sys
import types
from typing import Any

_PLAIN = frozenset(
    {
        "_codecs.encode",
        "builtins.set",
        "builtins.slice",
        "collections.OrderedDict",
        "collections.defaultdict",
        "logging.getLogger",
        "numpy.dtype",
        "numpy.matrix",
        "numpy.ndarray",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_tensor_v2",
        "yaml.loader.FullLoader",  # an attribute of RecBole's Config
    }
)


class CheckpointUnpickler(pickle.Unpickler):
    """Knows the globals that RecBole's checkpoints name: plain values, tensors, arrays, RecBole's classes.

    Raises:
        pickle.UnpicklingError: the file names any other global.
    """

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _PLAIN:
            return super().find_class(module, name)
        # No import by a name found in a file: importing a module runs it.
        if module in sys.modules or module.startswith(("recbole.", "recbole_raserec.", "scipy.sparse.")):
            found = super().find_class(module, name)
            if _is_written_by_recbole(found):
                return found
        raise pickle.UnpicklingError(
            f"The checkpoint names {module}.{name}, which is neither a value nor a class that RecBole writes. "
            f"If you trust where the file comes from, read it with torch.load(file, weights_only=False)."
        )


def _is_written_by_recbole(found: Any) -> bool:
    import torch
    from recbole.config import Config
    from recbole.model.abstract_recommender import AbstractRecommender
    from scipy.sparse import spmatrix

    if not isinstance(found, type):
        return isinstance(found, (torch.dtype, torch.layout))
    # DIN, FDSA, SASRecF, ... store their embedding layers whole, some with the data set these were made for.
    own = found.__module__.startswith(("recbole.", "recbole_raserec.", "torch.nn.modules."))
    return own or issubclass(found, (Config, AbstractRecommender, enum.Enum, spmatrix))


def load(file: Any, map_location: Any = None, **options: Any) -> Any:
    """torch.load for a checkpoint of RecBole's Trainer; with `weights_only` or `pickle_module` it is torch.load itself.

    `file` may also be a checkpoint directory of this package (S3Rec's and RaCT's `pre_model_path`); of its weights,
    {"state_dict": tensors} is returned.

    Raises:
        pickle.UnpicklingError: the file names a global that no checkpoint of RecBole names.
    """
    import torch

    if isinstance(file, (str, os.PathLike)) and os.path.isdir(file):
        from recbole_raserec.storage import read_tensors

        return {"state_dict": read_tensors(os.path.join(file, "model.safetensors"))[0]}
    if options.get("weights_only") is None and options.get("pickle_module") is None:
        reader = types.ModuleType("recbole_checkpoint_pickle")
        reader.__dict__.update(vars(pickle), Unpickler=CheckpointUnpickler, load=_load_pickle)
        options.update(weights_only=False, pickle_module=reader)
    return torch.load(file, map_location, **options)


def _load_pickle(file: Any, **options: Any) -> Any:
    return CheckpointUnpickler(file, **options).load()  # torch's format before 1.6 is a row of pickles
