"""The one small interface through which retrieval sees a trained sequential model.

A :class:`Backbone` splits a model's score into a dot product: ``encode(...)`` gives the user vectors ``h``,
``item_vectors()`` the vectors ``v`` they are multiplied with, so that ``h @ v.T (+ item_bias())`` is what the model's
own ``full_sort_predict`` returns. For RecBole's models one small adapter per deviation says how (``adapters.py``), and
nothing is taken on trust: :func:`wrap_backbone` compares the scores on a random batch and refuses a model whose scores
disagree.

``python -m recbole_raserec.recommendation.backbone --table`` prints the table of ``docs/backbones.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_raserec.errors import ConfigError
from recbole_raserec.recommendation.adapters import ADAPTERS, REFUSED, SUPPORTED
from recbole_raserec.recommendation.interface import TRIMMABLE, Backbone, trims

__all__ = ["ADAPTERS", "REFUSED", "SUPPORTED", "TRIMMABLE", "Backbone", "table", "trims", "wrap_backbone"]

#: Largest difference allowed between the two ways to score, relative to the largest score.
TOLERANCE = 1e-5


def wrap_backbone(model: nn.Module, config: Any, dataset: Any) -> Backbone:
    """Wraps a RecBole sequential model, after a comparison of its scores with those of the wrapper.

    Models are known by the name of their class. One that is in neither :data:`ADAPTERS` nor :data:`REFUSED` is taken
    for ``forward(item_seq, item_seq_len) -> [B, H]`` times ``item_embedding``. The comparison needs no training data,
    draws nothing from the global random generators and leaves train/eval mode as it was.

    Args:
        model: the model, trained or not.
        config: RecBole's config: names of the user and item fields, MAX_ITEM_LIST_LENGTH.
        dataset: anything with ``num(field)``, the number of users and of items including padding.

    Returns:
        The adapter around the same model object.

    Raises:
        ConfigError: naming ``backbone``, the model and those that work, when the model does not score by a dot product
            of a user vector with item vectors, or needs data beyond the sequences.
    """
    name = type(model).__name__
    if name in REFUSED:
        raise _refusal(name, REFUSED[name])
    try:
        backbone = ADAPTERS.get(name, Backbone)(model, int(dataset.num(config["ITEM_ID_FIELD"])))
        ours, own = _compare(backbone, config, dataset)
    except Exception as error:
        # Whatever a foreign model does on this call, the person who named it is to read what was expected of it.
        raise _refusal(name, f"encoding a small random batch failed with {type(error).__name__}: {error}") from error
    if ours.shape != own.shape:
        raise _refusal(name, f"scores have shape {tuple(ours.shape)} and the model's own {tuple(own.shape)}")
    gap, scale = float((ours - own).abs().max()), float(own.abs().max())
    if not gap <= TOLERANCE * scale:  # so written, NaN is refused too
        raise _refusal(
            name, f"user vectors times item vectors differ from its scores by {gap:.2g} (scores to {scale:.2g})"
        )
    return backbone


def _compare(backbone: Backbone, config: Any, dataset: Any, batch: int = 4) -> tuple[Tensor, Tensor]:
    """Scores a random batch in both ways: float [B, V] each."""
    weight = next(backbone.parameters())
    generator = torch.Generator().manual_seed(0)
    length = int(config["MAX_ITEM_LIST_LENGTH"])
    n_users = int(dataset.num(config["USER_ID_FIELD"]))
    item_seq_len = torch.linspace(1, length, batch).long()  # [B]: one item ... full
    item_seq = torch.randint(1, backbone.n_items, (batch, length), generator=generator)  # [B, L]
    item_seq = item_seq * (torch.arange(length) < item_seq_len.unsqueeze(1))
    user = torch.randint(1, n_users, (batch,), generator=generator)  # [B]
    item_seq, item_seq_len, user = (x.to(weight.device) for x in (item_seq, item_seq_len, user))
    item_id = config["ITEM_ID_FIELD"]
    fields = {
        config["USER_ID_FIELD"]: user,
        item_id: torch.ones_like(user),
        item_id + config["LIST_SUFFIX"]: item_seq.clone(),
        config["ITEM_LIST_LENGTH_FIELD"]: item_seq_len.clone(),
    }
    with _evaluating(backbone), torch.no_grad():
        own = backbone.model.full_sort_predict(Interaction(fields)).view(batch, -1)
        return backbone.scores(item_seq, item_seq_len, user), own


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, and afterwards the mode each sub-module had (``train()`` would set them all alike)."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode


def _refusal(name: str, reason: str) -> ConfigError:
    remedy = (
        f"These work: {', '.join(SUPPORTED)}; and models of your own whose forward(item_seq, item_seq_len) gives one "
        "vector that is scored against item_embedding."
    )
    return ConfigError([f"backbone: {name} cannot be a backbone: {reason}. {remedy}"])


def table() -> str:
    """Gives the Markdown table of all sequential models of RecBole 1.2.1."""
    rows = ["| Model | Backbone | Needs the user id | Trims | Why not |", "|---|---|---|---|---|"]
    for name in sorted([*ADAPTERS, *REFUSED], key=str.lower):
        adapter = ADAPTERS.get(name)
        user = "" if adapter is None else _yes("user" in getattr(adapter, "arguments", ()))
        rows.append(
            f"| {name} | {_yes(adapter is not None)} | {user} | {_yes(name in TRIMMABLE)} | {REFUSED.get(name, '')} |"
        )
    return "\n".join(rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Which RecBole models work as a backbone.")
    parser.add_argument("--table", action="store_true", required=True, help="print the table of docs/backbones.md")
    parser.parse_args()
    print(table())
