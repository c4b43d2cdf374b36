"""The item table of a model: a trained vector for each item, a trained map of its text, embeddings of attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_raserec.config import Columns, Config, Count, Dropout, Names, Options, Text, option
from recbole_raserec.data import ItemFeatures, item_features


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
        dropout: the option `item_id_dropout`.
        std: standard deviation of the initial weights.

    Attributes:
        mark: fingerprint of the features.
    """

    text: Tensor
    numbers: Tensor

    def __init__(
        self, embedding: nn.Embedding, features: ItemFeatures, n_items: int, by_text: bool, dropout: float, std: float
    ):
        super().__init__()
        rows, size = embedding.weight.shape
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
        self.register_buffer("text", text)
        self.register_buffer("numbers", numbers)
        self._kept: Optional[tuple[Any, Tensor]] = None

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
        old, self._kept = self.n_items, None
        self.text, self.numbers = torch.cat([self.text, text]), torch.cat([self.numbers, numbers])
        self.n_items += len(text)
        if not self.by_text:
            weight = self.vectors.weight.detach()
            none = weight.new_zeros(len(text), weight.shape[1])
            joined = torch.cat([weight[:old], none, weight[old:]])
            self.vectors = nn.Embedding.from_pretrained(joined, freeze=False, padding_idx=0)

    def train(self, mode: bool = True) -> ItemTable:
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _forget(self, gradient: Tensor) -> None:
        self._kept = None

    def _state(self) -> Any:
        """What the table depends on; copies of weights are known by their place, changes by torch's count of them."""
        modes = self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return modes, [(w.data_ptr(), w._version, w.requires_grad, w.dtype) for w in self.parameters()]

    def _table(self) -> Tensor:
        vectors, rest = self.vectors.weight, None
        if self.by_text:
            own, behind = vectors[:1], vectors[1:]
        else:
            own, behind = vectors[: self.n_items], vectors[self.n_items :]
            if self.training and self.dropout:
                keep = torch.rand(len(own), 1, device=own.device) >= self.dropout
                own = own * keep
        if hasattr(self, "text_map"):
            rest = self.text_map(self.text)
        if hasattr(self, "attributes"):
            summed = F.embedding_bag(self.numbers, self.attributes.weight, mode="sum", padding_idx=0)
            rest = summed if rest is None else rest + summed
        assert rest is not None
        if self.by_text:
            return torch.cat([own, rest[1:], behind])
        own = own + rest
        return torch.cat([own, behind]) if len(behind) else own


def use_item_table(model: Any, config: Union[Config, Mapping[str, Any]], dataset: Any) -> None:
    """Put an `ItemTable` in the place of `item_embedding`, as the option `item_vectors` asks; `id`: change nothing."""
    if config["item_vectors"] not in ("text", "both"):
        return
    features = item_features(config, dataset)
    model.item_embedding = ItemTable(
        model.item_embedding, features, model.n_items, config["item_vectors"] == "text", config["item_id_dropout"] or 0,
        config["initializer_range"] or 0.02,
    )  # fmt: skip
