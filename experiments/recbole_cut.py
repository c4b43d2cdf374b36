"""What ``recbole_models.py`` runs RecBole's models on: a cut of ml-100k, and the options that each model needs."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import recbole

DATASET = "ml-100k-cut"
#: Interactions kept of each user, the last ones: an epoch of the slowest models then takes seconds.
LONGEST = 40
#: Length of the generated entity and relation vectors; the models' embedding_size.
VECTOR = 64

#: Options of every run.
COMMON: dict[str, Any] = {
    "epochs": 1,
    "MAX_ITEM_LIST_LENGTH": 20,
    "user_inter_num_interval": "[5,inf)",
    "item_inter_num_interval": "[5,inf)",
    "show_progress": False,
    "use_gpu": False,
    "seed": 2020,
}
#: With --regeneration: a quick stage i, its rows behind the training split of every sequential model.
REGENERATED: dict[str, Any] = {
    "regeneration": True, "regen_pretrained": False, "regen_epochs": 1, "regen_hidden_size": 16, "regen_heads": 1,
    "regen_layers": 1, "regen_inner_size": 16,
}  # fmt: skip
_INTER = ["user_id", "item_id", "rating", "timestamp"]
_ITEM = {"inter": _INTER, "item": ["item_id", "class"]}
_KG = {
    "inter": _INTER,
    "kg": ["head_id", "relation_id", "tail_id"],
    "link": ["item_id", "entity_id"],
    "ent": ["ent_id", "ent_vec"],
}

#: What a model needs beyond its defaults: options; a tuple of them for the runs of a model that trains in stages.
EXTRA: dict[str, Any] = {
    "RaSeRec": {"ram_epochs": 1},
    **{name: {"load_col": _ITEM, "selected_features": ["class"]} for name in ("FDSA", "SASRecF", "GRU4RecF")},
    "S3Rec": (
        {"load_col": _ITEM, "item_attribute": "class", "train_stage": "pretrain", "pretrain_epochs": 1},
        {"load_col": _ITEM, "item_attribute": "class", "train_stage": "finetune"},
    ),
    "RaCT": tuple(
        {"metrics_k": 10, "train_stage": stage, "pretrain_epochs": 1}
        for stage in ("actor_pretrain", "critic_pretrain", "finetune")
    ),
    "GRU4RecKG": {
        "load_col": _KG,
        "additional_feat_suffix": ["ent"],
        "alias_of_entity_id": ["ent_id"],
        "preload_weight": {"ent_id": "ent_vec"},
    },
    "KSR": {
        "load_col": {**_KG, "rel": ["rel_id", "rel_vec"]},
        "additional_feat_suffix": ["ent", "rel"],
        "alias_of_entity_id": ["ent_id"],
        "alias_of_relation_id": ["rel_id"],
        "preload_weight": {"ent_id": "ent_vec", "rel_id": "rel_vec"},
    },
    "DGCF": {"train_batch_size": 256},  # with few batches it samples more users than there are
    "NCL": {"num_clusters": 5},
    "GRU4RecCPR": {"reranker_CAN_NUM": "20"},
    "SASRecCPR": {"reranker_CAN_NUM": "20"},
}


def write_cut(directory: Path, users: int) -> Path:
    """Write the last 40 interactions of the first `users` users of RecBole's ml-100k, and the files that go with them,
    as the data set `ml-100k-cut` below `directory`. Entities and relations get random vectors: ml-100k has none.
    """
    source = Path(recbole.__file__).parent / "dataset_example" / "ml-100k"
    target = Path(directory) / DATASET
    target.mkdir(parents=True, exist_ok=True)

    def lines(suffix: str) -> list[str]:
        return (source / f"ml-100k.{suffix}").read_text(encoding="utf-8").splitlines()

    def write(suffix: str, content: Iterable[str]) -> None:
        (target / f"{DATASET}.{suffix}").write_text("\n".join(content) + "\n", encoding="utf-8")

    header, *log = lines("inter")
    histories: dict[str, list[str]] = {}
    for line in log:
        histories.setdefault(line.split("\t", 1)[0], []).append(line)
    kept = dict(list(histories.items())[:users])
    rows = (sorted(history, key=lambda line: float(line.split("\t")[3]))[-LONGEST:] for history in kept.values())
    write("inter", [header, *(line for history in rows for line in history)])
    header, *people = lines("user")
    write("user", [header, *(line for line in people if line.split("\t", 1)[0] in kept)])
    for suffix in ("item", "link", "kg"):
        write(suffix, lines(suffix))

    rng = random.Random(0)
    entities = dict.fromkeys(line.split("\t")[1] for line in lines("link")[1:])
    relations = dict.fromkeys(line.split("\t")[1] for line in lines("kg")[1:])
    for suffix, names in (("ent", entities), ("rel", relations)):
        vectors = (f"{name}\t{' '.join(f'{rng.gauss(0, 0.1):.4f}' for _ in range(VECTOR))}" for name in names)
        write(suffix, [f"{suffix}_id:token\t{suffix}_vec:float_seq", *vectors])
    return target
