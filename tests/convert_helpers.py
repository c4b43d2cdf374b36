"""What the tests of the conversion share; their fixture is in conftest.py."""

from __future__ import annotations

import numpy as np
import pandas as pd


def as_recbole_reads(path):
    """RecBole's way of reading: names from the header, tokens as text, floats as float64."""
    names = path.read_text(encoding="utf-8").split("\n", 1)[0].split("\t")
    kinds = {name: str if name.endswith(":token") else np.float64 for name in names}
    table = pd.read_csv(path, delimiter="\t", dtype=kinds, encoding="utf-8", engine="python")
    return table.rename(columns=lambda name: name.split(":")[0])


def rows(table):
    return list(table.itertuples(index=False, name=None))
