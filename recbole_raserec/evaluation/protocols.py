"""Full-ranking evaluation of any RecBole model under both protocols from one score matrix.

The same model differs by a fifth or more in NDCG between the two protocols, so every figure carries its name:

- `seen_kept`: the items of the user's earlier history stay in the ranking. RecBole's way for sequential models.
- `seen_removed`: they are taken out, except the target itself. RecBole's way for general models.

Ranks are counted here (`ranking`); the metrics come from RecBole's own Evaluator, which
is handed the hit structure that its Collector would have built, and so are equal to RecBole's to the last digit. (Where
scores tie, RecBole leaves the order open; here the lower item id ranks first.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional, Union

import numpy as np
import torch
from recbole.data.dataloader import NegSampleEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.evaluator import Evaluator
from recbole.evaluator.collector import DataStruct
from scipy.sparse import csr_matrix

from recbole_raserec.config import SEEN_KEPT, SEEN_REMOVED, Config, evaluation_problems
from recbole_raserec.distributed import current
from recbole_raserec.errors import ConfigError, DatasetError
from recbole_raserec.evaluation.ranking import Scorer, batches_of, csr_pairs, even_blocks

PROTOCOLS = (SEEN_KEPT, SEEN_REMOVED)

Metrics = dict[str, float]
#: Where only `metrics`, `topk` and the like are read, a plain mapping will do.
Options = Union[Config, Mapping[str, Any]]


@dataclass(frozen=True)
class Ranks:
    """The rank of every target of an evaluation set, in the order of its data loader.

    Attributes:
        kept: 1-based ranks with the seen items in the ranking, int64 [P].
        removed: 1-based ranks without them, int64 [P]; None if the seen items were not given.
        queries: the query of each rank (a general model may have several targets per query), int64 [P].
        users: internal user id of each query, int64 [n_queries].
        targets: internal item id of each target, int64 [P].
    """

    kept: torch.Tensor
    removed: Optional[torch.Tensor]
    queries: torch.Tensor
    users: torch.Tensor
    targets: torch.Tensor

    def by_protocol(self) -> dict[str, torch.Tensor]:
        """The ranks under the name of their protocol."""
        return {SEEN_KEPT: self.kept} if self.removed is None else {SEEN_KEPT: self.kept, SEEN_REMOVED: self.removed}


def evaluate(
    model: torch.nn.Module, eval_data: Any, config: Options, seen: Optional[csr_matrix] = None, progress: bool = False,
    *, seen_by: str = "user", decimals: Optional[int] = None,
) -> dict[str, Metrics]:  # fmt: skip
    """Metrics of `model` on `eval_data` under both protocols: {protocol: {"recall@10": value, ...}}.

    The arguments and errors are those of `collect_ranks` and `metrics_from_ranks`.
    """
    ranks = collect_ranks(model, eval_data, config, seen, progress, seen_by=seen_by)
    return metrics_by_protocol(ranks, config, decimals=decimals)


def metrics_by_protocol(ranks: Ranks, config: Options, *, decimals: Optional[int] = None) -> dict[str, Metrics]:
    """Metrics of collected ranks under each protocol they have; see `metrics_from_ranks`."""
    return {
        protocol: metrics_from_ranks(values, config, queries=ranks.queries, decimals=decimals)
        for protocol, values in ranks.by_protocol().items()
    }


def collect_ranks(
    model: torch.nn.Module, eval_data: Any, config: Options, seen: Optional[csr_matrix] = None, progress: bool = False,
    *, seen_by: str = "user",
) -> Ranks:  # fmt: skip
    """Rank every target of `eval_data` with `model`, in chunks of at most `eval_memory_mb` MiB of scores.

    A model that offers `full_sort_vectors(interaction) -> (h [B, H], item_vectors [V, H], item_bias [V] or None)`, with
    scores `h @ item_vectors.T + item_bias`, is ranked without a [B, V] matrix. Any other is asked through RecBole's
    `full_sort_predict`, or `predict` over all items where that is all it has.

    Args:
        model: a RecBole model; its training mode is restored afterwards.
        eval_data: RecBole's FullSortEvalDataLoader, or one whose batches have the same four parts.
        config: gives `metrics`, `topk`, `eval_args`, `USER_ID_FIELD`, `device`, `eval_memory_mb`.
        seen: what has been seen before the targets of this phase (training data for validation; training and
            validation data for test), the whole log and not just the part the model reads: bool [n_users, n_items].
            Without it only `seen_kept` is reported. RecBole's own history index is not used: it holds the same items.
        progress: show a progress bar.
        seen_by: "user", or "query" if `seen` has a row for each query, in the order of `eval_data` (for splits in
            which a user has several queries with different histories).

    Raises:
        ConfigError: A metric needs more than the ranks, the items are sampled, or `eval_memory_mb` is too low.
        DatasetError: there is nothing to evaluate.
        ValueError: the model gives NaN scores, or `seen` does not fit the data.
    """
    problems = evaluation_problems(config)
    if problems:
        raise ConfigError(problems)
    if isinstance(eval_data, NegSampleEvalDataLoader):
        raise ConfigError(["eval_args: the data loader samples the items to rank; set eval_args: {mode: full}."])
    if seen_by not in ("user", "query"):
        raise ValueError(f"seen_by is {seen_by!r}; it must be 'user' or 'query'.")

    scorer = Scorer(model, eval_data._dataset, config)
    parts: list[tuple[torch.Tensor, ...]] = []
    n_queries, was_training = 0, model.training
    model.eval()
    try:
        with torch.no_grad():
            for interaction, positive_u, positive_i in batches_of(eval_data, scorer.rows, progress):
                users = interaction[config["USER_ID_FIELD"]].cpu()
                rows = users.numpy() if seen_by == "user" else n_queries + np.arange(len(users))
                kept, removed = _rank_batch(scorer, interaction, positive_u, positive_i, seen, rows)
                parts.append((kept, removed, positive_u + n_queries, users, positive_i.cpu()))
                n_queries += len(users)
    finally:
        model.train(was_training)
    if not n_queries:
        raise DatasetError("the evaluation set is empty: no user has an interaction left for it after the split.")
    kept, removed, queries, users, targets = (torch.cat(part) for part in zip(*parts))
    add_up = current().add_up  # each process has ranked its queries
    return Ranks(add_up(kept), None if seen is None else add_up(removed), queries, users, targets)


def metrics_from_ranks(
    ranks: torch.Tensor, config: Options, *, queries: Optional[torch.Tensor] = None, decimals: Optional[int] = None
) -> Metrics:
    """RecBole's metrics from the ranks of the targets.

    Args:
        ranks: 1-based, int64 [P].
        config: gives `metrics`, `topk`, `metric_decimal_place`, `eval_args`.
        queries: query (0..n-1, each present) of each rank, int64 [P]; without it each rank is a query of its own.
        decimals: digits the values are rounded to; without it `metric_decimal_place`, as RecBole does.

    Raises:
        ConfigError: a metric needs more than the ranks.
    """
    digits = config["metric_decimal_place"] if decimals is None else decimals
    evaluator, collected = _evaluator(ranks, config, queries, digits)
    return {name: float(value) for name, value in evaluator.evaluate(collected).items()}


def query_metrics(
    ranks: torch.Tensor, config: Options, *, queries: Optional[torch.Tensor] = None
) -> dict[str, np.ndarray]:
    """RecBole's metrics of each query, not averaged and not rounded: {"recall@10": float64 [n], ...}.

    The arguments and errors are those of `metrics_from_ranks`.
    """
    evaluator, collected = _evaluator(ranks, config, queries, 0)
    for metric in evaluator.metric_class.values():
        # where RecBole averages the values of all queries, [n, max k], they are taken as they are
        metric.topk_result = lambda name, values: {f"{name}@{k}": values[:, k - 1] for k in _cutoffs(config)}
    return {name: np.asarray(values, dtype=np.float64) for name, values in evaluator.evaluate(collected).items()}


def _evaluator(ranks: torch.Tensor, config: Options, queries: Optional[torch.Tensor], digits: int) -> tuple[Any, Any]:
    """RecBole's Evaluator, and the hit structure of `ranks` that it reads."""
    problems = evaluation_problems(config)
    if problems:
        raise ConfigError(problems)
    topk = _cutoffs(config)
    queries = torch.arange(len(ranks)) if queries is None else queries
    positives = torch.bincount(queries)  # [n]

    hits = torch.zeros((len(positives), max(topk) + 1), dtype=torch.int32)  # [n, max k | number of positives]
    inside = ranks <= max(topk)
    hits[queries[inside], ranks[inside] - 1] = 1
    hits[:, -1] = positives
    collected = DataStruct()
    collected.set("rec.topk", hits)
    return Evaluator({"metrics": _names(config), "topk": topk, "metric_decimal_place": digits}), collected


