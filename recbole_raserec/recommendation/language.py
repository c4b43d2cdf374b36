"""A frozen language model of Hugging Face with bottleneck adapters, run over rows of tokens laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from recbole_raserec.errors import ConfigError
from recbole_raserec.recommendation.guided_attention import ATTENTION, Slot, give_attention
from recbole_raserec.recommendation.places import View, masked
from recbole_raserec.recommendation.pretrained import Frozen


class Adapter(nn.Module):
    """Bottleneck adapter (Houlsby et al., arXiv 1902.00751): ``up(gelu(down(x)))``, added to x where it is used.

    `up` starts at zero, so that the frozen model is untouched at step 0.
    """

    def __init__(self, hidden_size: int, size: int, dropout: float, std: float):
        super().__init__()
        self.down, self.up = nn.Linear(hidden_size, size), nn.Linear(size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.down.weight, std=std)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.dropout(F.gelu(self.down(x))))


def computes_in_bfloat16(precision: str, device: torch.device) -> bool:
    """The option `llm_precision`; ``auto``: whether the processor (AVX-512 BF16, AMX) or GPU multiplies in bfloat16."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return device.type == "cpu" and any(probe is not None and probe() for probe in probes)


class LanguageModel(nn.Module):
    """A frozen encoder or causal decoder, `adapters` in its layers, and an attention that follows :class:`View`.

    The attention is put in through `transformers`' AttentionInterface, so that any model built on it works. Adapters
    hang on the two linear maps that end a layer's halves (found by shape: the last map to the hidden size within the
    attention, and the last outside it), before the residual connection, as in the adapter paper. The frozen weights are
    not part of the state dict: a checkpoint holds a hash of them, and takes them from `llm` when it is loaded.

    Args:
        model: of `transformers`, loaded with :func:`load_pretrained`.
        sizes: for each layer inner sizes (after attention, after feed-forward); 0: no adapter.
        dropout: of the adapters. std: of their initial weights. bias: learn a bias between items (`context_mask`).

    Raises:
        ConfigError: the model's layers are not of a kind we know, or `sizes` has another length.
    """

    def __init__(
        self, model: Any, sizes: Sequence[tuple[int, int]], dropout: float = 0.0, std: float = 0.02, bias: bool = False
    ):
        super().__init__()
        self.frozen = Frozen(model)
        layers = _layers(model)
        if len(sizes) != len(layers):
            raise ConfigError([f"adapter_sizes: {len(sizes)} entries for {len(layers)} layers of the language model."])
        self.hidden_size = int(model.config.hidden_size)
        self.heads = int(model.config.num_attention_heads)
        self.key_heads = int(getattr(model.config, "num_key_value_heads", None) or self.heads)
        self.head_size = int(getattr(model.config, "head_dim", None) or self.hidden_size // self.heads)
        self.position_offset = _position_offset(model)
        self.adapters = nn.ModuleDict()
        self.causal = False
        for number, (layer, pair) in enumerate(zip(layers, sizes)):
            if model.config._attn_implementation == ATTENTION:
                attention = next((m for m in layer.modules() if hasattr(m, "is_causal")), None)
            else:
                attention = give_attention(layer)
            if attention is None:
                raise ConfigError([f"llm: {type(model).__name__} has an attention of its own, which cannot be guided."])
            self.causal = self.causal or bool(getattr(attention, "is_causal", False))
            slot = Slot(self, number)
            for module in layer.modules():
                object.__setattr__(module, "places_slot", slot)
            for name, target, size in zip(("attention", "feed_forward"), _ends(layer, self.hidden_size), pair):
                if size:
                    adapter = Adapter(self.hidden_size, size, dropout, std)
                    self.adapters[f"{number}_{name}"] = adapter
                    target.register_forward_hook(lambda _, __, output, adapter=adapter: output + adapter(output))
        self.bias = nn.Parameter(torch.zeros(len(layers), self.heads)) if bias else None
        self.injection: Any = None
        self.autocast = False
        # those that give_attention was for keep types for as many tokens as they have positions, unless they are given
        self._typed = model.config._attn_implementation != ATTENTION
        self._view: Optional[View] = None

    def train(self, mode: bool = True) -> LanguageModel:
        super().train(mode)
        self.frozen.eval()  # its own dropout would be noise on weights that cannot answer to it
        return self

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Word embeddings of token ids: [...] -> [..., D]."""
        return self.frozen.model.get_input_embeddings()(ids)

    def forward(self, inputs: torch.Tensor, view: View) -> torch.Tensor:
        """Last hidden states [N, D] of N input embeddings [N, D] that stand and see as `view` says."""
        positions = (view.places.position + self.position_offset)[None]
        more = {"token_type_ids": torch.zeros_like(positions)} if self._typed else {}
        self._view = view
        try:
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.autocast):
                output = self.frozen.model(inputs_embeds=inputs[None], position_ids=positions, **more)
        finally:
            self._view = None
        return output.last_hidden_state[0].to(inputs.dtype)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: Any
    ) -> torch.Tensor:
        """Attention of one layer; query [1, heads, N, d], key and value [1, key_heads, N, d] -> [1, N, heads, d]."""
        view = self._view
        assert view is not None, "the language model runs through LanguageModel.forward alone"
        places = view.places

        def rows(x: torch.Tensor) -> torch.Tensor:  # [1, h, N, d] -> [R, h, T, d]
            return places.pad(x[0].transpose(0, 1)).transpose(1, 2)

        q, k, v = rows(query), rows(key), rows(value)
        low = q.device.type != "cpu"  # torch's attention on the CPU is four times slower in bfloat16, backwards
        if not low:
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(q.device.type, torch.bfloat16, enabled=low and self.autocast):
            out = self._attend(layer, q, k, v, view, scaling)
        return places.unpad(out.transpose(1, 2))[None]

    def _attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, view: View, scaling: Any
    ) -> torch.Tensor:
        """The same for padded rows: q [R, heads, T, d], k and v [R, key_heads, T, d] -> [R, heads, T, d]."""
        mask = masked(view.visible, q.dtype)[:, None]  # [R, 1, T, T]
        if self.bias is not None and view.foreign is not None:
            bias = self.bias[layer].to(q.dtype)[None, :, None, None] * view.foreign[:, None]
            mask = mask + bias  # [R, heads, T, T]
        if self.injection is not None and view.given is not None and layer in self.injection.layers:
            assert view.items is not None
            more_k, more_v, logit = self.injection(layer, view.given.to(q.dtype))  # [R, key_heads, S, d], []
            k, v = torch.cat([k, more_k], dim=2), torch.cat([v, more_v], dim=2)
            extra = masked(view.items, q.dtype)[:, None] + logit.to(q.dtype)  # [R, 1, T, S]
            mask = torch.cat([mask, extra.expand(-1, mask.shape[1], -1, -1)], dim=3)
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)  # [R, heads, T, d]


def _layers(model: Any) -> list[nn.Module]:
    """The model's layers: the longest list of modules of one kind."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    found = max(lists, key=len, default=None)
    if found is None or len(found) != int(model.config.num_hidden_layers):
        raise ConfigError([f"llm: the layers of {type(model).__name__} were not found; name another model."])
    return list(found)


def _ends(layer: nn.Module, hidden_size: int) -> tuple[nn.Module, nn.Module]:
    """The linear maps that end a layer's attention and its feed-forward."""
    inside: list[nn.Module] = []
    outside: list[nn.Module] = []
    attentions = [
        name for name, module in layer.named_modules() if "attention" in type(module).__name__.lower() and name
    ]
    for name, module in layer.named_modules():
        # GPT-2's Conv1D is a linear map whose weight is transposed
        size = getattr(module, "out_features", getattr(module, "nf", None))
        if size == hidden_size and isinstance(getattr(module, "weight", None), nn.Parameter):
            within = any(name.startswith(f"{start}.") for start in attentions)
            (inside if within else outside).append(module)
    if not inside or not outside:
        raise ConfigError([f"llm: no place for adapters was found in {type(layer).__name__}; name another model."])
    return inside[-1], outside[-1]


def _position_offset(model: Any) -> int:
    """What RoBERTa and its like add to positions: their tables keep the first rows for padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0
