"""Hybrid inference of the regenerator: all sequences and conditions together against one after the other."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.common import Case, config_of

#: Sequences that the peer decodes.
SAMPLE = 60
GAMMAS = (0.0, 1.0)


def _model_and_sequences(data_path: str) -> tuple[Any, Any]:
    """A regenerator of amazon-beauty's size (default sizes, weights as constructed), and the training sequences."""
    import torch

    from recbole_raserec.data.splits import prepare_data
    from recbole_raserec.kernels.allocator import keep_freed_memory
    from recbole_raserec.regeneration.pairs import pieces, training_sequences
    from recbole_raserec.regeneration.regenerator import Regenerator

    keep_freed_memory()
    train = prepare_data(config_of("SASRec", data_path)).train._dataset
    torch.manual_seed(0)
    model = Regenerator(train.store.n_items).eval()
    torch.nn.init.normal_(model.items.weight.data[1:], std=0.5)  # about as long as trained ones
    return model, pieces(training_sequences(train), model.longest)


def _sampled(sequences: Any) -> np.ndarray:
    return np.linspace(0, len(sequences) - 1, SAMPLE).astype(np.int64)


def together(data_path: str) -> dict[str, Any]:
    """Everything, for both gammas."""
    from recbole_raserec.regeneration.inference import generate

    model, sequences = _model_and_sequences(data_path)
    started = time.perf_counter()
    found = [generate(model, sequences, gamma) for gamma in GAMMAS]
    seconds = (time.perf_counter() - started) / len(GAMMAS)
    note = f"{len(sequences)} sequences x {model.conditions} conditions, mean of gamma 0 and 1"
    return {"seconds": seconds, "note": note, "patterns": [each[_sampled(sequences)].tolist() for each in found]}


def one_by_one(data_path: str) -> dict[str, Any]:
    """A sample: each sequence encoded alone, each condition decoded alone, the whole decoder again at every step."""
    import torch

    model, sequences = _model_and_sequences(data_path)
    rows = [sequences.padded(np.array([row])) for row in _sampled(sequences)]
    with torch.no_grad():
        started = time.perf_counter()
        for gamma in GAMMAS:
            for items in rows:
                _decode(model, items, gamma == 1)
        sample = (time.perf_counter() - started) / len(GAMMAS)
        exact = model.double()  # what is compared: see the module regeneration.inference
        patterns = [[_decode(exact, items, gamma == 1) for items in rows] for gamma in GAMMAS]
    note = f"{SAMPLE} of {len(sequences)} sequences, float32, scaled"
    return {"seconds": sample * len(sequences) / SAMPLE, "note": note, "patterns": patterns}


def _decode(model: Any, items: Any, restrictive: bool) -> list[list[int]]:
    """Greedy patterns of one sequence [1, S], one for each condition."""
    import torch

    source = model.encode(items)
    mask = (items > 0)[:, None, None]
    allowed = torch.zeros(model.n_items + 2, dtype=torch.bool)
    allowed[items[0] if restrictive else slice(1, model.n_items)] = True
    found = []
    for way in range(model.conditions):
        written: list[int] = []
        while len(written) < model.pattern_length:
            steps = torch.tensor([[model.start, *written]])
            x = model.pattern_norm(model.items(steps) + model.pattern_positions.weight[: steps.shape[1]])
            for layer in model.decoder_layers():
                x = layer(x, layer.source.keys_values(source.spaces[:, way]), mask)
            logits = x[0, -1] @ model.items.weight.t()
            open_ = allowed.clone()
            open_[written] = False
            open_[model.end] = len(written) >= 2 or not bool(open_.any())
            best = int(logits.masked_fill(~open_, -torch.inf).argmax())
            if best == model.end:
                break
            written.append(best)
        found.append(written + [0] * (model.pattern_length - len(written)))
    return found


def compared(ours: dict[str, Any], peer: dict[str, Any]) -> str:
    """The sample's patterns."""
    assert ours.pop("patterns") == peer.pop("patterns")
    return f"the same patterns for {SAMPLE} sequences, gamma 0 and 1"


CASES = {
    "decoding": Case(
        "amazon-beauty, greedy patterns of every sequence under every condition: in batches on kept keys and values "
        "against one by one without",
        together, one_by_one, compared,
    ),
}  # fmt: skip
