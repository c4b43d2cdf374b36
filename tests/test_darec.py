"""DARec on a small log with tiny language models: what a state may know, the tasks, checkpoints, the pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra llm")

from conftest import random_log
from darec_helpers import SIZE, small, tiny_llm, write_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_raserec.config.config import Config
from recbole_raserec.data.splits import prepare_data
from recbole_raserec.errors import ConfigError
from recbole_raserec.recommendation.backbone import wrap_backbone
from recbole_raserec.recommendation.darec.language_model import adapter_pairs
from recbole_raserec.recommendation.darec.model import DARec, hard_contrast, mine_hard_negatives
from recbole_raserec.retrieval.queries import encode_split

QUICK_SASREC = {"hidden_size": 8, "inner_size": 8, "n_layers": 1}


@pytest.fixture
def built(workdir):
    """(model, config, splits) on the small log; weights that start at zero are drawn, so that they count."""
    write_data(workdir, random_log(0))

    def build(family="bert", **options):
        config = Config("DARec", "tiny", config_dict=small(workdir, tiny_llm(workdir, family), **options), argv=[])
        if options.get("collaborative"):
            config["collaborative_options"] = {
                **Config("SASRec", "tiny", config_dict={**QUICK_SASREC, "MAX_ITEM_LIST_LENGTH": 8}, argv=[]).explain(),
            }
        splits = prepare_data(config)
        model = DARec(config, splits.train._dataset)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.requires_grad and "item_embedding" not in name:
                    weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
        return model, config, splits

    return build


VARIANTS = {
    "tokens": {"history": "tokens"},
    "items": {"history": "items"},
    "bias": {"history": "tokens", "context_mask": "bias"},
    "dual": {"history": "tokens", "context_mask": "dual"},
    "injection": {"history": "tokens", "collaborative": "SASRec", "collaborative_layers": [0, 1]},
    "all": {"history": "items", "context_mask": "dual", "collaborative": "SASRec"},
}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("variant", list(VARIANTS))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_state_knows_a_later_token(built, family, variant, data):
    """The state at a [SEQ] stays when any later item, its target the first of them, becomes another."""
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
    counts = torch.tensor([length, length, 8])
    with torch.no_grad():
        h = model.encode_positions(batch, counts)
        assert (h[0, :cut] - h[1, :cut]).abs().max() < 1e-4
        alone = model.forward(one[None, :cut], torch.tensor([cut]))
        assert (h[0, cut - 1] - alone[0]).abs().max() < 1e-4


def self_cache(built):
    """Models of this test run, one for each variant: hypothesis asks many times for the same."""
    if not hasattr(built, "models"):
        built.models = {}
    return built.models


def test_earlier_items_count(built):
    for variant in VARIANTS.values():
        model = built(**variant)[0].eval()
        with torch.no_grad():
            first, second = model.forward(torch.tensor([[3, 4, 5], [6, 4, 5]]), torch.tensor([3, 3]))
        assert (first - second).abs().max() > 1e-4


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


def test_off_is_the_plain_model_bit_for_bit(built):
    """Without injection and masking nothing of them is there: same weights, same random draws, same scores."""
    with_ = built(collaborative="SASRec", context_mask="dual", history="tokens")[0]
    plain = built(history="tokens")[0]
    assert plain.collaborator is None
    assert plain.language.injection is None
    assert plain.language.bias is None
    assert not hasattr(plain, "mix")
    names = dict(plain.named_parameters())
    extra = [name for name, _ in with_.named_parameters() if name not in names]
    assert all(name.startswith(("collaborator", "language.injection", "mix")) for name in extra)
    again = built(history="tokens")[0]
    seq, length = torch.tensor([[3, 4, 5]]), torch.tensor([3])
    assert torch.equal(plain.eval().forward(seq, length), again.eval().forward(seq, length))


def test_masking_by_bias_starts_as_the_usual_view(built):
    off, bias = built(history="tokens")[0].eval(), built(history="tokens", context_mask="bias")[0].eval()
    with torch.no_grad():
        bias.load_state_dict(off.state_dict(), strict=False)
        bias.language.bias.zero_()
        rows = torch.tensor([[3, 4, 5, 6]])
        assert torch.allclose(off.encode_positions(rows), bias.encode_positions(rows), atol=1e-5)
        bias.language.bias.fill_(-50.0)  # other items out of sight: the second view of `dual`
        dual = built(history="tokens", context_mask="dual")[0].eval()
        dual.load_state_dict(off.state_dict(), strict=False)
        dual.mix.fill_(1.0)
        assert torch.allclose(dual.encode_positions(rows), bias.encode_positions(rows), atol=1e-4)


@pytest.mark.parametrize("history", ["items", "tokens"])
def test_the_loss_is_the_sum_of_its_tasks(built, history):
    model, _, splits = built(history=history, adapter_dropout=0.0, head_dropout=0.0)
    batch = next(iter(splits.train))
    losses = {}
    for weights in ((0.0, 0.0), (0.7, 0.0), (0.0, 0.7), (0.7, 0.7)):
        model.align_weight, model.hard_weight = weights
        torch.manual_seed(3)
        losses[weights] = model.calculate_loss(batch)
    align, hard = (losses[w] - losses[0.0, 0.0] for w in ((0.7, 0.0), (0.0, 0.7)))
    if history == "tokens":
        assert align > 0
        assert hard > 0
    assert torch.isclose(losses[0.7, 0.7], losses[0.0, 0.0] + align + hard, atol=1e-4)
    losses[0.7, 0.7].backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert missing in ([], ["item_input.weight", "item_input.bias"])  # which only `history: items` reads
    assert all(p.grad is None for p in model.language.frozen.parameters())


def test_a_head_of_texts_knows_items_by_their_texts_alone(built):
    model, config, splits = built(item_head="text")
    untold = model.item_lengths.new_tensor([n for n in range(1, model.n_items) if model.item_lengths[n] > 1])
    same = model.head_texts[untold[0]].clone()
    model.head_texts[untold[1]] = same  # as if two items had one text
    vectors = model.item_vectors()
    assert torch.equal(vectors[untold[0]], vectors[untold[1]])
    assert not any("item_embedding" in name for name, _ in model.named_parameters())
    model.calculate_loss(next(iter(splits.train))).backward()
    assert model.text_head.weight.grad.abs().sum() > 0
    wrapped = wrap_backbone(model, config, splits.train._dataset)
    assert wrapped.item_vectors().shape == (model.n_items, SIZE)


def test_rare_items_are_no_wrong_answers(built):
    model, _, splits = built(head_min_interactions=4, align_weight=0, hard_weight=0)
    split = splits.train._dataset
    users, positions, _ = split.windows()
    counts = np.bincount(split.store.until(users, positions)[0], minlength=model.n_items)
    among = np.flatnonzero(counts >= 4)
    assert 2 < len(among) < model.n_items - 1
    assert model.rank_among.tolist() == among.tolist()
    table, targets = model.item_vectors(), torch.arange(1, model.n_items)
    h = torch.randn(len(targets), SIZE)
    kept = torch.from_numpy(np.isin(targets.numpy(), among))
    place = torch.from_numpy(np.searchsorted(among, targets[kept].numpy()))
    wanted = torch.nn.functional.cross_entropy(h[kept] @ table[model.rank_among].t(), place)
    torch.testing.assert_close(model._link(h, table, targets), wanted, rtol=1e-3, atol=0)  # it may be in bfloat16
    model.eval().calculate_loss(next(iter(splits.train))).backward()
    rare = np.setdiff1d(np.arange(1, model.n_items), among)
    assert not model.item_embedding.weight.grad[rare].any()
    assert model.item_embedding.weight.grad[among].any(dim=1).all()
    with pytest.raises(ConfigError, match="head_min_interactions: 999"):
        built(head_min_interactions=999)


def test_training_learns(built):
    model, _, splits = built(text_items=24, hard_weight=0.0)
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


@pytest.mark.parametrize("history", ["items", "tokens"])
def test_it_is_a_backbone(built, history):
    model, config, splits = built(history=history)
    backbone = wrap_backbone(model, config, splits.dataset).eval()
    assert backbone.hidden_size == SIZE
    queries = encode_split(backbone, splits.train._dataset, "cpu")
    store = splits.train._dataset.store
    with torch.no_grad():
        short = np.flatnonzero(queries.positions <= 8)
        rows, lengths = store.windows(queries.users[short], queries.positions[short], 8)
        alone = backbone.encode(torch.from_numpy(rows), torch.from_numpy(lengths))
    assert (queries.h[short] - alone).abs().max() < 1e-4  # one pass for all prefixes gives the same
