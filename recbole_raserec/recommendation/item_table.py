"""The item table of a model: a trained vector for each item, a trained map of its text, embeddings of attributes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_raserec.config import Columns, Config, Count, Dropout, Names, Natural, Options, Text, option
from recbole_raserec.data import ItemFeatures, computes_in_bfloat16, item_counts, item_features


class ItemOptions(Options):
    """What an item's vector is made of; docs/item_text.md."""

    item_vectors: Literal["id", "text", "both"] = option(
        "id", "id: a trained vector for each item; text: a trained map of its text's vector, and embeddings of its "
        "attributes; both: their sum", heading="What an item's vector is made of", later=True,
    )  # fmt: skip
    item_text: Optional[Columns] = option(
        "auto", "columns of the .item file that are read as text; auto: all of text or tokens but the id; null: none",
        later=True,
    )  # fmt: skip
    item_text_encoder: Optional[Text] = option(
        None, "directory or hub name of a sentence encoder, or tfidf; null: the MiniLM of the extra llm, or tfidf "
        "where that is not installed", later=True,
    )  # fmt: skip
    item_text_size: Count = option(128, "principal components of the texts' vectors", later=True)
    item_attributes: Optional[Names] = option(
        None, "columns of the .item file whose values have embeddings, such as [categories, brand]", later=True
    )
    item_id_min_interactions: Natural = option(
        0,
        "both: items with fewer in the training split have no vector of their own, as those that come later",
        later=True,
    )
    item_id_dropout: Dropout = option(
        0, "both: share of the items whose own vector is left out of a training step, in [0, 1)", later=True
    )


