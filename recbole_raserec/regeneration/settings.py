"""The regenerator and the schedule of its training, as the options `regen_*` say."""

from __future__ import annotations

from typing import Any

import torch

from recbole_raserec.errors import ConfigError
from recbole_raserec.regeneration.regenerator import Regenerator
from recbole_raserec.regeneration.training import Schedule


def check_heads(config: Any) -> None:
    """`regen_heads` must divide the vectors' length.

    Raises:
        ConfigError: it does not.
    """
    size = config.for_embeddings()["hidden_size"] if config["regen_pretrained"] else config["regen_hidden_size"]
    if size % config["regen_heads"]:
        raise ConfigError(
            [f"regen_heads: {config['regen_heads']} does not divide vectors of length {size}; choose for example 1."]
        )


def build(config: Any, n_items: int, vectors: Any) -> Regenerator:
    """A fresh regenerator for V = `n_items` items.

    Args:
        vectors: item vectors [V, H] it starts from; None: random ones of length `regen_hidden_size`.
    """
    size, heads = config["regen_hidden_size"] if vectors is None else vectors.shape[1], config["regen_heads"]
    model = Regenerator(
        n_items, size, heads, config["regen_layers"], config["regen_inner_size"], config["regen_dropout"],
        config["regen_conditions"], config["MAX_ITEM_LIST_LENGTH"], config["regen_pattern_length"],
    )  # fmt: skip
    if vectors is not None:
        model.use_item_vectors(vectors.to("cpu", torch.float32))
    return model


def schedule(config: Any) -> Schedule:
    """How it is trained."""
    return Schedule(
        epochs=config["regen_epochs"],
        patience=config["regen_stopping_step"],
        learning_rate=config["regen_learning_rate"],
        batch_pairs=config["regen_batch_pairs"],
        held_out=config["regen_held_out"],
        entropy_weight=config["regen_entropy"],
        tau_decay=config["regen_tau_decay"],
        tau_least=config["regen_tau_least"],
        seed=config["seed"],
    )
