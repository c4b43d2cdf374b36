"""Our attention in place of a language model's own: how layers of Hugging Face models come to ask us."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn

from recbole_raserec.errors import ConfigError

#: Name under which our attention is known to `transformers`.
ATTENTION = "recbole_raserec_places"

#: Options of an attention that ours does not know; a model that asks for one is refused.
UNKNOWN = ("softcap", "position_bias", "s_aux")


class Slot:
    """What an attention module of the language model knows of us: who attends for it, and the number of its layer."""

    def __init__(self, owner: Any, layer: int):
        self.owner, self.layer = owner, layer


def register() -> str:
    """Register our attention with `transformers`; its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
    return ATTENTION


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None,
    scaling: Any = None, dropout: float = 0.0, **options: Any,
) -> Any:  # fmt: skip
    asked = [name for name in UNKNOWN if options.get(name) is not None]
    if asked:
        raise ConfigError([f"llm: its attention uses {', '.join(asked)}, which is not supported; name another model."])
    slot = module.places_slot
    return slot.owner.attend(slot.layer, query, key, value, scaling), None


def give_attention(layer: nn.Module) -> Optional[nn.Module]:
    """Put our attention into a layer of the BERT family as `transformers` 4 has it; None where there is no such one."""
    found = next((m for m in layer.modules() if all(hasattr(m, name) for name in ("query", "key", "value"))), None)
    if found is None or not hasattr(found, "num_attention_heads") or getattr(found, "is_decoder", False):
        return None
    attention: Any = found

    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        def heads(x: torch.Tensor) -> torch.Tensor:  # [1, N, D] -> [1, heads, N, d]
            return x.view(1, x.shape[1], attention.num_attention_heads, -1).transpose(1, 2)

        q, k, v = (heads(part(hidden_states)) for part in (attention.query, attention.key, attention.value))
        out, weights = _attend(attention, q, k, v)
        return out.reshape(hidden_states.shape), weights

    attention.forward = forward
    return found
