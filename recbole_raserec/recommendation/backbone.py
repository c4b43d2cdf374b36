"""The one small interface through which retrieval sees a trained sequential model: a score is a dot product.

A `Backbone` gives user vectors `h` and item vectors `v` so that `h @ v.T (+ bias)` is what the model's own
`full_sort_predict` returns. RecBole's models differ in the arguments of `forward`, in the table that holds the item
vectors and in what is done to it first; `ARGUMENTS`, `ITEM_TABLES` and a few small adapters say how. Nothing is taken
on trust: `wrap_backbone` compares the scores on a random batch and refuses a model whose scores disagree.

`python -m recbole_raserec.recommendation.backbone --table` prints the table of `docs/backbones.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor, nn
from tqdm import tqdm

from recbole_raserec.config import REFUSED, SUPPORTED, TRIMMABLE, Config, is_own, trims
from recbole_raserec.errors import ConfigError
from recbole_raserec.evaluation import scores

#: Arguments of a model's `forward` where they are not (item_seq, item_seq_len), in order.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "Caser": ("user", "item_seq"),
    "FOSSIL": ("item_seq", "item_seq_len", "user"),
    "FPMC": ("user", "item_seq", "item_seq_len"),
    "HGN": ("item_seq", "user"),
    "HRM": ("item_seq", "user", "item_seq_len"),
    "NPE": ("item_seq", "user"),
    "NextItNet": ("item_seq",),
    "SHAN": ("item_seq", "user"),
}

#: Name of the embedding that items are ranked with where it is not `item_embedding`.
ITEM_TABLES = {"HGN": "item_embedding_for_prediction"}

#: Largest difference allowed between the two ways to score, relative to the largest score.
TOLERANCE = 1e-5


class Backbone(nn.Module):
    """A model as user vectors times item vectors.

    B: sequences in the batch, L: padded length, V: items including the padding item 0, H: size of the vectors.

    Gradients flow through all three methods, and train/eval mode is the model's own (dropout included), so that the
    same object serves a frozen and a trained backbone.

    Args:
        model: a RecBole sequential recommender; becomes a sub-module.
        n_items: V.

    Attributes:
        hidden_size: H, the size in which user and item vectors meet (not always the option `hidden_size`).
        needs_user: whether `encode` needs the users' ids.
        trims: whether a batch may be cut to its longest sequence.
    """

    model: Any  # a recommender of any library; its attributes are checked when it is wrapped

    def __init__(self, model: nn.Module, n_items: int):
        super().__init__()
        self.model, self.n_items = model, n_items
        known = "" if is_own(model) else type(model).__name__
        self.arguments = ARGUMENTS.get(known, ("item_seq", "item_seq_len"))
        self.item_table = ITEM_TABLES.get(known, "item_embedding")
        self.needs_user = "user" in self.arguments
        self.trims = trims(model)
        with torch.no_grad():
            self.hidden_size = int(self.item_vectors().shape[1])

    def encode(self, item_seq: Tensor, item_seq_len: Tensor, user: Tensor | None = None) -> Tensor:
        """Gives the user vectors as they enter the dot product, float [B, H].

        Args:
            item_seq: long [B, L], oldest item first, padded with 0 on the right. L is MAX_ITEM_LIST_LENGTH, or anything
                from the longest sequence of the batch on if `trims`.
            item_seq_len: long [B], each at least 1.
            user: long [B]; needed if `needs_user`, otherwise ignored.

        Raises:
            ValueError: the model needs the users' ids and `user` is None.
        """
        if self.needs_user and user is None:
            raise ValueError(f"{type(self.model).__name__} has an embedding per user: encode() needs `user` ids [B].")
        return self._user_vectors(item_seq, item_seq_len, user)

    def _user_vectors(self, item_seq: Tensor, item_seq_len: Tensor, user: Tensor | None) -> Tensor:
        # HRM writes into the lengths it is given; the caller's must stay as they are
        given = {"item_seq": item_seq, "item_seq_len": item_seq_len.clone(), "user": user}
        return self.model(*(given[name] for name in self.arguments))  # [B, H]

    def item_vectors(self) -> Tensor:
        """Gives the vectors of all items as they enter the dot product, row 0 (padding) included: float [V, H]."""
        own = getattr(self.model, "item_vectors", None)  # a method of the package's own models
        return (own() if callable(own) else getattr(self.model, self.item_table).weight)[: self.n_items]

    def item_bias(self) -> Tensor | None:
        """Gives what is added to the dot product, float [V], or None."""
        return None

    def scores(self, item_seq: Tensor, item_seq_len: Tensor, user: Tensor | None = None) -> Tensor:
        """Gives the scores of all items, float [B, V]: the model's `full_sort_predict`."""
        return scores(self.encode(item_seq, item_seq_len, user), self.item_vectors(), self.item_bias())


