"""What a checkpoint knows beyond its weights: how popular each item is, what it is called, and what every user did.

Histories end before the test targets, as the test itself sees them, so that a checkpoint recommends what its figures
were measured on; what was held out can be brought in by an update.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any, Optional

import numpy as np

from recbole_raserec.data.dataset import SequenceDataset
from recbole_raserec.data.splits import Splits
from recbole_raserec.errors import CheckpointError
from recbole_raserec.fileio import read_json, write_json
from recbole_raserec.serving.histories import DIRECTORY, Histories

FILE = "items.json"


@dataclasses.dataclass
class Catalogue:
    """Items and histories.

    Attributes:
        counts: int64 [V], interactions of each item in the histories.
        titles: [V], a name for people, or None where the data set has none.
        histories: of the users; None where the data set does not keep them (benchmark files).
    """

    counts: np.ndarray
    titles: Optional[list[str]]
    histories: Optional[Histories]

    def save(self, directory: Path) -> None:
        """Write it into a checkpoint directory."""
        write_json(directory / FILE, {"counts": self.counts.tolist(), "titles": self.titles})
        if self.histories is not None:
            self.histories.save(directory / DIRECTORY)

    @classmethod
    def load(cls, directory: Path, n_users: int, n_items: int) -> Catalogue:
        """Read it; a checkpoint of before there was one gives counts of 0, no titles and no histories.

        Raises:
            CheckpointError: damaged, or of other items.
        """
        path = directory / FILE
        if not path.is_file():
            return cls(np.zeros(n_items, np.int64), None, None)
        found = read_json(path)
        found = found if isinstance(found, dict) else {}
        counts, titles = found.get("counts"), found.get("titles")
        sound = isinstance(counts, list) and all(type(count) is int and 0 <= count < 1 << 62 for count in counts)
        named = titles is None or (isinstance(titles, list) and all(isinstance(title, str) for title in titles))
        if not sound or not named or len(counts or ()) != n_items or (titles is not None and len(titles) != n_items):
            raise CheckpointError(f"{path} does not describe this checkpoint's items; it is damaged or foreign.")
        kept = (directory / DIRECTORY).is_dir()
        histories = Histories.load(directory / DIRECTORY, n_users, n_items) if kept else None
        return cls(np.array(counts, dtype=np.int64), titles, histories)


def catalogue_of(splits: Splits, config: Any) -> Catalogue:
    """The catalogue of a prepared data set."""
    dataset = splits.train._dataset
    dataset = getattr(dataset, "original", None) or dataset  # regenerated rows are nobody's history
    parts = [dataset, splits.valid._dataset, splits.test._dataset]
    tokens = splits.vocabulary()["items"]
    titles = read_titles(Path(config["data_path"]) / f"{config['dataset']}.item", tokens)
    if not all(isinstance(part, SequenceDataset) and part.is_lazy for part in parts):
        targets = dataset.inter_feat[dataset.iid_field].numpy()
        return Catalogue(np.bincount(targets, minlength=len(tokens)), titles, None)
    windows = [part.windows()[:2] for part in parts]
    users = np.concatenate([users for users, _ in windows])
    positions = np.concatenate([positions - (part is parts[-1]) for part, (_, positions) in zip(parts, windows)])
    items, offsets = parts[-1].store.until(users, positions)
    return Catalogue(np.bincount(items, minlength=len(tokens)), titles, Histories(offsets, items.astype(np.int32)))


def read_titles(path: Path, tokens: list[str]) -> Optional[list[str]]:
    """Names of the items `tokens` from an atomic item file; None without the file or a column of names.

    The column is the first whose name contains ``title``, else ``name``. An item that the file lacks has its id.
    """
    if not path.is_file():
        return None
    with open(path, encoding="utf-8", newline="", errors="replace") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = [column.split(":")[0].lower() for column in next(rows, [])]
        found = [column for word in ("title", "name") for column in header if word in column]
        if not found or "item_id" not in header:
            return None
        id_at, at = header.index("item_id"), header.index(found[0])
        names = {row[id_at]: row[at].strip() for row in rows if len(row) > max(id_at, at)}
    return [names.get(token) or token for token in tokens]
