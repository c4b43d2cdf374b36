"""Training of the regenerator on pairs, with early stopping on held-out sequences; killed, it goes on where it was."""

from __future__ import annotations

import dataclasses
import math
import time
from logging import getLogger
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from tqdm import tqdm

from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.regeneration.pairs import Pairs
from recbole_raserec.regeneration.regenerator import Regenerator
from recbole_raserec.storage import load_optimizer, optimizer_tensors, part_of, read_tensors, write_tensors

STATE, BEST = "regenerator-state.safetensors", "regenerator.safetensors"

#: Batches sorted by length together, see :class:`~recbole_raserec.data.loaders.BucketLoader`.
_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the regenerator learns.

    Attributes:
        epochs: at most. patience: epochs without a better held-out loss before it stops. learning_rate: of Adam with
            betas (.9, .98), the paper's. batch_pairs: about so many pairs in a batch. held_out: share of the sequences
            whose pairs are not learned from. entropy_weight: of the regulariser. tau, tau_decay, tau_least: of the
            Gumbel-softmax; the paper multiplies by .995 a step down to .1. seed: of shuffling, dropout and noise.
    """

    epochs: int = 40
    patience: int = 3
    learning_rate: float = 1e-3
    batch_pairs: int = 1024
    held_out: float = 0.05
    entropy_weight: float = 0.1
    tau: float = 1.0
    tau_decay: float = 0.995
    tau_least: float = 0.1
    seed: int = 0


def split(pairs: Pairs, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences with pairs: those to learn from and the held-out ones, disjoint, int64 [..] each."""
    usable = np.flatnonzero(np.diff(pairs.offsets))
    order = np.random.default_rng(seed).permutation(usable)
    held = min(max(round(share * len(usable)), 1 if share and len(usable) > 1 else 0), max(len(usable) - 1, 0))
    return np.sort(order[held:]), np.sort(order[:held])


def epoch_batches(pairs: Pairs, rows: np.ndarray, batch_pairs: int, rng: np.random.Generator) -> list[np.ndarray]:
    """`rows` in batches of about `batch_pairs` pairs and sequences of like length, in random order."""
    counts, lengths = np.diff(pairs.offsets), pairs.sequences.lengths()
    order = rng.permutation(rows)
    block = np.cumsum(counts[order]) // (_BLOCK * batch_pairs)
    order = order[np.lexsort((lengths[order], block))]
    batch = (np.cumsum(counts[order]) - 1) // batch_pairs
    parts = np.split(order, np.flatnonzero(np.diff(batch)) + 1)
    return [parts[number] for number in rng.permutation(len(parts))]


@torch.no_grad()
def held_out_loss(model: Regenerator, pairs: Pairs, rows: np.ndarray, batch_pairs: int = 2048) -> float:
    """Mean negative log-likelihood of a pair of `rows`, conditions equally likely (nats)."""
    was_training, device = model.training, model.projections.device
    model.eval()
    total = count = 0.0
    lengths = pairs.sequences.lengths()
    order = rows[np.argsort(lengths[rows], kind="stable")]
    batch = np.cumsum(np.diff(pairs.offsets)[order]) // batch_pairs
    for part in np.split(order, np.flatnonzero(np.diff(batch)) + 1):
        items, owner, patterns = (x.to(device) for x in pairs.batch(part))
        total -= float(model.mixture_log_likelihood(items, owner, patterns).double().sum())
        count += len(owner)
    model.train(was_training)
    return total / max(count, 1.0)


