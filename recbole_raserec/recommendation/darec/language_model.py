"""A frozen language model of Hugging Face with bottleneck adapters, run over rows of tokens laid end to end.

A `TokenLayout` says where the tokens of many texts stand, an `AttentionView` which of them each one sees. Our attention
takes the place of the model's own: through `transformers`' AttentionInterface, or, before transformers 5, where the
BERT family has its attention by class, in the attention module's `forward`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_raserec.data import reading
from recbole_raserec.errors import CheckpointError, ConfigError

ATTENTION = "recbole_raserec"  # name under which our attention is known to `transformers`

#: Options of an attention that ours does not know; a model that asks for one is refused.
UNKNOWN = ("softcap", "position_bias", "s_aux")


@dataclasses.dataclass
class TokenLayout:
    """Where the N tokens of R rows stand, without padding. A row is a history, or the text of one item."""

    row: Tensor  # int64 [N], ascending
    item: Tensor  # int64 [N], ascending in a row: which item of the history the token belongs to
    special: Tensor  # bool [N]: [SEQ], the last token of its item
    position: Tensor  # int64 [N] within the item, which the language model takes for the token's position
    rows: int  # R

    def __post_init__(self) -> None:
        counts = torch.bincount(self.row, minlength=self.rows)  # [R]
        self.width = int(counts.max()) if len(self.row) else 0  # tokens of the longest row, T
        column = torch.arange(len(self.row), device=self.row.device) - (counts.cumsum(0) - counts)[self.row]
        self.padded = self.row * self.width + column  # index of each token in [R, T] laid flat, int64 [N]

    @classmethod
    def of_texts(cls, lengths: Tensor) -> TokenLayout:
        """Each item a row of its own: its text's tokens, as many as `lengths` [R] says."""
        row = torch.repeat_interleave(lengths)
        position = torch.arange(len(row), device=row.device) - (lengths.cumsum(0) - lengths)[row]
        nothing = torch.zeros_like(row)
        return cls(row, nothing, nothing.bool(), position, len(lengths))

    @classmethod
    def of_histories(cls, counts: Tensor, lengths: Tensor) -> TokenLayout:
        """Each history a row: the tokens of an item, its [SEQ], the tokens of the next; `counts` int64 [R] items of
        `lengths` int64 [sum of counts] tokens without [SEQ]."""
        sizes = lengths + 1
        entry = torch.repeat_interleave(sizes)  # [N], which item of which history
        row = torch.repeat_interleave(counts)[entry]
        item = entry - (counts.cumsum(0) - counts)[row]
        position = torch.arange(len(entry), device=entry.device) - (sizes.cumsum(0) - sizes)[entry]
        return cls(row, item, position == lengths[entry], position, len(counts))

    def pad(self, values: Tensor) -> Tensor:
        """[N, ...] -> [R, T, ...], zeros behind each row's last token."""
        flat = values.new_zeros(self.rows * self.width, *values.shape[1:]).index_copy(0, self.padded, values)
        return flat.view(self.rows, self.width, *values.shape[1:])

    def unpad(self, values: Tensor) -> Tensor:
        """[R, T, ...] -> [N, ...]."""
        return values.reshape(self.rows * self.width, *values.shape[2:])[self.padded]

    def visible(self, causal: bool, own_item: bool = False) -> Tensor:
        """What each token sees: bool [R, T, T], query before key.

        Tokens of earlier items (their [SEQ] too) and of the same item; of the latter an ordinary token never sees the
        special one, which comes last. So nothing later than an item enters the state at its [SEQ]. With `causal` no
        token sees a later one; with `own_item` (context masking) ordinary tokens see their own item's alone.
        """
        item = self.pad(self.item + 1)  # [R, T], 0 where there is nothing
        special = self.pad(self.special)
        query, key = item[:, :, None], item[:, None, :]
        same = query == key
        visible = (key < query) | (same & (special[:, :, None] | ~special[:, None, :]))
        if own_item:
            visible &= same | special[:, :, None]
        visible &= key > 0
        if causal:
            visible &= torch.ones(self.width, self.width, dtype=torch.bool, device=item.device).tril()
        # a query that does not exist sees itself, so that its softmax is defined
        return visible | torch.eye(self.width, dtype=torch.bool, device=item.device)


@dataclasses.dataclass
class AttentionView:
    """What the attention of one pass works with."""

    layout: TokenLayout
    visible: Tensor  # bool [R, T, T]


class Adapter(nn.Module):
    """Bottleneck adapter (Houlsby et al., arXiv 1902.00751): `up(gelu(down(x)))`, added to x where it is used.

    `up` starts at zero, so that the frozen model is untouched at step 0.
    """

    def __init__(self, hidden_size: int, size: int, dropout: float, std: float):
        super().__init__()
        self.down, self.up = nn.Linear(hidden_size, size), nn.Linear(size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.down.weight, std=std)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.dropout(F.gelu(self.down(x))))


