"""The heads that read the memory: the retrieval-augmented module (RAM), trained, and the kNN head, which is not.

RAM attends to the neighbours and mixes them into the user vector. The kNN head mixes what followed the nearest memories
into the model's distribution, as nearest-neighbour language models do (Khandelwal et al., arXiv 1911.00172):
`p(i) = (1 - share) softmax(h . v)_i + share sum_k softmax(similarity / tau)_k [target_k = i]`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from recbole_raserec.errors import ConfigError
from recbole_raserec.kernels import FastDropout

#: Attention logits at the start, per unit of cosine between query and key.
START_LOGIT = 10.0

#: What is tried on the validation split for the kNN head.
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
TAUS = (0.02, 0.05, 0.1, 0.2)


class CrossAttention(nn.Module):
    """Multi-head cross attention of one query over its own K neighbours, with residual and layer norm.

    Per head: `softmax(Wq q . Wk k / (sqrt(H / heads) attn_tau))` weighs `Wv v`; `Wo` joins the heads; the
    result is `LayerNorm(q + dropout(...))`, as in a transformer layer. The report writes the bare attention;
    without residual and norm the outcome lives on the scale of the values (item vectors are some 30 times shorter
    than user vectors), and the mixture gains little.

    A row has one query, so that the projections of keys and values are taken to the query's side: `Wq q . Wk k =
    (Wk' Wq q) . k` and `sum w Wv v = Wv (sum w v)`, one product a row instead of K. (The keys' bias adds the same
    to all logits of a row: it cancels, and stays 0.)

    Args:
        size: H.
        heads: divides H.
        dropout: on attention weights and output.
        tau: attention temperature, > 0.
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

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """The queries with what they attend to, [B, H].

        Args:
            q: [B, H].
            k: [B, K, H].
            v: [B, K, H].
            mask: bool [B, K], True where there is a neighbour; the others get no weight.
            bias: [B, K], added to the logits of all heads.
        """
        weights = self.weight_dropout(self.weights(q, k, mask, bias))
        projection = self.value.weight.view(self.heads, -1, q.shape[1])
        values = torch.einsum("bnh,ndh->bnd", weights @ v, projection)  # [B, heads, H / heads]
        values = values + self.value.bias.view(self.heads, -1) * weights.sum(dim=2, keepdim=True)
        return self.norm(q + self.out_dropout(self.out(values.flatten(1))))

    def weights(self, q: Tensor, k: Tensor, mask: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """How much each head attends to each neighbour, [B, heads, K]; arguments as of `forward`."""
        head = q.shape[1] // self.heads
        query = self.query(q).view(-1, self.heads, head) / (math.sqrt(head) * self.tau)
        towards = torch.einsum("bnd,ndh->bnh", query, self.key.weight.view(self.heads, head, -1))  # [B, heads, H]
        scores = towards @ k.transpose(1, 2)  # [B, heads, K]
        if bias is not None:
            scores = scores + bias[:, None]
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        return torch.softmax(scores, dim=-1) * mask[:, None]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """Mean over the heads, [B, K]."""
        return self.weights(q, k, mask, bias).mean(dim=1)

    @torch.no_grad()
    def calibrate(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Start on the scale of samples [N, H]: values as long as queries, logits of `START_LOGIT` times the cosine."""
        size = q.shape[1]
        lengths = [x.norm(dim=1).mean().clamp(min=1e-12) for x in (q, k, v)]
        logit = START_LOGIT * self.heads * math.sqrt(size // self.heads) / (lengths[0] * lengths[1])
        self.query.weight.copy_(torch.eye(size, device=q.device) * logit)
        self.value.weight.copy_(torch.eye(size, device=q.device) * lengths[0] / lengths[2])
        fit_norm(self.norm, q)


class FeedForward(nn.Module):
    """`LayerNorm(x + W2 gelu(W1 x))`; W2 starts at zero."""

    def __init__(self, size: int, inner_size: int, dropout: float):
        super().__init__()
        self.inner, self.outer = nn.Linear(size, inner_size), nn.Linear(inner_size, size)
        self.norm, self.dropout = nn.LayerNorm(size), FastDropout(dropout)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H] -> [B, H]."""
        return self.norm(x + self.dropout(self.outer(F.gelu(self.inner(x)))))


class Channel(nn.Module):
    """Cross attention, feed-forward, cross attention over the same neighbours (RaSeRec, arXiv 2412.18378)."""

    def __init__(self, size: int, heads: int, inner_size: int, dropout: float, tau: float):
        super().__init__()
        self.first = CrossAttention(size, heads, dropout, tau)
        self.feed_forward = FeedForward(size, inner_size, dropout)
        self.second = CrossAttention(size, heads, dropout, tau)

    def forward(self, h: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """h [B, H], k and v [B, K, H], mask and bias [B, K] -> [B, H]."""
        return self.second(self.feed_forward(self.first(h, k, v, mask, bias)), k, v, mask, bias)

    def attention(self, h: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """Mean over both attentions and their heads, [B, K]."""
        inner = self.feed_forward(self.first(h, k, v, mask, bias))
        return (self.first.attention(h, k, v, mask, bias) + self.second.attention(inner, k, v, mask, bias)) / 2

    def calibrate(self, h: Tensor, k: Tensor, v: Tensor) -> None:
        """See `CrossAttention.calibrate`."""
        self.first.calibrate(h, k, v)
        fit_norm(self.feed_forward.norm, h)
        self.second.calibrate(h, k, v)


class RetrievalModule(nn.Module):
    """`h~ = alpha h + (1 - alpha) h'`; a row without neighbours keeps h.

    With `ram: single`, h' = MHCA(h, {h_k}, {v_k}), the report's formula; with `dual`, h' = beta c1 + (1 - beta) c2,
    RaSeRec's two channels, the second with keys and values exchanged. A channel of weight 0 is not built.

    Args:
        config: the options `ram`, `alpha`, `beta`, `attn_tau`, `ram_heads`, `ram_inner_size`, `ram_dropout`,
            `learnable_alpha`.
        size: length H of user vectors.

    Raises:
        ConfigError: `ram_heads` does not divide H.
    """

    def __init__(self, config: Mapping[str, Any], size: int):
        super().__init__()
        if size % config["ram_heads"]:
            raise ConfigError(
                [f"ram_heads: {config['ram_heads']} does not divide the backbone's user vectors of length {size}; "
                 f"choose a divisor such as 1 or 2."]
            )  # fmt: skip
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

    def forward(self, h: Tensor, keys: Tensor, values: Tensor, mask: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """h [B, H], keys h_k and values v_k [B, K, H], mask bool and bias of the logits [B, K] -> h~ [B, H]."""
        mixed = torch.zeros_like(h)
        for share, channel, k, v in self._built(keys, values):
            mixed = mixed + share * channel(h, k, v, mask, bias)
        alpha = self.alpha.clamp(0, 1)
        augmented = alpha * h + (1 - alpha) * mixed
        return torch.where(mask.any(dim=1, keepdim=True), augmented, h)

    def attention(self, h: Tensor, keys: Tensor, values: Tensor, mask: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """How much is attended to each neighbour, mean over heads and layers, channels by their share: [B, K].

        The weights of a row with neighbours add up to 1.
        """
        found = torch.zeros(mask.shape, dtype=h.dtype, device=h.device)
        for share, channel, k, v in self._built(keys, values):
            found = found + share * channel.attention(h, k, v, mask, bias)
        return found

    def calibrate(self, h: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put the starting weights on the scale of the data: h, h_k and v_k, [N, H] each."""
        for _, channel, k, v in self._built(keys, values):
            channel.calibrate(h, k, v)

    def _built(self, keys: Tensor, values: Tensor) -> list[tuple[float, Any, Tensor, Tensor]]:
        """Share, channel, keys and values of each channel whose share is not 0."""
        both = zip((self.beta, 1 - self.beta), self.channels, (keys, values), (values, keys))
        return [channel for channel in both if channel[0] > 0]


@torch.no_grad()
def fit_norm(norm: nn.LayerNorm, x: Tensor) -> None:
    """Set gain and bias by least squares per dimension so that `norm(x)` is as near to x [N, H] as it can be."""
    z = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    centred = z - z.mean(dim=0)
    gain = (centred * (x - x.mean(dim=0))).mean(dim=0) / centred.square().mean(dim=0).clamp(min=1e-12)
    norm.weight.copy_(gain)
    norm.bias.copy_(x.mean(dim=0) - gain * z.mean(dim=0))


def interpolate(scores: Tensor, targets: Tensor, similarity: Tensor, mask: Tensor, share: float, tau: float) -> Tensor:
    """Logarithm of the mixed distribution, [B, V].

    Args:
        scores: [B, V], the model's.
        targets: int64 [B, K], what followed each neighbour.
        similarity: [B, K].
        mask: bool [B, K]; a row without any neighbour keeps the model's distribution.
        share: of the neighbours, in [0, 1).
        tau: temperature of their similarities, > 0.
    """
    model = torch.log_softmax(scores, dim=1)
    if not share:
        return model
    spread = torch.zeros_like(scores).scatter_add_(1, targets, neighbour_weights(similarity, mask, tau))  # [B, V]
    some = mask.any(dim=1, keepdim=True)
    kept = torch.where(some, model + torch.log1p(torch.tensor(-share, dtype=scores.dtype)), model)
    mixed = torch.logaddexp(kept, spread.clamp(min=1e-37).log() + torch.log(torch.tensor(share, dtype=scores.dtype)))
    return torch.where(spread > 0, mixed, kept)


def neighbour_weights(similarity: Tensor, mask: Tensor, tau: float) -> Tensor:
    """Shares of the neighbours in their distribution, [B, K], from their similarities; 0 where `mask` is False."""
    logits = (similarity / tau).masked_fill(~mask, torch.finfo(similarity.dtype).min)
    return torch.softmax(logits, dim=1) * mask


def tune_knn(model: Any, validate: Callable[[], float], progress: bool) -> float:
    """Set share and temperature of the kNN head to the pair of `SHARES` and `TAUS` that validates best; its value.

    Args:
        model: a `RaSeRec` with the memory of the training split.
        validate: the value to raise, with the model as it is; of equal ones that of the smaller share counts.
        progress: show a progress bar.
    """
    pairs = [(share, tau) for share, tau in itertools.product(SHARES, TAUS) if share or tau == TAUS[0]]
    best, chosen = float("-inf"), pairs[0]
    for share, tau in tqdm(pairs, desc="Tune kNN head", disable=not progress, dynamic_ncols=True):
        model.knn_share.fill_(share)
        model.knn_tau.fill_(tau)
        if (value := validate()) > best:
            best, chosen = value, (share, tau)
    model.knn_share.fill_(chosen[0])
    model.knn_tau.fill_(chosen[1])
    return best
