"""DuoRec (arXiv 2110.05730): SASRec regularised by contrast between views of a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Optional, Union

import torch
from torch import Tensor

from recbole_raserec.config import Config, Dropout, Options, Positive, PositiveShare, Weight, option
from recbole_raserec.data import PACKED_TARGETS, SAME_TARGET, SAME_TARGET_ROWS
from recbole_raserec.kernels import info_nce
from recbole_raserec.recommendation.base import row_weights
from recbole_raserec.recommendation.sasrec import SASRec, SASRecOptions


class ContrastOptions(Options):
    """DuoRec's contrastive loss."""

    contrast: Literal["un", "su", "us", "us_x", "none"] = option(
        "us_x",
        "un: two dropout views; su: original and same-target sequence; us: both; us_x: dropout view against "
        "same-target sequence (the paper's); none",
        heading="",
    )
    lmd: Weight = option(0.1, "weight of the unsupervised contrast (two dropout views)")
    lmd_sem: Weight = option(0.1, "weight of the supervised contrast (same target)")
    contrast_share: PositiveShare = option(1.0, "share of a batch's rows in the supervised contrast, in (0, 1]")
    tau: Positive = option(1.0, "temperature of the contrast, > 0")
    sim: Literal["dot", "cos"] = option("dot", "similarity in the contrast: dot (the paper's) or cos")


class DuoRecOptions(ContrastOptions, SASRecOptions):
    """DuoRec (arXiv 2110.05730): SASRec's encoder, recommendation loss and a contrastive loss."""

    weight_averaging: Dropout = option(
        0.999, "moving average of the weights that is validated and kept; 0: the last ones"
    )


SUPERVISED = ("su", "us", "us_x")  # contrast forms that need the window of another row with the same target
GROUPS = 4  # of like length, in which an unsorted batch is encoded


class DuoRec(SASRec):
    """SASRec's encoder and cross-entropy plus InfoNCE between views.

    Views of a row: its encoding h, a second encoding h' of the same window under other dropout noise, the encoding s of
    another training window with the same target item (drawn uniformly in each epoch). Rows of one batch that share a
    target count as negatives of each other, as in the paper's public implementation.

    The option `contrast`: `un` is h against h', weight `lmd`; `su` is h against s, weight `lmd_sem`; `us` is both;
    `us_x` is h' against s, weight `lmd_sem`. The rows of `contrast_share` (the paper: all) are drawn in each step:
    the windows behind s cost more than the rest of a step where the rest is `packed`.

    The defaults are the paper's, `sim: dot` with `tau: 1`. They need patience: user vectors leave a layer norm with
    length 8, so that the contrast is 33 at the start (chance is 6.9) and the encoder first collapses to get rid of it.
    On amazon-beauty (seed 2020, the other options as shipped) validation NDCG@10 after 6, 20 and 40 epochs is .012,
    .039 and .053, and .055 in the end; with `sim: cos, tau: 0.1` it is .043 and .051 after 6 and 20, and stays there.
    """

    options = DuoRecOptions
    trims = True

    def __init__(self, config: Config | Mapping[str, Any], dataset: Any):
        super().__init__(config, dataset)
        self.contrast, self.lmd, self.lmd_sem = config["contrast"], config["lmd"], config["lmd_sem"]
        self.tau, self.sim = config["tau"], config["sim"]

    @staticmethod
    def needs_same_target(config: Config | Mapping[str, Any]) -> bool:
        """Whether the loader has to add same-target windows to each batch."""
        return config["contrast"] in SUPERVISED

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Cross-entropy over all items plus the weighted contrast of a training batch, a scalar."""
        if self.loss_type != "CE":
            return super().calculate_loss(interaction)
        h, targets = self.encode_batch(interaction)  # [B, H], [B]
        weights = row_weights(interaction)
        loss = self.weighted_loss(h, targets, weights)
        if self.contrast in ("un", "us"):
            loss = loss + self.lmd * self._nce(h, self.encode_batch(interaction)[0], weights)
        if self.contrast not in SUPERVISED:
            return loss
        rows = interaction[SAME_TARGET_ROWS] if SAME_TARGET_ROWS in interaction.columns else slice(None)
        first = self._second_view(interaction, rows) if self.contrast == "us_x" else h[rows]
        some = weights if weights is None else weights[rows]
        return loss + self.lmd_sem * self._nce(first, self._same_target(interaction), some)

    def _second_view(self, interaction: Any, rows: Union[slice, Tensor]) -> Tensor:
        """h' of `rows`: what else a batch of windows holds is not encoded, what is packed is encoded as a whole."""
        if isinstance(rows, slice) or PACKED_TARGETS in interaction.columns:
            return self.encode_batch(interaction)[0][rows]
        return self.forward(interaction[self.ITEM_SEQ][rows], interaction[self.ITEM_SEQ_LEN][rows])

    def _nce(self, first: Tensor, second: Tensor, weights: Optional[Tensor]) -> Tensor:
        return info_nce(first, second, self.tau, self.sim, weights)

    def _same_target(self, interaction: Any) -> Tensor:
        """s of the rows that the loader drew windows for, [B, H]."""
        windows = interaction[SAME_TARGET + self.ITEM_SEQ]
        return self.forward_ragged(windows, interaction[SAME_TARGET + self.ITEM_SEQ_LEN])

    def forward_ragged(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """`forward` for rows of unlike length: encoded in groups of like length, with little padding. [B, H]."""
        if self.compiled() or item_seq.device.type != "cpu":
            return self.forward(item_seq, item_seq_len)
        order = torch.argsort(item_seq_len)
        groups = [(item_seq[rows], item_seq_len[rows]) for rows in order.chunk(GROUPS)]
        parts = [self.forward(rows[:, : int(lengths.max())], lengths) for rows, lengths in groups]
        return torch.cat(parts)[torch.argsort(order)]
