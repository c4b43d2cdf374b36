"""A finished run for other programs: its vectors as tables, its networks as ONNX or `torch.export` programs.

A network is written as the program `backbone`, `(item_seq [B, L], item_seq_len [B] (, user [B])) -> (vectors [B, H],
scores [B, V])`. Of RaSeRec there is `module`, too, what is made of given neighbours: `(vectors [B, H], keys [B, K, H],
targets [B, K], mask [B, K] (, bias [B, K])) -> (augmented [B, H], scores [B, V])`. B is free, L is
MAX_ITEM_LIST_LENGTH. The programs are run on stored histories, and compared with the scores of this package.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from recbole_raserec.errors import CheckpointError, InputError, MissingExtraError
from recbole_raserec.evaluation import scores
from recbole_raserec.recommendation import ItemTable
from recbole_raserec.retrieval import RaSeRec, interpolate
from recbole_raserec.storage import replacing, write_json

FORMATS = ("parquet", "npy")
PROGRAMS = {"onnx": ".onnx", "torch_export": ".pt2"}
#: Largest difference from the package's scores, relative to the largest of these.
TOLERANCE = 1e-4
BATCHES = (5, 1, 16)  # the first makes the program, all check it


class Checked(list[str]):
    """What was written, a line a file, with the largest difference found."""

    def add(self, path: Path, what: str, gap: float, scale: float, tolerance: float) -> None:
        """Note a file.

        Raises:
            CheckpointError: the difference is above the tolerance.
        """
        relative = gap / max(scale, 1e-12)
        if not relative <= tolerance:
            path.unlink(missing_ok=True)
            found = f"{what} differ from the package's by {gap:.2g} (values to {scale:.3g})"
            raise CheckpointError(f"{path}: {found}, more than --tolerance={tolerance:g} allows; it is not kept.")
        self.append(f"{path}: {what} differ by at most {gap:.1e} (values to {scale:.3g})")


def write_vectors(recommender: Any, directory: Path, form: str = "parquet", tolerance: float = TOLERANCE) -> Checked:
    """Write item, user and (RaSeRec) memory vectors into `directory`.

    Args:
        recommender: a `Recommender`.
        directory: is created; of it items, users and memory are written.
        form: `parquet`: one table each, its column `vector` a list of H float32. `npy`: float32 [N, H], and a .csv with
            the other columns of the rows.
        tolerance: see `TOLERANCE`; user vectors times item vectors are compared with `Recommender.score`.

    Raises:
        InputError: the model has no user and item vectors.
        MissingExtraError: polars is not installed.
        CheckpointError: the vectors do not give the scores.
    """
    write = {"parquet": _write_parquet, "npy": _write_npy}[form]
    directory.mkdir(parents=True, exist_ok=True)
    backbone, live, done = recommender.backbone, recommender.live, Checked()
    with torch.no_grad():
        items, bias = backbone.item_vectors().cpu().numpy()[1:], backbone.item_bias()
    columns: dict[str, Any] = {"item": recommender.items[1:]}
    columns |= {} if bias is None else {"bias": bias.detach().cpu().numpy()[1 : len(items) + 1]}
    columns |= {"title": recommender.titles[1:]} if recommender.titles else {}
    known = [user for user, row in zip(live.numbers, recommender.stored(live.numbers)) if len(row)]
    users = recommender.encode(users=known)
    probe = known[:64]
    found = users[: len(probe)] @ items.T + columns.get("bias", np.float32(0))
    wanted = found
    if not (
        isinstance(recommender.model, RaSeRec) and recommender.model.gives_probabilities
    ):  # whose scores are no dot product
        wanted = recommender.score(users=probe)
    gap, scale = (float(np.abs(x).max(initial=0)) for x in (found - wanted, wanted))
    path = write(directory / "users", {"user": known}, users)
    done.append(f"{write(directory / 'items', columns, items)}: {len(items):,} vectors of length {items.shape[1]}")
    done.add(path, f"{len(known):,} vectors of users; their products with the items'", gap, scale, tolerance)
    if isinstance(recommender.model, RaSeRec):
        memory = recommender.model.memory
        rows = np.flatnonzero(~memory.gone)
        names = [recommender.users[user] if user > 0 else None for user in memory.users[rows].tolist()]
        columns = {"user": names, "item": [recommender.items[item] for item in memory.targets[rows].tolist()]}
        columns |= {name: getattr(memory, name)[rows] for name in ("positions", "times", "support")}
        path = write(directory / "memory", columns, np.ascontiguousarray(memory.keys[rows]))
        done.append(f"{path}: {len(rows):,} memories, the keys as vectors")
    return done


def _write_parquet(path: Path, columns: dict[str, Any], vectors: np.ndarray) -> Path:
    try:
        import polars as pl  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise MissingExtraError("frames", "polars", "it writes --format=parquet (or take npy)") from None
    path = path.with_suffix(".parquet")
    with replacing(path) as part:
        pl.DataFrame({**columns, "vector": pl.Series(vectors)}).write_parquet(part)
    return path


def _write_npy(path: Path, columns: dict[str, Any], vectors: np.ndarray) -> Path:
    with replacing(path.with_suffix(".npy")) as part, open(part, "wb") as file:
        np.save(file, vectors)
    with replacing(path.with_suffix(".csv")) as part:
        pd.DataFrame(columns).to_csv(part, index=False)
    return path.with_suffix(".npy")


class BackboneProgram(nn.Module):
    """Histories into user vectors [B, H] and scores of all items [B, V]."""

    vectors = "vectors"  # the name of that output

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, item_seq: Tensor, item_seq_len: Tensor, user: Any = None) -> tuple[Tensor, Tensor]:
        backbone: Any = self.backbone
        h = backbone.encode(item_seq, item_seq_len, user)
        return h, scores(h, backbone.item_vectors(), backbone.item_bias())


class ModuleProgram(nn.Module):
    """User vectors [B, H] and given neighbours into what RaSeRec makes of them: h~ [B, H] and scores [B, V].

    Without neighbours (`mask` False in a row) these are the backbone's.
    """

    vectors = "augmented"

    def __init__(self, model: RaSeRec):
        super().__init__()
        self.augments, self.knn, self.ram = model.augments, model.knn, model.ram
        self.compared, self.own = model.compared, model.own
        self.register_buffer("table", model.item_vectors().detach())
        self.register_buffer("item_bias", model.backbone.item_bias())
        self.share, self.tau = (float(model.knn_share), float(model.knn_tau)) if model.knn else (0.0, 1.0)

    def forward(
        self, vectors: Tensor, keys: Tensor, targets: Tensor, mask: Tensor, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        table: Any = self.table
        mixed = self.own(vectors)
        if self.augments:
            mixed = self.ram(mixed, self.own(keys), table[targets], mask, bias)
        found = scores(mixed, table, self.item_bias)  # type: ignore[arg-type]
        if self.knn:
            found = interpolate(found, targets, self.compared(vectors, keys), mask, self.share, self.tau)
        return mixed, found


def write_programs(
    recommender: Any, directory: Path, kinds: Sequence[str], tolerance: float = TOLERANCE
) -> Checked:  # fmt: skip
    """Write the backbone and (RaSeRec) the module for given neighbours, and `programs.json`, into `directory`.

    `programs.json` has the ids of the items by number, L, K and the names of the inputs.

    Args:
        recommender: a `Recommender` on the CPU.
        directory: is created.
        kinds: of `PROGRAMS`.
        tolerance: see `TOLERANCE`.

    Raises:
        InputError: the model has no user and item vectors, or cannot be written in this form.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        CheckpointError: a program gives other scores than the package.
    """
    directory.mkdir(parents=True, exist_ok=True)
    done, about = Checked(), {}
    for name, program, inputs in _programs(recommender):
        given = inputs(BATCHES[0])[0]
        about[name] = list(given)
        for kind in kinds:
            path = directory / f"{name}{PROGRAMS[kind]}"
            run = {"onnx": _onnx, "torch_export": _torch_export}[kind](program, given, path)
            made = [(run(values), wanted) for values, *wanted in map(inputs, BATCHES)]
            pairs = [pair for found, wanted in made for pair in zip(found, wanted)]
            gap = torch.stack([(found.detach() - right).abs().max() for found, right in pairs]).max()  # keeps a NaN
            scale = max(float(right.abs().max()) for _, right in pairs)
            done.add(path, "vectors and scores", float(gap), scale, tolerance)
    write_json(
        directory / "programs.json",
        {
            "model": recommender.name, "dataset": recommender.dataset, "fingerprint": recommender.fingerprint,
            "inputs": about, "L": recommender.longest, "K": getattr(recommender.model, "top_k", None),
            "items": recommender.items,
        },
    )  # fmt: skip
    return done


def _programs(recommender: Any) -> Iterator[tuple[str, nn.Module, Callable[[int], tuple[Any, ...]]]]:
    """Name, program, and what gives for a batch size its inputs by name and the package's vectors and scores."""
    model, backbone = recommender.model, recommender.backbone
    plain = copy.deepcopy(backbone).eval()
    for part in [*plain.modules()]:
        if hasattr(part, "_compiled"):
            part._compiled = False  # the compiled kernels are no operators of torch
        if isinstance(table := getattr(part, "item_embedding", None), ItemTable):
            part.item_embedding = table.frozen()
    rows = [row for row in recommender.stored(recommender.live.numbers) if len(row)]
    rows = rows or [np.arange(1, min(len(recommender.items), 9))]

    def histories(size: int) -> list[np.ndarray]:  # of all lengths: whole ones, and ones cut short
        cut = [(rows[n % len(rows)], n) for n in range(size)]
        return [row if n % 3 else row[-1 - n % len(row) :] for row, n in cut]

    def encoded(size: int) -> tuple[dict[str, Tensor], Tensor]:
        users = np.arange(size) % max(len(recommender._checkpoint.vocabulary.users) - 1, 1) + 1
        item_seq, lengths, user = recommender._checkpoint.batch(histories(size), users)
        item_seq = nn.functional.pad(item_seq, (0, recommender.longest - item_seq.shape[1]))
        given = {"item_seq": item_seq, "item_seq_len": lengths, **({"user": user} if backbone.needs_user else {})}
        with torch.no_grad():
            return given, backbone.encode(item_seq, lengths, user)

    def of_backbone(size: int) -> tuple[Any, ...]:
        given, h = encoded(size)
        with torch.no_grad():
            return given, h, scores(h, backbone.item_vectors(), backbone.item_bias())

    def of_module(size: int) -> tuple[Any, ...]:
        with torch.no_grad():
            given = encoded(size)[0]
            h = model.encode(given["item_seq"], given["item_seq_len"], given.get("user"))
            ids, mask = model.neighbours(h)
            mask = mask & (torch.arange(size) != 2)[:, None]  # a row without any
            keys, targets, bias = model.entries(ids)
            given = {"vectors": h, "keys": keys, "targets": targets, "mask": mask}
            given |= {} if bias is None else {"bias": bias}
            mixed = model.augment(h, ids, mask) if model.augments else model.own(h)
            return given, mixed, model.scores_of(h, ids, mask)

    yield "backbone", BackboneProgram(plain).eval(), of_backbone
    if isinstance(model, RaSeRec) and len(model.memory):
        yield "module", ModuleProgram(copy.copy(model)).eval(), of_module


