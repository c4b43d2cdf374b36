"""DARec on a small log with tiny language models: texts, what a state may know, the tasks, the pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra llm")

from conftest import random_log
from darec_helpers import small, tiny_llm, write_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_raserec.config.config import Config
from recbole_raserec.data.splits import prepare_data
from recbole_raserec.errors import ConfigError
from recbole_raserec.recommendation.backbone import wrap_backbone
from recbole_raserec.recommendation.darec.language_model import adapter_pairs
from recbole_raserec.recommendation.darec.model import DARec, hard_contrast, mine_hard_negatives
from recbole_raserec.recommendation.sasrec import SASRec
from recbole_raserec.retrieval.queries import encode_split
from recbole_raserec.training.trainer import ResumableTrainer


@pytest.fixture
def built(workdir):
    """(model, config, splits) on the small log; `drawn`: weights that start at zero are drawn, so that they count."""
    write_data(workdir, random_log(0))

    def build(family="bert", drawn=True, **options):
        config = Config("DARec", "tiny", config_dict=small(workdir, tiny_llm(workdir, family), **options), argv=[])
        splits = prepare_data(config)
        torch.manual_seed(1)
        model = DARec(config, splits.train._dataset)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if drawn and weight.requires_grad and "vectors" not in name:
                    weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
        return model, config, splits

    return build


VARIANTS = {
    "off": {},
    "tokens": {"history": "tokens"},
    "items": {"history": "items"},
    "dual": {"history": "tokens", "context_mask": "dual"},
    "dual items": {"history": "items", "context_mask": "dual"},
}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("variant", list(VARIANTS))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_state_knows_a_later_token(built, family, variant, data):
    """The user vector after an item stays when any later item, its target the first of them, becomes another."""
    key = (family, variant)
    cache = self_cache(built)
    if key not in cache:
        cache[key] = built(family, **VARIANTS[variant])[0].eval()
    model = cache[key]
    length = data.draw(st.integers(2, 8))
    items = st.lists(st.integers(1, model.n_items - 1), min_size=length, max_size=length)
    one, other = torch.tensor(data.draw(items)), torch.tensor(data.draw(items))
    cut = data.draw(st.integers(1, length - 1))
    other[:cut] = one[:cut]
    # another row that is longer: rows must not mix
    batch = torch.zeros(3, 8, dtype=torch.int64)
    batch[0, :length], batch[1, :length], batch[2] = one, other, torch.arange(1, 9)
    with torch.no_grad():
        h = model.encode_positions(batch)
        assert (h[0, :cut] - h[1, :cut]).abs().max() < 1e-4
        alone = model.forward(one[None, :cut], torch.tensor([cut]))
        assert (h[0, cut - 1] - alone[0]).abs().max() < 1e-4


def self_cache(built):
    """Models of this test run, one for each variant: hypothesis asks many times for the same."""
    if not hasattr(built, "models"):
        built.models = {}
    return built.models


@pytest.mark.parametrize("history", ["items", "tokens"])
def test_earlier_items_count_in_what_the_language_model_reads(built, history):
    model = built(history=history)[0].eval()
    with torch.no_grad():
        both = model.read_histories(torch.tensor([[3, 4, 5], [6, 4, 5]]), torch.tensor([3, 3]))
    assert (both[0, 2] - both[1, 2]).abs().max() > 1e-4


@pytest.mark.parametrize("history", ["items", "tokens"])
def test_batches_do_not_matter(built, history):
    model = built(history=history, token_budget=20)[0].eval()
    lengths = torch.tensor([8, 1, 4, 3, 7])
    rows = torch.randint(1, model.n_items, (5, 8), generator=torch.Generator().manual_seed(0))
    rows *= torch.arange(8) < lengths[:, None]
    with torch.no_grad():
        together = model.forward(rows, lengths)
        for row, length, h in zip(rows, lengths, together):
            assert (model.forward(row[None, :length], length[None])[0] - h).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_adapters_at_zero_read_what_the_encoder_read(built, family):
    """The item table is that of a SASRec with texts, and reading texts again does not change it."""
    model = built(family, drawn=False)[0].eval()
    numbers = torch.arange(1, model.n_items)[model.item_lengths[1:] > 0]
    assert 2 < len(numbers) < model.n_items - 1  # some items have no text
    with torch.no_grad():
        whole = model.item_embedding.text[numbers]
        assert (model.read_texts(numbers) - whole).abs().max() < 0.06 * whole.abs().max()  # read in bfloat16 before
    rest = {name for name, _ in model.named_parameters() if not name.startswith("language.")}
    sasrec = built(drawn=False)[1]
    sasrec["model"] = "SASRec"
    assert rest == {name for name, _ in SASRec(sasrec, model_data(built)).named_parameters()}


def model_data(built):
    """The training split of another run of the same."""
    return built(drawn=False)[2].train._dataset


def test_what_version_0_1_0_trained_is_refused(built):
    _, config, splits = built()
    config["item_vectors"] = None  # it had no such option
    with pytest.raises(ConfigError, match=r"of version 0\.1\.0.*train it again"):
        DARec(config, splits.train._dataset)


def test_texts_are_read_with_gradient_and_kept(built):
    model, _, splits = built(drawn=False, text_items=8, align_weight=0.5)
    batch = next(iter(splits.train))
    before = model.item_embedding.text.clone()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.calculate_loss(batch).backward()
        assert all(p.grad is None for p in model.language.frozen.parameters())
        assert any(p.grad is not None and p.grad.any() for p in model.language.adapters.parameters())
        optimizer.step()
    torch.manual_seed(0)
    numbers, texts = model.read_some(batch["item_id_list"][batch["item_id_list"] > 0])
    assert 4 <= len(numbers) <= 8
    changed = (model.item_embedding.text - before).abs().amax(dim=1) > 1e-3
    assert changed[numbers].all()
    assert not changed[model.item_lengths == 0].any()
    assert torch.equal(model.item_embedding.text[numbers], texts.detach())
    table, kept = model.eval().item_vectors(), model.item_embedding
    assert torch.allclose(table[numbers], (kept.vectors.weight + kept.text_map(kept.text))[numbers])


def test_the_gradient_of_a_text_is_that_of_the_item_table(built):
    """Against the table made of the texts themselves."""
    model = built(drawn=False)[0]
    numbers, weights = torch.tensor([2, 5]), torch.randn(model.n_items, model.hidden_size)
    texts = torch.randn(2, model.item_embedding.text.shape[1], requires_grad=True)
    model.item_embedding.precision = "float32"
    model.item_embedding.replace(numbers, texts)
    (model.item_vectors() * weights).sum().backward()
    wanted = weights[numbers] @ model.item_embedding.text_map.weight
    torch.testing.assert_close(texts.grad, wanted)
    (model.item_vectors() * weights).sum().backward()  # the next step's table knows nothing of them
    torch.testing.assert_close(texts.grad, wanted)


def test_adapters_have_a_learning_rate_of_their_own(built, tmp_path):
    model, config, _ = built(adapter_learning_rate=1e-5)
    trainer = ResumableTrainer(config, model, tmp_path, lambda *_: {}, "seen_kept")
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    adapters = {id(p) for p in model.language.adapters.parameters()}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert rates == {p: 1e-5 if p in adapters else 0.001 for p in trained}


@pytest.mark.parametrize("history", ["off", "items", "tokens"])
def test_the_loss_is_the_sum_of_its_tasks(built, history):
    model, _, splits = built(
        history=history, hidden_dropout_prob=0.0, attn_dropout_prob=0.0, hard_weight=1.0, softmax_precision="float32"
    )
    batch = next(iter(splits.train))
    losses = {}
    for weights in ((0.0, 0.0), (0.7, 0.0), (0.0, 0.7), (0.7, 0.7)):
        model.align_weight, model.hard_weight = weights
        torch.manual_seed(3)
        losses[weights] = model.calculate_loss(batch)
    align, hard = (losses[w] - losses[0.0, 0.0] for w in ((0.7, 0.0), (0.0, 0.7)))
    assert align > 0
    assert hard > 0
    assert torch.isclose(losses[0.7, 0.7], losses[0.0, 0.0] + align + hard, atol=1e-4)
    losses[0.7, 0.7].backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert all(p.grad is None for p in model.language.frozen.parameters())


@pytest.mark.parametrize("history", ["off", "items"])
def test_training_learns(built, history):
    model, _, splits = built(drawn=False, history=history, hidden_dropout_prob=0.0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        model.train()
        total = 0.0
        for batch in splits.train:
            loss = model.calculate_loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        losses.append(total)
    assert losses[-1] < 0.95 * losses[0]


def test_batches_stay_within_the_token_budget(built):
    for history in ("items", "tokens"):
        model, _, splits = built(history=history, token_budget=60)
        costs, seen = model.costs(), 0
        for batch in splits.train:
            inside = torch.arange(batch["item_id_list"].shape[1]) < batch["item_length"][:, None]
            tokens = int((costs[batch["item_id_list"]] * inside).sum())
            assert tokens <= 60 or len(inside) == 1
            seen += int((batch["packed_targets"] > 0).sum())
        assert seen == len(splits.train._dataset.inter_feat)
        assert len(splits.train) > 1


def test_hard_negatives_are_alike_and_never_together():
    vectors = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    histories = [[1, 2], [2, 3, 4], [5, 6]]
    items, offsets = np.concatenate(histories), np.cumsum([0, *map(len, histories)])
    found = mine_hard_negatives(vectors, items, offsets, 3)
    together = {frozenset((a, b)) for row in histories for a in row for b in row}
    unit = torch.nn.functional.normalize(vectors, dim=1)
    for item in range(1, 7):
        allowed = [j for j in range(1, 7) if j != item and frozenset((item, j)) not in together]
        expected = sorted(allowed, key=lambda j, item=item: -float(unit[item] @ unit[j]))[:3]
        assert [j for j in found[item].tolist() if j] == expected
    assert not found[0].any()
    h = torch.randn(3, 4)
    targets, table = torch.tensor([1, 2, 5]), vectors
    expected = []
    for row, target in zip(h, targets.tolist()):
        logits = torch.stack([row @ table[target], *(row @ table[j] for j in found[target].tolist() if j)]) / 0.5
        expected.append(-torch.log_softmax(logits, 0)[0])
    assert torch.isclose(hard_contrast(h, targets, table, found, 0.5), torch.stack(expected).mean(), atol=1e-5)
    assert hard_contrast(h, targets, table, torch.zeros(7, 2, dtype=torch.int64), 0.5) == 0


def test_adapter_sizes():
    assert adapter_pairs(3, 2) == [(3, 3), (3, 3)]
    assert adapter_pairs([0, [4, 2]], 2) == [(0, 0), (4, 2)]
    with pytest.raises(ConfigError, match="3 entries, but the language model has 2 layers"):
        adapter_pairs([1, 2, 3], 2)


@pytest.mark.parametrize("history", ["off", "items", "tokens"])
def test_it_is_a_backbone(built, history):
    model, config, splits = built(history=history)
    backbone = wrap_backbone(model, config, splits.dataset).eval()
    assert backbone.hidden_size == 16
    queries = encode_split(backbone, splits.train._dataset, "cpu")
    store = splits.train._dataset.store
    with torch.no_grad():
        short = np.flatnonzero(queries.positions <= 8)
        rows, lengths = store.windows(queries.users[short], queries.positions[short], 8)
        alone = backbone.encode(torch.from_numpy(rows), torch.from_numpy(lengths))
    assert (queries.h[short] - alone).abs().max() < 1e-4  # one pass for all prefixes gives the same
