"""Full-ranking evaluation of any RecBole model under both protocols from one score matrix.

The same model differs by a fifth or more in NDCG between the two protocols, so every figure carries its name:

- `seen_kept`: the items of the user's earlier history stay in the ranking. RecBole's way for sequential models.
- `seen_removed`: they are taken out, except the target itself. RecBole's way for general models.
- `sampled`: the only one where the data loader samples the items to rank (modes uniN and popN), by RecBole's rules.

Ranks are counted (`ranking`); the metrics come from RecBole's own Evaluator, which is handed the hit structure that its
Collector would have built, and so are equal to RecBole's to the last digit. Of what other metrics read (lists of items,
mean ranks, scores) only that is collected which the configured ones need. (Where scores tie, RecBole leaves the order
open; here the lower item id ranks first.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import numpy as np
import torch
from recbole.data.dataloader import NegSampleEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.evaluator import Evaluator
from recbole.evaluator.collector import DataStruct
from scipy.sparse import csr_matrix

from recbole_raserec.config import SAMPLED, SEEN_KEPT, SEEN_REMOVED, Config, evaluation_problems, metric_needs
from recbole_raserec.distributed import current
from recbole_raserec.errors import ConfigError, DatasetError
from recbole_raserec.evaluation.ranking import (
    Scorer,
    batches_of,
    csr_pairs,
    even_blocks,
    fill_lists,
    option_of,
    target_ranks,
)

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
        more: protocol -> what metrics read beside the ranks, by the names of RecBole's Collector.
        sampled: `kept` are ranks among sampled items.
    """

    kept: torch.Tensor
    removed: Optional[torch.Tensor]
    queries: torch.Tensor
    users: torch.Tensor
    targets: torch.Tensor
    more: dict[str, dict[str, Any]] = field(default_factory=dict)
    sampled: bool = False

    def by_protocol(self) -> dict[str, torch.Tensor]:
        """The ranks under the name of their protocol."""
        if self.sampled:
            return {SAMPLED: self.kept}
        return {SEEN_KEPT: self.kept} if self.removed is None else {SEEN_KEPT: self.kept, SEEN_REMOVED: self.removed}


def evaluate(
    model: torch.nn.Module, eval_data: Any, config: Options, seen: Optional[csr_matrix] = None, progress: bool = False,
    *, seen_by: str = "user", decimals: Optional[int] = None, training: Any = None,
) -> dict[str, Metrics]:  # fmt: skip
    """Metrics of `model` on `eval_data` under both protocols: {protocol: {"recall@10": value, ...}}.

    The arguments and errors are those of `collect_ranks` and `metrics_from_ranks`.
    """
    ranks = collect_ranks(model, eval_data, config, seen, progress, seen_by=seen_by, training=training)
    return metrics_by_protocol(ranks, config, decimals=decimals)


def metrics_by_protocol(ranks: Ranks, config: Options, *, decimals: Optional[int] = None) -> dict[str, Metrics]:
    """Metrics of collected ranks under each protocol they have; see `metrics_from_ranks`."""
    return {
        protocol: metrics_from_ranks(
            values, config, queries=ranks.queries, decimals=decimals, more=ranks.more.get(protocol)
        )
        for protocol, values in ranks.by_protocol().items()
    }