def _rank_batch(
    scorer: Scorer, interaction: Interaction, positive_u: torch.Tensor, positive_i: torch.Tensor,
    seen: Optional[csr_matrix], seen_rows: np.ndarray,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Ranks (kept, removed), int64 [P] each, of the positives of one batch; `seen_rows` [B] are rows of `seen`.

    In a group of processes those of the queries of this process, 0 for the others'.
    """
    kept = torch.zeros(len(positive_i), dtype=torch.int64)
    removed = torch.zeros(len(positive_i), dtype=torch.int64)
    if seen is not None and len(seen_rows) and seen_rows.max() >= seen.shape[0]:
        raise ValueError(f"the seen items have {seen.shape[0]} rows, but row {seen_rows.max()} was asked for.")
    single = torch.equal(positive_u, torch.arange(len(interaction)))
    first, last = current().span(len(interaction))
    for start, stop in even_blocks(last - first, scorer.rows):
        start, stop = first + start, first + stop
        here = ((positive_u >= start) & (positive_u < stop)).nonzero().squeeze(1)
        rows, targets = positive_u[here] - start, positive_i[here]
        pairs = None
        if seen is not None:
            owner, item = csr_pairs(seen.indptr, seen.indices, seen_rows[start:stop][rows.numpy()])
            if not single:  # the other positives of the query stay in its ranking too
                width = scorer.n_items
                others = np.isin(rows.numpy()[owner] * width + item, rows.numpy() * width + targets.numpy())
                owner, item = owner[~others], item[~others]
            pairs = (owner, item)
        kept[here], removed[here] = scorer.rank(interaction, start, stop, rows, targets, pairs)
    return kept, removed


def _cutoffs(config: Options) -> list[int]:
    return [config["topk"]] if isinstance(config["topk"], int) else list(config["topk"])


def _names(config: Options) -> list[str]:
    metrics = config["metrics"]
    return [metrics] if isinstance(metrics, str) else list(metrics)
