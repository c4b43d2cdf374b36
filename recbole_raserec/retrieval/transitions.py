"""The transition head: what followed the last two items in the training split, smoothed by texts; nothing is trained.

It gives two distributions over items, each a mixture of one for the last item, l_1, and one for the item before, l_2
(`P = (1 - second) P_1 + second P_2`):

- transitions: `P_g(b) = sum_a w(l_g, a) T_g[a, b] / sum_a w(l_g, a) T_g[a].sum()`. `T_g[a, b]` counts how often b came
  g places behind a; `w(l, a) = exp((cos(t_l, t_a) - 1) / tau)` for the items a with the nearest texts, l among them.
- texts: `P_g(b) = w'(l_g, b) / sum_a w'(l_g, a)` over the same items without l, with `text_tau` in the place of tau.

Without texts transitions are those of the items themselves, and there are no texts. The model's distribution p becomes
`(1 - share - text_share) p + share P_transitions + text_share P_texts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from recbole_raserec.data import item_features
from recbole_raserec.retrieval.heads import SHARES, neighbour_weights

GAPS = (1, 2)
#: The head's weights, and what is tried for each on the validation split.
GRID = {
    "share": (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
    "text_share": (0.0, 0.05, 0.1, 0.2, 0.3, 0.4),
    "tau": (0.1, 0.15, 0.25, 0.4),
    "text_tau": (0.07, 0.1, 0.15, 0.2, 0.3),
    "second": (0.0, 0.2, 0.35, 0.5),
}
#: Where the search for them starts.
START = (0.2, 0.2, 0.25, 0.15, 0.35)
#: Share of targets that were in the history before, from which on the head may give something to such items.
REPEATS = 0.01
_COMPONENTS = [
    (tau, gap, name == "text_tau") for name in ("tau", "text_tau") for tau in GRID[name] for gap in range(len(GAPS))
]
#: Cosines of texts that are held at a time; candidates of the sample that the weights are tried on.
SCORES, SAMPLED = 1 << 24, 3_000_000


class TransitionHead(nn.Module):
    """Counts of transitions, and the weights with which they and texts are mixed into the model's distribution.

    Counts are not part of the weights: a checkpoint makes them of its users' histories again, which are forgotten and
    grow there.

    Args:
        n_items: V.
        neighbours: K, items with the nearest texts that stand for an item.

    Attributes:
        weights: those of `GRID`, in its order, and whether it may give something to items of the history. Without
            `share` and `text_share` the head gives nothing.
    """

    weights: Tensor

    def __init__(self, n_items: int, neighbours: int):
        super().__init__()
        self.register_buffer("weights", torch.tensor([0.0, 0.0, *START[2:], 0.0]))
        self.neighbours = neighbours
        self._counts = [sp.csr_matrix((n_items, n_items), dtype=np.float32) for _ in GAPS]
        self._near: Any = None

    def grow(self, n_items: int) -> None:
        """Take up more items: their transitions come later, and nearest texts are looked for again."""
        self._counts, self._near = [counts.copy() for counts in self._counts], None
        for counts in self._counts:
            counts.resize(n_items, n_items)

    def add(self, before: np.ndarray, after: np.ndarray, times: int = 1) -> None:
        """Count transitions.

        Args:
            before: int [N, 2], the last item and the one before, 0 where there is none.
            after: int [N], what followed.
            times: -1 takes them out again.
        """
        for gap, items in enumerate(before.T):
            real, shape = items > 0, self._counts[gap].shape
            values = np.full(int(real.sum()), times, np.float32)
            counts = self._counts[gap] + sp.csr_matrix((values, (items[real], after[real])), shape=shape)
            counts.eliminate_zeros()
            self._counts[gap] = counts

    def near(self, items: np.ndarray, text: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The items with the nearest texts, each item itself first, and their cosines: [N, K] each.

        Where there are fewer than K the cosine is minus infinity.

        Args:
            items: int [N].
            text: unit vectors [V, S], 0 where an item has no text.
        """
        size = len(text)
        if self._near is None or len(self._near[0]) != size:
            shape = size, min(self.neighbours, size) if text.shape[1] else 1
            self._near = np.zeros(size, bool), np.empty(shape, np.int32), np.empty(shape, np.float32)
        known, near, cosines = self._near
        missing = np.unique(items[~known[items]])
        if len(missing):
            bare = ~text.any(dim=1)
            for part in np.array_split(missing, -(-len(missing) * size // SCORES)):
                rows = torch.from_numpy(part).to(text.device)
                cosine = text[rows] @ text.T  # [n, V]
                cosine[:, bare] = -torch.inf
                cosine[bare[rows]] = -torch.inf
                cosine[torch.arange(len(part)), rows] = torch.inf
                best = cosine.topk(near.shape[1], dim=1)
                best.values[:, 0] = 1
                near[part], cosines[part] = best.indices.cpu().numpy(), best.values.cpu().numpy()
            known[missing] = True  # last: another thread may ask meanwhile
        return near[items], cosines[items]

    def add_part(
        self, found: np.ndarray, weight: float, seq: np.ndarray, ends: np.ndarray, text: Tensor, gap: int, tau: float,
        by_text: bool,
    ) -> None:  # fmt: skip
        """Add `weight` times the distribution of one item of each history; of one that is missing or unknown nothing.

        Args:
            found: [B, V], added to.
            weight: of the distribution.
            seq: [B, L], padded with 0 on the right.
            ends: [B], the places of the last items.
            text: see `near`.
            gap: 0: of the last item, 1: of the one before.
            tau: temperature of the texts' cosines.
            by_text: the items with near texts instead of transitions.
        """
        rows, size = np.arange(len(seq)), len(text)
        near, cosine = self.near(np.where(ends >= gap, seq[rows, np.maximum(ends - gap, 0)], 0), text)
        weights = np.exp((cosine - 1) / tau)
        if by_text:
            weights[:, 0] = 0  # the item itself
            found[rows[:, None], near] += weights * (weight / np.maximum(weights.sum(axis=1, keepdims=True), 1e-30))
        else:
            starts = np.arange(0, near.size + 1, near.shape[1])
            smoothed = sp.csr_matrix((weights.ravel(), near.ravel(), starts), (len(seq), size)) @ self._counts[gap]
            owner = np.repeat(rows, np.diff(smoothed.indptr))
            mass = np.bincount(owner, smoothed.data, len(seq))
            added = smoothed.data * (weight / np.maximum(mass, 1e-30)).astype(np.float32)[owner]
            found.reshape(-1)[owner * size + smoothed.indices] += added

    def forward(self, item_seq: Tensor, lengths: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """What transitions and texts give to each item, [B, V] each: their shares times their distributions.

        A row of which one of them knows nothing is 0 there.

        Args:
            item_seq: [B, L], padded with 0 on the right.
            lengths: [B].
            text: see `near`.
        """
        share, text_share, tau, text_tau, second, repeats = self.weights.tolist()
        seq, ends = item_seq.cpu().numpy(), lengths.cpu().numpy() - 1
        given = []
        for wanted, width, by_text in ((share, tau, False), (text_share, text_tau, True)):
            spread = np.zeros((len(seq), len(text)), np.float32)
            for gap, weight in enumerate((1 - second, second) if wanted else ()):
                if weight:
                    self.add_part(spread, weight, seq, ends, text, gap, width, by_text)
            if not repeats:
                np.put_along_axis(spread, seq, 0, axis=1)
            mass = spread.sum(axis=1, keepdims=True)
            spread *= wanted / np.where(mass > 0, mass, 1)
            given.append(torch.from_numpy(spread).to(item_seq.device))
        return given[0], given[1]


def mixed(log_p: Tensor, spread: Tensor) -> Tensor:
    """Logarithm of `(1 - m) p + spread`, where a row of `spread` [B, V] sums to m < 1, and `log_p` is that of p."""
    kept = log_p + torch.log1p(-spread.sum(dim=1, keepdim=True))
    at = (spread.flatten() > 0).nonzero().squeeze(1)
    kept.view(-1)[at] = torch.logaddexp(kept.flatten()[at], spread.flatten()[at].log())
    return kept


def text_of(config: Any, dataset: Any, n_items: int) -> Tensor:
    """The items' texts as `ItemFeatures.directions`, [V, S]; S is 0 where there is no item file.

    Zeros where the data set is not there but in its place what a checkpoint knows: its weights bring them.
    """
    features = getattr(dataset, "item_features", None)
    if features is None and hasattr(dataset, "field2id_token"):
        path = Path(config["data_path"]) / f"{config['dataset']}.item"
        if path.is_file():
            names = "data_path dataset field_separator checkpoint_dir show_progress device item_vectors item_text"
            names += " item_text_encoder item_text_size item_attributes"
            options = {name: config[name] for name in names.split()}
            if options["item_vectors"] is None:  # a backbone of RecBole, which has none of these options
                options.update(item_text="auto", item_text_size=128)
            features = item_features(options, dataset)
        else:
            getLogger().info(f"Item texts: {path} is not there; an item stands for itself alone")
    if features is None or not features.projection.size:
        return torch.zeros(n_items, 0)
    if len(features.text) != n_items:
        return torch.zeros(n_items, features.text.shape[1])
    return torch.from_numpy(features.directions())


def pairs_of(items: np.ndarray, places: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Transitions to the `places` [N] of `items`, as `TransitionHead.add` takes them.

    `starts` [N] are the places where their histories begin.
    """
    before = [np.where(places - gap >= starts, items[np.maximum(places - gap, 0)], 0) for gap in GAPS]
    return np.stack(before, axis=1).astype(np.int64), items[places].astype(np.int64)


class _Sample:
    """Validation windows with what there is to mix, for the items that can rank high: weights are tried fast on them.

    Args:
        model: a `RaSeRec` whose kNN head, if any, has the share 0.
        batches: some windows, as `full_sort_predict` reads them, and their targets.
        removed: items of the history are not ranked.
        metric: what is compared, such as `ndcg@10`.
    """

    def __init__(self, model: Any, batches: Iterable[tuple[Any, Tensor]], removed: bool, metric: str):
        head, self.metric = model.transitions, metric
        self.k = int(metric.partition("@")[2] or 10)
        repeats = bool(head.weights[-1])
        parts: list[tuple[np.ndarray, ...]] = []
        first = size = 0
        for interaction, targets in batches:
            h, ids, mask = model.retrieved(interaction)
            probability = torch.softmax(model.scores_of(h, ids, mask), dim=1)
            item_seq, ends = interaction[model.ITEM_SEQ].cpu(), interaction[model.ITEM_SEQ_LEN].cpu().numpy() - 1
            seq, rows = item_seq.numpy(), np.arange(len(targets))
            spreads = [np.zeros(probability.shape, np.float32)]
            if model.knn:
                next_items, similarity = model.neighbour_similarity(h, ids)
                weights = neighbour_weights(similarity, mask, float(model.knn_tau))
                spreads[0] = torch.zeros_like(probability).scatter_add_(1, next_items, weights).cpu().numpy()
            for tau, gap, by_text in _COMPONENTS:
                spreads.append(np.zeros(probability.shape, np.float32))
                head.add_part(spreads[-1], 1.0, seq, ends, model.text, gap, tau, by_text)
                if not repeats:
                    np.put_along_axis(spreads[-1], seq, 0, axis=1)
            high = np.zeros(probability.shape, bool)
            best = probability.topk(min(2 * self.k, high.shape[1])).indices.cpu().numpy()
            np.put_along_axis(high, best, True, axis=1)
            for spread in spreads:
                high |= spread > 0
            if removed:
                np.put_along_axis(high, seq, False, axis=1)
            high[:, 0] = False
            high[rows, targets.numpy()] = True
            owner, item = high.nonzero()
            own = np.cumsum(high, axis=1)[rows, targets.numpy()] - 1 + np.cumsum([0, *high.sum(axis=1)[:-1]])
            values = np.stack([probability.cpu().numpy()[owner, item], *(spread[owner, item] for spread in spreads)])
            masses = np.stack([spread.sum(axis=1) for spread in spreads])
            parts.append((owner + first, own + size, values, masses))
            first, size = first + len(targets), size + len(owner)
            if size > SAMPLED:
                break
        self.owner, self.own, self.values, self.masses = (np.concatenate(x, axis=-1) for x in zip(*parts))

    def value(self, setting: Mapping[str, float]) -> float:
        """The metric of the sample with these weights."""
        share, second, spreads = setting["knn_share"], setting["second"], []
        found = self.values[0] * (1 - share * (self.masses[0] > 0))[self.owner] + share * self.values[1]
        for wanted, tau, by_text in (("share", "tau", False), ("text_share", "text_tau", True)):
            places = [1 + _COMPONENTS.index((setting[tau], gap, by_text)) for gap in range(len(GAPS))]
            spread, mass = ((1 - second) * x[places[0]] + second * x[places[1]] for x in (self.values[1:], self.masses))
            spreads.append((setting[wanted], spread, mass))
        given = sum(share * (mass > 0) for share, _, mass in spreads)  # [N]
        found = found * (1 - given)[self.owner]
        for share, spread, mass in spreads:
            found = found + share * spread / np.where(mass > 0, mass, 1)[self.owner]
        rank = 1 + np.bincount(self.owner[found > found[self.own][self.owner]], minlength=len(self.own))
        gain = {"recall": np.ones(len(rank)), "hit": np.ones(len(rank)), "mrr": 1 / rank}
        return float((gain.get(self.metric.partition("@")[0].lower(), 1 / np.log2(1 + rank)) * (rank <= self.k)).mean())


@torch.no_grad()
def tune_transitions(
    model: Any, batches: Iterable[tuple[Any, Tensor]], removed: bool, metric: str, validate: Callable[[], float],
    best: float,
) -> float:  # fmt: skip
    """Set the weights of the transition head, and the share of a kNN head, to what validates best; that value.

    The search is made on a sample of windows: from `START` one weight after the other goes up or down in its grid as
    long as that is better. What it finds is validated on the whole split, with the kNN head and without, and taken if
    it is better there than the model without a transition head. The head gives nothing to items of the history unless
    more than `REPEATS` of the sample's targets are such items.

    Args:
        model: a `RaSeRec`; its kNN head is tuned.
        batches: of the sample, see `_Sample`.
        removed: see `_Sample`.
        metric: see `_Sample`.
        validate: the value to raise, with the model as it is.
        best: its value without the transition head.
    """
    batches = list(batches)
    grids, start = {name: list(grid) for name, grid in GRID.items()}, dict(zip(GRID, START))
    again = [(x[model.ITEM_SEQ].cpu() == targets[:, None]).any(dim=1) for x, targets in batches]
    start["repeats"] = float(torch.cat(again).float().mean() > REPEATS)
    grids["knn_share"], start["knn_share"] = [0.0], 0.0
    if model.knn:
        grids["knn_share"] = list(SHARES)
        start["knn_share"] = min(SHARES, key=lambda share: abs(share - float(model.knn_share)))
    if not model.text.shape[1]:  # each item is near to itself alone
        start["text_share"] = 0.0
        grids.update({name: [start[name]] for name in ("text_share", "tau", "text_tau")})

    def use(setting: dict[str, float]) -> None:
        model.transitions.weights.copy_(torch.tensor([setting[name] for name in (*GRID, "repeats")]))
        if model.knn:
            model.knn_share.fill_(setting["knn_share"])

    chosen = off = {**start, "share": 0.0, "text_share": 0.0}
    use({**off, "knn_share": 0.0})
    sample, found = _Sample(model, batches, removed, metric), []
    for at, names in ((start, [*grids]), ({**start, "knn_share": 0.0}, [*GRID]))[: 1 + model.knn]:
        value, better = sample.value(at), True
        while better:
            better = False
            for name in names:
                for step in (1, -1):
                    while 0 <= (place := grids[name].index(at[name]) + step) < len(grids[name]):
                        moved = {**at, name: grids[name][place]}
                        if (reached := sample.value(moved)) <= value:
                            break
                        at, value, better = moved, reached, True
        found.append(at)
    for setting in found:
        use(setting)
        if (reached := validate()) > best:
            best, chosen = reached, setting
    use(chosen)
    return best