def collect_ranks(
    model: torch.nn.Module, eval_data: Any, config: Options, seen: Optional[csr_matrix] = None, progress: bool = False,
    *, seen_by: str = "user", training: Any = None,
) -> Ranks:  # fmt: skip
    """Rank every target of `eval_data` with `model`, in chunks of at most `eval_memory_mb` MiB of scores.

    A model that offers `full_sort_vectors(interaction) -> (h [B, H], item_vectors [V, H], item_bias [V] or None)`, with
    scores `h @ item_vectors.T + item_bias`, is ranked without a [B, V] matrix. Any other is asked through RecBole's
    `full_sort_predict`, or `predict` over all items where that is all it has.

    Args:
        model: a RecBole model; its training mode is restored afterwards.
        eval_data: RecBole's FullSortEvalDataLoader or NegSampleEvalDataLoader, or one with batches of the same parts.
        config: gives `metrics`, `topk`, `eval_args`, `USER_ID_FIELD`, `device`, `eval_memory_mb`.
        seen: what has been seen before the targets of this phase (training data for validation; training and
            validation data for test), the whole log and not just the part the model reads: bool [n_users, n_items].
            Without it only `seen_kept` is reported. RecBole's own history index is not used: it holds the same items.
        seen_by: "user", or "query" if `seen` has a row for each query, in the order of `eval_data` (for splits in
            which a user has several queries with different histories).
        training: RecBole's data set of the training split, whose counts AveragePopularity and TailPercentage read;
            without it the attribute `training` of `eval_data`, which this package's loaders have.

    Raises:
        ConfigError: A metric cannot be computed here, or `eval_memory_mb` is too low.
        DatasetError: there is nothing to evaluate.
        ValueError: the model gives NaN scores, or `seen` does not fit the data.
    """
    if problems := evaluation_problems(config):
        raise ConfigError(problems)
    if seen_by not in ("user", "query"):
        raise ValueError(f"seen_by is {seen_by!r}; it must be 'user' or 'query'.")

    scorer = Scorer(model, eval_data._dataset, config)
    needs, more = metric_needs(config), _counts(config, eval_data, training)
    sampled = isinstance(eval_data, NegSampleEvalDataLoader)
    names = (SAMPLED,) if sampled else PROTOCOLS[: 1 if seen is None else 2]
    parts: list[tuple[torch.Tensor, ...]] = []
    listed: list[dict[str, dict[str, torch.Tensor]]] = []
    n_queries, was_training = 0, model.training
    model.eval()
    try:
        with torch.no_grad():
            for interaction, row, positive_u, positive_i in batches_of(eval_data, scorer.rows, progress):
                users = interaction[config["USER_ID_FIELD"]].cpu()
                if sampled:
                    users = users[torch.from_numpy(np.unique(row.numpy(), return_index=True)[1])]
                lists = _empty_lists(needs, names, len(users), config)
                if sampled:
                    pairs = torch.unique(positive_u * scorer.n_items + positive_i)  # each once, as RecBole counts
                    counts = torch.bincount(positive_u)
                    positive_u, positive_i = pairs // scorer.n_items, pairs % scorer.n_items
                    scores = scorer.score_pairs(interaction, counts)
                    if "rec.score" in needs:
                        lists[SAMPLED]["rec.score"] = scores.cpu()
                        lists[SAMPLED]["data.label"] = interaction[config["LABEL_FIELD"]].cpu()
                    kept = removed = _rank_sampled(scorer, scores, interaction, row, positive_u, positive_i, lists)
                else:
                    rows = users.numpy() if seen_by == "user" else n_queries + np.arange(len(users))
                    kept, removed = _rank_batch(scorer, interaction, positive_u, positive_i, seen, rows, lists)
                listed.append(lists)
                parts.append((kept, removed, positive_u + n_queries, users, positive_i.cpu()))
                n_queries += len(users)
    finally:
        model.train(was_training)
    if not n_queries:
        raise DatasetError("the evaluation set is empty: no user has an interaction left for it after the split.")
    kept, removed, queries, users, targets = (torch.cat(part) for part in zip(*parts))
    # each process has ranked its queries; of sampled items, which are drawn alike in all, each has ranked all
    add_up = (lambda values: values) if sampled else current().add_up
    found = {
        name: {key: add_up(torch.cat([lists[name][key] for lists in listed])) for key in listed[0][name]} | more
        for name in listed[0]
    }
    return Ranks(add_up(kept), None if seen is None else add_up(removed), queries, users, targets, found, sampled)


def metrics_from_ranks(
    ranks: torch.Tensor, config: Options, *, queries: Optional[torch.Tensor] = None, decimals: Optional[int] = None,
    more: Optional[Mapping[str, Any]] = None,
) -> Metrics:  # fmt: skip
    """RecBole's metrics from the ranks of the targets; those that need more are left out where it is not given.

    Args:
        ranks: 1-based, int64 [P].
        config: gives `metrics`, `topk`, `metric_decimal_place`, `eval_args`.
        queries: query (0..n-1, each present) of each rank, int64 [P]; without it each rank is a query of its own.
        decimals: digits the values are rounded to; without it `metric_decimal_place`, as RecBole does.
        more: see `Ranks`.

    Raises:
        ConfigError: a metric cannot be computed here.
    """
    digits = config["metric_decimal_place"] if decimals is None else decimals
    evaluator, collected = _evaluator(ranks, config, queries, digits, more)
    return {name: float(value) for name, value in evaluator.evaluate(collected).items()}


def query_metrics(
    ranks: torch.Tensor, config: Options, *, queries: Optional[torch.Tensor] = None
) -> dict[str, np.ndarray]:
    """RecBole's metrics of each query, not averaged and not rounded: {"recall@10": float64 [n], ...}.

    Only those that are made of the ranks alone. The arguments and errors are those of `metrics_from_ranks`.
    """
    evaluator, collected = _evaluator(ranks, config, queries, 0)
    for metric in evaluator.metric_class.values():
        # where RecBole averages the values of all queries, [n, max k], they are taken as they are
        metric.topk_result = lambda name, values: {f"{name}@{k}": values[:, k - 1] for k in _cutoffs(config)}
    return {name: np.asarray(values, dtype=np.float64) for name, values in evaluator.evaluate(collected).items()}


