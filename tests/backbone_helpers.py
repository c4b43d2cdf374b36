"""What the tests of the backbones build: a tiny data set, RecBole's models on it, and batches for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from recbole.config import Config
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.data.transform import construct_transform
from recbole.utils import get_model
from torch import Tensor, nn

N_USERS, N_ITEMS, LENGTH, BATCH = 12, 30, 10, 6

#: Options that a model needs for a tiny run; "model/variant": the same model on another of its code paths.
OPTIONS: dict[str, dict] = {
    "BERT4Rec": {"mask_ratio": 0.7},
    "CORE/ave": {"dnn_type": "ave"},
    "FOSSIL": {"order_len": 3},
    "GRU4RecCPR": {"reranker_CAN_NUM": 5},
    "HGN/max": {"pooling_type": "max"},
    "HRM/average": {"pooling_type_layer_1": "average", "pooling_type_layer_2": "average"},
    "SASRecCPR": {"reranker_CAN_NUM": 5},
    "TransRec": {"loss_type": "BPR"},
}


def write_data(root: Path) -> Path:
    """Atomic files: interactions with times, items with a multi-valued feature `class`."""
    folder = root / "tiny"
    folder.mkdir()
    rng = np.random.default_rng(7)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(N_USERS - 1):
        items = rng.permutation(N_ITEMS - 1)[: rng.integers(4, 13)] if user else np.arange(N_ITEMS - 1)
        lines += [f"u{user}\ti{item}\t{time}" for time, item in enumerate(items)]
    (folder / "tiny.inter").write_text("\n".join(lines) + "\n")
    lines = ["item_id:token\tclass:token_seq"]
    lines += [f"i{item}\tc{rng.integers(4)} c{rng.integers(4, 8)}" for item in range(N_ITEMS - 1)]
    (folder / "tiny.item").write_text("\n".join(lines) + "\n")
    return root


class Built:
    """A model, the config and the data set that it was built from."""

    def __init__(self, variant: str, data_path: Path):
        name = variant.split("/")[0]
        options = {
            "data_path": str(data_path),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]},
            "MAX_ITEM_LIST_LENGTH": LENGTH,
            "hidden_size": 16,
            "embedding_size": 16,
            "inner_size": 32,
            "n_heads": 2,
            "kg_embedding_size": 16,
            "additional_feat_suffix": None,
            "preload_weight": None,
            "ENTITY_ID_FIELD": "ent_id",
            "RELATION_ID_FIELD": "rel_id",
            "prototype_size": 8,
            "mlp_hidden_size": [8],
            "train_neg_sample_args": None,
            "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"},
            "show_progress": False,
            "use_gpu": False,
            "save_dataset": False,
            "train_batch_size": 64,
            "state": "ERROR",
        }
        options.update(OPTIONS.get(variant, {}))
        self.config = Config(model=name, dataset="tiny", config_dict=options)
        self.transform = construct_transform(self.config)  # BERT4Rec's model reads names that this sets
        self.dataset = SequentialDataset(self.config).build()[0]
        if name in ("GRU4RecKG", "KSR"):
            stub_knowledge(self.dataset)
        torch.manual_seed(0)
        self.model = get_model(name)(self.config, self.dataset)
        disturb(self.model)
        self.model.eval()


def stub_knowledge(dataset) -> None:
    """Knowledge vectors and relations, as if read from the files of a knowledge graph."""
    rng, num = np.random.default_rng(3), dataset.num
    rows = {"ent_id": N_ITEMS, "rel_id": 5}
    dataset.get_preload_weight = lambda field: rng.normal(size=(rows[field], 16)).astype("float32")
    dataset.num = lambda field: rows.get(field) or num(field)


def disturb(model: nn.Module, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=scale)


def batch_of(lengths: list, seed: int = 0) -> dict:
    """Random sequences of the given lengths, padded to LENGTH, with random users, targets and negatives."""
    generator = torch.Generator().manual_seed(seed)
    item_seq_len = torch.tensor(lengths)
    item_seq = torch.randint(1, N_ITEMS, (len(lengths), LENGTH), generator=generator)
    return {
        "item_id_list": item_seq * (torch.arange(LENGTH) < item_seq_len.unsqueeze(1)),
        "item_length": item_seq_len,
        "user_id": torch.randint(1, N_USERS, (len(lengths),), generator=generator),
        "item_id": torch.randint(1, N_ITEMS, (len(lengths),), generator=generator),
        "neg_item_id": torch.randint(1, N_ITEMS, (len(lengths),), generator=generator),
    }


def interaction_of(batch: dict, length: int = LENGTH) -> Interaction:
    """A fresh Interaction (some models write into theirs), its sequences cut to `length`."""
    fields = {name: values.clone() for name, values in batch.items()}
    fields["item_id_list"] = fields["item_id_list"][:, :length].contiguous()
    return Interaction(fields)


MIXED = [1, 2, 3, 5, 9, LENGTH]


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= 1e-5 * max(1e-3, float(other.abs().max()))
