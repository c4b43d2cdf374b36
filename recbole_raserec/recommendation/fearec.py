"""FEARec (arXiv 2304.09184) with RecBole's parameters and results; autocorrelation without its [B, H, L] series."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping
from typing import Any, Literal, Optional

import numpy as np
import torch
import torch.nn.functional as F
from recbole.model.sequential_recommender.fearec import FEARec as RecBoleFEARec
from torch import Tensor

from recbole_raserec.config import (
    Config,
    Dropout,
    LearningOptions,
    Loss,
    Positive,
    PositiveShare,
    SequentialOptions,
    Share,
    Weight,
    option,
)
from recbole_raserec.recommendation.base import SoftmaxOverItems
from recbole_raserec.recommendation.sasrec import feed_forward_branch


class FEARecOptions(LearningOptions, SequentialOptions):
    """FEARec (arXiv 2304.09184), with RecBole's sizes and RecBole's defaults: the frequency domain alone, without
    contrast."""

    attn_dropout_prob: Dropout = option(0.5, "dropout of the attention weights (dual_domain: true), in [0, 1)")
    loss_type: Loss = "CE"
    global_ratio: PositiveShare = option(
        1, "share of the frequencies that a layer reads, in (0, 1]; 1 / n_layers at least", heading=""
    )
    topk_factor: Positive = option(1, "each place takes from int(topk_factor * log(MAX_ITEM_LIST_LENGTH)) delays")
    dual_domain: bool = option(False, "attention in the time domain beside that in the frequency domain")
    spatial_ratio: Share = option(0, "share of the time domain's, in [0, 1]")
    std: bool = option(False, "the time domain's reads the same frequencies as the other")
    contrast: Literal["un", "su", "us", "us_x", "none"] = option(
        "none", "as of DuoRec: un, su, us, us_x or none; RecBole's code, much slower"
    )
    lmd: Weight = option(0.1, "weight of the unsupervised contrast (two dropout views)")
    lmd_sem: Weight = option(0.1, "weight of the supervised contrast (same target)")
    tau: Positive = option(1.0, "temperature of the contrast, > 0")
    sim: Literal["dot", "cos"] = option("dot", "similarity in the contrast: dot or cos")
    fredom: bool = option(False, "contrast us_x: compare spectra too")
    fredom_type: Optional[Literal["un", "su", "us", "us_x"]] = option(None, "of which views: un, su, us or us_x")


class FEARec(SoftmaxOverItems, RecBoleFEARec):
    """RecBole's FEARec: same parameters, same names, same initialisation, same scores and loss within 1e-5.

    What differs is the cost, where attention is in the frequency domain alone (`dual_domain: false`, RecBole's
    default; with true, layers are RecBole's own):

    - The strength of a delay is a mean over the H dimensions of cross-correlations. The mean is taken of the spectra,
      before the inverse transform, and the transforms are products with small matrices (`Delays`).
    - Each position takes a weighted mean of those that the strongest delays lead to: one product with an [L, L] matrix
      for each window.
    - The last layer is evaluated at the last position alone.

    Without contrast (RecBole's default) and with `loss_type: CE` the windows of the same target, which RecBole draws
    for each batch and does not use, are not drawn, and the softmax over items runs in reused buffers.

    All positions of the padded window take part, so that windows are never cut; prefixes are encoded one by one.
    """

    options = FEARecOptions
    trims = False

    def __init__(self, config: Config | Mapping[str, Any], dataset: Any):
        with contextlib.redirect_stdout(io.StringIO()):  # RecBole prints each layer's frequencies
            super().__init__(config, dataset)
        self.fast = not config["dual_domain"] and not config["use_filter"]
        if self.fast:
            parts = [layer.hybrid_attention for layer in self.item_encoder.layer]
            self.delays = [Delays(self.max_seq_length, part.q_index, part.factor) for part in parts]

    def get_same_item_index(self, dataset: Any) -> dict[int, np.ndarray]:
        """Rows of the training split by target item, in ascending order."""
        targets = dataset.inter_feat[self.ITEM_ID].numpy()
        order = np.argsort(targets, kind="stable")
        items, starts = np.unique(targets[order], return_index=True)
        return dict(zip(items.tolist(), np.split(order, starts[1:])))

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """User vectors [B, H] of histories [B, L], left-aligned, padded with 0 to L: `MAX_ITEM_LIST_LENGTH`."""
        if not self.fast:
            return super().forward(item_seq, item_seq_len)
        hidden = self.item_embedding(item_seq) + self.position_embedding.weight[: item_seq.shape[1]]
        hidden = self.dropout(self.LayerNorm(hidden))  # [B, L, H]
        layers = self.item_encoder.layer
        for number, layer in enumerate(layers):
            last = item_seq_len - 1 if number == len(layers) - 1 else None
            hidden = feed_forward_branch(layer, _attention(layer.hybrid_attention, self.delays[number], hidden, last))
        return hidden

    def calculate_loss(self, interaction: Any) -> Tensor:
        """The loss of a training batch, a scalar: cross-entropy over all items, with `contrast` RecBole's sum."""
        if self.ssl in ("us", "un", "su", "us_x"):
            return RecBoleFEARec.calculate_loss(self, interaction)
        return super().calculate_loss(interaction)


class Delays:
    """Which delays of a window of L positions go together best, from some of its frequencies (paper, section 3.2).

    Args:
        length: L.
        frequencies: those that count, of the L // 2 + 1 of a real transform.
        factor: the strongest int(factor * log L) delays are taken.
    """

    def __init__(self, length: int, frequencies: list[int], factor: float):
        unit = torch.eye(length, dtype=torch.float64)
        spectrum = torch.fft.rfft(unit, dim=0)[frequencies]  # [F, L]
        self.transform = torch.cat([spectrum.real, spectrum.imag])  # [2F, L]
        box = torch.zeros(len(frequencies), length // 2 + 1, dtype=torch.complex128)
        box[torch.arange(len(frequencies)), torch.tensor(frequencies)] = 1
        self.inverse = torch.cat([torch.fft.irfft(box), torch.fft.irfft(1j * box)])  # [2F, L], one less if L is odd
        self.constant = self.transform.sum(dim=1, keepdim=True)  # [2F, 1]: the transform of 1, 1, ...
        self.count = int(factor * math.log(length))
        self.length = length

    def to(self, like: Tensor) -> None:
        """Move to device and type of `like`."""
        if self.transform.dtype != like.dtype or self.transform.device != like.device:
            for name in ("inverse", "constant", "transform"):  # in this order, as other threads may look at the last
                setattr(self, name, getattr(self, name).to(like))

    def strengths(self, hidden: Tensor, query: Any, key: Any) -> Tensor:
        """Mean over dimensions of the circular cross-correlations of query and key, [B, L, H] -> [B, L]."""
        spectrum = self.transform @ hidden  # [B, 2F, H]
        q = F.linear(spectrum, query.weight) + self.constant * query.bias
        k = F.linear(spectrum, key.weight) + self.constant * key.bias
        half = q.shape[1] // 2
        real = (q * k).mean(dim=2)  # [B, 2F]
        crossed = (q * k.roll(half, dims=1)).mean(dim=2)
        product = torch.cat([real[:, :half] + real[:, half:], crossed[:, half:] - crossed[:, :half]], dim=1)
        return product @ self.inverse

    def mixing(self, strengths: Tensor, shared: bool, last: Optional[Tensor]) -> Tensor:
        """Weights by which positions take from positions, [B, L, L], or [B, 1, L] at the positions `last` [B] alone.

        Of the delays' strengths [B, L] the strongest count; `shared`: those in the mean of the batch, for all its
        windows (training).
        """
        if shared:
            index = torch.topk(strengths.mean(dim=0), self.count).indices  # [C]
            weights = torch.softmax(strengths[:, index], dim=1)  # [B, C]
            if last is None:
                taken = (torch.arange(self.length, device=index.device) + index[:, None]) % self.length  # [C, L]
                shifts = F.one_hot(taken, self.length).to(weights)  # [C, L, L]
                return (weights @ shifts.flatten(1)).view(-1, self.length, self.length)
            index = index.expand(len(weights), -1)
        else:
            values, index = torch.topk(strengths, self.count, dim=1)
            weights = torch.softmax(values, dim=1)
        spread = weights.new_zeros(weights.shape[0], self.length).scatter(1, index, weights)  # [B, delay]
        if last is None:  # row t holds them from position t on, around
            return torch.cat([spread, spread], dim=1).unfold(1, self.length, 1)[:, 1:].flip(1)
        delay = torch.arange(self.length, device=last.device) - last[:, None]
        return spread.gather(1, delay % self.length).unsqueeze(1)


def _attention(part: Any, delays: Delays, hidden: Tensor, last: Optional[Tensor]) -> Tensor:
    """RecBole's HybridAttention in the frequency domain, [B, L, H] -> [B, L, H], or [B, H] at positions `last`."""
    delays.to(hidden)
    strengths = delays.strengths(hidden, part.query_layer, part.key_layer)
    taken = delays.mixing(strengths, part.training, last) @ hidden  # weights sum to 1, so that values may come after
    if last is not None:
        taken = taken.squeeze(1)
        hidden = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
    return part.LayerNorm(part.out_dropout(part.dense(part.value_layer(taken))) + hidden)