def _own_weights_are_there(module: Frozen, keys: Any) -> None:
    own = tuple(f"model.{name}" for name in module.model.state_dict())
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.endswith(own)]


class Frozen(nn.Module):
    """Holds the language model. Of its weights only a hash is in the state dict, as the buffer `mark`."""

    mark: Tensor

    def __init__(self, model: Any):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        digest = hashlib.sha256()
        for name, weight in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self.register_buffer("mark", torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).clone())
        self.register_load_state_dict_post_hook(_own_weights_are_there)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        destination = OrderedDict() if destination is None else destination
        destination[prefix + "mark"] = self.mark
        return destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        mark = state_dict.get(prefix + "mark")
        if mark is not None and not torch.equal(mark.cpu(), self.mark.cpu()):
            other = "the language model found now is not the one this checkpoint was trained with"
            raise CheckpointError(f"item_text_encoder: {other}; name that one.")


class LanguageModel(nn.Module):
    """A frozen encoder or causal decoder, `adapters` in its layers, and an attention that follows an `AttentionView`.

    Adapters hang on the two linear maps that end a layer's halves (found by shape: the last map to the hidden size
    within the attention, and the last outside it), before the residual connection, as in the adapter paper. Of
    the frozen weights a checkpoint holds a hash.

    Args:
        model: of `transformers`, loaded with `load_pretrained`.
        sizes: the option `adapter_sizes`: one inner size for all adapters, or for each layer one or a pair (after
            attention, after feed-forward); 0: no adapter.
        dropout: of the adapters.
        std: of their initial weights.

    Raises:
        ConfigError: the model's layers are not of a kind we know, or `sizes` has another length.
    """

    def __init__(self, model: Any, sizes: Union[int, Sequence[Any]], dropout: float = 0.0, std: float = 0.02):
        super().__init__()
        self.frozen = Frozen(model)
        layers = _layers(model)
        pairs = adapter_pairs(sizes, len(layers))
        self.layers, self.hidden_size = len(layers), int(model.config.hidden_size)
        self.position_offset = _position_offset(model)
        self.adapters = nn.ModuleDict()
        self.causal = False
        registered = model.config._attn_implementation == ATTENTION
        for number, (layer, pair) in enumerate(zip(layers, pairs)):
            guided = next((m for m in layer.modules() if hasattr(m, "is_causal")), None)
            attention = guided if registered else _replace_attention(layer)
            if attention is None:
                raise ConfigError(
                    [f"item_text_encoder: {type(model).__name__} has an attention of its own, which cannot be guided."]
                )
            self.causal = self.causal or bool(getattr(attention, "is_causal", False))
            module: Any
            for module in layer.modules():
                module.attends = (self, number)  # a tuple, so that it does not become a sub-module
            for name, target, size in zip(("attention", "feed_forward"), _ends(layer, self.hidden_size), pair):
                if size:
                    self.adapters[f"{number}_{name}"] = adapter = Adapter(self.hidden_size, size, dropout, std)
                    target.register_forward_hook(lambda _, __, output, adapter=adapter: output + adapter(output))
        self.autocast = False
        self._typed = not registered  # such models keep types for as many tokens as positions, unless they are given
        self._view: Optional[AttentionView] = None

    def train(self, mode: bool = True) -> LanguageModel:
        super().train(mode)
        self.frozen.eval()  # its own dropout would be noise on weights that cannot answer to it
        return self

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings of token ids: [...] -> [..., D]."""
        return self.frozen.model.get_input_embeddings()(ids)

    def forward(self, inputs: Tensor, view: AttentionView) -> Tensor:
        """Last hidden states [N, D] of N input embeddings [N, D] that stand and see as `view` says."""
        positions = (view.layout.position + self.position_offset)[None]
        more = {"token_type_ids": torch.zeros_like(positions)} if self._typed else {}
        self._view = view
        try:
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.autocast):
                output = self.frozen.model(inputs_embeds=inputs[None], position_ids=positions, **more)
        finally:
            self._view = None
        return output.last_hidden_state[0].to(inputs.dtype)

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: Optional[float]) -> Tensor:
        """Attention of one layer: query [1, heads, N, d], key and value [1, key_heads, N, d] -> [1, N, heads, d]."""
        view = self._view
        assert view is not None, "the language model runs through LanguageModel.forward alone"
        # [1, h, N, d] -> [R, h, T, d]
        q, k, v = (view.layout.pad(x[0].transpose(0, 1)).transpose(1, 2) for x in (query, key, value))
        low = q.device.type != "cpu"  # torch's attention on the CPU is four times slower in bfloat16, backwards
        if not low:
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(q.device.type, torch.bfloat16, enabled=low and self.autocast):
            mask = _additive(view.visible, q.dtype)[:, None]  # [R, 1, T, T]
            groups = q.shape[1] // k.shape[1]
            if groups > 1:
                k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)  # [R, heads, T, d]
        return view.layout.unpad(out.transpose(1, 2))[None]


def adapter_pairs(sizes: Union[int, Sequence[Any]], layers: int) -> list[tuple[int, int]]:
    """The option `adapter_sizes` as (after attention, after feed-forward) for each layer; raises ConfigError."""
    if isinstance(sizes, int):
        return [(sizes, sizes)] * layers
    pairs = [(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])) for size in sizes]
    if len(pairs) != layers:
        raise ConfigError([f"adapter_sizes: {len(pairs)} entries, but the language model has {layers} layers."])
    return pairs


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean view -> what is added to the logits."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, float("-inf"))


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
    scaling: Any = None, dropout: float = 0.0, **options: Any,
) -> Any:  # fmt: skip
    """Our attention as `transformers` calls it."""
    asked = [name for name in UNKNOWN if options.get(name) is not None]
    if asked:
        raise ConfigError(
            [f"item_text_encoder: its attention uses {', '.join(asked)}, which is not supported; name another model."]
        )
    owner, layer = module.attends
    return owner._attend(layer, query, key, value, scaling), None


def _replace_attention(layer: nn.Module) -> Optional[nn.Module]:
    """Put our attention into a layer of the BERT family as `transformers` 4 has it; None where there is no such one."""
    found = next((m for m in layer.modules() if all(hasattr(m, name) for name in ("query", "key", "value"))), None)
    if found is None or not hasattr(found, "num_attention_heads") or getattr(found, "is_decoder", False):
        return None
    attention: Any = found

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        parts = (part(hidden_states) for part in (attention.query, attention.key, attention.value))
        # [1, N, D] -> [1, heads, N, d]
        heads = (x.view(1, x.shape[1], attention.num_attention_heads, -1).transpose(1, 2) for x in parts)
        out, weights = _attend(attention, *heads)
        return out.reshape(hidden_states.shape), weights

    attention.forward = forward
    return found


def _layers(model: Any) -> list[nn.Module]:
    """The model's layers: the longest list of modules of one kind."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    found = max(lists, key=len, default=None)
    if found is None or len(found) != int(model.config.num_hidden_layers):
        raise ConfigError(
            [f"item_text_encoder: the layers of {type(model).__name__} were not found; name another model."]
        )
    return list(found)


