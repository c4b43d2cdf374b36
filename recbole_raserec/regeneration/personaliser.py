"""The data-set personaliser (DR4SR+, arXiv 2405.17795): what a regenerated row is worth to a target model.

A small network reads the model's vector of a row and gives a score. The scores weigh the rows in the model's training
loss (inner problem); they are good if the model so trained predicts the original data well (outer problem). The
gradient of the outer loss with respect to the scorer goes through the trained weights by implicit differentiation:

    dL_out/dphi = - p . d(dL_in/dtheta)/dphi,    p = (d2 L_in / dtheta2)^-1 dL_out/dtheta

The inverse is a truncated Neumann series. Its Hessian-vector products, and the mixed derivative, are central
differences of gradients and of losses: the model's kernels have first derivatives only.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
from recbole.utils import init_seed
from torch import nn
from tqdm import tqdm

from recbole_raserec.config import Config, regeneration_options
from recbole_raserec.data import ORIGINS, SEQUENCE, BucketLoader, Regenerated, joined
from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.regeneration.report import REPORT, RegeneratedData, inner_rows, stored_or_made
from recbole_raserec.storage import fingerprint, load_named, named_tensors, read_tensors, write_json, write_tensors
from recbole_raserec.training import Outcome

Tensors = Sequence[torch.Tensor]

#: Raised when the same options and data would give other weights than before.
VERSION = 2

#: What a run that was killed continues from.
STATE = "personaliser-state.safetensors"

_STEP = 1e-2  # length of a step of the central differences, over that of the direction
_ROWS = 4096  # scored at a time


class Personaliser(nn.Module):
    """Scores rows by the target model's vectors of them, of length H = `size`."""

    def __init__(self, size: int):
        super().__init__()
        self.hidden, self.choice = nn.Linear(size, size), nn.Linear(size, 2)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Drop and keep: [B, H] -> [B, 2]."""
        return self.choice(F.relu(self.hidden(h)))

    def score(self, h: torch.Tensor) -> torch.Tensor:
        """Probability of keeping a row, [B]."""
        return torch.softmax(self.logits(h), dim=1)[:, 1]

    def sample(self, h: torch.Tensor, tau: float) -> torch.Tensor:
        """A relaxed draw of it (Gumbel-softmax), [B]."""
        return F.gumbel_softmax(self.logits(h), tau=tau)[:, 1]


def implicit_direction(
    parameters: Tensors, outer: Callable[[], torch.Tensor], inner: Callable[[], torch.Tensor], terms: int, rate: float
) -> list[torch.Tensor]:
    """p above: `rate * sum_{j <= terms} (I - rate H)^j g` with H of `inner` and g the gradient of `outer`.

    Args:
        parameters: theta; left as they are.
        outer: loss at their values, without noise.
        inner: the same.
        terms: of the series beyond the first.
        rate: below 2 over the largest eigenvalue of H, or it diverges.
    """
    total = part = _gradient(parameters, outer)
    for _ in range(terms):
        product = hessian_product(parameters, inner, part)
        part = [x - rate * y for x, y in zip(part, product)]
        total = [x + y for x, y in zip(total, part)]
    return [rate * x for x in total]


def hessian_product(parameters: Tensors, loss: Callable[[], torch.Tensor], direction: Tensors) -> list[torch.Tensor]:
    """The Hessian of `loss` times `direction`, by central differences of gradients."""
    ends, step = _both_ends(parameters, direction, lambda: _gradient(parameters, loss))
    return [(a - b) / (2 * step) for a, b in zip(*ends)]


@torch.no_grad()
def row_slopes(parameters: Tensors, direction: Tensors, row_losses: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Slope of each row's loss along `direction`, [B], by central differences."""
    ends, step = _both_ends(parameters, direction, lambda: row_losses().clone())
    return (ends[0] - ends[1]) / (2 * step)


def _both_ends(parameters: Tensors, direction: Tensors, value: Callable[[], Any]) -> tuple[list[Any], float]:
    """`value` at the parameters moved by plus and minus a step along `direction`, and the step."""
    length = float(torch.stack([d.double().square().sum() for d in direction]).sum().sqrt())
    step, ends = _STEP / max(length, 1e-30), []
    for sign in (1, -1):
        with shifted(parameters, direction, sign * step):
            ends.append(value())
    return ends, step


