"""A card that is not there.

`with Card():` what is made on the device `meta` or moved there says that it is there, and holds its values. An
operation of tensors of both places fails as it does with CUDA: scalars may be on the CPU, and so may what indexes a
tensor of the card.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("meta")
_aten = torch.ops.aten
#: Operations that read from one place and write to the other.
_MOVES = (_aten._to_copy.default, _aten.copy_.default, _aten._foreach_copy_.default)
_INDEXED = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._unsafe_index_put.default)


class OnCard(torch.Tensor):
    """Of the card; `held` has the values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnCard:
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CARD
        )
        self.held = held
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnCard({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Card(TorchDispatchMode):
    """Within, the device `meta` is the card."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What `func` gives, on the card where what it reads or the device it names is."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, OnCard)]
    device = kwargs.get("device")
    onto = bool(there) if device is None else torch.device(device) == CARD
    if there and func not in _MOVES:
        others = [x for x in tensors if not isinstance(x, OnCard) and x.dim()]
        if others and not (func in _INDEXED and isinstance(args[0], OnCard)):
            raise RuntimeError(f"{func}: tensors on the card and on the CPU")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inside = tree_map(lambda x: x.held if isinstance(x, OnCard) else x, (args, kwargs))
    found = func(*inside[0], **inside[1])
    if func is _aten._to_copy.default and onto != bool(there) and found is inside[0][0]:
        found = found.clone()
    given = {id(x.held): x for x in there}  # what was changed in place stays itself

    def outside(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, OnCard):
            return x
        if id(x) in given:
            return given[id(x)]
        if func is _aten.copy_.default:
            return args[0]
        return OnCard(x) if onto else x

    return tree_map(outside, found)
