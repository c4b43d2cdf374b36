"""What becomes a memory: patterns with the users they lean on, thinned pairs, and no later item of anybody's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_raserec import splits
from tiny_models import LENGTH, N_ITEMS, Ids, build, options

from recbole_raserec.data.patterns import mine_patterns
from recbole_raserec.errors import ConfigError
from recbole_raserec.recommendation.backbone import wrap_backbone
from recbole_raserec.recommendation.sasrec import SASRec
from recbole_raserec.retrieval.memory import MemoryBank
from recbole_raserec.retrieval.queries import PairBuilder, PatternBuilder, encode_split, thinned
from recbole_raserec.retrieval.raserec import RaSeRec
from recbole_raserec.retrieval.stage import RetrievalHooks

SPAN, SUPPORT = 3, 2


def histories(seed, n_users=7, longest=9, n_items=6):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, n_items, rng.integers(3, longest + 1)).tolist() for _ in range(n_users)]


def first_end(sequence, pattern, span):
    """Place at which the pattern is first complete, by trying; None if it does not occur."""
    ends = []

    def grow(at, start, depth):
        if depth == len(pattern):
            ends.append(at)
            return
        for nxt in range(at + 1, min(start + span, len(sequence))):
            if sequence[nxt] == pattern[depth]:
                grow(nxt, start, depth + 1)

    for start, item in enumerate(sequence):
        if item == pattern[0]:
            grow(start, start, 1)
    return min(ends) if ends else None


def built(logs, **changes):
    config = options(memory="patterns", memory_span=SPAN, **changes)
    torch.manual_seed(0)
    model = RaSeRec(config, Ids(), wrap_backbone(build(SASRec), config, Ids()))
    parts = splits(logs)
    return model, RetrievalHooks(model, parts[0], parts[1], config), parts


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 3), st.sampled_from([0, 1024]))
def test_occurrences_are_first_completions(seed, span, support, memory_mb):
    logs = histories(seed)
    items, offsets = np.concatenate(logs), np.cumsum([0, *map(len, logs)])
    mined = mine_patterns(items, offsets, span, support, memory_mb=memory_mb, occurrences=True)
    plain = mine_patterns(items, offsets, span, support)
    assert mined.as_dict() == plain.as_dict()
    assert plain.occurrences is None
    found = list(zip(*(column.tolist() for column in mined.occurrences)))
    wanted = []
    for number in range(len(mined)):
        ends = [(s, first_end(log, mined[number], span)) for s, log in enumerate(logs)]
        wanted += [(number, s, end) for s, end in ends if end is not None]
    assert found == wanted
    assert (np.bincount(mined.occurrences[0], minlength=len(mined)) == mined.support).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_patterns_come_from_the_training_split_alone(seed):
    logs = histories(seed)
    train = splits(logs)[0]
    builder = PatternBuilder(train, SPAN, SUPPORT)
    cut = [log[:-2] if len(log) > 3 else [] for log in logs]  # validation and test items, and too short histories
    cut = [log if len(log) > 1 else [] for log in cut]
    wanted = mine_patterns(np.concatenate([*cut, []]).astype(int), np.cumsum([0, *map(len, cut)]), SPAN, SUPPORT)
    assert builder.patterns.as_dict() == wanted.as_dict()
    for number in range(len(builder.patterns)):
        *prefix, target = builder.patterns[number]
        assert builder.rows.targets[number] == target
        assert builder.rows.positions[number] == len(prefix)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_a_pattern_found_is_frequent_without_the_querys_later_items(seed):
    """Whatever a training query finds would have been mined from a log in which its user's history ends before it."""
    logs = histories(seed, n_users=6)
    try:
        model, hooks, _parts = built(logs, top_k=50)
    except ConfigError:  # no pattern at all
        return
    hooks.before_epoch(0)
    queries = model.known["train"]
    cut = [log[:-2] if len(log) > 3 else [] for log in logs]
    patterns = hooks._builders[0].patterns
    for row in range(len(queries)):
        user, position = int(queries.users[row]), int(queries.positions[row])
        own = [log[:position] if u == user else log for u, log in enumerate(cut, 1)]
        mined = mine_patterns(np.concatenate([*own, []]).astype(int), np.cumsum([0, *map(len, own)]), SPAN, SUPPORT)
        open_ = set(mined.as_dict())
        found = {patterns[i] for i in queries.ids[row][queries.mask[row]].tolist()}
        assert found <= open_
        assert len(found) == min(50, len(open_))  # and nothing is barred that need not be


def test_keys_are_the_encodings_of_the_prefixes():
    model, hooks, _ = built(histories(5, n_users=8))
    patterns = hooks._builders[0].patterns
    assert len(model.memory) == len(patterns) > 2
    for number in range(len(patterns)):
        prefix = torch.tensor([patterns[number][:-1]])
        with torch.no_grad():
            h = model.backbone.eval().encode(prefix, torch.tensor([prefix.shape[1]]))[0]
        np.testing.assert_allclose(model.memory.keys[number], h.numpy(), atol=1e-5)
    np.testing.assert_array_equal(model.memory.support, patterns.support)


