"""Tiny models and batches without files, and formulas written out in float64 loops."""

from __future__ import annotations

import math
from typing import Optional

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_raserec.data.dataset import POSITION

N_USERS, N_ITEMS, LENGTH = 9, 23, 6

OPTIONS = {
    "TIME_FIELD": "timestamp",
    "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list",
    "NEG_PREFIX": "neg_",
    "ITEM_LIST_LENGTH_FIELD": "item_length", "MAX_ITEM_LIST_LENGTH": LENGTH, "device": torch.device("cpu"), "seed": 0,
    "n_layers": 2, "n_heads": 2, "hidden_size": 8, "inner_size": 12, "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.02,
    "loss_type": "CE", "contrast": "us_x", "lmd": 0.1, "lmd_sem": 0.2, "tau": 1.0, "sim": "dot",
    "ram": "dual", "alpha": 0.5, "learnable_alpha": False, "beta": 1.0, "attn_tau": 1.0, "ram_heads": 2,
    "ram_inner_size": 12, "ram_dropout": 0.0, "top_k": 3, "similarity": "cosine", "index": "flat", "ivf_lists": 4,
    "ivf_probes": 2, "freeze_backbone": True, "native_kernels": True, "softmax_precision": "float32",
    "item_vectors": "id",
    "embedding_size": 10, "num_layers": 1, "dropout_prob": 0.0, "dropout_probs": [0.0, 0.0],
    "filter_weight": 0.6, "filter_cutoff": 3, "filter_scope": "causal",
    "head": "ram", "memory": "pairs",
    "memory_min_length": 1, "memory_max_length": None, "memory_thin": 0.0, "memory_span": 3,
    "memory_min_support": 2, "memory_frequency_weight": 0.0, "memory_scope": "history", "memory_refresh": 1,
    "show_progress": False, "retrieve_by": "sequence", "transition_head": False, "transition_neighbours": 4,
    "memory_text": 0, "repeat_share": False,
}  # fmt: skip


class Ids:
    """The one thing models ask of a data set."""

    @staticmethod
    def num(field: str) -> int:
        return {"user_id": N_USERS, "item_id": N_ITEMS}[field]


def options(**changes):
    unknown = set(changes) - set(OPTIONS)
    assert not unknown, unknown
    return {**OPTIONS, **changes}


def disturb(module: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> torch.nn.Module:
    """Move every weight off its initial value, at which different formulas may agree."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator).to(weight)
    return module


def build(model_class, **changes):
    torch.manual_seed(0)
    return disturb(model_class(options(**changes), Ids()))


def batch(rows: int = 7, longest: int = LENGTH, width: int = LENGTH, seed: int = 0) -> Interaction:
    """Windows of 1 to `longest` items (both occur), padded to `width`, with a positive, a negative and a partner."""
    rng = np.random.default_rng(seed)

    def windows():
        lengths = rng.permutation(np.resize(np.arange(longest, 0, -1), rows))
        items = rng.integers(1, N_ITEMS, (rows, width)) * (np.arange(width) < lengths[:, None])
        return torch.from_numpy(items), torch.from_numpy(lengths)

    (seq, length), (other, other_length) = windows(), windows()
    draw = torch.from_numpy(rng.integers(1, N_ITEMS, (3, rows)))
    return Interaction({
        "item_id_list": seq, "item_length": length, "item_id": draw[0], "neg_item_id": draw[1],
        "user_id": draw[2] % (N_USERS - 1) + 1, POSITION: length,
        "same_target_item_id_list": other, "same_target_item_length": other_length,
    })  # fmt: skip


def nce_loops(
    first: torch.Tensor,
    second: torch.Tensor,
    tau: float = 1.0,
    sim: str = "dot",
    weights: Optional[torch.Tensor] = None,
) -> float:  # fmt: skip
    """InfoNCE over the 2B views of a batch, one term at a time, each times its row's weight."""
    weighing = [1.0] * len(first) if weights is None else weights.tolist()
    views = torch.cat([first, second]).detach().double().tolist()
    if sim == "cos":
        views = [[x / math.hypot(*view) for x in view] for view in views]
    size, total = len(first), 0.0
    for i, view in enumerate(views):
        logits = {j: sum(a * b for a, b in zip(view, other)) / tau for j, other in enumerate(views) if j != i}
        top = max(logits.values())
        log_sum = top + math.log(sum(math.exp(x - top) for x in logits.values()))
        total += weighing[i % size] * (log_sum - logits[(i + size) % (2 * size)])
    return total / (2 * size)


def cross_entropy_loops(
    h: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, weights: Optional[torch.Tensor] = None
) -> float:
    """Mean of -log softmax(h . v)[target], times the row's weight, one row at a time in float64."""
    weighing = [1.0] * len(h) if weights is None else weights.tolist()
    scores = (h.detach().double() @ items.detach().double().T).tolist()
    rows = []
    for row, target, weight in zip(scores, targets.tolist(), weighing):
        top = max(row)
        rows.append(weight * (top + math.log(sum(math.exp(x - top) for x in row)) - row[target]))
    return sum(rows) / len(rows)
