"""Texts of items as vectors: what is read, how it is whitened and kept, whole runs with it, and items added later."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from item_text_helpers import ATTRIBUTES, ITEMS, TEXT, row, write_data, write_items
from live_helpers import load
from pipeline_helpers import run

from recbole_raserec.data import item_text
from recbole_raserec.data.item_text import ItemFeatures, flatten, item_features, whitening
from recbole_raserec.errors import CheckpointError, ConfigError, InputError, MissingExtraError
from recbole_raserec.serving import write_programs

QUICK = {
    "training": "packed", "hidden_size": 16, "inner_size": 16, "epochs": 1, "MAX_ITEM_LIST_LENGTH": 8, "top_k": 4,
    "train_batch_size": 64, "backbone": "SASRec", "ram_inner_size": 16, "ram_epochs": 1,
}  # fmt: skip


@pytest.fixture
def made(workdir, monkeypatch):
    """The features of the small data set, and how often texts were read for them."""
    write_items(workdir)
    read = []
    original = item_text._make
    monkeypatch.setattr(item_text, "_make", lambda *args: read.append(1) or original(*args))

    def build(**options):
        config = {
            "data_path": str(workdir / "tiny"), "dataset": "tiny", "field_separator": "\t", "item_text": "auto",
            "item_attributes": None, "checkpoint_dir": str(workdir / "saved"), "show_progress": False, "device": "cpu",
            **TEXT, **options,
        }  # fmt: skip
        names = ["[PAD]", *(f"i{item}" for item in range(ITEMS)), "no row"]
        dataset = SimpleNamespace(iid_field="item_id", field2id_token={"item_id": names})
        return item_features(config, dataset)

    build.read = read
    return build


def test_values_that_say_nothing_are_left_out():
    assert flatten(["Lamp", "Unknown", " ", "red"]) == "Lamp. red"
    assert flatten(["n/a", ""]) == ""


def test_vectors_are_whitened_and_items_without_text_have_none(made, caplog):
    with caplog.at_level("INFO"):
        found = made()
    assert found.text.shape == (ITEMS + 2, 12)
    given = np.abs(found.text).sum(axis=1) > 0
    assert np.flatnonzero(~given).tolist() == [0, 1, ITEMS + 1]
    inside = found.text[given]
    some = inside.std(axis=0) > 0
    np.testing.assert_allclose(inside.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.cov(inside[:, some], rowvar=False), np.eye(some.sum()), atol=1e-4)
    assert f"{ITEMS + 1} items, 2 without a text, of title, categories, brand; TF-IDF" in caplog.text


def test_whitening_of_vectors_of_low_rank():
    rng = np.random.default_rng(0)
    raw = (rng.normal(size=(50, 2)) @ rng.normal(size=(2, 5)) + 3).astype(np.float32)
    mean, projection = whitening(raw)
    white = (raw - mean) @ projection
    np.testing.assert_allclose(np.cov(white[:, :2], rowvar=False), np.eye(2), atol=1e-4)
    assert not projection[:, 2:].any()


def test_texts_are_read_once_and_again_when_they_change(made, workdir):
    first = made()
    assert len(made.read) == 1
    np.testing.assert_array_equal(made().text, first.text)
    assert made(item_text_size=40).text.shape[1] == 40  # cut from what is kept
    assert len(made.read) == 1
    assert made(item_text=["title"]).mark != first.mark
    write_items(workdir, items=20)
    assert made().mark != first.mark
    assert len(made.read) == 3
    folder = next((workdir / "saved").glob("item_text-tiny-*"))
    kept = next(folder.glob("text-*.npy"))
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="SHA-256"):
        ItemFeatures.load(folder)


def test_attributes_are_values_and_the_starts_of_paths(made):
    found = made(**ATTRIBUTES, item_text=None)
    assert found.text.shape[1] == 12
    assert not found.text.any()
    assert found.values[:3] == ["brand=b0", "brand=b1", "brand=b2"]
    names = [[found.values[number - 1] for number in numbers if number] for numbers in found.numbers]
    assert names[2] == ["categories=Shop", "categories=Shop > blue train", "brand=b1"]
    assert names[0] == names[1] == []
    more = found.of([{"categories": "Shop > new", "brand": "b2"}])
    assert [found.values[number - 1] for number in more.numbers[0] if number] == ["categories=Shop", "brand=b2"]


def test_others_are_described_alike(made):
    found = made(**ATTRIBUTES)
    again = found.of([row(3), row(0)])
    np.testing.assert_allclose(again.text, found.text[[4, 1]], atol=1e-5)
    np.testing.assert_array_equal(again.numbers, found.numbers[[4, 1]])


def test_what_cannot_be_read_is_one_error(made, workdir, monkeypatch):
    with pytest.raises(ConfigError, match=r"item_text: .*has no column colour.*title"):
        made(item_text=["colour"])
    monkeypatch.setattr(item_text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="transformers"):
        made(item_text_encoder="somewhere")
    assert made(item_text_encoder=None).encoder == "tfidf"  # where there is no language model
    (workdir / "tiny" / "tiny.item").unlink()
    with pytest.raises(ConfigError, match=r"item_vectors: both reads .*tiny.item, which is not there"):
        made()


def test_a_language_model_reads_texts(made):
    pytest.importorskip("transformers")
    if item_text.importlib.util.find_spec(item_text.DEFAULT_PACKAGE) is None:
        pytest.skip("the extra llm is not installed")
    found = made(item_text_encoder=None, item_text_size=4)
    assert found.encoder == ""
    text = found.text[2:-1] / np.linalg.norm(found.text[2:-1], axis=1, keepdims=True)
    cosine = text @ text.T  # items 1 and 6 are trains, 2 a chair
    assert cosine[0, 5] > cosine[0, 1] + 0.2
    again = found.of([row(3)])
    np.testing.assert_allclose(again.text, found.text[[4]], atol=0.1)  # rounding in bfloat16 depends on the batch


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """RaSeRec over a SASRec with texts and attributes."""
    folder = tmp_path_factory.mktemp("text")
    write_data(folder)
    return folder, run(folder, dataset="tiny", data_path=str(folder), **QUICK, **TEXT, **ATTRIBUTES)


@pytest.fixture
def checkpoint(finished, tmp_path):
    """A copy of its checkpoint, without the data set."""
    return shutil.copytree(finished[1].ours.directory, tmp_path / "checkpoint")


def test_a_checkpoint_needs_no_data_set(finished, checkpoint):
    recommender, model = load(checkpoint), finished[1].ours.model
    assert torch.equal(recommender.model.item_vectors(), model.item_vectors())
    assert recommender.model.backbone.model.item_embedding.text.any()


def test_a_run_is_found_again_and_another_text_is_another_run(finished):
    folder, first = finished
    again = run(folder, dataset="tiny", data_path=str(folder), **QUICK, **TEXT, **ATTRIBUTES)
    assert again.trained == []
    assert again.ours.directory == first.ours.directory
    other = run(folder, dataset="tiny", data_path=str(folder), **QUICK, **TEXT)
    assert {name for name, _ in other.trained} == {"SASRec", "RaSeRec"}


def test_added_items_are_recommended_explained_and_kept(checkpoint):
    recommender = load(checkpoint)
    history = [recommender.items[1], recommender.items[5]]
    before = recommender.score([history])
    like = row(7)
    table = pd.DataFrame([{**like, "item_id": "new"}, {**row(8), "item_id": 77, "brand": None}])
    assert recommender.add_items(table) == 2
    after = recommender.score([history])
    np.testing.assert_allclose(after[:, :-2], before, atol=1e-5)
    assert recommender.titles[-2:] == [like["title"], row(8)["title"]]
    best = recommender.recommend([history], k=5, candidates=["new", "77"])
    assert sorted(best[0]) == ["77", "new"]
    assert len(recommender.explain(history, k=ITEMS).items) > ITEMS - 2
    assert recommender.similar_items(["new"], k=3)[0]
    done = recommender.update([("somebody", "i3"), ("somebody", "new"), ("somebody", "i4")])
    assert (done.events, done.dropped, done.memories) == (3, 0, 2)
    wanted = recommender.score([["new", "i3"]])
    recommender.save()
    again = load(checkpoint)
    assert again.items == recommender.items
    np.testing.assert_allclose(again.score([["new", "i3"]]), wanted, atol=1e-5)
    assert again.stored(["somebody"])[0].tolist() == recommender.stored(["somebody"])[0].tolist()
    assert again.add_items([{**row(9), "item_id": "newer"}]) == 1


def test_added_items_are_in_what_is_exported(checkpoint, tmp_path):
    recommender = load(checkpoint)
    recommender.add_items([{**row(7), "item_id": "new"}])
    lines = write_programs(recommender, tmp_path / "out", ["torch_export"])  # scores are compared
    assert any("backbone.pt2" in line for line in lines)


def test_added_items_survive_a_crash(checkpoint):
    recommender = load(checkpoint, journal=True)
    recommender.add_items([{**row(7), "item_id": "new"}])
    recommender.update([("somebody", "i3"), ("somebody", "new")])
    wanted = recommender.score([["new"]])
    recommender.close()
    again = load(checkpoint, journal=True)
    np.testing.assert_allclose(again.score([["new"]]), wanted, atol=1e-6)
    assert again.stored(["somebody"])[0].tolist() == [again._number["i3"], again._number["new"]]
    again.close()


def test_wrong_items_are_one_error_and_change_nothing(checkpoint):
    recommender = load(checkpoint)
    with pytest.raises(InputError, match=r"there is no title and no brand .*item_id, title, categories, brand"):
        recommender.add_items(pd.DataFrame({"item_id": ["new"], "categories": ["Shop"]}))
    with pytest.raises(InputError, match="'i3' is known"):
        recommender.add_items([{**row(3)}])
    with pytest.raises(InputError, match="'new' is known"):
        recommender.add_items([{**row(3), "item_id": "new"}] * 2)
    for nothing in ("new", 3, [("new", "title")]):
        with pytest.raises(InputError, match="items: "):
            recommender.add_items(nothing)
    assert len(recommender.items) == len(load(checkpoint).items)


def test_a_model_without_texts_takes_no_items(directory):
    with pytest.raises(InputError, match="item_vectors: both"):
        load(directory).add_items([{"item_id": "new"}])


@pytest.mark.parametrize("name", ["GRU4Rec", "BERT4Rec"])
def test_other_models_take_items_too(tmp_path, name):
    write_data(tmp_path)
    sizes = {"embedding_size": 16} if name == "GRU4Rec" else {"inner_size": 16}
    options = {"hidden_size": 16, "epochs": 1, "MAX_ITEM_LIST_LENGTH": 8, **sizes, **TEXT, "item_vectors": "text"}
    found = run(tmp_path, name, "tiny", data_path=str(tmp_path), **options)
    recommender = load(found.base.directory)
    before = recommender.score([["i3", "i4"]])
    recommender.add_items([{**row(7), "item_id": "new"}])
    after = recommender.score([["i3", "i4"]])
    np.testing.assert_allclose(after[:, :-1], before, atol=1e-5)
    column = recommender._number["i7"] - 1
    if name == "GRU4Rec":  # the bias of BERT4Rec's items is their own
        np.testing.assert_allclose(after[:, -1], before[:, column], atol=1e-4)
    recommender.save()
    np.testing.assert_allclose(load(found.base.directory).score([["i3", "i4"]]), after, atol=1e-5)


def test_rows_are_regenerated_and_weighed_for_a_model_with_texts(tmp_path):
    write_data(tmp_path)
    options = {
        "regeneration": "personalised",
        "regen_personal_epochs": 1,
        "regen_epochs": 1,
        "regen_layers": 1,
        "regen_inner_size": 16,
        **QUICK,
        **TEXT,
        "item_id_dropout": 0.2,
    }
    options = {name: value for name, value in options.items() if not name.startswith(("ram_", "backbone", "top_k"))}
    found = run(tmp_path, "SASRec", "tiny", data_path=str(tmp_path), **options)
    assert [name for name, _ in found.trained] == ["SASRec", "SASRec"]
