"""What a search leaves behind: `best.yaml`, `trials.csv`, plots, and a table for the terminal."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recbole_raserec.errors import MissingExtraError
from recbole_raserec.evaluation import ABSENT, PROTOCOL_TITLES, plot_points, text_block
from recbole_raserec.storage import plain, replacing
from recbole_raserec.tuning.space import Space, option_of, options_of
from recbole_raserec.tuning.study import values_of

BEST, TRIALS, STUDY, PLOTS = "best.yaml", "trials.csv", "study.json", "plots"

#: Trials in the table, and its width in characters.
_SHOWN, _WIDTH = 10, 100

#: Optuna's names of how a trial ended -> ours.
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


def trial_record(trial: Any, space: Space) -> dict[str, Any]:
    """A trial that is over, ready for JSON.

    Args:
        trial: Optuna's.
        space: of the search.

    Returns:
        `number`, `state`, `value` (of a complete trial: the metric of its best weights), `options` (by parameter),
        `epochs` (`{epoch, from 1: the metric after it}`), `seconds` (of the process that ended it) and, where it
        failed, `reason`.
    """
    state = STATES[trial.state.name]
    found = {
        "number": trial.number,
        "state": state,
        "value": trial.value if state == "complete" else None,
        "options": values_of(trial.params, space),
        "epochs": {str(epoch): value for epoch, value in sorted(trial.intermediate_values.items())},
        "seconds": trial.user_attrs.get("seconds"),
    }
    reason = trial.user_attrs.get("reason")
    return found if reason is None else {**found, "reason": reason}


def write_best(path: Path, header: Sequence[str], options: Mapping[str, Any]) -> None:
    """A configuration file; `header` becomes comments, a line each."""
    body = yaml.safe_dump(plain(options), sort_keys=False, allow_unicode=True, width=120)
    with replacing(path) as part:
        part.write_text("".join(f"# {line}\n" for line in header) + body, encoding="utf-8")


def write_trials(path: Path, trials: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """One trial a line; what a trial does not have is empty, and what is not a text or number is JSON."""
    with replacing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "state", "value", "epochs", "seconds", *names, "reason"])
        for trial in trials:
            options = [_cell(trial["options"][name]) if name in trial["options"] else "" for name in names]
            last = max(map(int, trial["epochs"]), default=0)
            cells = [trial["number"], trial["state"], trial["value"], last, trial["seconds"]]
            writer.writerow([*cells, *options, trial.get("reason", "")])


def trials_table(record: Mapping[str, Any]) -> str:
    """The best trials of a study's record, and what became of the others."""
    names = list(dict.fromkeys(map(option_of, record["space"])))
    maximize = record["direction"] == "maximize"
    complete = [trial for trial in record["trials"] if trial["state"] == "complete"]
    complete.sort(key=lambda trial: (-trial["value"] if maximize else trial["value"], trial["number"]))
    rows = [["trial", record["metric"], "epochs", "seconds", *names]]
    for trial in complete[:_SHOWN]:
        seconds = ABSENT if trial["seconds"] is None else f"{trial['seconds']:.0f}"
        last = max(map(int, trial["epochs"]), default=0)
        rows.append([str(trial["number"]), f"{trial['value']:.4f}", str(last), seconds])
        options = options_of(trial["options"])
        rows[-1] += [str(_cell(options.get(name))) for name in names]
    counts = {state: sum(trial["state"] == state for trial in record["trials"]) for state in STATES.values()}
    title = (
        f"{record['study']}: {', '.join(f'{count} {state}' for state, count in counts.items() if count)}; validation "
        f"{record['metric']},\n{PROTOCOL_TITLES[record['protocol']]}"
    )
    lines = [text_block(title, rows, _WIDTH)]
    if record["importances"]:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in record["importances"].items())
        lines.append(f"importance: {shares}")
    return "\n".join(lines)


def draw(folder: Path, record: Mapping[str, Any]) -> None:
    """Plots of the value by trial and by each option; none where there is no matplotlib."""
    maximize = record["direction"] == "maximize"
    by_trial: dict[str, list[tuple[Any, float]]] = {"complete": [], "pruned": []}
    by_option: dict[str, dict[str, list[tuple[Any, float]]]] = {
        name: {state: [] for state in by_trial} for name in record["space"]
    }
    best: list[tuple[Any, float]] = []
    for trial in record["trials"]:
        state, height = trial["state"], trial["value"]
        if state == "pruned" and trial["epochs"]:
            height = trial["epochs"][max(trial["epochs"], key=int)]
        if height is None:
            continue
        by_trial[state].append((trial["number"], height))
        for name, entry in record["space"].items():
            value = trial["options"][name]
            by_option[name][state].append((str(_cell(value)) if entry["type"] == "categorical" else value, height))
        if state == "complete":
            better = not best or (height > best[-1][1] if maximize else height < best[-1][1])
            best.append((trial["number"], height if better else best[-1][1]))
    with contextlib.suppress(MissingExtraError):
        plot_points(folder / "history.png", by_trial, "trial", record["metric"], steps={"best so far": best})
        for name, entry in record["space"].items():
            plot_points(folder / f"{name}.png", by_option[name], name, record["metric"], log=bool(entry.get("log")))


def _cell(value: Any) -> Any:
    return json.dumps(value) if value is None or isinstance(value, (bool, list)) else value