def _ends(layer: nn.Module, hidden_size: int) -> tuple[nn.Module, nn.Module]:
    """The linear maps that end a layer's attention and its feed-forward."""
    inside: list[nn.Module] = []
    outside: list[nn.Module] = []
    attentions = [name for name, part in layer.named_modules() if "attention" in type(part).__name__.lower() and name]
    for name, module in layer.named_modules():
        # GPT-2's Conv1D is a linear map whose weight is transposed
        size = getattr(module, "out_features", getattr(module, "nf", None))
        if size == hidden_size and isinstance(getattr(module, "weight", None), nn.Parameter):
            within = any(name.startswith(f"{start}.") for start in attentions)
            (inside if within else outside).append(module)
    if not inside or not outside:
        raise ConfigError(
            [f"item_text_encoder: no place for adapters was found in {type(layer).__name__}; name another model."]
        )
    return inside[-1], outside[-1]


def _position_offset(model: Any) -> int:
    """What RoBERTa and its like add to positions: their tables keep the first rows for padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def load_pretrained(name: Optional[str]) -> tuple[Any, Any]:
    """Model and tokenizer of the option `item_text_encoder`; weights are read from safetensors, never from a pickle.

    Raises:
        ConfigError: nothing of that name can be read.
        MissingExtraError: see `model_source`.
    """
    with reading(name) as (transformers, source):
        config = transformers.AutoConfig.from_pretrained(source)
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(
                [f"item_text_encoder: {source} is an encoder-decoder; name an encoder or a causal decoder."]
            )
        transformers.AttentionInterface.register(ATTENTION, _attend)
        # whatever was stored (bfloat16, mostly), the weights are float32; llm_precision is that of the products
        options = {"use_safetensors": True, "dtype": torch.float32}
        try:
            model = transformers.AutoModel.from_pretrained(source, attn_implementation=ATTENTION, **options)
        except KeyError as error:
            if ATTENTION not in error.args:
                raise
            model = transformers.AutoModel.from_pretrained(source, attn_implementation="eager", **options)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # unused, and drawn at random where the file has none
    return model, load_tokenizer(name)


def load_tokenizer(name: Optional[str]) -> Any:
    """The tokenizer alone; raises as `load_pretrained`."""
    with reading(name) as (transformers, source):
        return transformers.AutoTokenizer.from_pretrained(source)