class BERT4RecBackbone(Backbone):
    """BERT4Rec: the vector at a mask token appended to the sequence; item table with a row for the mask; item bias."""

    def _user_vectors(self, item_seq: Tensor, item_seq_len: Tensor, user: Tensor | None) -> Tensor:
        masked = F.pad(item_seq, (0, 1)).scatter(1, item_seq_len.unsqueeze(1), self.n_items)  # [B, L + 1]
        # The first item makes room for the mask in every sequence, short ones too: RecBole ranks this way.
        output = self.model(masked[:, 1:])  # [B, L, H]
        return output[torch.arange(output.shape[0], device=output.device), item_seq_len - 1]  # [B, H]

    def item_bias(self) -> Tensor | None:
        return self.model.output_bias


class COREBackbone(Backbone):
    """CORE: cosine over a temperature.

    The temperature is shared out evenly, `h / sqrt(temperature)` and `v / sqrt(temperature)`: CORE's user vectors are
    weighted sums of item vectors, and folding all of it into one side would give the two different lengths, which a
    mixture of user and item vectors would then weigh differently. In train mode the item vectors pass the model's item
    dropout, as in its loss.
    """

    def _user_vectors(self, item_seq: Tensor, item_seq_len: Tensor, user: Tensor | None) -> Tensor:
        return self.model(item_seq) / self.model.temperature**0.5

    def item_vectors(self) -> Tensor:
        table = self.model.item_dropout(self.model.item_embedding.weight[: self.n_items])
        return F.normalize(table, dim=-1) / self.model.temperature**0.5


class FPMCBackbone(Backbone):
    """FPMC: user . item + last item . item, two dot products written as one of twice the size."""

    def _user_vectors(self, item_seq: Tensor, item_seq_len: Tensor, user: Tensor | None) -> Tensor:
        last = item_seq.gather(1, (item_seq_len - 1).unsqueeze(1)).squeeze(1)  # [B]
        return torch.cat([self.model.UI_emb(user), self.model.LI_emb(last)], dim=-1)  # [B, 2E]

    def item_vectors(self) -> Tensor:
        return torch.cat([self.model.IU_emb.weight, self.model.IL_emb.weight], dim=-1)[: self.n_items]


class NPEBackbone(Backbone):
    """NPE: ranks with the rectified item table."""

    def item_vectors(self) -> Tensor:
        return torch.relu(super().item_vectors())


#: RecBole 1.2.1's sequential models that work as a backbone.
ADAPTERS: dict[str, type[Backbone]] = {
    **dict.fromkeys(("Caser", "FEARec", "FOSSIL", "GCSAN", "GRU4Rec", "HGN", "HRM", "LightSANs"), Backbone),
    **dict.fromkeys(
        ("FDSA", "GRU4RecF", "SASRecF", "NARM", "NextItNet", "SASRec", "SHAN", "SINE", "SRGNN", "STAMP"), Backbone
    ),
    "BERT4Rec": BERT4RecBackbone,
    "CORE": COREBackbone,
    "FPMC": FPMCBackbone,
    "NPE": NPEBackbone,
}


def wrap_backbone(model: nn.Module, config: Config | Mapping[str, Any], dataset: Any) -> Backbone:
    """The adapter around a RecBole sequential model, after a comparison of the scores of both.

    Models of this package and of RecBole are known by the name of their class. Any other is taken for
    `forward(item_seq, item_seq_len) -> [B, H]` times `item_embedding`, or `item_vectors()`. The comparison needs no
    training data, draws nothing from the global random generators and leaves train/eval mode as it was.

    Args:
        model: the model, trained or not.
        config: names of the user and item fields, MAX_ITEM_LIST_LENGTH; RecBole's Config works too.
        dataset: anything with `num(field)`, the number of users and of items including padding.

    Raises:
        ConfigError: naming `backbone`, the model and those that work, when the model does not score by a dot product
            of a user vector with item vectors, or needs data beyond the sequences.
    """
    name, own_class = type(model).__name__, is_own(model)
    if name in REFUSED and not own_class:
        raise _refusal(name, REFUSED[name])
    if own_class and (unmet := _unmet(model)):
        raise _refusal(name, unmet)
    try:
        kind = Backbone if own_class else ADAPTERS.get(name, Backbone)
        backbone = kind(model, int(dataset.num(config["ITEM_ID_FIELD"])))
        ours, own, cut = _compare(backbone, config, dataset)
    except Exception as error:
        # Whatever an unknown model does on this call, the error has to say what was expected of it.
        raise _refusal(name, f"encoding a small random batch failed with {type(error).__name__}: {error}") from error
    if ours.shape != own.shape:
        raise _refusal(name, f"scores have shape {tuple(ours.shape)} and the model's own {tuple(own.shape)}")
    gap, scale = float((ours - own).abs().max()), float(own.abs().max())
    if not gap <= TOLERANCE * scale:  # so written, NaN is refused too
        what = "user vectors times item vectors differ from its scores"
        raise _refusal(name, f"{what} by {gap:.2g} (scores to {scale:.2g})")
    if own_class and not float((cut - ours[: len(cut)]).abs().max()) <= TOLERANCE * scale:
        raise _refusal(name, "it says trims = True, and a batch cut to its longest sequence has other scores")
    return backbone


