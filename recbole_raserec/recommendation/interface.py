"""What a sequential model is to whoever uses its vectors: a :class:`Backbone`, a score as a dot product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Models whose scores, loss and gradients stay the same when ``item_seq`` [B, L] is cut to the longest sequence of the
#: batch: padding never enters them. (In RecBole the padding row of an embedding is initialised like any other, so that
#: a model that sums over positions without a mask, STAMP for one, does depend on L.) A batch transform, such as the
#: masking of BERT4Rec, has to come after the cut.
TRIMMABLE: frozenset[str] = frozenset(
    {
        "BERT4Rec",
        "CORE",
        "FDSA",
        "FPMC",
        "GCSAN",
        "GRU4Rec",
        "GRU4RecF",
        "GRU4RecKG",
        "KSR",
        "NARM",
        "S3Rec",
        "SASRec",
        "SASRecF",
        "SRGNN",
        "TransRec",
    }
)


def trims(model: Any) -> bool:
    """Tells whether batches for ``model`` may be cut to their longest sequence without a change of any result.

    A model that :data:`TRIMMABLE` does not know says so itself with a class attribute ``trims = True``.

    Args:
        model: a model or its class.
    """
    kind = model if isinstance(model, type) else type(model)
    return bool(getattr(kind, "trims", kind.__name__ in TRIMMABLE))


class Backbone(nn.Module):
    """A model as user vectors times item vectors. This class fits ``forward(item_seq, item_seq_len) -> [B, H]``.

    B: sequences in the batch, L: padded length, V: items including the padding item 0, H: size of the vectors.

    Gradients flow through all three methods, and train/eval mode is the model's own (dropout included), so that the
    same object serves a frozen and a trained backbone.

    Args:
        model: a RecBole sequential recommender.
        n_items: V.

    Attributes:
        model: the wrapped model, a sub-module.
        n_items: V.
        hidden_size: H, the size in which user and item vectors meet (not always the option ``hidden_size``).
        needs_user: whether :meth:`encode` needs the users' ids.
        trims: whether a batch may be cut to its longest sequence, see :data:`TRIMMABLE`.
    """

    model: Any  # a recommender of any library; its attributes are checked when it is wrapped
    #: the arguments of the model's forward, in order
    arguments: tuple[str, ...] = ("item_seq", "item_seq_len")
    #: the attribute that holds the embedding of the items to be ranked
    item_table = "item_embedding"

    def __init__(self, model: nn.Module, n_items: int):
        super().__init__()
        self.model = model
        self.n_items = n_items
        self.needs_user = "user" in self.arguments
        self.trims = trims(model)
        with torch.no_grad():
            self.hidden_size = int(self.item_vectors().shape[1])

    def encode(self, item_seq: Tensor, item_seq_len: Tensor, user: Tensor | None = None) -> Tensor:
        """Gives the user vectors as they enter the dot product.

        Args:
            item_seq: long [B, L], oldest item first, padded with 0 on the right. L is MAX_ITEM_LIST_LENGTH, or anything
                from the longest sequence of the batch on if :attr:`trims`.
            item_seq_len: long [B], each at least 1.
            user: long [B]; needed if :attr:`needs_user`, otherwise ignored.

        Returns:
            float [B, H].

        Raises:
            ValueError: the model needs the users' ids and ``user`` is None.
        """
        if self.needs_user and user is None:
            raise ValueError(f"{type(self.model).__name__} has an embedding per user: encode() needs `user` ids [B].")
        return self._user_vectors(item_seq, item_seq_len, user)

    def _user_vectors(self, item_seq: Tensor, item_seq_len: Tensor, user: Tensor | None) -> Tensor:
        given = {"item_seq": item_seq, "item_seq_len": item_seq_len, "user": user}
        return self.model(*(given[name] for name in self.arguments))  # [B, H]

    def item_vectors(self) -> Tensor:
        """Gives the vectors of all items as they enter the dot product, row 0 (padding) included: float [V, H]."""
        own = getattr(self.model, "item_vectors", None)  # a method of the package's own models
        return (own() if callable(own) else getattr(self.model, self.item_table).weight)[: self.n_items]

    def item_bias(self) -> Tensor | None:
        """Gives what is added to the dot product, float [V], or None."""
        return None

    def scores(self, item_seq: Tensor, item_seq_len: Tensor, user: Tensor | None = None) -> Tensor:
        """Gives the scores of all items, float [B, V]: the model's ``full_sort_predict``."""
        scores = self.encode(item_seq, item_seq_len, user) @ self.item_vectors().T
        bias = self.item_bias()
        return scores if bias is None else scores + bias
