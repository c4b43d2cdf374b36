"""Figures of one small run, held against a file: RaSeRec above its base, and both where they were.

The file is remade by the command named in it. Make a new one only where a change is meant to change results.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
from pipeline_helpers import PLANTED, figures, run

from recbole_raserec.evaluation.protocols import PROTOCOLS

GOLDEN = Path(__file__).parent / "golden" / "planted.json"
REMAKE = "PYTHONPATH=. python tests/test_golden.py --remake"

#: Rounding differs between processors and builds of torch; 6 of the 600 users may change places.
TOLERANCE = 0.01
#: RaSeRec's lead over its base in NDCG@10; the run has some three times that.
MARGIN = 0.02


def test_retrieval_beats_the_base_by_a_clear_margin(planted_run):
    for phase in ("valid", "test"):
        for protocol in PROTOCOLS:
            base, ours = (figures(planted_run.record)[who][phase][protocol]["ndcg@10"] for who in ("base", "ours"))
            assert ours > base + MARGIN, (phase, protocol)


def test_the_figures_are_those_of_the_golden_file(planted_run):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert golden["remake"] == REMAKE
    assert golden["options"] == PLANTED, f"the run has changed; remake the file: {REMAKE}"
    made = figures(planted_run.record)
    for who, phases in golden["metrics"].items():
        for phase, protocols in phases.items():
            for protocol, values in protocols.items():
                expected = pytest.approx(values, abs=TOLERANCE)
                assert made[who][phase][protocol] == expected, (who, phase, protocol)
    assert golden["metrics"].keys() == made.keys()


def remake() -> None:
    import torch

    from recbole_raserec.storage.files import write_json

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        made = run(directory, **PLANTED)
    record = made.record
    kept = {name: record[name] for name in ("model", "backbone", "dataset", "seed", "metrics", "versions")}
    write_json(GOLDEN, {"remake": REMAKE, "options": PLANTED, **kept})
    print(f"{GOLDEN} written:\n{made.printed}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--remake"]:
        raise SystemExit(f"usage: {REMAKE}")
    remake()
