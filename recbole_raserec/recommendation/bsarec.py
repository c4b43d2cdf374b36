"""BSARec (arXiv 2312.10325): SASRec's layers with a frequency filter beside the self-attention."""

from __future__ import annotations

from typing import Any, Literal, Optional

import torch
from torch import nn

from recbole_raserec.config import Count, Options, Share, option
from recbole_raserec.errors import ConfigError
from recbole_raserec.kernels import use_fast_dropout
from recbole_raserec.recommendation.duorec import ContrastOptions, DuoRec
from recbole_raserec.recommendation.sasrec import SASRecOptions, attention_branch, feed_forward_branch


class FilterOptions(Options):
    """BSARec's filter."""

    filter_weight: Share = option(
        0.7, "of the filter's output, the paper's alpha; the attention's has the rest; in [0, 1]", heading=""
    )
    filter_cutoff: Count = option(5, "the paper's c: the first c // 2 + 1 frequencies are the low ones")
    filter_scope: Literal["causal", "window"] = option(
        "causal",
        "causal: the filter sees earlier positions; window: all of the window's (the paper's; training: prefix only)",
    )


class BSARecOptions(ContrastOptions, FilterOptions, SASRecOptions):
    """BSARec (arXiv 2312.10325): SASRec's encoder with a frequency filter beside the attention; trained as SASRec is,
    with DuoRec's contrast on top if asked for."""

    n_heads: Count = option(1, "attention heads; must divide hidden_size")
    contrast: Literal["un", "su", "us", "us_x", "none"] = option(
        "none", "as of DuoRec: un, su, us, us_x or none", heading=""
    )


class BSARec(DuoRec):
    """Each layer mixes what a filter of the sequence gives with what attention gives, `filter_weight` to the rest.

    The filter splits the states of a window of N positions (N: `MAX_ITEM_LIST_LENGTH`) into low frequencies, the first
    `filter_cutoff` // 2 + 1 of its discrete Fourier transform, and the others, and weighs these anew (paper, section
    4.2): low + beta^2 high, with a trained beta for each of the H dimensions. Like the attention it is followed by
    dropout, the residual connection and a layer norm.

    - ``filter_scope: window``: the paper's. Low frequencies are a circular weighted mean over the N positions, so that
      a position sees later ones of its window; prefixes are encoded one by one (``training: prefix``). Padding is zero,
      so that scores do not depend on it.
    - ``filter_scope: causal`` (ours): the mean stops at the position itself, so that one pass gives the states of all
      prefixes, in either form of training.

    Options beside DuoRec's, whose contrast is off by default: `filter_weight` (the paper's alpha), `filter_cutoff` (its
    c), `filter_scope`. The compiled encoder is not used.
    """

    options = BSARecOptions

    mean: torch.Tensor

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self._compiled = False
        self.filter_weight, self.causal = config["filter_weight"], config["filter_scope"] == "causal"
        self.filters = nn.ModuleList(
            FrequencyFilter(self.hidden_size, self.hidden_dropout_prob, self.layer_norm_eps)
            for _ in self.trm_encoder.layer
        )
        use_fast_dropout(self)
        mean = low_pass(self.max_seq_length, config["filter_cutoff"] // 2 + 1)
        self.register_buffer("mean", mean.tril() if self.causal else mean, persistent=False)

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """User vectors [B, H] of histories [B, L], left-aligned, of lengths [B]."""
        hidden, inside = self._embed_inside(item_seq, item_seq_len)
        for number in range(self.n_layers - 1):
            hidden = self._layer(number, hidden, hidden, self.mean[: hidden.shape[1]], inside, causal=True)
        last = item_seq_len - 1
        query = self.gather_indexes(hidden, last).unsqueeze(1)  # [B, 1, H]
        rows = self.mean[last].unsqueeze(1)  # [B, 1, N]
        return self._layer(self.n_layers - 1, query, hidden, rows, inside, key_length=item_seq_len).squeeze(1)

    def encode_positions(self, item_seq: torch.Tensor) -> torch.Tensor:
        """User vector after every prefix of each row in one causal pass: [B, L] -> [B, L, H].

        Raises:
            ConfigError: ``filter_scope`` is ``window``.
        """
        if not self.causal:
            raise ConfigError(["filter_scope: window lets a position see later ones; set filter_scope: causal"])
        hidden, inside = self._embed_inside(item_seq, (item_seq > 0).sum(dim=1))
        for number in range(self.n_layers):
            hidden = self._layer(number, hidden, hidden, self.mean[: hidden.shape[1]], inside, causal=True)
        return hidden

    def _embed_inside(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inside = torch.arange(item_seq.shape[1], device=item_seq.device) < item_seq_len[:, None]  # [B, L]
        return self._embed(item_seq), inside.unsqueeze(2)

    def _layer(
        self, number: int, query: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor, inside: torch.Tensor,
        causal: bool = False, key_length: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:  # fmt: skip
        """Layer `number` for the positions in `query` [B, Q, H] over `hidden` [B, L, H].

        `rows` [(B,) Q, N]: theirs of the low-pass matrix; `inside` [B, L, 1]: where `hidden` is no padding.
        """
        layer = self.trm_encoder.layer[number]
        low = rows[..., : hidden.shape[1]] @ (hidden * inside)  # [B, Q, H]
        filtered = self.filters[number](query, low)
        attended = attention_branch(layer, query, hidden, causal, key_length)
        mixed = self.filter_weight * filtered + (1 - self.filter_weight) * attended
        return feed_forward_branch(layer, mixed)


class FrequencyFilter(nn.Module):
    """low + beta^2 (x - low), then dropout, the residual connection and a layer norm."""

    def __init__(self, hidden_size: int, dropout: float, epsilon: float):
        super().__init__()
        self.beta = nn.Parameter(torch.randn(hidden_size))
        self.dropout = nn.Dropout(dropout)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=float(epsilon))

    def forward(self, x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """States `x` and their low frequencies `low`, [..., H] -> [..., H]."""
        beta = self.beta.square()
        return self.LayerNorm(self.dropout(low + beta * (x - low)) + x)


def low_pass(length: int, frequencies: int) -> torch.Tensor:
    """The matrix [N, N] that keeps the first `frequencies` of a sequence of N = `length` positions.

    As ``irfft(mask(rfft(x)))`` along the positions, with the mean as frequency 0.
    """
    spectrum = torch.fft.rfft(torch.eye(length, dtype=torch.float64), dim=0, norm="ortho")
    spectrum[frequencies:] = 0
    return torch.fft.irfft(spectrum, n=length, dim=0, norm="ortho").float()
