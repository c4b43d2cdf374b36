"""BSARec (arXiv 2312.10325): SASRec's layers with a frequency filter beside the self-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recbole_raserec.config import Config, Count, Options, Share, option
from recbole_raserec.errors import ConfigError
from recbole_raserec.kernels import use_fast_dropout
from recbole_raserec.recommendation.duorec import ContrastOptions, DuoRec
from recbole_raserec.recommendation.sasrec import SASRecOptions


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
    `filter_cutoff` // 2 + 1 of its discrete Fourier transform, and the others, and weighs these again (paper, section
    4.2): low + beta^2 high, with a trained beta for each of the H dimensions. Like the attention it is followed by
    dropout, the residual connection and a layer norm.

    - `filter_scope: window`: the paper's. Low frequencies are a circular weighted mean over the N positions, so that
      a position sees later ones of its window; prefixes are encoded one by one (`training: prefix`). Padding is zero,
      so that scores do not depend on it.
    - `filter_scope: causal` (ours): the mean stops at the position itself, so that one pass gives the states of all
      prefixes, in either form of training.

    DuoRec's contrast is off by default. The compiled encoder is not used.
    """

    options = BSARecOptions

    mean: Tensor

    def __init__(self, config: Config | Mapping[str, Any], dataset: Any):
        super().__init__(config, dataset)
        self._compiled = False
        self.filter_weight, self.causal = config["filter_weight"], config["filter_scope"] == "causal"
        sizes = self.hidden_size, self.hidden_dropout_prob, self.layer_norm_eps
        self.filters = nn.ModuleList(FrequencyFilter(*sizes) for _ in self.trm_encoder.layer)
        use_fast_dropout(self)
        mean = low_pass(self.max_seq_length, config["filter_cutoff"] // 2 + 1)
        self.register_buffer("mean", mean.tril() if self.causal else mean, persistent=False)

    def encode_positions(self, item_seq: Tensor) -> Tensor:
        """User vector after every prefix of each row in one causal pass: [B, L] -> [B, L, H].

        Raises:
            ConfigError: `filter_scope` is `window`.
        """
        if not self.causal:
            raise ConfigError(["filter_scope: window lets a position see later ones; set filter_scope: causal"])
        return super().encode_positions(item_seq)

    def _mix(self, number: int, query: Tensor, hidden: Tensor, item_seq_len: Tensor, alone: bool) -> Tensor:
        """Filter and attention, mixed."""
        length = hidden.shape[1]
        inside = torch.arange(length, device=hidden.device) < item_seq_len[:, None]  # [B, L]: no padding
        rows = self.mean[item_seq_len - 1].unsqueeze(1) if alone else self.mean[:length]  # [(B,) Q, N]
        low = rows[..., :length] @ (hidden * inside.unsqueeze(2))  # [B, Q, H]
        filtered = self.filters[number](query, low)
        attended = super()._mix(number, query, hidden, item_seq_len, alone)
        return self.filter_weight * filtered + (1 - self.filter_weight) * attended


class FrequencyFilter(nn.Module):
    """low + beta^2 (x - low), then dropout, the residual connection and a layer norm."""

    def __init__(self, hidden_size: int, dropout: float, epsilon: float):
        super().__init__()
        self.beta = nn.Parameter(torch.randn(hidden_size))
        self.dropout = nn.Dropout(dropout)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=float(epsilon))

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        """States `x` and their low frequencies `low`, [..., H] -> [..., H]."""
        beta = self.beta.square()
        return self.LayerNorm(self.dropout(low + beta * (x - low)) + x)


def low_pass(length: int, frequencies: int) -> Tensor:
    """The matrix [N, N] that keeps the first `frequencies` of a sequence of N = `length` positions.

    As `irfft(mask(rfft(x)))` along the positions, with the mean as frequency 0.
    """
    spectrum = torch.fft.rfft(torch.eye(length, dtype=torch.float64), dim=0, norm="ortho")
    spectrum[frequencies:] = 0
    return torch.fft.irfft(spectrum, n=length, dim=0, norm="ortho").float()
