"""The compiled kernels: found, checked and called; everything here has a form in torch that takes its place.

`setup.py` compiles `src/` once per instruction set, where a C compiler is at hand; without one the package works
all the same, at torch's speed. Nothing is compiled when the package runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.machinery
import importlib.metadata
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import torch

#: Number of the interface; a library compiled from other sources is not used.
INTERFACE = 3
#: Libraries, the best first.
NAMES = ("_native_avx512", "_native_avx2")
#: Bytes of the exponentials that the cross-entropy keeps between the gradients of the rows and of the items.
KEPT_BYTES = 16 << 20
_BLOCK = 24  # rows that a thread takes at a time in cross_entropy.h


class Library:
    """A loaded library.

    Attributes:
        name: one of `NAMES`.
        width: floats in a vector; sizes must be multiples of it.
        bfloat16: whether it has the cross-entropy.
    """

    def __init__(self, path: Path, name: str):
        self.name = name
        self.call = ctypes.CDLL(str(path))
        found = (ctypes.c_int64 * 3)()
        self.call.raserec_properties(found)
        self.width, self.bfloat16, self.interface = int(found[0]), bool(found[1]), int(found[2])


@functools.cache
def loaded() -> Optional[Library]:
    """The best library this processor can run, or None."""
    # The shortest first: a file named after one Python is of an earlier installation.
    suffixes = sorted(importlib.machinery.EXTENSION_SUFFIXES, key=len)
    places = itertools.product(filter(_runs, NAMES), list(_folders()), suffixes)
    for name, folder, suffix in places:
        path = folder / (name + suffix)
        with contextlib.suppress(OSError, AttributeError):
            if path.is_file() and (found := Library(path, name)).interface == INTERFACE:
                return found
    return None


def _runs(name: str) -> bool:
    """Whether the processor has the instructions of library `name`."""
    probe_of = getattr(torch.backends, "cpu", None)  # there since torch 2.1
    capability = getattr(probe_of, "get_cpu_capability", lambda: "")()
    if name == "_native_avx512":
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return capability == "AVX512" and bool(probe is not None and probe())
    return capability in ("AVX512", "AVX2")


def _folders() -> Iterator[Path]:
    """Beside this file; in the installed package, where this file belongs to a source tree."""
    yield Path(__file__).parent
    for installed in importlib.metadata.distributions(name="recbole-raserec"):
        yield Path(str(installed.locate_file("recbole_raserec/kernels")))


def pointer(x: Optional[torch.Tensor]) -> ctypes.c_void_p:
    """Address of a contiguous CPU tensor, or NULL."""
    if x is None:
        return ctypes.c_void_p(None)
    if not x.is_contiguous() or x.device.type != "cpu":
        raise ValueError("the kernels take contiguous tensors on the CPU.")
    return ctypes.c_void_p(x.data_ptr())


def has_cross_entropy() -> bool:
    """Whether `cross_entropy` can be called."""
    found = loaded()
    return found is not None and found.bfloat16


def cross_entropy(
    h: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, rows: bool, table: bool
) -> tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
    """`-log softmax(h @ items.T)[target]` of each row, and gradients of its weighted sum; products in bfloat16.

    Args:
        h: float32 [B, H].
        items: float32 [V, H].
        targets: in [0, V), int64 [B].
        weights: float32 [B].
        rows: whether the gradient of `h` is wanted.
        table: whether the gradient of `items` is wanted.

    Returns:
        losses [B] (unweighted), gradient [B, H] or None, gradient [V, H] or None.
    """
    found = loaded()
    assert found is not None
    n, size, n_items = len(h), h.size(1), len(items)
    if items.size(1) != size or targets.shape != (n,) or weights.shape != (n,):
        raise ValueError("h [B, H], items [V, H], targets [B] and weights [B] must fit together.")
    if targets.dtype != torch.int64 or any(x.dtype != torch.float32 for x in (h, items, weights)):
        raise TypeError("the kernel takes float32 vectors and weights, and int64 targets.")
    room = -size % 16
    if room:
        h, items = (torch.nn.functional.pad(x, (0, room)) for x in (h, items))
    h, items, targets, weights = (x.contiguous() for x in (h, items, targets, weights))
    if n and not 0 <= int(targets.min()) <= int(targets.max()) < n_items:
        raise IndexError(f"targets must lie in [0, {n_items}).")
    wide, padded, threads = h.size(1), -(-n_items // 64) * 64, torch.get_num_threads()
    chunk = max(2, min(n + n % 2, KEPT_BYTES // (2 * padded) // 2 * 2))

    def halves(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    columns, vectors, kept = halves(padded, wide), halves(padded, wide), halves(padded, chunk)
    scaled, pairs, near = halves(chunk, wide), halves(chunk, wide), halves(threads, padded, _BLOCK)
    logits, scales, losses = (torch.empty(s, dtype=torch.float32) for s in ((threads, padded, _BLOCK), (chunk,), (n,)))
    grad_h = torch.empty_like(h) if rows else None
    grad_items = torch.zeros_like(items) if table else None
    found.call.raserec_cross_entropy_bf16(
        ctypes.c_long(n), ctypes.c_long(n_items), ctypes.c_long(wide), *map(pointer, (h, items, targets, weights)),
        *map(pointer, (columns, vectors, kept, scaled, pairs, logits, near, scales)), ctypes.c_long(chunk),
        ctypes.c_int(threads), *map(pointer, (losses, grad_h, grad_items)),
    )  # fmt: skip
    if room:
        grad_h, grad_items = (None if x is None else x[:, :size] for x in (grad_h, grad_items))
    return losses, grad_h, grad_items
