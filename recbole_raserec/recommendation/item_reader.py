"""Items read as text by a language model: their tokens, their states at [ALIGN], and which of them are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from logging import getLogger
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from recbole.model.abstract_recommender import SequentialRecommender
from torch import nn

from recbole_raserec.data.item_text import read_item_texts, tokenise
from recbole_raserec.errors import ConfigError
from recbole_raserec.recommendation import pretrained
from recbole_raserec.recommendation.injection import Collaborator
from recbole_raserec.recommendation.language import LanguageModel, computes_in_bfloat16
from recbole_raserec.recommendation.places import Places, View, texts_as_rows


class ItemReader(SequentialRecommender):
    """A sequential model that knows items by what a language model makes of their texts.

    A text is followed by [ALIGN], whose state stands for the item. While training the states of all items are kept from
    the epoch's start on (:meth:`known_items`), and each step reads some of them anew (:meth:`fresh_items`).

    Raises:
        MissingExtraError: `transformers` or the default language model is not installed.
        ConfigError: options and language model do not fit.
    """

    item_tokens: torch.Tensor
    item_lengths: torch.Tensor

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        model, tokenizer = pretrained.load_pretrained(config["llm"])
        self.layers, self.context_mask = int(model.config.num_hidden_layers), config["context_mask"]
        self.token_budget, self.text_items = config["token_budget"], config["text_items"]
        self.language = LanguageModel(
            model, adapter_pairs(config["adapter_sizes"], self.layers), config["adapter_dropout"],
            config["initializer_range"], self.context_mask == "bias",
        )  # fmt: skip
        self.language.autocast = computes_in_bfloat16(config["llm_precision"], config["device"])
        words = self.language.embed(torch.arange(model.config.vocab_size))  # [W, D]
        self.scale = float(words.norm(dim=1).mean())
        self.special = nn.Embedding(2, self.language.hidden_size)  # [ALIGN], [SEQ]
        with torch.no_grad():
            # new tokens begin as a word that means nothing in particular
            noise = torch.randn_like(self.special.weight) * words.std()
            self.special.weight.copy_(words.mean(dim=0) + noise)
        self._take_texts(config, dataset, tokenizer)
        self._known: Optional[tuple[Any, torch.Tensor]] = None
        self.collaborator: Optional[Collaborator] = None

    @staticmethod
    def check_installed(config: Any) -> None:
        """Whether what the model reads is installed, before any data is.

        Raises:
            MissingExtraError: it is not.
        """
        pretrained.model_source(config["llm"])

    def _take_texts(self, config: Any, dataset: Any, tokenizer: Any) -> None:
        """Token ids of all items as buffers: with them a checkpoint is whole. Without a data set they are empty."""
        longest = config["item_text_length"]
        ids, lengths = np.zeros((self.n_items, longest), np.int32), np.ones(self.n_items, np.int32)
        if hasattr(dataset, "field2id_token"):
            found = item_tokens(config, dataset, tokenizer)
            ids, lengths = found.ids, found.lengths
        self.register_buffer("item_tokens", torch.from_numpy(ids))
        self.register_buffer("item_lengths", torch.from_numpy(lengths))

    @torch.no_grad()
    def text_vectors(self) -> torch.Tensor:
        """The items' texts as the language model has them, means of its states over the tokens, centred: [V, D].

        Called while the adapters are at zero, so that the vectors are the frozen model's.
        """
        parts = []
        for numbers in self._text_blocks(torch.arange(self.n_items, device=self.item_tokens.device)):
            states, places = self._read_texts(numbers)
            words = ~places.special
            total = states.new_zeros(len(numbers), states.shape[1]).index_add(0, places.row[words], states[words])
            parts.append(total / self.item_lengths[numbers][:, None])
        vectors = torch.cat(parts)
        return vectors - vectors[1:].mean(dim=0)

    def fingerprint_parts(self) -> list[str]:
        """What of the data and the language model decides the result, beside the log: for the run's fingerprint."""
        digest = hashlib.sha256(self.item_tokens.cpu().numpy().tobytes() + self.item_lengths.cpu().numpy().tobytes())
        digest.update(self.language.frozen.mark.cpu().numpy().tobytes())
        return [digest.hexdigest()]

    def _read_texts(self, numbers: torch.Tensor) -> tuple[torch.Tensor, Places]:
        """States [N, D] of the texts of items [n], each followed by [ALIGN] and on its own."""
        places = texts_as_rows(self.item_lengths[numbers].long())
        ids = self.item_tokens[numbers[places.row], places.position.clamp(max=self.item_tokens.shape[1] - 1)].long()
        inputs = self._inputs(self.language.embed(ids), places, 0)
        view = View(places, places.visible(self.language.causal))
        if self.collaborator is not None:
            view.given, view.items = self.collaborator.items(numbers), places.sees_items(1)
        return self.language(inputs, view), places

    def read_items(self, numbers: torch.Tensor) -> torch.Tensor:
        """States at [ALIGN] of the texts of items [n]: [n, D]."""
        states, places = self._read_texts(numbers)
        return states[places.special]

    def _text_blocks(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        """Items in parts of at most `token_budget` tokens."""
        ends = (self.item_lengths[numbers].long() + 1).cumsum(0)
        parts = torch.bincount((ends - 1) // self.token_budget).tolist()
        return [part for part in numbers.split(parts) if len(part)]

    @torch.no_grad()
    def known_items(self) -> torch.Tensor:
        """States at [ALIGN] of all items [V, D]: while training those of the epoch's start, or of the last step that
        read the item anew; otherwise the present ones."""
        marks = "epoch" if self.training else [(p.data_ptr(), p._version) for p in self.parameters()]
        if self._known is None or self._known[0] != marks:
            was_training = self.training
            self.language.eval()
            numbers = torch.arange(self.n_items, device=self.item_tokens.device)
            found = torch.cat([self.read_items(part) for part in self._text_blocks(numbers)])
            self.language.train(was_training)
            self._known = marks, found
        return self._known[1]

    def train(self, mode: bool = True) -> ItemReader:
        if mode:  # RecBole calls it at the start of each epoch
            self._known = None
        return super().train(mode)

    def fresh_items(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Items whose texts a training step reads with gradient, and their states: half of them of the batch, half of
        all, so that rare ones are aligned too."""
        here = torch.unique(items)
        some = here[torch.randperm(len(here), device=items.device)[: -(-self.text_items // 2)]]
        any_ = torch.randint(1, self.n_items, (self.text_items // 2,), device=items.device)
        numbers = torch.unique(torch.cat([some, any_]))
        states = self.read_items(numbers)
        if self.training and self._known is not None:
            self._known[1].index_copy_(0, numbers, states.detach())
        return numbers, states

    def _inputs(self, embedded: torch.Tensor, places: Places, special: int) -> torch.Tensor:
        """Word embeddings [N, D], and those of [ALIGN] (`special` 0) or [SEQ] (1) in their places."""
        return torch.where(places.special[:, None], self.special.weight[special], embedded)


def adapter_pairs(sizes: Any, layers: int) -> list[tuple[int, int]]:
    """The option `adapter_sizes` as (after attention, after feed-forward) for each layer.

    Raises:
        ConfigError: it lists another number of layers than the language model has.
    """
    if isinstance(sizes, int):
        return [(sizes, sizes)] * layers
    pairs = [(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])) for size in sizes]
    if len(pairs) != layers:
        raise ConfigError([f"adapter_sizes: {len(pairs)} entries, but the language model has {layers} layers."])
    return pairs


def item_tokens(config: Any, dataset: Any, tokenizer: Any) -> Any:
    """The items' texts as tokens (:class:`~recbole_raserec.data.item_text.ItemTokens`), and a line in the log.

    They are kept with the data set: it is read by the loader and by the model.
    """
    kept = getattr(dataset, "item_text_tokens", None)
    if kept is not None:
        return kept
    path = Path(config["data_path"]) / f"{config['dataset']}.item"
    names: Sequence[str] = [str(token) for token in dataset.field2id_token[dataset.iid_field]]
    texts = read_item_texts(
        path, names, config["item_text_fields"], config["field_separator"] or "\t", dataset.iid_field
    )
    found = tokenise(
        texts.texts, lambda rows: tokenizer(rows, add_special_tokens=False)["input_ids"], config["item_text_length"]
    )
    getLogger().info(
        f"Item texts: {len(names) - 1} items, {texts.missing} without a text (their id is read instead), "
        f"{found.lengths[1:].mean():.1f} tokens each, {found.cut} cut at {config['item_text_length']}"
    )
    dataset.item_text_tokens = found
    return found
