"""Which token sees which: rows of tokens laid end to end, without padding, and the views of the attention over them."""

from __future__ import annotations

import dataclasses
from typing import Optional

import torch


@dataclasses.dataclass
class Places:
    """Where the N tokens of R rows stand. A row is a history, or the text of one item.

    Attributes:
        row: int64 [N], ascending. item: int64 [N], ascending in a row: which item of the history the token belongs to.
        special: bool [N]: [SEQ] or [ALIGN], the last token of its item.
        position: int64 [N], the token's place within its item, which the language model takes for its position.
        rows: R.
    """

    row: torch.Tensor
    item: torch.Tensor
    special: torch.Tensor
    position: torch.Tensor
    rows: int

    def __post_init__(self) -> None:
        counts = torch.bincount(self.row, minlength=self.rows)  # [R]
        self.width = int(counts.max()) if len(self.row) else 0
        starts = counts.cumsum(0) - counts
        self.column = torch.arange(len(self.row), device=self.row.device) - starts[self.row]
        #: place of each token in [R, width] laid flat, int64 [N]
        self.slot = self.row * self.width + self.column

    def pad(self, values: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [R, width, ...], zeros behind each row's last token."""
        flat = values.new_zeros(self.rows * self.width, *values.shape[1:]).index_copy(0, self.slot, values)
        return flat.view(self.rows, self.width, *values.shape[1:])

    def unpad(self, values: torch.Tensor) -> torch.Tensor:
        """[R, width, ...] -> [N, ...]."""
        return values.reshape(self.rows * self.width, *values.shape[2:])[self.slot]

    def visible(self, causal: bool, own_item: bool = False) -> torch.Tensor:
        """What each token sees: bool [R, width, width], query before key.

        Tokens of earlier items (their [SEQ] too) and of the same item; of the latter an ordinary token never sees the
        special one, which comes last. So nothing later than an item enters the state at its [SEQ].

        Args:
            causal: as in a causal decoder no token sees a later one of its item.
            own_item: the view of context masking: ordinary tokens see their own item's alone, special ones as usual.
        """
        item = self.pad(self.item + 1)  # [R, T], 0 where there is nothing
        special = self.pad(self.special)
        query, key = item[:, :, None], item[:, None, :]
        same = query == key
        visible = (key < query) | (same & (special[:, :, None] | ~special[:, None, :]))
        if own_item:
            visible &= same | special[:, :, None]
        visible &= key > 0
        if causal:
            visible &= torch.ones(self.width, self.width, dtype=torch.bool, device=item.device).tril()
        # a query that does not exist sees itself, so that its softmax is defined
        return visible | torch.eye(self.width, dtype=torch.bool, device=item.device)

    def foreign(self) -> torch.Tensor:
        """Where an ordinary token looks at another item: bool [R, width, width]."""
        item, special = self.pad(self.item + 1), self.pad(self.special)
        return (item[:, :, None] != item[:, None, :]) & ~special[:, :, None]

    def sees_items(self, length: int) -> torch.Tensor:
        """Which items of the history a token may know of as a whole, those up to its own: bool [R, width, length]."""
        item = self.pad(self.item)
        return torch.arange(length, device=item.device) <= item[:, :, None]


def texts_as_rows(lengths: torch.Tensor) -> Places:
    """Each item a row of its own: its text's tokens, then [ALIGN]; lengths int64 [R], without it."""
    sizes = lengths + 1
    row = torch.repeat_interleave(sizes)
    position = torch.arange(len(row), device=row.device) - (sizes.cumsum(0) - sizes)[row]
    return Places(row, torch.zeros_like(row), position == lengths[row], position, len(lengths))


def histories_as_rows(counts: torch.Tensor, lengths: torch.Tensor) -> Places:
    """Each history a row: the tokens of an item, its [SEQ], the tokens of the next.

    Args:
        counts: int64 [R], items of each history. lengths: int64 [sum of counts], tokens of each without [SEQ].
    """
    sizes = lengths + 1
    entry = torch.repeat_interleave(sizes)  # [N], which item of which history
    row = torch.repeat_interleave(counts)[entry]
    item = entry - (counts.cumsum(0) - counts)[row]
    position = torch.arange(len(entry), device=entry.device) - (sizes.cumsum(0) - sizes)[entry]
    return Places(row, item, position == lengths[entry], position, len(counts))


def masked(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Boolean view -> what is added to the logits."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, float("-inf"))


@dataclasses.dataclass
class View:
    """What the attention of one pass works with.

    Attributes:
        places: the tokens. visible: bool [R, T, T]. foreign: see :meth:`Places.foreign`; None: no learned bias.
        items: bool [R, T, S], which of the extra keys a token sees; None: no extra keys.
        given: [R, S, C], the vectors that extra keys and values are made of.
    """

    places: Places
    visible: torch.Tensor
    foreign: Optional[torch.Tensor] = None
    items: Optional[torch.Tensor] = None
    given: Optional[torch.Tensor] = None
