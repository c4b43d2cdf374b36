"""A `.pth` of RecBole's Trainer read without running anything in it: its tensors and its options."""

from __future__ import annotations

import pickle
import struct
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from recbole_raserec.errors import CheckpointError

#: What is made as the file says. All are functions of torch's own that build tensors.
_BUILT = frozenset({"_rebuild_parameter", "_rebuild_sparse_tensor", "_rebuild_tensor_v2"})


class Inert:
    """Stands for an object of any other class, which is not imported: what it was made with, and its state."""

    state: Any = None

    def __new__(cls, *args: Any, **_: Any) -> Inert:
        made = super().__new__(cls)
        made.args = args  # type: ignore[attr-defined]
        return made

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def _ignore(self, *_: Any) -> None:
        """A list's, set's or mapping's content."""

    append = extend = add = __setitem__ = _ignore


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch._utils" and name in _BUILT:
            return getattr(torch._utils, name)
        if module == "torch.serialization" and name == "_get_layout":
            return torch.serialization._get_layout
        return Inert


def read_recbole_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The tensors of the model by name, the options of its run, and the best validation score, or None.

    Numbers, texts, lists and tensors are read; objects of all other kinds are `Inert`.

    Raises:
        CheckpointError: it is no checkpoint of RecBole's Trainer, or damaged.
    """
    import torch

    module: Any = types.ModuleType("recbole_checkpoint_reader")
    module.__dict__.update(vars(pickle), Unpickler=_Reader)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [Path(name).name for name in archive.namelist()]
        if (
            "data.pkl" not in names or "constants.pkl" in names
        ):  # with constants: a program, which torch.load would load
            raise ValueError("it is no archive of tensors")
        found = torch.load(path, "cpu", pickle_module=module, weights_only=False)
        tensors, options = dict(found["state_dict"]), found["config"].state["final_config_dict"]
        if not all(isinstance(value, torch.Tensor) for value in tensors.values()) or not isinstance(options, dict):
            raise ValueError("it has no tensors, or no options")
        score = found.get("best_valid_score")
    except Exception as error:  # whatever a damaged or made-up file leads to
        why = " ".join(str(error).split()) or type(error).__name__
        problem = f"{path} is not a readable checkpoint of RecBole's Trainer ({why[:200]})"
        raise CheckpointError(f"backbone_checkpoint: {problem}; name one, or a directory of this package.") from None
    if isinstance(score, Inert) and len(score.args) == 2 and len(score.args[1]) == 8:  # type: ignore[attr-defined]
        (score,) = struct.unpack("<d", score.args[1])  # type: ignore[attr-defined]  # of numpy
    return tensors, options, score if isinstance(score, float) else None