class ItemTable(nn.Module):
    """Stands where a model has `item_embedding`: `weight` is the table [V, H], and a call looks rows of it up.

    `v_i = e_i + W t_i + sum_a b_a`: the item's own vector, the map of its whitened text t_i, and the embeddings b of
    its attributes. The table is made once for a training step, so that what reads and what scores items share it and
    its gradient, and otherwise once until a weight changes. Rows beyond the items', such as a mask's, have their own
    vectors alone, and so has the padding.

    Args:
        embedding: the model's, which becomes `vectors`.
        features: of the items.
        n_items: V.
        by_text: there are no vectors of items' own.
        rare: which items have no vector of their own, bool [V]; None: all have one.
        dropout: the option `item_id_dropout`.
        std: standard deviation of the initial weights.
        precision: the option `softmax_precision`.

    Attributes:
        mark: fingerprint of the features.
    """

    text: Tensor
    numbers: Tensor
    own: Tensor

    def __init__(
        self, embedding: nn.Embedding, features: ItemFeatures, n_items: int, by_text: bool, rare: Optional[Tensor],
        dropout: float, std: float, precision: str,
    ):  # fmt: skip
        super().__init__()
        rows, size = embedding.weight.shape
        self.precision, self.spares = precision, rare is not None
        self.by_text, self.dropout, self.n_items = by_text, float(dropout), int(n_items)
        if by_text:
            kept = nn.Embedding(1 + rows - n_items, size, padding_idx=0)
            with torch.no_grad():
                kept.weight.copy_(embedding.weight[[0, *range(n_items, rows)]])
            embedding = kept
        self.vectors, self.mark = embedding, features.mark
        if features.projection.size:
            self.text_map = nn.Linear(features.text.shape[1], size, bias=False)
            nn.init.normal_(self.text_map.weight, std=std)
        if features.values:
            self.attributes = nn.Embedding(1 + len(features.values), size, padding_idx=0)
            nn.init.normal_(self.attributes.weight, std=std)
            with torch.no_grad():
                self.attributes.weight[0] = 0
        text, numbers = torch.zeros(n_items, features.text.shape[1]), torch.zeros(n_items, features.numbers.shape[1])
        numbers = numbers.to(torch.int32)
        if len(features.text) == n_items:  # without a data set the weights bring them
            text, numbers = torch.tensor(features.text), torch.tensor(features.numbers)
        own = torch.ones(n_items, dtype=torch.bool) if rare is None else ~rare
        self.register_buffer("own", own if not by_text else own[:0])
        self.register_buffer("text", text)
        self.register_buffer("numbers", numbers)
        self._kept: Optional[tuple[Any, Tensor]] = None
        self._read: Optional[tuple[Tensor, Tensor]] = None  # see `replace`
        self._made: dict[str, Any] = {}  # of the buffers: the texts in bfloat16, the attributes as sparse matrices

    @property
    def weight(self) -> Tensor:
        """The table, [V, H], or with the rows beyond the items'."""
        key = self._state()
        kept = self._kept
        if kept is None or kept[0] != key:
            table = self._table()
            if table.requires_grad:  # its graph serves one backward pass
                table.register_hook(self._forget)
            self._kept = kept = key, table
        return kept[1]

    def forward(self, item_seq: Tensor) -> Tensor:
        """Vectors of items, [...] -> [..., H]."""
        return F.embedding(item_seq, self.weight, padding_idx=0)

    def append(self, text: Tensor, numbers: Tensor) -> None:
        """Add items that have texts [A, S] and attributes [A, M], and no vectors of their own."""
        old, self._kept, self._made = self.n_items, None, {}
        self.text, self.numbers = torch.cat([self.text, text]), torch.cat([self.numbers, numbers])
        self.n_items += len(text)
        if not self.by_text:
            weight = self.vectors.weight.detach()
            none = weight.new_zeros(len(text), weight.shape[1])
            joined = torch.cat([weight[:old], none, weight[old:]])
            self.own = torch.cat([self.own, self.own.new_zeros(len(text))])
            self.vectors = nn.Embedding.from_pretrained(joined, freeze=False, padding_idx=0)

    def replace(self, numbers: Tensor, text: Tensor) -> None:
        """Give items [n] the texts [n, S]; their gradient is that of the next table, in training."""
        with torch.no_grad():
            self.text[numbers] = text.detach()
        self._read = numbers, text - text.detach()

    def frozen(self) -> nn.Embedding:
        """The table as it is, as an embedding that is not trained."""
        return nn.Embedding.from_pretrained(self.weight.detach().clone(), padding_idx=0)

    def train(self, mode: bool = True) -> ItemTable:
        self._kept = self._read = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_read": None, "_made": {}}

    def _forget(self, gradient: Tensor) -> None:
        self._kept = self._read = None

    def _state(self) -> Any:
        """What the table depends on; copies of weights are known by their place, changes by torch's count of them."""
        modes = self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        tensors = [*self.parameters(), *self.buffers()]
        return modes, [(*_place(x), x.requires_grad) for x in tensors]

    def _table(self) -> Tensor:
        vectors, rest = self.vectors.weight, None
        if self.by_text:
            own, behind = vectors[:1], vectors[1:]
        else:
            own, behind = vectors[: self.n_items], vectors[self.n_items :]
            keep = self.own
            if self.training and self.dropout:
                keep = keep & (torch.rand(len(own), device=own.device) >= self.dropout)
            if self.spares or (self.training and self.dropout):
                own = own * keep[:, None]
        if hasattr(self, "text_map"):
            rest = self._mapped()
            if self._read is not None:
                rest = rest.index_add(0, self._read[0], self.text_map(self._read[1]))
        if hasattr(self, "attributes"):
            summed = self._summed()
            rest = summed if rest is None else rest + summed
        assert rest is not None
        if self.by_text:
            return torch.cat([own, rest[1:], behind])
        own = own + rest
        return torch.cat([own, behind]) if len(behind) else own

    def _mapped(self) -> Tensor:
        """W t of all items; while it is trained in bfloat16 where that is several times faster."""
        weight = self.text_map.weight
        fast = self.precision != "float32" and weight.dtype == torch.float32
        if self.training and fast and computes_in_bfloat16("auto", weight.device):
            low = self._derived("low", self.text, lambda: self.text.bfloat16())
            return F.linear(low, weight.bfloat16()).float()
        return self.text_map(self.text)

    def _summed(self) -> Tensor:
        """The sums of the items' attributes."""
        weight = self.attributes.weight
        if weight.device.type == "cpu" and not torch.backends.mkl.is_available():
            return F.embedding_bag(self.numbers, weight, mode="sum", padding_idx=0)

        def matrices() -> tuple[Tensor, Tensor]:
            rows, _ = torch.nonzero(self.numbers, as_tuple=True)
            pairs = rows, self.numbers[self.numbers > 0].long()
            return _csr(*pairs, (self.n_items, len(weight))), _csr(*pairs[::-1], (len(weight), self.n_items))

        return _SparseProduct.apply(weight, *self._derived("sparse", self.numbers, matrices))

    def _derived(self, name: str, source: Tensor, make: Callable[[], Any]) -> Any:
        """What is made of a buffer, and again when that changes."""
        key, kept = _place(source), self._made.get(name)
        if kept is None or kept[0] != key:
            self._made[name] = kept = key, make()
        return kept[1]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and how often it was changed there."""
    return tensor.device, tensor.dtype, tensor.data_ptr(), tensor._version


class _SparseProduct(torch.autograd.Function):
    """A sparse matrix times a dense one; torch has no fast gradient for that."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix @ dense

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.transposed @ grads[0], None, None


def _csr(rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    """Ones at these places, in compressed rows."""
    order = torch.argsort(rows * shape[1] + columns)
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        ones = torch.ones(len(rows), device=rows.device)
        return torch.sparse_csr_tensor(starts, columns[order], ones, shape, check_invariants=False)


def use_item_table(model: Any, config: Union[Config, Mapping[str, Any]], dataset: Any) -> None:
    """Put an `ItemTable` in the place of `item_embedding`, as the option `item_vectors` asks; `id`: change nothing."""
    if config["item_vectors"] not in ("text", "both"):
        return
    features, least, rare = item_features(config, dataset), config["item_id_min_interactions"] or 0, None
    if least:
        rare = torch.from_numpy(item_counts(dataset) < least)  # without a data set the weights bring it
        rare[0] = False
    model.item_embedding = ItemTable(
        model.item_embedding, features, model.n_items, config["item_vectors"] == "text", rare,
        config["item_id_dropout"] or 0, config["initializer_range"] or 0.02, config["softmax_precision"] or "auto",
    )  # fmt: skip