def scorer_loss(weights: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """A number whose gradient for the scorer is that of the outer loss, from its `weights` [B] and the `slopes` [B].

    The inner loss is the mean of the rows' losses times their weights, so `p . dL_in/dtheta` is that of their slopes.
    """
    return -(weights * slopes).mean()


@contextlib.contextmanager
def shifted(parameters: Tensors, direction: Tensors, step: float) -> Iterator[None]:
    """Inside, the parameters are moved by `step` times `direction`; then they are what they were, to the bit."""
    kept = [x.detach().clone() for x in parameters]
    with torch.no_grad():
        for x, d in zip(parameters, direction):
            x.add_(d, alpha=step)
    try:
        yield
    finally:
        with torch.no_grad():
            for x, old in zip(parameters, kept):
                x.copy_(old)


@dataclasses.dataclass(frozen=True)
class Bilevel:
    """How the scorer learns.

    Attributes:
        every: inner steps between two steps of the scorer.
        terms: of the series.
        rate: of the series.
        learning_rate: of the scorer.
        tau: of its Gumbel-softmax.
        model_rate: learning rate of the model.
    """

    every: int = 10
    terms: int = 3
    rate: float = 0.1
    learning_rate: float = 1e-3
    tau: float = 0.5
    model_rate: float = 1e-3


class Learner:
    """Trains the scorer, and the model beside it.

    Args:
        model: one of this package's, near its optimum on the original data.
        scorer: of vectors of its size.
        plan: how.
    """

    def __init__(self, model: Any, scorer: Personaliser, plan: Bilevel):
        self.model, self.scorer, self.plan = model, scorer, plan
        self.steps = 0
        self._parameters = [x for x in model.parameters() if x.requires_grad]
        self._model_steps = torch.optim.Adam(self._parameters, lr=plan.model_rate)
        self._scorer_steps = torch.optim.Adam(scorer.parameters(), lr=plan.learning_rate)
        steps = {"model_steps": self._model_steps, "scorer_steps": self._scorer_steps}
        self._parts: dict[str, Any] = {"model": model, "scorer": scorer, **steps}

    def learn(
        self, inner: Iterable[Any], outer: Iterator[Any], extra: Callable[[Any], torch.Tensor],
        report: Callable[[float], None],
    ) -> None:  # fmt: skip
        """A step of the model for each batch of `inner`, and after every so many one of the scorer.

        Args:
            inner: batches of original and regenerated rows.
            outer: endless batches of original rows.
            extra: batch -> bool [B], the regenerated rows of it; the others weigh 1.
            report: called with the outer loss.

        Raises:
            ConfigError: a loss is not finite.
        """
        model, scorer, plan = self.model, self.scorer, self.plan
        for batch in inner:
            rows = extra(batch)
            model.train()
            h, targets = model.encode_batch(batch)
            with torch.no_grad():
                weights = torch.where(rows, scorer.sample(h.detach(), plan.tau), 1.0)
            self._step(model.weighted_loss(h, targets, weights), self._model_steps)
            self.steps += 1
            if self.steps % plan.every == 0 and bool(rows.any()):
                with torch.backends.cudnn.flags(enabled=False):  # its recurrent layers need training mode to go back
                    report(self._scorer_step(batch, rows, next(outer)))
        model.eval()

    def _scorer_step(self, batch: Any, rows: torch.Tensor, original: Any) -> float:
        """One step of the scorer; returns the outer loss."""
        model, scorer, plan = self.model, self.scorer, self.plan
        model.eval()
        # differences of rounded gradients are noise
        precision, model.softmax_precision = model.softmax_precision, "float32"
        with torch.no_grad():
            h, targets = model.encode_batch(batch)
        weights = torch.where(rows, scorer.sample(h, plan.tau), torch.ones_like(h[:, 0]))
        fixed = weights.detach()
        outer_loss = 0.0

        def outer() -> torch.Tensor:
            nonlocal outer_loss
            loss = model.weighted_loss(*model.encode_batch(original), None)
            outer_loss = float(loss.detach())
            return loss

        def inner() -> torch.Tensor:
            return model.weighted_loss(*model.encode_batch(batch), fixed)

        def row_losses() -> torch.Tensor:
            return F.cross_entropy(model.encode_batch(batch)[0] @ model.item_vectors().t(), targets, reduction="none")

        direction = implicit_direction(self._parameters, outer, inner, plan.terms, plan.rate)
        self._step(scorer_loss(weights, row_slopes(self._parameters, direction, row_losses)), self._scorer_steps)
        model.softmax_precision = precision
        return outer_loss

    def _step(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        if not math.isfinite(float(loss.detach())):
            given = f"regen_personal_rate: {self.plan.rate:g} with regen_personal_terms: {self.plan.terms}"
            raise ConfigError([f"{given}: the learning of the weights diverges; lower them, or learning_rate"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the next pass needs."""
        return named_tensors(**self._parts)

    def load(self, tensors: Mapping[str, torch.Tensor], steps: int) -> None:
        """Continue after `steps` steps from what `tensors` returned then."""
        load_named(tensors, **self._parts)
        self.steps = steps


def _gradient(parameters: Tensors, loss: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    with torch.enable_grad():
        found = torch.autograd.grad(loss(), list(parameters), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.clone() for x, g in zip(parameters, found)]


def personalise(config: Config, made: RegeneratedData, base: Outcome) -> RegeneratedData:
    """DR4SR+: learn what each regenerated row is worth to the configured model, or reuse what an earlier run found.

    Args:
        config: of the target model, one of this package's.
        made: stage i.
        base: that model, trained on the original data.

    Returns:
        the same sequences with weights in [0, 1].
    """
    options = {name: config[name] for name in regeneration_options(config)}
    mark = fingerprint({**options, "seed": config["seed"], "version": VERSION}, made.fingerprint, base.fingerprint)
    directory = Path(config["checkpoint_dir"]) / f"personalised-{config['dataset']}-{mark[:12]}"

    def make() -> RegeneratedData:
        return _personalised(config, made, base, directory, mark)

    return stored_or_made(make, "Personalised weights", config, base.splits, mark, directory)


def _personalised(config: Config, made: RegeneratedData, base: Outcome, directory: Path, mark: str) -> RegeneratedData:
    """Learn the weights and write them into `directory`."""
    started = time.perf_counter()
    train = base.splits.train._dataset
    rows = made.data.with_ids_of(base.splits.vocabulary())
    both = joined(train, rows)
    model, scorer, losses, before = _learned(config, base.model, both, train, directory)
    weights, targets = _weights(model, scorer, both, rows, config["device"])
    data = dataclasses.replace(rows, weights=weights)
    seconds = made.seconds + before + time.perf_counter() - started
    tail, origin = losses[len(losses) // 2 :], np.repeat(data.origin, np.diff(data.offsets))[targets]
    found = {**made.report, "seconds": seconds, "weights": {
        "outer_loss": float(np.mean(tail)) if tail else None,
        "deciles": np.quantile(weights[targets], np.linspace(0, 1, 11)).tolist(),
        "mean_by_origin": {
            ORIGINS[number]: float(weights[targets][origin == number].mean()) for number in np.unique(origin)
        },
    }}  # fmt: skip
    data.save(directory, mark)
    write_json(directory / REPORT, found)
    (directory / STATE).unlink(missing_ok=True)
    getLogger().info(f"Personalised weights: {directory}, deciles {np.round(found['weights']['deciles'], 3).tolist()}")
    return RegeneratedData(data, directory, mark, seconds, found)


def _learned(
    config: Config, base: Any, both: Any, train: Any, directory: Path
) -> tuple[Any, Personaliser, list[float], float]:
    """Model, scorer, outer losses, and the seconds of earlier runs; after each pass the state lies in `directory`."""
    init_seed(config["seed"], config["reproducibility"])
    model, n_users, device = copy.deepcopy(base), train.store.n_users, config["device"]
    scorer = Personaliser(model.item_vectors().shape[1]).to(device)
    learner = Learner(model, scorer, Bilevel(
        every=config["regen_personal_every"], terms=config["regen_personal_terms"],
        rate=config["regen_personal_rate"], learning_rate=config["regen_personal_learning_rate"],
        model_rate=config["learning_rate"],
    ))  # fmt: skip
    loaders = [BucketLoader(config, data, None, shuffle=True) for data in (both, train)]
    passes, seconds = 0, 0.0
    losses: list[float] = []
    path = directory / STATE
    if config["resume"] is not False and path.exists():
        passes, losses, seconds = _resume(learner, path)
        getLogger().info(f"Personaliser: resuming after pass {passes - 1} from {directory}")
    started = time.perf_counter() - seconds
    for number in range(passes, config["regen_personal_epochs"]):
        torch.manual_seed(config["seed"] * 1_000_003 + number)  # a pass's noise depends on its number alone
        for which, loader in enumerate(loaders):
            loader.generator.manual_seed(config["seed"] * 1_000_003 + 2 * number + which)
        desc, hidden = f"Personalise {number:>3}", not config["show_progress"]
        inner = tqdm(loaders[0], desc=desc, disable=hidden, dynamic_ncols=True)
        outer = itertools.chain.from_iterable(itertools.repeat(loaders[1]))
        rows, original = ((batch.to(device) for batch in part) for part in (inner, outer))
        learner.learn(rows, original, lambda batch: batch[SEQUENCE] >= n_users, losses.append)
        meta = {"passes": number + 1, "steps": learner.steps, "losses": losses}
        write_tensors(path, learner.tensors(), {**meta, "seconds": time.perf_counter() - started})
        if losses:
            getLogger().info(f"Personaliser: pass {number}, loss of the original targets {losses[-1]:.4f}")
    return model, scorer, losses, seconds


def _resume(learner: Learner, path: Path) -> tuple[int, list[float], float]:
    """Passes done, outer losses and seconds so far."""
    try:
        tensors, meta = read_tensors(path)
        learner.load(tensors, int(meta["steps"]))
        return int(meta["passes"]), [float(loss) for loss in meta["losses"]], float(meta["seconds"])
    except (KeyError, TypeError, ValueError, RuntimeError, CheckpointError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise CheckpointError(f"{path} does not fit this run ({reason}); delete it to start again.") from None


@torch.no_grad()
def _weights(model: Any, scorer: Personaliser, both: Any, data: Regenerated, device: Any) -> tuple[Any, Any]:
    """Score of each item as a target, float32 [N], 1 for the first of a sequence, and the targets' rows, int64 [T]."""
    model.eval()
    weights = np.ones(len(data.items), dtype=np.float32)
    targets = inner_rows(data.offsets)
    first = len(both) - len(targets)  # the regenerated rows come last, in the order of the items
    for start in range(0, len(targets), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(targets)))
        h, _ = model.encode_batch(both[first + rows].to(device))
        weights[targets[rows]] = scorer.score(h).cpu().numpy()
    return weights, targets
