"""Ranks of the targets under both protocols, the metrics made of them, tables and plots."""

from recbole_raserec.evaluation.plots import plot_bars, plot_beside, plot_lines, plot_points
from recbole_raserec.evaluation.protocols import SEEN_KEPT, Ranks, collect_ranks, evaluate, metrics_by_protocol
from recbole_raserec.evaluation.ranking import scores
from recbole_raserec.evaluation.ranks import grouped, holm, paired_p, read_ranks, user_metrics
from recbole_raserec.evaluation.report import (
    ABSENT,
    PROTOCOL_TITLES,
    STYLES,
    improvement,
    metric_title,
    record_table,
    report_stages,
    text_block,
    versions,
)

__all__ = [
    "ABSENT",
    "PROTOCOL_TITLES",
    "SEEN_KEPT",
    "STYLES",
    "Ranks",
    "collect_ranks",
    "evaluate",
    "grouped",
    "holm",
    "improvement",
    "metric_title",
    "metrics_by_protocol",
    "paired_p",
    "plot_bars",
    "plot_beside",
    "plot_lines",
    "plot_points",
    "read_ranks",
    "record_table",
    "report_stages",
    "scores",
    "text_block",
    "user_metrics",
    "versions",
]
