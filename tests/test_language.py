"""The frozen language model: the attention over laid-out tokens is the model's own, adapters start at nothing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra llm")

from darec_helpers import SIZE, WORDS, tiny_llm
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_raserec.data import computes_in_bfloat16
from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.recommendation.darec.language_model import (
    AttentionView,
    LanguageModel,
    TokenLayout,
    load_pretrained,
)

#: Tokens of each item of a history.
HISTORY = st.lists(st.integers(1, 4), min_size=1, max_size=5)
FAMILIES = ["bert", "roberta", "gpt2", "llama"]


def language(directory, family, sizes=((4, 3), (0, 2)), **options):
    return LanguageModel(load_pretrained(tiny_llm(directory, family))[0], sizes, **options).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_the_model_itself(tmp_path, family):
    import transformers

    ours = language(tmp_path, family)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / family, attn_implementation="eager").eval()
    lengths = [5, 1, 9]
    ids = torch.randint(2, len(WORDS), (sum(lengths),), generator=torch.Generator().manual_seed(1))
    layout = TokenLayout.of_texts(torch.tensor(lengths))
    with torch.no_grad():
        found = ours(ours.embed(ids), AttentionView(layout, layout.visible(ours.causal)))
        for part, text in zip(found.split(lengths), ids.split(lengths)):
            expected = theirs(input_ids=text[None]).last_hidden_state[0]
            assert (part - expected).abs().max() < 1e-5
    assert ours.causal == (family in ("gpt2", "llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_act_in_every_layer_and_the_model_stays_frozen(tmp_path, family):
    ours = language(tmp_path, family).train()
    layout = TokenLayout.of_texts(torch.tensor([3, 2]))
    x = torch.randn(len(layout.row), SIZE)
    view = AttentionView(layout, layout.visible(ours.causal))
    before = ours(x, view)
    assert torch.equal(before, ours(x, view))  # its own dropout is off
    assert set(ours.adapters) == {"0_attention", "0_feed_forward", "1_feed_forward"}
    before.square().sum().backward()
    assert all(p.grad is None for p in ours.frozen.parameters())
    for adapter in ours.adapters.values():
        assert adapter.up.weight.grad.any()
        with torch.no_grad():
            adapter.up.bias.copy_(torch.randn(SIZE))
        assert (ours(x, view) - before).abs().max() > 1e-3
        with torch.no_grad():
            adapter.up.bias.zero_()


def test_a_checkpoint_knows_its_language_model(tmp_path):
    ours = language(tmp_path, "bert")
    state = ours.state_dict()
    assert not any(name.startswith("frozen.model") for name in state)
    ours.load_state_dict(state, strict=False)
    state["frozen.mark"] = state["frozen.mark"].flip(0)
    with pytest.raises(CheckpointError, match="not the one this checkpoint was trained with"):
        ours.load_state_dict(state, strict=False)


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"item_text_encoder: .*nothing.* cannot be read"):
        load_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="adapter_sizes: 1 entries, but the language model has 2 layers"):
        language(tmp_path, "bert", sizes=((4, 4),))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=5), min_size=1, max_size=4), st.booleans(), st.booleans()
)
def test_views(rows, causal, own_item):
    """Against the sentence it is: earlier items and the same one, whose special token is seen by itself alone."""
    layout = TokenLayout.of_histories(torch.tensor([len(r) for r in rows]), torch.tensor([n for r in rows for n in r]))
    visible = layout.visible(causal, own_item)
    for number, row in enumerate(rows):
        tokens = [(item, at == n) for item, n in enumerate(row) for at in range(n + 1)]
        for q, (item, special) in enumerate(tokens):
            for k, (other, other_special) in enumerate(tokens):
                sees = other < item or (other == item and (special or not other_special))
                if own_item and not special:
                    sees = sees and other == item
                if causal:
                    sees = sees and k <= q
                assert bool(visible[number, q, k]) == (sees or q == k)
        assert not visible[number, : len(tokens), len(tokens) :].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_states_and_gradients_are_nearly_the_same(tmp_path, family):
    ours = language(tmp_path, family)
    with torch.no_grad():
        for adapter in ours.adapters.values():
            adapter.up.weight.normal_(std=0.1)
    layout = TokenLayout.of_texts(torch.tensor([3, 6, 2]))
    view = AttentionView(layout, layout.visible(ours.causal))
    x, direction = torch.randn(2, len(layout.row), SIZE, generator=torch.Generator().manual_seed(2))
    x.requires_grad_()
    found = {}
    for ours.autocast in (False, True):
        states = ours(x, view)
        assert states.dtype == torch.float32
        weights = [adapter.down.weight for adapter in ours.adapters.values()]
        found[ours.autocast] = [states, *torch.autograd.grad((states * direction).sum(), [x, *weights])]
    for exact, near in zip(found[False], found[True]):
        assert not torch.equal(exact, near)
        assert (exact - near).norm() < 0.04 * exact.norm()


def test_products_are_in_bfloat16_where_the_processor_has_them(monkeypatch):
    cpu = torch.device("cpu")
    for precision in ("float32", "bfloat16"):
        assert computes_in_bfloat16(precision, cpu) is (precision == "bfloat16")
    for avx512, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=avx512: answer, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda answer=amx: answer, raising=False)
        assert computes_in_bfloat16("auto", cpu) is (avx512 or amx)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert computes_in_bfloat16("auto", cpu) is False
