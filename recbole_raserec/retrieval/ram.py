"""The retrieval-augmented module (RAM): neighbours are attended to and mixed into the user vector."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from recbole_raserec.errors import ConfigError
from recbole_raserec.kernels import FastDropout

#: Attention logits at the start, per unit of cosine between query and key.
START_LOGIT = 10.0


class CrossAttention(nn.Module):
    """Multi-head cross attention of one query over its own K neighbours, with residual and layer norm.

    Per head: ``softmax(Wq q . Wk k / (sqrt(H / heads) attn_tau))`` weighs ``Wv v``; ``Wo`` joins the heads; the
    result is ``LayerNorm(q + dropout(...))``, as in a transformer layer. The report writes the bare attention;
    without residual and norm the outcome lives on the scale of the values (item vectors are some 30 times shorter
    than user vectors), and the mixture gains little.

    A row has one query, so that the projections of keys and values are taken to the query's side: ``Wq q . Wk k =
    (Wk' Wq q) . k`` and ``sum w Wv v = Wv (sum w v)``, one product a row instead of K. (The keys' bias adds the same
    to all logits of a row: it cancels, and stays 0.)

    Args:
        size: H. heads: divides H. dropout: on attention weights and output. tau: attention temperature, > 0.
    """

    def __init__(self, size: int, heads: int, dropout: float, tau: float):
        super().__init__()
        self.heads, self.tau = heads, tau
        self.query, self.key = nn.Linear(size, size), nn.Linear(size, size)
        self.value, self.out = nn.Linear(size, size), nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)
        self.weight_dropout, self.out_dropout = FastDropout(dropout), FastDropout(dropout)
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, bias: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """q [B, H], k and v [B, K, H], mask bool [B, K] (True: a neighbour stands there) -> [B, H].

        Masked neighbours get no weight. A row without any neighbour attends to nothing. `bias` [B, K] is added to the
        logits of all heads.
        """
        weights = self.weight_dropout(self.weights(q, k, mask, bias))
        values = _per_head(weights @ v, self.value.weight)  # [B, heads, H / heads]
        values = values + self.value.bias.view(self.heads, -1) * weights.sum(dim=2, keepdim=True)
        return self.norm(q + self.out_dropout(self.out(values.flatten(1))))

    def weights(
        self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, bias: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """How much each head attends to each neighbour, [B, heads, K]; arguments as of :meth:`forward`."""
        head = q.shape[1] // self.heads
        query = self.query(q).view(-1, self.heads, head) / (math.sqrt(head) * self.tau)
        towards = torch.einsum("bnd,ndh->bnh", query, self.key.weight.view(self.heads, head, -1))  # [B, heads, H]
        scores = towards @ k.transpose(1, 2)  # [B, heads, K]
        if bias is not None:
            scores = scores + bias[:, None]
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        return torch.softmax(scores, dim=-1) * mask[:, None]

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, bias: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """Mean over the heads, [B, K]."""
        return self.weights(q, k, mask, bias).mean(dim=1)

    @torch.no_grad()
    def calibrate(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Start on the scale of the data: values as long as queries, logits of :data:`START_LOGIT` times the cosine.

        Args:
            q, k, v: samples of queries, keys and values, [N, H] each.
        """
        size = q.shape[1]
        lengths = [x.norm(dim=1).mean().clamp(min=1e-12) for x in (q, k, v)]
        head = size // self.heads
        logit = START_LOGIT * self.heads * math.sqrt(head) / (lengths[0] * lengths[1])
        self.query.weight.copy_(torch.eye(size, device=q.device) * logit)
        self.value.weight.copy_(torch.eye(size, device=q.device) * lengths[0] / lengths[2])
        fit_norm(self.norm, q)


def _per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Each head's rows of `weight` [H, H] times its vector in x [B, heads, H]: [B, heads, H / heads]."""
    heads = x.shape[1]
    return torch.einsum("bnh,ndh->bnd", x, weight.view(heads, -1, weight.shape[1]))


