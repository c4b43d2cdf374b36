"""A small RaSeRec with its memory and its splits, without files."""

from __future__ import annotations

import numpy as np
import torch
from recbole.data.interaction import Interaction
from tiny_models import LENGTH, N_ITEMS, N_USERS, Ids, build, disturb, options

from recbole_raserec.data.dataset import POSITION
from recbole_raserec.data.sequences import SequenceStore
from recbole_raserec.recommendation.backbone import Backbone, wrap_backbone
from recbole_raserec.recommendation.sasrec import SASRec
from recbole_raserec.retrieval.raserec import RaSeRec
from recbole_raserec.retrieval.stage import RetrievalHooks

ITEM_SEQ = "item_id_list"


class Split:
    """Windows (user, position) of a store: what the memory's hooks reads of a data set."""

    max_item_list_len = LENGTH

    def __init__(self, store, users, positions):
        self.store, self._users, self._positions = store, users, positions

    def windows(self):
        return self._users, self._positions, self.store.items[self.store.offsets[self._users] + self._positions]

    def batch(self, rows=slice(None)):
        users, positions, targets = (x[rows] for x in self.windows())
        seq, lengths = self.store.windows(users, positions, LENGTH)
        fields = {"user_id": users, POSITION: positions, "item_id": targets, ITEM_SEQ: seq, "item_length": lengths}
        return Interaction({name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in fields.items()})


def splits(histories):
    """Leave-one-out: train, valid, test of histories of three items and more."""
    users = np.repeat(np.arange(1, len(histories) + 1), [len(h) for h in histories])
    store = SequenceStore(users, np.concatenate(histories), N_USERS, N_ITEMS, np.arange(len(users)))
    lengths = store.lengths()
    owner, index = store.users(), np.arange(len(store)) - store.offsets[store.users()]
    left = lengths[owner] - index
    return [
        Split(store, owner[chosen], index[chosen])
        for chosen in ((index > 0) & (left > 2), (index > 0) & (left == 2), left == 1)
    ]


def histories_of(seed, users=N_USERS - 1, longest=11):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, N_ITEMS, rng.integers(4, longest + 1)) for _ in range(users)]


class Biased(Backbone):
    """A backbone whose items have a bias."""

    def __init__(self, model, n_items):
        super().__init__(model, n_items)
        self.bias = torch.nn.Parameter(torch.linspace(-1, 1, n_items))

    def item_bias(self):
        return self.bias


def raserec(histories=None, biased=False, min_length=1, **changes):
    """Model, hooks and splits; the module's weights are moved off their start."""
    sasrec = build(SASRec, **{name: changes.pop(name) for name in list(changes) if "dropout_prob" in name})
    config = options(**changes)
    backbone = Biased(sasrec, N_ITEMS) if biased else wrap_backbone(sasrec, config, Ids())
    model = RaSeRec(config, Ids(), backbone)
    parts = splits(histories_of(0) if histories is None else histories)
    config = {**config, "memory_min_length": min_length}
    hooks = RetrievalHooks(model, parts[0], parts[1], config)
    alpha = model.ram.alpha.detach().clone()
    disturb(model.ram)
    with torch.no_grad():
        model.ram.alpha.copy_(alpha)
    return model.eval(), hooks, parts


def close(a, b, tolerance=1e-5):
    return float((a - b).detach().abs().max()) <= tolerance