def test_times_are_those_at_which_patterns_became_frequent():
    logs = [[1, 2, 3, 5, 5], [4, 1, 2, 5, 5], [1, 4, 2, 5, 5], [3, 3, 3, 3, 3]]
    train = splits(logs)[0]
    train.store.times = np.arange(len(train.store.items), dtype=float)
    builder = PatternBuilder(train, SPAN, 2)
    number = [builder.patterns[i] for i in range(len(builder.patterns))].index((1, 2))
    assert builder.patterns.support[number] == 3
    assert builder.rows.times[number] == 7.0  # the second user's 2 is interaction 7 of the log


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([0.3, 0.9, 1.0]))
def test_thinning_keeps_one_of_each_near_group(seed, size, cosine):
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((6, 4))[rng.integers(0, 6, size)]
    targets = rng.integers(0, 3, size)
    kept = thinned(keys, targets, cosine)
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    near = (unit @ unit.T >= cosine - 1e-6) & (targets[:, None] == targets)
    inside = np.zeros(size, dtype=bool)
    inside[kept] = True
    assert not np.triu(near[np.ix_(kept, kept)], 1).any()
    for row in np.flatnonzero(~inside):
        assert near[row, kept[kept < row]].any()  # its stand-in


def test_length_bounds_and_thinning_of_pairs():
    parts = splits(histories(3, longest=9))
    backbone = wrap_backbone(build(SASRec), options(), Ids())
    queries = encode_split(backbone, parts[0], "cpu")
    builder = PairBuilder(queries, 2, 3)
    assert set(builder.rows.positions) == {2, 3}
    assert len(PairBuilder(queries, thin=0.05).rows.targets) < len(queries)
    assert len(PairBuilder(queries).rows.targets) == len(queries)
    assert builder.keys(None, queries).shape == (len(builder.rows.targets), 8)


@pytest.mark.parametrize("memory", ["pairs", "patterns", "both"])
@pytest.mark.parametrize("freeze", [True, False])
def test_every_memory_trains_and_counts_frequency(memory, freeze):
    config = options(memory=memory, memory_span=SPAN, freeze_backbone=freeze, memory_frequency_weight=1.0)
    torch.manual_seed(0)
    model = RaSeRec(config, Ids(), wrap_backbone(build(SASRec), config, Ids()))
    train, valid, test = splits(histories(1, n_users=8))
    hooks = RetrievalHooks(model, train, valid, config)
    users = model.memory.users
    assert (users < 0).any() == (memory != "pairs")
    assert (users >= 0).any() == (memory != "patterns")
    hooks.before_epoch(0)
    model.train()
    hooks.before_epoch(1)
    queries = model.known["train"]
    h = queries.h[:5]
    weighted = model.augment(h, queries.ids[:5], queries.mask[:5])
    assert model._copy is not None
    model._copy = (*model._copy[:3], torch.zeros_like(model._copy[3]))
    assert torch.equal(weighted, model.augment(h, queries.ids[:5], queries.mask[:5])) == (memory == "pairs")
    before = len(model.memory)
    hooks.test = test
    hooks.before_test()
    assert len(model.memory) == before + len(valid.windows()[0])
    assert LENGTH
    assert N_ITEMS


@pytest.mark.parametrize("freeze", [True, False])
def test_retrieval_by_target_follows_the_item_vectors(freeze):
    config = options(retrieve_by="target", freeze_backbone=freeze, top_k=4, similarity="dot")
    model = RaSeRec(config, Ids(), wrap_backbone(build(SASRec), config, Ids()))
    train, valid, _ = splits(histories(1, n_users=8))
    hooks = RetrievalHooks(model, train, valid, config)
    if not freeze:
        with torch.no_grad():
            model.item_vectors().mul_(-1.0)
    hooks.before_epoch(0)
    queries = model.known["train"]
    values = model.item_vectors().detach()[torch.from_numpy(model.memory.targets.astype(int))]
    scores = queries.h @ values.T
    barred = (queries.users[:, None] == model.memory.users) & (queries.positions[:, None] <= model.memory.positions)
    scores[torch.from_numpy(barred)] = -torch.inf
    best = scores.topk(4, dim=1).values
    found = scores.gather(1, queries.ids)
    assert torch.allclose(found[queries.mask], best[queries.mask], atol=1e-5)


def test_no_memory_at_all_is_an_error():
    with pytest.raises(ConfigError, match="memory_min_support"):
        built([[1, 2, 3, 4], [5, 6, 7, 8]])


def test_merged_patterns_keep_their_owners():
    model, _, _ = built(histories(5, n_users=8))
    bank = MemoryBank(model.memory.hidden_size)
    bank.merge(model.memory)
    before = bank.live
    assert bank.forget(1) > 0
    assert bank.live < before
    lost = bank.gone
    assert (model.memory.support[lost] == 2).all()
