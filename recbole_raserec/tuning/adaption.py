"""Dynamic adaption (DARec, arXiv 2408.07427): which adapters each layer of the language model gets, by search.

The paper chooses by Bayesian optimisation; here Optuna's Gaussian-process sampler proposes the inner sizes of the two
adapters of every layer, 0 for none, and a trial's value is ``valid_metric`` on validation data after a short training.
For comparison: random search in the same space, and uniform adapters with about as many parameters.

    python -m recbole_raserec.tuning.adaption --dataset=ml-100k --output=adapters.yaml --trials=12 --adaption_epochs=1

The trials live in a file beside the output; the same command continues them. The output is a configuration file:
``--config_files=adapters.yaml`` trains with the chosen architecture.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import yaml

from recbole_raserec.cli import parse_run, take_own
from recbole_raserec.config import Config, check_run
from recbole_raserec.data.preparation import ensure_dataset
from recbole_raserec.errors import ConfigError, MissingExtraError, RaSeRecError
from recbole_raserec.evaluation import SEEN_KEPT
from recbole_raserec.recommendation import train_model
from recbole_raserec.storage import replacing

#: Inner sizes to choose among.
CHOICES = (0, 8, 16, 32, 64)

#: Trials at random before the Gaussian process proposes.
STARTUP = 5

SAMPLERS = ("gp", "random")


@dataclasses.dataclass
class Adaption:
    """The outcome of a search.

    Attributes:
        sizes: (after attention, after feed-forward) of each layer. value: of the best trial on validation data.
        trials: (sizes, value) of all that are done.
    """

    sizes: list[tuple[int, int]]
    value: float
    trials: list[tuple[list[tuple[int, int]], float]]

    def uniform_size(self) -> int:
        """One inner size for all layers with as many adapter parameters, up to rounding; at least 1."""
        total = sum(a + b for a, b in self.sizes)
        return max(1, round(total / (2 * len(self.sizes))))


def search(
    config: Any, layers: int, trials: int, epochs: int, journal: Path, sampler: str = "gp",
    choices: Sequence[int] = CHOICES,
) -> Adaption:  # fmt: skip
    """Search the adapter sizes; trials found in `journal` count.

    Args:
        config: of DARec; its `adapter_sizes` and `epochs` are replaced. layers: of its language model.
        trials: in all, those of earlier calls included. epochs: of each trial.
        journal: Optuna's journal of the trials.
        sampler: ``gp`` or ``random``.

    Raises:
        MissingExtraError: Optuna is not installed.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise MissingExtraError("tune", "optuna", "the search of adapters proposes with it") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.parent.mkdir(parents=True, exist_ok=True)
    name = _study_name(config, layers, epochs, sampler, choices)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))), study_name=name, direction="maximize",
        load_if_exists=True,
    )  # fmt: skip
    for _ in range(trials):
        done = [trial for trial in study.trials if trial.state.is_finished() and trial.value is not None]
        if len(done) >= trials:
            break
        # a seed for each trial: a search that goes on does not propose again what it began with
        seed = int(config["seed"]) + len(study.trials)
        study.sampler = _sampler(optuna, sampler, seed)
        trial = study.ask()
        for layer in range(layers):
            for place in ("attention", "feed_forward"):
                trial.suggest_int(f"{place}_{layer}", 0, len(choices) - 1)  # which choice: they have an order
        study.tell(trial, _value(config, _sizes(trial.params, layers, choices), epochs))
    found = [(_sizes(t.params, layers, choices), float(t.value)) for t in study.trials if t.value is not None]
    best, value = max(found, key=lambda pair: pair[1])
    return Adaption(best, value, found)


def _sampler(optuna: Any, name: str, seed: int) -> Any:
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    try:
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP)
    except ImportError as error:
        raise MissingExtraError("tune", "optuna", "its Gaussian-process sampler is part of Optuna 3.6") from error


def _sizes(params: dict[str, int], layers: int, choices: Sequence[int]) -> list[tuple[int, int]]:
    return [
        (choices[params[f"attention_{layer}"]], choices[params[f"feed_forward_{layer}"]]) for layer in range(layers)
    ]


def _value(config: Any, sizes: Sequence[tuple[int, int]], epochs: int) -> float:
    """`valid_metric` after a short training, seen items kept; a finished one is found again in `checkpoint_dir`."""
    outcome = train_model(config.with_options({"adapter_sizes": [list(pair) for pair in sizes], "epochs": epochs}))
    return outcome.metrics["valid"][SEEN_KEPT][str(config["valid_metric"]).lower()]


def _study_name(config: Any, layers: int, epochs: int, sampler: str, choices: Sequence[int]) -> str:
    options = config.training_options()
    for name in ("adapter_sizes", "epochs"):
        options.pop(name)
    payload = json.dumps([options, layers, epochs, sampler, list(choices)], sort_keys=True, default=str)
    return hashlib.sha256(payload.encode()).hexdigest()[:16]


def write_architecture(path: Path, found: Adaption, command: str) -> None:
    """A configuration file with the chosen sizes; all trials and their values stand in its comments."""
    text = f"# {command}\n# validation {found.value:.6f}, the best of {len(found.trials)} trials\n"
    for number, (sizes, value) in enumerate(found.trials):
        text += f"# {number}: {value:.6f} {' '.join(f'{a}/{b}' for a, b in sizes)}\n"
    text += yaml.safe_dump({"adapter_sizes": [list(pair) for pair in found.sizes]}, default_flow_style=None)
    with replacing(path) as part:
        Path(part).write_text(text, encoding="utf-8")


def number_of_layers(name: Optional[str]) -> int:
    """Layers of the language model that the option `llm` names."""
    from recbole_raserec.recommendation.darec import load_pretrained

    return int(load_pretrained(name)[0].config.num_hidden_layers)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command of this module's docstring; options of DARec may follow. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return 0 if words else 2
    try:
        _, dataset, files, options = parse_run(words)
        defaults = {"output": "", "trials": "12", "adaption_epochs": "1", "sampler": "gp"}
        given, rest = take_own(options, list(defaults))
        own = {**defaults, **given}
        if not own["output"] or own["sampler"] not in SAMPLERS or not own["trials"].isdigit():
            raise ConfigError(["write --output=FILE, --trials=N and --sampler=gp or random"])
        if not own["adaption_epochs"].isdigit():
            raise ConfigError([f"adaption_epochs: {own['adaption_epochs']} is not a number of epochs"])
        config = Config("DARec", dataset, files, None, rest)
        check_run(config)
        ensure_dataset(config)
        if config["threads"]:
            import torch

            torch.set_num_threads(int(config["threads"]))
        output = Path(own["output"])
        found = search(
            config, number_of_layers(config["llm"]), int(own["trials"]), int(own["adaption_epochs"]),
            output.with_suffix(".journal"), own["sampler"], CHOICES,
        )  # fmt: skip
        write_architecture(output, found, "python -m recbole_raserec.tuning.adaption " + " ".join(words))
        print(f"{output}: {found.sizes}, validation {config['valid_metric']} {found.value:.4f}")
        print(f"uniform adapters of as many parameters: --adapter_sizes={found.uniform_size()}")
    except RaSeRecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