def fit(model: Regenerator, pairs: Pairs, schedule: Schedule, directory: Path, progress: bool) -> dict[str, Any]:
    """Train until the held-out loss stops falling; the model ends with the weights that had the lowest.

    After each epoch the state lies in `directory`; a later call with the same arguments goes on from there.

    Returns:
        {"epochs": [{"loss", "held_out", "entropy", "seconds"}], "best": epoch, "held_out": loss of the best}.

    Raises:
        CheckpointError: `directory` holds a damaged or foreign state. ConfigError: the loss is not finite.
        ValueError: there are no pairs.
    """
    learn, held = split(pairs, schedule.held_out, schedule.seed)
    if not len(learn):
        raise ValueError("no sequence contains a frequent pattern")
    optimizer = torch.optim.Adam(model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.98))
    history: list[dict[str, float]] = []
    steps = 0
    best: dict[str, torch.Tensor] = {}
    if (directory / STATE).exists():
        history, steps, best = _resume(model, optimizer, directory)
        getLogger().info(f"Regenerator: resuming after epoch {len(history) - 1} from {directory}")
    while len(history) < schedule.epochs and not _stalled(history, schedule.patience):
        epoch, started = len(history), time.perf_counter()
        torch.manual_seed(schedule.seed * 1_000_003 + epoch)  # an epoch's noise depends on its number alone
        rng = np.random.default_rng([schedule.seed, epoch])
        batches = epoch_batches(pairs, learn, schedule.batch_pairs, rng)
        desc = f"Regenerator {epoch:>3}"
        loss, entropy, steps = _epoch(model, optimizer, pairs, batches, schedule, steps, desc if progress else None)
        value = held_out_loss(model, pairs, held) if len(held) else loss
        if not math.isfinite(value):
            raise _diverged(schedule)
        seconds = time.perf_counter() - started
        history.append({"loss": loss, "held_out": value, "entropy": entropy, "seconds": seconds})
        getLogger().info(f"regenerator epoch {epoch} [{seconds:.1f}s, loss: {loss:.4f}, held-out: {value:.4f}]")
        if _best(history) == epoch:
            best = {name: value.detach().clone() for name, value in model.state_dict().items()}
        _save(model, optimizer, directory, history, steps, best)
    model.load_state_dict(best)
    model.eval()
    number = _best(history)
    write_tensors(directory / BEST, best, {"epoch": number})
    return {"epochs": history, "best": number, "held_out": history[number]["held_out"]}


def _epoch(
    model: Regenerator, optimizer: Any, pairs: Pairs, batches: list[np.ndarray], schedule: Schedule, steps: int,
    desc: Optional[str],
) -> tuple[float, float, int]:  # fmt: skip
    """One pass: mean loss of a pair, mean entropy of the conditions' use, steps so far."""
    device = model.projections.device
    model.train()
    total = entropies = count = 0.0
    for rows in tqdm(batches, desc=desc, disable=desc is None, dynamic_ncols=True):
        items, owner, patterns = (x.to(device) for x in pairs.batch(rows))
        tau = max(schedule.tau * schedule.tau_decay**steps, schedule.tau_least)
        losses, entropy = model(items, owner, patterns, tau)
        loss = losses.mean() - schedule.entropy_weight * entropy
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        steps += 1
        total += float(losses.detach().sum())
        entropies += float(entropy.detach()) * len(owner)
        count += len(owner)
    if not math.isfinite(total):
        raise _diverged(schedule)
    return total / count, entropies / count, steps


def _diverged(schedule: Schedule) -> ConfigError:
    return ConfigError(
        [f"regen_learning_rate: {schedule.learning_rate:g}: the regenerator's loss is not finite; lower it"]
    )


def _best(history: list[dict[str, float]]) -> int:
    return int(np.argmin([epoch["held_out"] for epoch in history]))


def _stalled(history: list[dict[str, float]], patience: int) -> bool:
    return bool(history) and len(history) - 1 - _best(history) >= patience


def _save(
    model: Regenerator, optimizer: Any, directory: Path, history: list[dict[str, float]], steps: int,
    best: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    """One file, so that the best weights are those of the history whenever the run is killed."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors.update({f"best.{name}": value for name, value in best.items()})
    tensors.update(optimizer_tensors(optimizer))
    write_tensors(directory / STATE, tensors, {"history": history, "steps": steps})


def _resume(
    model: Regenerator, optimizer: Any, directory: Path
) -> tuple[list[dict[str, float]], int, dict[str, torch.Tensor]]:
    """History, steps and the best weights; the last ones are in `model`."""
    path = directory / STATE
    try:
        tensors, meta = read_tensors(path)
        device = model.projections.device
        best = {name: value.to(device) for name, value in part_of(tensors, "best").items()}
        for weights in (best, part_of(tensors, "model")):
            model.load_state_dict(weights)
        load_optimizer(optimizer, tensors)
        return list(meta["history"]), int(meta["steps"]), best
    except (KeyError, TypeError, ValueError, RuntimeError, CheckpointError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise CheckpointError(f"{path} does not fit this run ({reason}); delete {directory} to start anew.") from None


def schedule(config: Any) -> Schedule:
    """How it is trained."""
    return Schedule(
        epochs=config["regen_epochs"],
        patience=config["regen_stopping_step"],
        learning_rate=config["regen_learning_rate"],
        batch_pairs=config["regen_batch_pairs"],
        held_out=config["regen_held_out"],
        entropy_weight=config["regen_entropy"],
        tau_decay=config["regen_tau_decay"],
        tau_least=config["regen_tau_least"],
        seed=config["seed"],
    )