def _unmet(model: Any) -> str:
    """What a model of the user's lacks of a backbone; empty if the methods are there."""
    if not isinstance(model, SequentialRecommender):
        return "it is no SequentialRecommender"
    if type(model).full_sort_predict is SequentialRecommender.full_sort_predict:
        return "it has no full_sort_predict(interaction), which gives the scores of all items"
    if callable(getattr(model, "item_vectors", None)) or isinstance(getattr(model, "item_embedding", None), nn.Module):
        return ""
    return "it has neither an embedding named item_embedding nor a method item_vectors()"


def _compare(backbone: Backbone, config: Config | Mapping[str, Any], dataset: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Scores a random batch of B = 4 in both ways, float [B, V] each; and, where it `trims`, the first 2 rows cut."""
    generator = torch.Generator().manual_seed(0)
    length, item_id = int(config["MAX_ITEM_LIST_LENGTH"]), config["ITEM_ID_FIELD"]
    n_users = int(dataset.num(config["USER_ID_FIELD"]))
    item_seq_len = torch.linspace(1, length, 4).long()  # [B]: one item ... full
    item_seq = torch.randint(1, backbone.n_items, (4, length), generator=generator)  # [B, L]
    item_seq = item_seq * (torch.arange(length) < item_seq_len.unsqueeze(1))
    user = torch.randint(1, n_users, (4,), generator=generator)  # [B]
    device = next(backbone.parameters()).device
    item_seq, item_seq_len, user = (x.to(device) for x in (item_seq, item_seq_len, user))
    fields = {
        config["USER_ID_FIELD"]: user,
        item_id: torch.ones_like(user),
        item_id + config["LIST_SUFFIX"]: item_seq.clone(),
        config["ITEM_LIST_LENGTH_FIELD"]: item_seq_len.clone(),
    }
    with _evaluating(backbone), torch.no_grad():
        own = backbone.model.full_sort_predict(Interaction(fields)).view(4, -1)
        ours = backbone.scores(item_seq, item_seq_len, user)
        longest = int(item_seq_len[1]) if backbone.trims else length
        return ours, own, backbone.scores(item_seq[:2, :longest], item_seq_len[:2], user[:2])


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, and afterwards the mode each sub-module had (`train()` would set them all alike)."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode


def batches_by_length(lengths: np.ndarray, rows: int = 4096, tokens: int = 1 << 16) -> list[np.ndarray]:
    """Puts rows of like length together, the shortest first; rows of one length stay in their order.

    Of rows of `lengths` [N] come batches, row numbers int64 [B] each, of at most so many rows and about so many tokens,
    padding included.
    """
    order = np.argsort(lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        longest = int(lengths[order[min(start + rows, len(order)) - 1]])
        batches.append(order[start : start + min(rows, max(1, tokens // max(longest, 1)))])
        start += len(batches[-1])
    return batches


@torch.no_grad()
def encode_in_batches(
    model: nn.Module, encode: Callable[[np.ndarray], Tensor], batches: Sequence[np.ndarray], out: Tensor,
    desc: str | None = None,
) -> Tensor:  # fmt: skip
    """Writes what `encode` gives of each batch of row numbers, [B, ...], into `out`, [N, ...], and returns that.

    The model is in evaluation mode meanwhile, and no gradients are kept. `desc` labels a progress bar.
    """
    bar = tqdm(total=sum(map(len, batches)), desc=desc, disable=desc is None, unit="windows", dynamic_ncols=True)
    with _evaluating(model), bar:
        for rows in batches:
            out[torch.from_numpy(rows).to(out.device)] = encode(rows).to(out.device)
            bar.update(len(rows))
    return out


def _refusal(name: str, reason: str) -> ConfigError:
    own = "whose forward(item_seq, item_seq_len) gives one vector that is scored against item_embedding"
    remedy = f"These work: {', '.join(SUPPORTED)}; and models of your own {own}."
    return ConfigError([f"backbone: {name} cannot be a backbone: {reason}. {remedy}"])


def table() -> str:
    """Gives the Markdown table of all sequential models of RecBole 1.2.1."""
    rows = ["| Model | Backbone | Needs the user id | Trims | Why not |", "|---|---|---|---|---|"]
    for name in sorted([*ADAPTERS, *REFUSED], key=str.lower):
        facts = (name in ADAPTERS, "user" in ARGUMENTS.get(name, ()), name in TRIMMABLE)
        works, user, cut = ("yes" if fact else "no" for fact in facts)
        rows.append(f"| {name} | {works} | {user if name in ADAPTERS else ''} | {cut} | {REFUSED.get(name, '')} |")
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Which RecBole models work as a backbone.")
    parser.add_argument("--table", action="store_true", required=True, help="print the table of docs/backbones.md")
    parser.parse_args()
    print(table())
