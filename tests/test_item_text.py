"""Items as text: flattened attributes, the id where there is none, tokens cut and counted."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from recbole_raserec.data.item_text import item_tokens, read_item_texts
from recbole_raserec.errors import ConfigError

TABLE = """\
item_id:token\tmovie_title:token_seq\tprice:float\tclass:token_seq
x\tToy Story\t3\tAnimation Comedy
y\t\t1\t
z\tHeat
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "d.item"
    file.write_text(TABLE, encoding="utf-8")
    return file


def test_all_columns_of_text_are_read_by_default(path):
    found = read_item_texts(path, ["[PAD]", "y", "x", "z", "q"])
    assert found == ["", "y", "movie title: Toy Story, class: Animation Comedy", "movie title: Heat", "q"]


def test_columns_are_chosen_and_ordered(path):
    assert read_item_texts(path, ["[PAD]", "x"], ["price", "movie_title"])[1] == "price: 3, movie title: Toy Story"
    assert read_item_texts(path, ["[PAD]", "x"], []) == ["", "x"]
    with pytest.raises(ConfigError, match=r"item_text_fields.*no column colour.*movie_title"):
        read_item_texts(path, ["[PAD]", "x"], ["colour"])


def test_without_a_file_ids_are_read(tmp_path):
    found = read_item_texts(tmp_path / "none.item", ["[PAD]", "x", "y"])
    assert found == ["", "x", "y"]


def test_tokens_are_cut_and_counted(tmp_path, caplog):
    (tmp_path / "d.item").write_text("item_id:token\tname:token\nx\ta b c\ny\t\n", encoding="utf-8")
    rows = {"": [], "name: a b c": [5, 6, 7], "y": [5]}
    config = {
        "data_path": str(tmp_path), "dataset": "d", "item_text_fields": None, "field_separator": None,
        "item_text_length": 2,
    }  # fmt: skip
    dataset = SimpleNamespace(iid_field="item_id", field2id_token={"item_id": ["[PAD]", "x", "y"]})
    asked = []

    def tokenizer(texts, add_special_tokens):
        asked.append(texts)
        assert not add_special_tokens
        return {"input_ids": [rows[text] for text in texts]}

    with caplog.at_level("INFO"):
        ids, lengths = item_tokens(config, dataset, tokenizer)
    assert np.array_equal(ids, [[0, 0], [5, 6], [5, 0]])
    assert lengths.tolist() == [1, 2, 1]
    assert "2 items, 1 without a text" in caplog.text
    assert "1 cut at 2" in caplog.text
    assert item_tokens(config, dataset, tokenizer)[0] is ids  # kept with the data set
    assert len(asked) == 1
