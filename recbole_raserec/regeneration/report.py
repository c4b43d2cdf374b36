"""What regeneration did to a training set, in figures, as text and as a plot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from recbole_raserec.data import ORIGINS, Regenerated
from recbole_raserec.evaluation import plot_bars, plot_beside
from recbole_raserec.regeneration.pairs import Sequences

#: Examples of each origin in the report.
EXAMPLES = 5


def describe(original: Sequences, extra: Regenerated, n_items: int, tokens: Sequence[str]) -> dict[str, Any]:
    """Sizes by origin, lengths, popularity of the targets, transitions, examples; ready for JSON.

    Args:
        original: the training sequences. extra: what joins them. n_items: V. tokens: external item ids [V].
    """
    sets = {ORIGINS[0]: (original.items, original.offsets)}
    for number, name in enumerate(ORIGINS[1:], start=1):
        sets[name] = _taken(extra, extra.origin == number)
    known = _transitions(*sets[ORIGINS[0]], n_items)
    report: dict[str, Any] = {"items": n_items - 1, "origins": {}}
    for name, (items, offsets) in sets.items():
        moves = _transitions(items, offsets, n_items)
        report["origins"][name] = {
            "sequences": len(offsets) - 1,
            "items": len(items),
            "targets": int(np.maximum(np.diff(offsets) - 1, 0).sum()),
            "lengths": np.bincount(np.minimum(np.diff(offsets), 50), minlength=51).tolist(),
            "transitions": len(moves),
            "new_transitions": int((~np.isin(moves, known)).sum()),
            "examples": [
                [str(tokens[item]) for item in items[offsets[row] : offsets[row + 1]]]
                for row in np.unique(np.linspace(0, max(len(offsets) - 2, 0), EXAMPLES).astype(int))
                if len(offsets) > 1
            ],
        }
    before = np.bincount(_targets(*sets[ORIGINS[0]]), minlength=n_items)[1:]
    after = before + sum(np.bincount(_targets(*sets[name]), minlength=n_items)[1:] for name in ORIGINS[1:])
    report["popularity"] = {"before": _shares(before), "after": _shares(after)}
    return report


def text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [f"{'origin':<12}{'sequences':>12}{'targets':>12}{'mean length':>13}{'new transitions':>17}"]
    for name, found in report["origins"].items():
        mean = found["items"] / max(found["sequences"], 1)
        lines.append(
            f"{name:<12}{found['sequences']:>12}{found['targets']:>12}{mean:>13.2f}{found['new_transitions']:>17}"
        )
    shares = report["popularity"]
    lines += ["", "share of the targets among the most popular tenths of the items, before and after:"]
    lines += ["  " + " ".join(f"{value:6.1%}" for value in shares[when]) for when in ("before", "after")]
    for name in ORIGINS[1:]:
        examples = report["origins"][name]["examples"]
        lines += ["", f"{name}, for example:", *("  " + " -> ".join(example) for example in examples)]
    return "\n".join(lines)


def draw(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Lengths by origin, and the targets' popularity before and after.

    Raises:
        MissingExtraError: there is no matplotlib.
    """
    sizes = {
        name: {length: [found["lengths"][length]] for length in range(1, 16)}
        for name, found in report["origins"].items()
    }
    shares = {
        when: {f"{tenth + 1}": [value] for tenth, value in enumerate(values)}
        for when, values in report["popularity"].items()
    }
    plot_bars(path, {"lengths (up to 15)": sizes}, "items of a sequence", "sequences")
    plot_bars(
        plot_beside(path, "_popularity"), {"popularity": shares}, "tenth of the items, most popular first",
        "share of the targets",
    )  # fmt: skip


def _taken(extra: Regenerated, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.diff(extra.offsets)
    return extra.items[np.repeat(chosen, sizes)], np.concatenate([[0], np.cumsum(sizes[chosen])])


def _inner(offsets: np.ndarray) -> np.ndarray:
    """Places that are not the first of their sequence."""
    inner = np.ones(int(offsets[-1]), dtype=bool)
    inner[offsets[:-1][offsets[:-1] < offsets[-1]]] = False
    return np.flatnonzero(inner)


def _targets(items: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return items[_inner(offsets)]


def _transitions(items: np.ndarray, offsets: np.ndarray, n_items: int) -> np.ndarray:
    """Distinct (item, next item), as one number each."""
    later = _inner(offsets)
    return np.unique(items[later - 1] * np.int64(n_items) + items[later])


def _shares(counts: np.ndarray) -> list[float]:
    """Share of the total in each tenth of the items, most counted first."""
    ordered = np.sort(counts)[::-1]
    total = max(int(counts.sum()), 1)
    return [float(part.sum() / total) for part in np.array_split(ordered, 10)]
