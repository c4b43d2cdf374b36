"""Stage ii: backbones, and their training."""

from recbole_raserec.recommendation.backbone import Backbone, batches_by_length, encode_in_batches, wrap_backbone
from recbole_raserec.recommendation.bert4rec import BERT4Rec
from recbole_raserec.recommendation.bsarec import BSARec
from recbole_raserec.recommendation.duorec import DuoRec
from recbole_raserec.recommendation.fearec import FEARec
from recbole_raserec.recommendation.item_table import ItemTable
from recbole_raserec.recommendation.recurrent import NARM, GRU4Rec
from recbole_raserec.recommendation.sasrec import SASRec
from recbole_raserec.recommendation.stage import train_model

__all__ = [
    "NARM", "BERT4Rec", "BSARec", "Backbone", "DuoRec", "FEARec", "GRU4Rec", "ItemTable", "SASRec", "batches_by_length",
    "encode_in_batches", "train_model", "wrap_backbone",
]  # fmt: skip