def _exported(program: nn.Module, given: dict[str, Tensor]) -> Any:
    """The program as `torch.export` sees it, of any batch size."""
    batch = torch.export.Dim("batch", min=1)
    shapes = {name: {0: batch} for name in given}
    return torch.export.export(program, (), given, dynamic_shapes=shapes, strict=False)


@contextlib.contextmanager
def _refusing(kind: str, program: nn.Module) -> Iterator[None]:
    """Quiet inside; a failure, whatever it is, becomes one InputError."""
    level = logging.root.manager.disable
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    except Exception as error:
        inner = getattr(program, "backbone", program)
        name = "the module" if inner is program else type(inner.model).__name__
        why = str(error).strip().partition("\n")[0]
        raise InputError(f"{kind}: {name} cannot be written in this form ({type(error).__name__}: {why}).") from error
    finally:
        logging.disable(level)


def _torch_export(program: nn.Module, given: dict[str, Tensor], path: Path) -> Callable[[dict[str, Tensor]], Any]:
    with _refusing("torch_export", program):
        with replacing(path) as part, open(part, "wb") as file:
            torch.export.save(_exported(program, given), file)
        loaded = torch.export.load(path).module()
    return lambda values: loaded(**values)


def _onnx(program: Any, given: dict[str, Tensor], path: Path) -> Callable[[dict[str, Tensor]], Any]:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("onnx", str(error.name), "--onnx needs it") from None
    with _refusing("onnx", program):
        made = torch.onnx.export(
            _exported(program, given), (), kwargs=given, dynamo=True, input_names=list(given),
            output_names=[program.vectors, "scores"], verbose=False, optimize=True,
        )  # fmt: skip
        with replacing(path) as part:
            made.save(str(part), external_data=False)  # type: ignore[union-attr]
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(values: dict[str, Tensor]) -> list[Tensor]:
        found = session.run(None, {name: value.numpy() for name, value in values.items()})
        return [torch.from_numpy(np.asarray(each)) for each in found]

    return run
