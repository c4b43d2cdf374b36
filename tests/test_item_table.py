"""The item table: what it adds up to, when it is made again, and that every model takes it as its embedding."""

from __future__ import annotations

import copy

import pytest
import torch
from item_text_helpers import ATTRIBUTES, TEXT, write_items

from recbole_raserec.config import get_model
from recbole_raserec.data.dataset import item_counts
from recbole_raserec.data.splits import prepare_data
from recbole_raserec.recommendation import item_table
from recbole_raserec.recommendation.item_table import ItemTable
from recbole_raserec.recommendation.sasrec import SASRec

MODELS = ("SASRec", "DuoRec", "BSARec", "GRU4Rec", "NARM", "BERT4Rec", "FEARec")
SIZES = {name: {"hidden_size": 16, "inner_size": 16} for name in MODELS}
SIZES["GRU4Rec"] = SIZES["NARM"] = {"hidden_size": 16, "embedding_size": 16}


@pytest.fixture
def built(small_config, workdir):
    """(model, splits) of a name and options, on the small log with texts."""

    def build(name="SASRec", **options):
        config = small_config(name, **{**SIZES[name], **options})
        write_items(workdir)
        splits = prepare_data(config)
        torch.manual_seed(3)
        return get_model(name)(config, splits.train._dataset), splits

    return build


def batch_of(splits):
    return next(iter(splits.train))


def test_the_table_is_the_sum_of_its_parts(built):
    model, _ = built(**TEXT, **ATTRIBUTES, softmax_precision="float32")
    table = model.item_embedding
    wanted = table.vectors.weight + table.text @ table.text_map.weight.T
    for item, numbers in enumerate(table.numbers.tolist()):
        for number in numbers:
            if number:
                wanted[item] = wanted[item] + table.attributes.weight[number]
    assert torch.allclose(table.weight, wanted, atol=1e-6)
    assert table.numbers.shape[1] == 3  # Shop, Shop > kind, brand
    assert torch.equal(table.weight[0], table.vectors.weight[0])
    item_seq = torch.tensor([[3, 0], [1, 2]])
    assert torch.equal(table(item_seq), table.weight[item_seq])


def test_in_bfloat16_the_table_is_nearly_the_same(built, monkeypatch):
    tables, gradients = [], []
    for low in (False, True):
        monkeypatch.setattr(item_table, "computes_in_bfloat16", lambda *_, low=low: low)
        model, _ = built(**TEXT, **ATTRIBUTES)
        table = model.train().item_embedding
        tables.append(table.weight)
        tables[-1].square().sum().backward()
        gradients.append([weight.grad for weight in table.parameters()])
    assert not torch.equal(*tables)
    assert torch.allclose(*tables, atol=1e-3)
    for one, two in zip(*gradients):
        assert torch.allclose(one, two, rtol=0.02, atol=0.02 * float(one.abs().max()))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert torch.allclose(model.eval().item_embedding.weight, tables[0], atol=1e-6)


def test_by_text_alone_items_have_no_vectors(built):
    model, _ = built(**{**TEXT, "item_vectors": "text"}, softmax_precision="float32")
    table = model.item_embedding
    assert table.vectors.weight.shape == (1, 16)
    assert torch.allclose(table.weight[1:], (table.text @ table.text_map.weight.T)[1:])
    mask, _ = built("BERT4Rec", **{**TEXT, "item_vectors": "text"})
    assert len(mask.item_embedding.weight) == mask.n_items + 1
    assert torch.equal(mask.item_embedding.weight[-1], mask.item_embedding.vectors.weight[-1])


@pytest.mark.parametrize("name", MODELS)
def test_with_a_map_of_zeros_a_model_is_what_it_is_without(built, name):
    plain, splits = built(name, native_kernels=False)
    model, _ = built(name, native_kernels=False, **TEXT, **ATTRIBUTES)
    assert type(plain.item_embedding) is torch.nn.Embedding
    weights = {key.replace("item_embedding.", "item_embedding.vectors."): w for key, w in plain.state_dict().items()}
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for part in (model.item_embedding.text_map, model.item_embedding.attributes):
            part.weight.zero_()
    batch = batch_of(splits)
    losses = []
    for each in (plain, model):
        torch.manual_seed(5)
        losses.append(each.calculate_loss(batch))
        losses[-1].backward()
    assert losses[0] == losses[1]
    assert torch.equal(plain.item_embedding.weight.grad, model.item_embedding.vectors.weight.grad)
    assert model.item_embedding.text_map.weight.grad.abs().sum() > 0
    for each in (plain, model):
        each.eval()
    test = next(iter(splits.test))[0]
    assert torch.equal(plain.full_sort_predict(test), model.full_sort_predict(test))


@pytest.mark.parametrize("kind", ["text", "both"])
def test_gradients_are_those_of_a_table_written_out(built, kind):
    model, splits = built(native_kernels=False, softmax_precision="float32", **{**TEXT, "item_vectors": kind})
    batch = batch_of(splits)
    model.eval()
    model.calculate_loss(batch).backward()
    table = model.item_embedding
    found = {name: weight.grad for name, weight in table.named_parameters()}
    leaf = torch.nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False, padding_idx=0)
    model.item_embedding = leaf
    model.calculate_loss(batch).backward()
    gradient = leaf.weight.grad
    assert torch.allclose(found["text_map.weight"], gradient.T @ table.text, atol=1e-6)
    own = gradient if kind == "both" else gradient[:1]
    assert torch.allclose(found["vectors.weight"], own, atol=1e-6)