def _evaluator(
    ranks: torch.Tensor, config: Options, queries: Optional[torch.Tensor], digits: int,
    more: Optional[Mapping[str, Any]] = None,
) -> tuple[Any, Any]:  # fmt: skip
    """RecBole's Evaluator, and the hit structure of `ranks` that it reads."""
    if problems := evaluation_problems(config):
        raise ConfigError(problems)
    topk, names = _cutoffs(config), config["metrics"]
    there = {"rec.topk", *(more or ())}
    names = [name for name in ([names] if isinstance(names, str) else names) if metric_needs(config, name) <= there]
    queries = torch.arange(len(ranks)) if queries is None else queries
    positives = torch.bincount(queries)  # [n]

    hits = torch.zeros((len(positives), max(topk) + 1), dtype=torch.int32)  # [n, max k | number of positives]
    inside = ranks <= max(topk)
    hits[queries[inside], ranks[inside] - 1] = 1
    hits[:, -1] = positives
    collected = DataStruct()
    for key, value in {"rec.topk": hits, **(more or {})}.items():
        collected.set(key, value)
    tail = option_of(config, "tail_ratio")
    options = {"metrics": names, "topk": topk, "metric_decimal_place": digits, "tail_ratio": tail}
    return Evaluator(options), collected


def _rank_batch(
    scorer: Scorer, interaction: Interaction, positive_u: torch.Tensor, positive_i: torch.Tensor,
    seen: Optional[csr_matrix], seen_rows: np.ndarray, lists: dict[str, dict[str, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Ranks (kept, removed), int64 [P] each, of the positives of one batch; `seen_rows` [B] are rows of `seen`.

    In a group of processes those of the queries of this process, 0 for the others'.
    """
    kept, removed = torch.zeros((2, len(positive_i)), dtype=torch.int64)
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
                width, queries = scorer.n_items, rows.numpy()
                others = np.isin(queries[owner] * width + item, queries * width + targets.numpy())
                owner, item = owner[~others], item[~others]
            pairs = owner, item
        kept[here], removed[here] = scorer.rank(interaction, start, stop, rows, targets, pairs, lists)
    return kept, removed


def _rank_sampled(
    scorer: Scorer, scores: torch.Tensor, interaction: Interaction, row: torch.Tensor, positive_u: torch.Tensor,
    positive_i: torch.Tensor, lists: dict[str, dict[str, torch.Tensor]],
) -> torch.Tensor:  # fmt: skip
    """Ranks int64 [P] of the positives among the items of their query, with `scores` [N] and queries `row` [N]."""
    items, ranks = interaction[scorer.dataset.iid_field], torch.zeros(len(positive_u), dtype=torch.int64)
    for start, stop in even_blocks(int(row.max()) + 1, scorer.listed):
        matrix = scores.new_full((stop - start, scorer.n_items), -torch.inf)
        mine = (row >= start) & (row < stop)
        matrix[(row[mine] - start).to(matrix.device), items[mine].to(matrix.device)] = scores[mine.to(scores.device)]
        here = ((positive_u >= start) & (positive_u < stop)).nonzero().squeeze(1)
        own, targets = positive_u[here] - start, positive_i[here]
        ranks[here] = target_ranks(matrix, targets, None, own)[0]
        for found in lists.values():
            part = {name: values[start:stop] for name, values in found.items() if name in _WIDTHS}
            fill_lists(part, matrix, own, targets, scorer.listed)
    return ranks


#: What is collected for each query beside the ranks: numbers of a row (None: the longest list), and their type.
_WIDTHS: dict[str, tuple[Optional[int], torch.dtype]] = {
    "rec.items": (None, torch.int64), "rec.meanrank": (3, torch.float32)
}  # fmt: skip


def _empty_lists(
    needs: set[str], protocols: tuple[str, ...], rows: int, config: Options
) -> dict[str, dict[str, torch.Tensor]]:
    """Zeros for what the metrics need of each of the rows, by protocol; empty where the ranks are enough."""
    of = {name: form for name, form in _WIDTHS.items() if name in needs}
    return {
        protocol: {
            name: torch.zeros((rows, width or max(_cutoffs(config))), dtype=kind) for name, (width, kind) in of.items()
        }
        for protocol in (protocols if needs - {"rec.topk"} else ())
    }


def _counts(config: Options, eval_data: Any, training: Any) -> dict[str, Any]:
    """The numbers that the metrics read of the data set, by the names of RecBole's Collector."""
    needs, dataset = metric_needs(config), eval_data._dataset
    found: dict[str, Any] = {"data.num_items": dataset.item_num, "data.num_users": dataset.user_num}
    if "rec.items" in needs and max(_cutoffs(config)) > dataset.item_num:
        raise ConfigError([f"topk: {max(_cutoffs(config))} is more than the {dataset.item_num} items; lower it."])
    if needs & {"data.count_items", "data.count_users"}:
        training = training if training is not None else getattr(eval_data, "training", None)
        if training is None:
            raise ValueError("a metric reads the counts of the training split: give `training`, its data set.")
        found.update({"data.count_items": training.item_counter, "data.count_users": training.user_counter})
    return {name: value for name, value in found.items() if name in needs}


def _cutoffs(config: Options) -> list[int]:
    return [config["topk"]] if isinstance(config["topk"], int) else list(config["topk"])
