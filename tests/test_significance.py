"""Significance: Holm's correction, the paired test, and the file of ranks that both tests are computed from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_helpers import TINY
from scipy import stats
from scipy.sparse import csr_matrix

from recbole_raserec.comparison.figures import Finished, Row, figures, spread
from recbole_raserec.errors import CheckpointError
from recbole_raserec.evaluation.protocols import PROTOCOLS, Ranks, metrics_from_ranks, query_metrics
from recbole_raserec.evaluation.ranks import holm, paired_p, read_ranks, user_metrics, write_ranks
from recbole_raserec.kernels.allocator import peak_memory_mb
from recbole_raserec.training.stage import DECIMALS

# ------------------------------------------------------------------ Holm


def test_holm_by_hand():
    # sorted .005 .01 .03 .04 -> times 4, 3, 2, 1 -> .02 .03 .06 .04, the last raised to the one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_could_not_be_tested_does_not_count():
    assert holm([None, 0.02, None]) == [None, 0.02, None]


@pytest.mark.parametrize("wrong", [-0.1, 1.5, math.nan])
def test_holm_refuses_what_is_no_p_value(wrong):
    with pytest.raises(ValueError, match="no p-value"):
        holm([0.5, wrong])


@given(st.lists(st.floats(0, 1), max_size=12))
@settings(max_examples=100, deadline=None)
def test_corrected_values_are_no_smaller_and_keep_the_order(p):
    corrected = holm(p)
    assert all(raw <= value <= 1 for raw, value in zip(p, corrected))
    for i in range(len(p)):
        for j in range(len(p)):
            assert not (p[i] < p[j] and corrected[i] > corrected[j])
    # no more than Bonferroni's, and the smallest is exactly that
    assert all(value <= min(1, len(p) * raw) + 1e-12 or raw > min(p) for raw, value in zip(p, corrected))
    if p:
        assert min(corrected) == min(1, len(p) * min(p))


# ------------------------------------------------------------------ the paired test


def test_the_paired_test_is_scipys_and_the_formula():
    rng = np.random.default_rng(0)
    base = rng.random(40)
    ours = base + rng.normal(0.02, 0.05, 40)
    difference = ours - base
    t = difference.mean() / (difference.std(ddof=1) / math.sqrt(40))
    assert paired_p(ours, base) == pytest.approx(stats.ttest_rel(ours, base).pvalue)
    assert paired_p(ours, base) == pytest.approx(2 * stats.t.sf(abs(t), 39))
    assert paired_p(base, ours) == pytest.approx(paired_p(ours, base))
    assert paired_p(ours, base) < stats.ttest_ind(ours, base).pvalue  # the pairs are worth something


def test_the_edges_of_the_paired_test():
    assert paired_p([0.1], [0.2]) is None
    assert paired_p([0.1, 0.2], [0.1, 0.2]) == 1.0
    assert paired_p([0.5, 0.75], [0.25, 0.5]) is None
    assert paired_p([0.500001, 0.75], [0.25, 0.5]) is None  # equal but for the rounding of the figures
    assert paired_p([0.51, 0.75], [0.25, 0.5]) < 0.05
    with pytest.raises(ValueError, match="same length"):
        paired_p([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="finite"):
        paired_p([0.1, math.nan], [0.1, 0.2])


def test_spread():
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(math.sqrt(2), abs=1e-6)}
    assert spread([2.0]) == {"mean": 2.0, "std": None}
    assert spread([None]) == {"mean": None, "std": None}


# ------------------------------------------------------------------ the ranks of a run


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("RaSeRec", {"metrics": ["Recall", "NDCG", "MRR", "Hit", "Precision", "MAP"], "topk": [1, 10]}),
        ("BPR", {"eval_args": {"split": {"RS": [0.6, 0.2, 0.2]}}}),  # several targets a user
        (
            "SASRec",
            {**{key: TINY[key] for key in ("MAX_ITEM_LIST_LENGTH",)}, "eval_args": {"split": {"RS": [6, 2, 2]}}},
        ),
    ],
    ids=["RaSeRec", "BPR", "SASRec"],
)
def test_the_ranks_give_the_figures_of_the_record(tiny_run, tmp_path, model, options):
    made = tiny_run(model, ranks_file="ranks.npz", **options)
    stored = read_ranks(tmp_path / "ranks.npz")
    figures_of = made.record["metrics"]
    assert list(stored) == (["base", "base + (iii)"] if model == "RaSeRec" else ["base"])
    for ranks, who in zip(stored.values(), ("base", "ours")):
        assert set(ranks.users) <= set(made.base.splits.vocabulary()["users"]) - {"[PAD]"}
        for protocol in PROTOCOLS:
            expected = figures_of[who]["test"][protocol]
            every = torch.from_numpy(ranks.ranks[protocol]), made.record["options"], torch.from_numpy(ranks.queries)
            again = metrics_from_ranks(*every[:2], queries=every[2], decimals=DECIMALS)
            assert again == expected
            each = query_metrics(*every[:2], queries=every[2])
            assert {name: round(float(v.mean()), DECIMALS) for name, v in each.items()} == pytest.approx(expected)
            users, values = user_metrics(ranks, protocol, made.record["options"])
            assert list(users) == sorted(set(ranks.users))
            one = np.flatnonzero(ranks.users == users[3])
            assert len(one) == 1 or model == "SASRec"
            for name in expected:
                assert values[name][3] == pytest.approx(each[name][one].mean())
    if model == "RaSeRec":
        assert (stored["base"].ranks["seen_kept"] != stored["base + (iii)"].ranks["seen_kept"]).any()
        assert made.record["parameters"]["ours"] > made.record["parameters"]["base"] > 0
    else:
        assert set(made.record["parameters"]) == {"base"}
    assert made.record["parameters"]["base"] == sum(p.numel() for p in made.base.model.parameters())
    assert made.record["protocol"]["validation_in_history"] is (model != "BPR")
    assert made.record["protocol"]["validation_in_memory"] is (model == "RaSeRec")
    assert 50 < made.record["peak_memory_mb"] <= peak_memory_mb() + 1


def test_a_file_of_ranks_is_written_whole_and_read_without_pickle(tmp_path):
    path = tmp_path / "deep" / "ranks.npz"
    ranks = Ranks(*(torch.tensor(x) if x else None for x in ([3, 1], None, [0, 1], [2, 1], [1, 3])))
    seen = {"valid": csr_matrix([[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 0, 0]]), "test": csr_matrix([[0], [1], [4]]) > 0}
    write_ranks(path, {"base": ranks}, ["[PAD]", "anna", "björn"], seen)
    stored = read_ranks(path)["base"]
    assert {name: values.tolist() for name, values in stored.groupings.items()} == {
        "popularity": [2, 1], "history": [1, 1]
    }  # fmt: skip
    assert list(stored.users) == ["björn", "anna"]
    assert stored.ranks["seen_kept"].tolist() == [3, 1]
    assert list(stored.ranks) == ["seen_kept"]
    assert [each.name for each in path.parent.iterdir()] == ["ranks.npz"]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"ranks\.npz"):
        read_ranks(path)
    np.savez(path, **{"base/users": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(CheckpointError, match="not a readable file of ranks"):
        read_ranks(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_ranks(tmp_path / "none.npz")


# ------------------------------------------------------------------ rows of a comparison

OPTIONS = {"metrics": ["Recall", "MRR"], "topk": [5], "metric_decimal_place": 4, "eval_args": {"mode": "full"}}


@pytest.fixture
def run_of(tmp_path):
    """Makes a `Finished` from the ranks of its users."""

    def build(name, users, kept, base=None):
        kept = torch.as_tensor(kept)
        names = ["[PAD]", *users]
        rows = torch.arange(len(kept))
        stages = {"base": Ranks(kept, None, rows, rows + 1, rows)}
        nothing = csr_matrix((len(names), len(names)), dtype=bool)
        write_ranks(tmp_path / f"{name}.npz", stages, names, {"valid": nothing, "test": nothing})
        metrics = {"test": {"seen_kept": metrics_from_ranks(kept, OPTIONS, decimals=DECIMALS)}}
        record = {
            "metrics": {"base": metrics} if base is None else {"base": base.record["metrics"]["base"], "ours": metrics},
            "parameters": {"base": 7},
            "options": OPTIONS,
            "seconds": {"recommendation": 2.0, "retrieval": 1.0, "this_run": 9.0},
            "peak_memory_mb": 100.0,
            "protocol": {"split": {}, "validation_in_history": True, "validation_in_memory": base is not None},
        }
        return Finished(record, tmp_path / f"{name}.npz")

    return build


def test_users_are_paired_by_name_and_seeds_by_seed(run_of):
    rng = np.random.default_rng(1)
    users = [f"u{number}" for number in range(30)]
    base, ours, mean = {}, {}, np.zeros((2, 30))
    for seed in (1, 2, 3):
        ranks = rng.integers(1, 9, (2, 30))
        base[seed] = run_of(f"base{seed}", users, ranks[0])
        order = rng.permutation(30)  # another data loader may have another order
        ours[seed] = run_of(f"ours{seed}", [users[k] for k in order], ranks[1][order], base[seed])
        mean += np.where(ranks <= 5, 1 / ranks, 0) / 3
    del ours[3]  # failed: seed 3 is no pair
    mean -= np.where(ranks <= 5, 1 / ranks, 0) / 3
    made = figures([Row("SASRec", None, base, {}), Row("RaSeRec", "SASRec", ours, {3: "out of memory"})])
    row = made["rows"][1]
    assert row["pairs"] == {"users": 30, "seeds": 2}
    found = row["significance"]["seen_kept"]["mrr@5"]
    assert found["users"] == pytest.approx(stats.ttest_rel(mean[1], mean[0]).pvalue)
    values = [[of[seed].metrics["seen_kept"]["mrr@5"] for seed in (1, 2)] for of in (ours, base)]
    assert found["seeds"] == pytest.approx(stats.ttest_rel(*values).pvalue)
    other = row["significance"]["seen_kept"]["recall@5"]
    assert [found["users_holm"], other["users_holm"]] == holm([found["users"], other["users"]])
    assert row["improvement_percent"]["seen_kept"]["mrr@5"] == pytest.approx(
        100 * (np.mean(values[0]) / np.mean(values[1]) - 1), abs=0.01
    )
    assert row["metrics"]["seen_kept"]["mrr@5"]["mean"] == pytest.approx(np.mean(values[0]), abs=1e-6)
    assert row["failed"] == {"3": "out of memory"}
    assert "significance" not in made["rows"][0]
    assert (row["training_seconds"]["mean"], made["rows"][0]["training_seconds"]["mean"]) == (1.0, 3.0)
    assert made["users"] == 30


def test_one_family_holds_all_rows_of_a_protocol(run_of):
    rng = np.random.default_rng(2)
    users = [f"u{number}" for number in range(20)]
    base = {1: run_of("base", users, rng.integers(1, 9, 20))}
    rows = [Row("SASRec", None, base, {})]
    rows += [Row(n, "SASRec", {1: run_of(n, users, rng.integers(1, 9, 20), base[1])}, {}) for n in ("A", "B")]
    made = figures(rows)["rows"][1:]
    entries = [entry for row in made for entry in row["significance"]["seen_kept"].values()]
    assert len(entries) == 4
    assert [entry["users_holm"] for entry in entries] == holm([entry["users"] for entry in entries])
    assert any(entry["users_holm"] > entry["users"] for entry in entries)
    assert all(entry["seeds"] is None and entry["seeds_holm"] is None for entry in entries)
