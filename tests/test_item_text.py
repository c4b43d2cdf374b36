"""Items as text: the values of columns, tokens cut to a length."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from recbole_raserec.data.item_text import item_texts, item_tokens
from recbole_raserec.errors import ConfigError

TABLE = """\
item_id:token\tmovie_title:token_seq\tprice:float\tclass:token_seq
x\tToy Story\t3\tAnimation Comedy
y\t\t1\tUnknown
z\tHeat
"""
DATASET = {"iid_field": "item_id", "field2id_token": {"item_id": ["[PAD]", "y", "x", "z", "q"]}}


@pytest.fixture
def options(tmp_path):
    (tmp_path / "d.item").write_text(TABLE, encoding="utf-8")
    return {
        "data_path": str(tmp_path), "dataset": "d", "item_text": "auto", "field_separator": None, "model": "SASRec",
        "item_text_length": 2, "item_vectors": "both",
    }  # fmt: skip


def test_columns_are_chosen_and_ordered(options):
    dataset = SimpleNamespace(**DATASET)
    all_ = ["movie_title", "class"]
    assert item_texts(options, dataset) == (all_, ["", "", "Toy Story. Animation Comedy", "Heat", ""])
    options["item_text"] = ["price", "movie_title"]
    assert item_texts(options, dataset)[1][1:3] == ["1", "3. Toy Story"]
    options["item_text"] = None
    assert item_texts(options, dataset) == ([], [""] * 5)
    options["item_text"] = ["colour"]
    with pytest.raises(ConfigError, match=r"item_text.*no column colour.*movie_title"):
        item_texts(options, dataset)
    options["dataset"] = "other"
    with pytest.raises(ConfigError, match=r"other.item, which is not there; bring the file .* item_vectors: id"):
        item_texts(options, dataset)


def test_tokens_are_cut(options):
    dataset, asked = SimpleNamespace(**DATASET), []

    def tokenizer(texts, truncation, max_length):
        asked.append(texts)
        assert truncation
        return {"input_ids": [[1, *(len(word) for word in text.split())][:max_length] for text in texts]}

    ids, lengths = item_tokens(options, dataset, tokenizer)
    assert np.array_equal(ids, [[0, 0], [0, 0], [1, 3], [1, 4], [0, 0]])  # nothing of items without a text
    assert lengths.tolist() == [0, 0, 2, 2, 0]
    assert item_tokens(options, dataset, tokenizer)[0] is ids  # kept with the data set
    assert len(asked) == 1
