"""The processes that run one command together: who this one is, and what they tell each other.

Every process runs the same program on the same data. What costs time is shared out by rows and joined again, so that
all of them hold the same values afterwards; the first one decides the course of the program, tells the others, and
alone writes files. Without a group (`current` outside of `joined`) each function here does the plain thing, at no cost.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from typing import Any, Callable, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

#: How long a process waits for the others at a step of all of them, and for what the first one makes alone.
STEP_TIMEOUT, FIRST_TIMEOUT = datetime.timedelta(minutes=30), datetime.timedelta(days=30)

_STRIDE = 0x9E3779B1  # distance of the processes' seeds of torch (2^32 over the golden ratio)


class Group:
    """The processes of one run, seen from one of them; of size 1 where there is only this one.

    Args:
        rank: number of this process among all, from 0.
        size: of the group.
        local_rank: number of this process among those of its machine, from 0.
        store: torch's, through which they found each other.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: Any = None):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.first = rank == 0  # whether this process is the one that decides, writes and prints
        self._store, self._turns = store, 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first process, on all of them; it may take long, and be anything that pickles."""
        if self.size == 1:
            return make()
        self._turns += 1
        key = f"made {self._turns}"
        value: Any = None
        if self.first:
            value = make()
            self._store.set(key, "1")
        else:
            self._store.wait([key], FIRST_TIMEOUT)
        return self.broadcast(value)

    def broadcast(self, value: T) -> T:
        """The first process's `value`, on all of them."""
        held = [value]
        if self.size > 1:
            dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    def _each(self, value: T) -> list[T]:
        """Every process's `value`, on all of them."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def gathered(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The named tensors of all processes, each under its `own_name`."""
        own = {self.own_name(name): value.cpu() for name, value in values.items()}
        return {name: value for part in self._each(own) for name, value in part.items()}

    def own_name(self, name: str) -> str:
        """The name under which `gathered` returns what this process called `name`."""
        return name if self.first else f"{name}.{self.rank}"

    def agreed(self, value: Any) -> bool:
        """Whether all processes have the same `value`."""
        return all(other == value for other in self._each(value))

    def first_here(self, do: Callable[[], Any]) -> None:
        """Call `do` on the first process of each machine, and then on the others."""
        if self.local_rank == 0:
            do()
        self.agreed(None)
        if self.local_rank:
            do()

    def span(self, rows: int) -> tuple[int, int]:
        """This process's part (start, stop) of `rows` rows that lie next to each other.

        Fewer than two rows a process are all the first one's: some RecBole models squeeze a batch of one row away.
        """
        if rows < 2 * self.size:
            return (0, rows) if self.first else (0, 0)
        return rows * self.rank // self.size, rows * (self.rank + 1) // self.size

    def every(self, rows: int) -> slice:
        """The same, but every `size`-th row: a fair part where rows are sorted by length."""
        return slice(*self.span(rows)) if rows < 2 * self.size else slice(self.rank, rows, self.size)

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of the processes' tensors, all of one shape, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def joined_rows(self, part: torch.Tensor, where: slice, rows: int) -> torch.Tensor:
        """All `rows` rows [N, ...], of which this process has `part` at the rows `where`."""
        if self.size == 1:
            return part
        counted = torch.uint8 if part.dtype == torch.bool else part.dtype
        whole = part.new_zeros((rows, *part.shape[1:]), dtype=counted)
        whole[where] = part.to(counted)
        return self.add_up(whole).to(part.dtype)

    def seed_torch(self, seed: int) -> None:
        """Give the others dropout masks of their own; NumPy's and Python's draws, such as negatives, stay the same."""
        if not self.first:
            torch.manual_seed((seed + _STRIDE * self.rank) % 2**32)

    def send_weights(self, model: torch.nn.Module) -> None:
        """Give all processes the first one's parameters and buffers."""
        for values in [*model.parameters(), *model.buffers()]:
            if self.size > 1 and values.layout == torch.strided:
                held = values.data.contiguous()
                dist.broadcast(held, src=0)
                values.data.copy_(held)


_current = Group()


def current() -> Group:
    """The group that this process belongs to."""
    return _current


@contextlib.contextmanager
def joined(rank: int, size: int, local_rank: int, store: Any, cuda: bool) -> Iterator[Group]:
    """Belong to a `Group` within: `gloo` between CPUs, and with `cuda` `nccl` between GPUs, one for each local rank."""
    global _current
    backend = "cpu:gloo,cuda:nccl" if cuda and dist.is_nccl_available() else "gloo"
    if cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT)
    _current = Group(rank, size, local_rank, dist.PrefixStore("recbole_raserec", store))
    try:
        yield _current
        _current.agreed(None)  # a process that leaves closes the connections that others may still read from
        dist.destroy_process_group()  # not after an error: it could wait for one that is gone
    finally:
        _current = Group()
