"""Many rows encoded in batches of like length: every row once, like lengths together, modes as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_raserec.recommendation import batches_by_length, encode_in_batches


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=80), st.integers(1, 20), st.integers(1, 200))
def test_every_row_once_by_length(lengths, rows, tokens):
    lengths = np.array(lengths, dtype=np.int64)
    batches = batches_by_length(lengths, rows, tokens)
    order = np.concatenate([np.zeros(0, np.int64), *batches])
    assert order.tolist() == np.argsort(lengths, kind="stable").tolist()
    for batch in batches:
        assert 1 <= len(batch) <= rows
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= tokens


def test_rows_of_one_length_stay_in_order():
    assert [batch.tolist() for batch in batches_by_length(np.zeros(5, int), 2)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("size", [0, 7])
def test_evaluation_mode_and_no_gradients_meanwhile(size):
    model = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Dropout(0.5), torch.nn.Dropout(0.5)).train()
    model[2].eval()
    seen = []

    def encode(rows):
        seen.extend(part.training for part in model.modules())
        return model(torch.from_numpy(rows)[:, None].float())

    lengths = np.arange(size)[::-1] % 3
    out = encode_in_batches(model, encode, batches_by_length(lengths, 2), torch.empty(size, 3))
    assert not out.requires_grad
    assert not any(seen)
    assert [part.training for part in model.modules()] == [True, True, True, False]
    torch.testing.assert_close(out, model[0](torch.arange(size)[:, None].float()))
