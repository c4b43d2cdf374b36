"""Collaborative knowledge: vectors of a trained sequential model as keys and values of a language model's attention.

The option `collaborative` names that model, which DARec holds frozen; an `Injection` projects its vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from recbole_raserec.config import MODELS, Config, get_model
from recbole_raserec.errors import ConfigError
from recbole_raserec.recommendation.darec.language_model import LanguageModel
from recbole_raserec.storage import MANIFEST, read_manifest

#: Start of the number added to the logits of the extra keys: they begin with little weight, and learn how much to have.
QUIET = -4.0


class CollaborativeModel(nn.Module):
    """A frozen sequential model: item vectors v, and user vectors h after every item of a history.

    Args:
        options: of the model, as its checkpoint holds them; None where one is missing.
        dataset: gives the numbers of users and items.

    Raises:
        ConfigError: the model cannot give the vectors of all positions in one pass.
    """

    def __init__(self, options: Mapping[str, Any], dataset: Any):
        super().__init__()
        kind = get_model(options["model"])
        if not hasattr(kind, "encode_positions") or options["model"] == "DARec":
            why = "gives no user vector for each item of a history; name for example SASRec, or the checkpoint of one."
            raise ConfigError([f"collaborative: {options['model']} {why}"])
        if options["item_vectors"] not in (None, "id"):
            why = f"of {options['model']} has item_vectors: {options['item_vectors']}; DARec takes those of ids alone."
            raise ConfigError([f"collaborative: the checkpoint {why}"])
        self.model = kind(options, dataset).requires_grad_(False).eval()
        self.longest = int(options["MAX_ITEM_LIST_LENGTH"])
        self.hidden_size = int(self.model.item_vectors().shape[1])

    def train(self, mode: bool = True) -> CollaborativeModel:
        return super().train(False)

    @torch.no_grad()
    def histories(self, item_seq: Tensor) -> Tensor:
        """[R, L] -> [R, 2 L, C]: the item vectors, then the user vector after each item (which knows no later one).

        User vectors beyond the longest history that the model knows are zeros.
        """
        items = self.model.item_vectors()[item_seq]  # [R, L, C]
        users = torch.zeros_like(items)
        users[:, : self.longest] = self.model.encode_positions(item_seq[:, : self.longest])
        return torch.cat([items, users], dim=1)

    @torch.no_grad()
    def items(self, numbers: Tensor) -> Tensor:
        """[R] -> [R, 1, C]: each item's own vector."""
        return self.model.item_vectors()[numbers][:, None]


class Injection(nn.Module):
    """Projects the vectors to keys and values, in some layers of a language model.

    DARec (arXiv 2408.07427) lets user and item vectors of a collaborative model enter the attention; that they do so as
    extra keys and values with a learned number added to their logits is this package's choice.

    Args:
        size: C.
        language: the language model.
        layers: the option `collaborative_layers`: counted from 0; None: the upper half.
        std: of the initial weights.

    Raises:
        ConfigError: the language model has no such layer.
    """

    def __init__(self, size: int, language: LanguageModel, layers: Optional[Sequence[int]], std: float):
        super().__init__()
        heads, head_size, count = language.key_heads, language.head_size, language.layers
        self.heads, self.head_size = heads, head_size
        self.layers = layers = tuple(range(count // 2, count) if layers is None else layers)
        wrong = [n for n in layers if not 0 <= n < count]
        if wrong:
            known = f"a language model with {count} layers; choose among 0 to {count - 1}."
            raise ConfigError([f"collaborative_layers: {wrong} of {known}"])
        self.norm = nn.LayerNorm(size)
        self.key = nn.ModuleDict({str(n): nn.Linear(size, heads * head_size) for n in layers})
        self.value = nn.ModuleDict({str(n): nn.Linear(size, heads * head_size) for n in layers})
        self.logit = nn.ParameterDict({str(n): nn.Parameter(torch.tensor(QUIET)) for n in layers})
        for module in [*self.key.values(), *self.value.values()]:
            nn.init.normal_(module.weight, std=std)  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, layer: int, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [R, heads, S, d] of the vectors [R, S, C], and what is added to their logits, a scalar."""
        shape, name = (*vectors.shape[:2], self.heads, self.head_size), str(layer)
        vectors = self.norm(vectors)
        key, value = self.key[name](vectors), self.value[name](vectors)
        return key.view(shape).transpose(1, 2), value.view(shape).transpose(1, 2), self.logit[name]


def find_collaborative_model(config: Config, train: Callable[[Config], Path]) -> tuple[Path, dict[str, Any]]:
    """Directory and manifest of the collaborative model, which `train` trains if one is named instead of a directory.

    Its options are put into `config`; raises ConfigError if there is no such directory or model.
    """
    named = config["collaborative"]
    directory = Path(named)
    if not (directory / MANIFEST).is_file():
        known = [name for name in MODELS if name != "DARec" and hasattr(get_model(name), "encode_positions")]
        if named not in known:
            none = f"is neither a checkpoint directory nor one of {', '.join(known)}; name one."
            raise ConfigError([f"collaborative: {named} {none}"])
        directory = train(config.for_collaborator())
    manifest = read_manifest(directory)
    config["collaborative_options"] = {**manifest["options"], "model": manifest["model"]}
    return directory, manifest