@pytest.mark.parametrize("name", ["SASRec", "BSARec", "GRU4Rec", "NARM"])
def test_packed_and_prefix_have_one_loss(built, name):
    losses = []
    for training in ("prefix", "packed"):
        options = {"train_batch_size": 10_000, "MAX_ITEM_LIST_LENGTH": 20, "softmax_precision": "float32"}
        model, splits = built(name, training=training, **options, **TEXT)
        model.eval()
        losses.append(float(model.calculate_loss(batch_of(splits)).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_compiled_encoder_gives_what_the_layers_give(built):
    still = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "hidden_size": 64, "inner_size": 64}
    compiled, splits = built("SASRec", **TEXT, **still, softmax_precision="float32")
    if not compiled.compiled():
        pytest.skip("the compiled kernels are not there")
    plain = copy.deepcopy(compiled)
    plain._compiled = False
    batch = batch_of(splits)
    for each in (plain, compiled):
        each.calculate_loss(batch).backward()
    for (name, one), (_, two) in zip(plain.named_parameters(), compiled.named_parameters()):
        assert torch.allclose(one.grad, two.grad, atol=1e-5), name


def test_one_table_serves_a_step_and_the_next_has_its_own(built):
    model, splits = built(**TEXT)
    table, made, batch = model.item_embedding, [], batch_of(splits)
    original = ItemTable._table
    table._table = lambda: made.append(1) or original(table)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for step in range(3):
        optimizer.zero_grad()
        model.calculate_loss(batch).backward()
        assert len(made) == step + 1
        optimizer.step()
    model.eval()
    with torch.no_grad():
        first = table.weight
        assert table.weight is first
        assert len(made) == 4
        table.text_map.weight.add_(1)
        assert not torch.equal(table.weight, first)
    model.calculate_loss(batch).backward()  # two passes without a step between them
    model.calculate_loss(batch).backward()


def test_weights_that_change_places_are_seen(built):
    model, _ = built(**TEXT)
    table = model.item_embedding
    with torch.no_grad():
        first = table.weight
        other = table.vectors.weight + 1
        table.vectors.weight.data, other = other, table.vectors.weight.data  # as the average of weights does
        assert torch.allclose(table.weight, first + 1)
        table.vectors.weight.data = other
        assert torch.equal(table.weight, first)


def test_own_vectors_are_left_out_at_random_in_training_alone(built):
    model, _ = built(**TEXT, item_id_dropout=0.5, softmax_precision="float32")
    table = model.item_embedding
    by_text = table.text @ table.text_map.weight.T
    dropped = torch.isclose(table.weight, by_text).all(dim=1)[1:]
    assert 0 < dropped.sum() < len(dropped)
    model.eval()
    assert torch.allclose(table.weight, by_text + table.vectors.weight)


def test_rare_items_have_no_vectors_of_their_own(built):
    model, splits = built(**TEXT, item_id_min_interactions=8, softmax_precision="float32")
    table, counts = model.item_embedding, item_counts(splits.train._dataset)
    rare = torch.from_numpy(counts < 8)
    rare[0] = False
    assert 0 < rare.sum() < len(rare) - 1
    by_text = table.text @ table.text_map.weight.T
    assert torch.allclose(table.weight[rare], by_text[rare])
    assert torch.allclose(table.weight[~rare], (by_text + table.vectors.weight)[~rare])
    model.calculate_loss(batch_of(splits)).backward()
    assert not table.vectors.weight.grad[rare].any()
    log = [item for row in splits.train._dataset for item in [int(row["item_id"])]]
    assert counts.sum() == len(log) + splits.train._dataset.user_num - 1  # and each history's first


def test_items_are_added_behind_the_others(built):
    for name in ("SASRec", "BERT4Rec"):
        model, splits = built(name, **TEXT, **ATTRIBUTES)
        table = model.eval().item_embedding
        scores = model.full_sort_predict(next(iter(splits.test))[0])
        mask = table.weight[-1] if name == "BERT4Rec" else None
        model.add_items(table.text[2:4], table.numbers[2:4])
        more = model.full_sort_predict(next(iter(splits.test))[0])
        assert torch.allclose(more[:, :-2], scores, atol=1e-6)
        items = model.item_vectors()
        assert torch.allclose(items[-2:], items[2:4] - table.vectors.weight[2:4], atol=1e-6)
        if mask is not None:
            assert torch.equal(table.weight[-1], mask)


def test_a_copy_works_on_its_own(built):
    model, splits = built(**TEXT)
    model.calculate_loss(batch_of(splits))  # a table with a graph is held
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.item_embedding.text_map.weight.zero_()
    assert not torch.equal(other.item_vectors(), model.item_vectors())
    assert isinstance(other, SASRec)
