"""Training epochs: this package's loaders and models against RecBole's, and against the padded form."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.common import BATCH, Case, Side, config_of, recbole_loaders, timed_epoch

#: Models of RecBole that this package has a faster form of, beside SASRec.
BASELINES = ("GRU4Rec", "NARM", "BERT4Rec", "FEARec")


def ours(model: str, training: str, dataset: str = "amazon-beauty", **options: Any) -> Side:
    """A whole epoch of this package's model."""

    def run(data_path: str) -> dict[str, Any]:
        seconds = _our_epoch(model, data_path, dataset, training=training, **options)
        return {"seconds": seconds, "note": f"whole epoch, {training}, batch {BATCH}"}

    return run


def _our_epoch(model: str, data_path: str, dataset: str = "amazon-beauty", **options: Any) -> float:
    import torch

    from recbole_raserec.config import get_model
    from recbole_raserec.data.splits import prepare_data
    from recbole_raserec.kernels.allocator import keep_freed_memory

    keep_freed_memory()
    config = config_of(model, data_path, dataset, train_batch_size=BATCH, **options)
    splits = prepare_data(config)
    net = get_model(model)(config, splits.train._dataset)
    net.train()
    return timed_epoch(net, torch.optim.Adam(net.parameters(), lr=1e-3, fused=True), splits.train)


def recbole(model: str, batches: int, dataset: str = "amazon-beauty") -> Side:
    """RecBole's own data set, loader and model; what ``Trainer._train_epoch`` does for each batch."""

    def run(data_path: str) -> dict[str, Any]:
        seconds, note = _recbole_epoch(model, batches, data_path, dataset)
        return {"seconds": seconds, "note": note}

    return run


def _recbole_epoch(model: str, batches: int, data_path: str, dataset: str = "amazon-beauty") -> tuple[float, str]:
    import torch
    from recbole.utils import get_model

    config = config_of(model, data_path, dataset, train_batch_size=BATCH)
    train, _, _ = recbole_loaders(config)
    net = get_model(model)(config, train._dataset)
    net.train()
    limit = min(batches, len(train))
    seconds = timed_epoch(net, torch.optim.Adam(net.parameters(), lr=1e-3), train, limit) * len(train) / limit
    return seconds, f"{limit} of {len(train)} batches of {BATCH}, scaled to the epoch"


def duorec_ours(data_path: str) -> dict[str, Any]:
    """DuoRec (us_x), and SASRec's epoch beside it."""
    seconds = _our_epoch("DuoRec", data_path, training="prefix")
    plain = _our_epoch("SASRec", data_path, training="prefix")
    note = f"whole epoch, prefix, batch {BATCH}; SASRec's epoch: {plain:.1f} s, so {seconds / plain:.2f} times it"
    return {"seconds": seconds, "note": note, "sasrec_seconds": plain, "times_sasrec": seconds / plain}


def duorec_padded(data_path: str) -> dict[str, Any]:
    """The same model and loss the usual way: every window padded to 50, RecBole's encoder, torch's cross entropy."""
    import torch

    net, train = padded_duorec(data_path)
    net.train()
    limit = 8
    seconds = timed_epoch(net, torch.optim.Adam(net.parameters(), lr=1e-3), train, limit) * len(train) / limit
    return {"seconds": seconds, "note": f"{limit} of {len(train)} batches of {BATCH}, scaled to the epoch"}


def padded_duorec(data_path: str, dataset: str = "amazon-beauty") -> tuple[Any, Any]:
    """The model of `duorec_padded`, and its loader."""
    import torch
    import torch.nn.functional as F
    from recbole.model.sequential_recommender.sasrec import SASRec as RecBoleSASRec

    from recbole_raserec.data.loaders import SAME_TARGET, BucketLoader
    from recbole_raserec.data.splits import prepare_data
    from recbole_raserec.kernels.losses import info_nce
    from recbole_raserec.recommendation.duorec import DuoRec

    class Padded(DuoRec):
        def calculate_loss(self, interaction: Any) -> torch.Tensor:
            windows = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
            other = (interaction[SAME_TARGET + field] for field in (self.ITEM_SEQ, self.ITEM_SEQ_LEN))
            encode = RecBoleSASRec.forward
            logits = encode(self, *windows) @ self.item_embedding.weight.t()
            loss = F.cross_entropy(logits, interaction[self.POS_ITEM_ID])
            return loss + self.lmd_sem * info_nce(encode(self, *windows), encode(self, *other), self.tau, self.sim)

    config = config_of("DuoRec", data_path, dataset, train_batch_size=BATCH, contrast="us_x", training="prefix")
    train = prepare_data(config).train
    assert type(train) is BucketLoader
    train.bucket = train._dataset.trim = False
    net = Padded(config, train._dataset)
    for module in net.modules():  # torch's own dropout
        for child, layer in module.named_children():
            if isinstance(layer, torch.nn.Dropout):
                setattr(module, child, torch.nn.Dropout(layer.p))
    return net, train


def baselines_ours(data_path: str) -> dict[str, Any]:
    """Whole epochs of this package's, one after the other; packed where there is that form."""
    packed = {name: {"training": "packed"} for name in ("GRU4Rec", "NARM")}
    seconds = {name: _our_epoch(name, data_path, **packed.get(name, {})) for name in BASELINES}
    note = "whole epochs: " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return {"seconds": sum(seconds.values()), "note": note, "epochs": seconds}


def baselines_recbole(data_path: str) -> dict[str, Any]:
    """The same models on RecBole's."""
    seconds = {name: _recbole_epoch(name, 6, data_path)[0] for name in BASELINES}
    note = "6 batches each, scaled: " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return {"seconds": sum(seconds.values()), "note": note, "epochs": seconds}


def baselines_compared(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The ratio of each model."""
    ratios = {name: b["epochs"][name] / a["epochs"][name] for name in BASELINES}
    mean = math.prod(ratios.values()) ** (1 / len(ratios))
    return ", ".join(f"{name} {ratio:.1f}x" for name, ratio in ratios.items()) + f"; geometric mean {mean:.1f}x"


def text_compared(a: dict[str, Any], b: dict[str, Any]) -> str:
    """What texts add to an epoch."""
    return f"an epoch with texts takes {a['seconds'] / b['seconds']:.2f} times one without"


CASES = {
    "sasrec-epoch": Case(
        "amazon-beauty, SASRec, one training epoch: packed against RecBole", ours("SASRec", "packed"),
        recbole("SASRec", 12),
    ),
    "sasrec-prefix": Case(
        "amazon-beauty, SASRec, one training epoch: one window per target against RecBole", ours("SASRec", "prefix"),
        recbole("SASRec", 12),
    ),
    "text-epoch": Case(
        "amazon-beauty, SASRec, one packed training epoch: with texts (TF-IDF's vectors, 128) and without",
        ours("SASRec", "packed", item_vectors="both", item_text_encoder="tfidf"), ours("SASRec", "packed"),
        text_compared,
    ),
    "duorec-epoch": Case(
        "amazon-beauty, DuoRec (us_x), one training epoch: against every window padded to 50", duorec_ours,
        duorec_padded,
    ),
    "ml100k-epoch": Case(
        "ml-100k, SASRec, one training epoch: packed against RecBole", ours("SASRec", "packed", "ml-100k"),
        recbole("SASRec", 12, "ml-100k"),
    ),
    "baselines": Case(
        "amazon-beauty, " + ", ".join(BASELINES) + ", one training epoch each: against RecBole",
        baselines_ours, baselines_recbole, baselines_compared,
    ),
}  # fmt: skip