class FeedForward(nn.Module):
    """``LayerNorm(x + W2 gelu(W1 x))``; W2 starts at zero."""

    def __init__(self, size: int, inner_size: int, dropout: float):
        super().__init__()
        self.inner, self.outer = nn.Linear(size, inner_size), nn.Linear(inner_size, size)
        self.norm, self.dropout = nn.LayerNorm(size), FastDropout(dropout)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H] -> [B, H]."""
        return self.norm(x + self.dropout(self.outer(F.gelu(self.inner(x)))))


class Channel(nn.Module):
    """Cross attention, feed-forward, cross attention over the same neighbours (RaSeRec, arXiv 2412.18378)."""

    def __init__(self, size: int, heads: int, inner_size: int, dropout: float, tau: float):
        super().__init__()
        self.first = CrossAttention(size, heads, dropout, tau)
        self.feed_forward = FeedForward(size, inner_size, dropout)
        self.second = CrossAttention(size, heads, dropout, tau)

    def forward(
        self, h: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, bias: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """h [B, H], k and v [B, K, H], mask and bias [B, K] -> [B, H]."""
        return self.second(self.feed_forward(self.first(h, k, v, mask, bias)), k, v, mask, bias)

    def attention(
        self, h: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, bias: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """Mean over both attentions and their heads, [B, K]."""
        inner = self.feed_forward(self.first(h, k, v, mask, bias))
        return (self.first.attention(h, k, v, mask, bias) + self.second.attention(inner, k, v, mask, bias)) / 2

    def calibrate(self, h: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """See :meth:`CrossAttention.calibrate`."""
        self.first.calibrate(h, k, v)
        fit_norm(self.feed_forward.norm, h)
        self.second.calibrate(h, k, v)


class RetrievalModule(nn.Module):
    """``h~ = alpha h + (1 - alpha) h'``; a row without neighbours keeps h.

    Options: `ram` (``single``: h' = MHCA(h, {h_k}, {v_k}), the report's formula; ``dual``: h' = beta c1 + (1 - beta)
    c2, RaSeRec's two channels, the second with keys and values exchanged), `alpha`, `beta`, `attn_tau`, `ram_heads`,
    `ram_inner_size`, `ram_dropout`, `learnable_alpha`. A channel of weight 0 is not built.
    """

    def __init__(self, config: Any, size: int):
        super().__init__()
        heads, dropout, tau = config["ram_heads"], config["ram_dropout"], config["attn_tau"]
        self.beta = float(config["beta"]) if config["ram"] == "dual" else 1.0
        self.channels = nn.ModuleList()
        for share in (self.beta, 1.0 - self.beta):
            if share <= 0:
                self.channels.append(nn.Identity())
            elif config["ram"] == "single":
                self.channels.append(CrossAttention(size, heads, dropout, tau))
            else:
                self.channels.append(Channel(size, heads, config["ram_inner_size"], dropout, tau))
        alpha = torch.tensor(float(config["alpha"]))
        if config["learnable_alpha"]:
            self.alpha = nn.Parameter(alpha)
        else:
            self.register_buffer("alpha", alpha)

    def forward(
        self, h: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:  # fmt: skip
        """h [B, H], keys h_k and values v_k [B, K, H], mask bool and bias of the logits [B, K] -> h~ [B, H]."""
        mixed = torch.zeros_like(h)
        if self.beta > 0:
            mixed = mixed + self.beta * self.channels[0](h, keys, values, mask, bias)
        if self.beta < 1:
            mixed = mixed + (1 - self.beta) * self.channels[1](h, values, keys, mask, bias)
        alpha = self.alpha.clamp(0, 1)
        augmented = alpha * h + (1 - alpha) * mixed
        return torch.where(mask.any(dim=1, keepdim=True), augmented, h)

    def attention(
        self, h: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:  # fmt: skip
        """How much is attended to each neighbour, mean over heads and layers, channels by their share: [B, K].

        The weights of a row with neighbours add up to 1.
        """
        found = torch.zeros(mask.shape, dtype=h.dtype, device=h.device)
        for share, channel, k, v in ((self.beta, 0, keys, values), (1 - self.beta, 1, values, keys)):
            if share > 0:
                attention: Any = self.channels[channel].attention
                found = found + share * attention(h, k, v, mask, bias)
        return found

    def calibrate(self, h: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put the starting weights on the scale of the data: h, h_k and v_k, [N, H] each."""
        for channel, k, v in zip(self.channels, (keys, values), (values, keys)):
            if isinstance(channel, (Channel, CrossAttention)):
                channel.calibrate(h, k, v)


@torch.no_grad()
def fit_norm(norm: nn.LayerNorm, x: torch.Tensor) -> None:
    """Set gain and bias by least squares per dimension so that ``norm(x)`` is as near to x [N, H] as it can be."""
    z = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    centred = z - z.mean(dim=0)
    gain = (centred * (x - x.mean(dim=0))).mean(dim=0) / centred.square().mean(dim=0).clamp(min=1e-12)
    norm.weight.copy_(gain)
    norm.bias.copy_(x.mean(dim=0) - gain * z.mean(dim=0))


def build_ram(config: Any, size: int) -> RetrievalModule:
    """The retrieval-augmented module for user vectors of length `size`.

    Raises:
        ConfigError: `ram_heads` does not divide `size`.
    """
    if size % config["ram_heads"]:
        raise ConfigError(
            [f"ram_heads: {config['ram_heads']} does not divide the backbone's user vectors of length {size}; "
             f"choose a divisor such as 1 or 2."]
        )  # fmt: skip
    return RetrievalModule(config, size)
