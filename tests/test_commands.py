"""The commands recommend, explain and doctor."""

from __future__ import annotations

import csv
import io
import json

import pytest

from recbole_raserec import Recommender
from recbole_raserec.cli import doctor
from recbole_raserec.cli.main import main


@pytest.fixture(scope="module")
def loaded(planted_run):
    directory = str(planted_run.ours.directory)
    return directory, Recommender.load(directory, "cpu")


def call(capsys, *words):
    capsys.readouterr()
    code = main(list(words))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_recommend_in_three_forms(loaded, capsys, tmp_path):
    directory, recommender = loaded
    items = recommender.items[1:4]
    wanted = recommender.recommend([items], k=3)
    code, out, _ = call(capsys, "recommend", directory, f"--items={' '.join(items)}", "--k=3", "--device=cpu")
    assert code == 0
    assert [line.split()[2] for line in out.splitlines()] == wanted[0]
    code, out, err = call(capsys, "recommend", directory, f"--items={','.join(items)},x", "--k=3", "--format=json")
    (row,) = json.loads(out)
    assert [item["item"] for item in row["items"]] == wanted[0]
    assert [item["score"] for item in row["items"]] == pytest.approx(wanted.scores[0].tolist())
    assert row["dropped"] == 1
    assert "1 unknown items dropped" in err
    user = recommender.users[5]
    code, out, _ = call(capsys, "recommend", directory, f"--user={user}", "--k=2", "--format=csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["item"] for row in rows] == recommender.recommend(users=[user], k=2)[0]
    assert {row["query"] for row in rows} == {user}


def test_histories_from_files(loaded, capsys, tmp_path):
    directory, recommender = loaded
    a, b, c, d = recommender.items[1:5]
    wanted = recommender.recommend([[a, b], [c], []], k=2)
    (tmp_path / "h.txt").write_text(f'{a} {b}\n["{c}"]\n\n')
    output = tmp_path / "out.json"
    words = ("recommend", directory, f"--input={tmp_path / 'h.txt'}", "--k=2", "--format=json", f"--output={output}")
    code, out, err = call(capsys, *words)
    assert (code, out) == (0, "")
    assert "most popular" in err
    assert [[item["item"] for item in row["items"]] for row in json.loads(output.read_text())] == wanted.items
    log = tmp_path / "log.csv"
    log.write_text(f"user_id,item_id,timestamp\nz,{b},2\nz,{a},1\n")
    code, out, _ = call(capsys, "recommend", directory, f"--input={log}", "--k=2", "--format=csv", f"--exclude={d}")
    assert code == 0
    assert [row["item"] for row in csv.DictReader(io.StringIO(out))] == recommender.recommend([[a, b]], 2, exclude=[d])[
        0
    ]


def test_explain_in_three_forms(loaded, capsys, tmp_path):
    directory, recommender = loaded
    items = recommender.items[1:4]
    wanted = recommender.explain(items, 2)
    words = ("explain", directory, f"--items={' '.join(items)}", "--k=2", "--device=cpu")
    assert call(capsys, *words)[1].rstrip("\n") == wanted.to_text()
    assert json.loads(call(capsys, *words, "--format=json")[1]) == json.loads(wanted.to_json())
    assert call(capsys, *words, "--format=html", f"--output={tmp_path / 'why.html'}")[0] == 0
    assert (tmp_path / "why.html").read_text().lower().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("recommend",), "checkpoint|DIR"), (("recommend", "nowhere", "--items=1"), "is not a checkpoint directory"),
        (("recommend", "{}"), "give one history by --items or --user, or several by --input"),
        (("recommend", "{}", "--items=1", "--input=x"), "give one history"),
        (("recommend", "{}", "--input=nowhere"), "input: nowhere cannot be read"),
        (("recommend", "{}", "--items=1", "--k=0"), "k: 0"),
        (("recommend", "{}", "--items=1", "--k=x"), "is not a valid integer"),
        (("explain", "{}"), "give a history by --items or --user"),
        (("explain", "{}", "--items=unknown"), "nothing is known"),
        (("recommend", "{}", "--items=1", "--itmes=2"), "unknown option --itmes: did you mean --items"),
    ],
)  # fmt: skip
def test_wrong_words(loaded, capsys, words, message):
    code, _, err = call(capsys, *(word.format(loaded[0]) for word in words))
    assert code == 2
    assert err.startswith("error: ")
    import re

    assert re.search(message, err)


def test_help(capsys):
    for command in ("recommend", "explain", "doctor"):
        code, out, _ = call(capsys, command, "--help")
        assert code == 0
        assert f"recbole-raserec {command}" in out


def test_doctor_reports(capsys):
    code, out, _ = call(capsys, "doctor", "--no_self_test")
    assert code == 0
    for word in ("recbole 1.2.1", "torch", "kernels", "faiss", "torch-load"):
        assert word in out
    code, out, _ = call(capsys, "doctor", "--json", "--no_self_test")
    found = json.loads(out)
    assert found["packages"]["recbole"] == "1.2.1"
    assert found["self_test"] == []


def test_doctor_tests_itself():
    checks = {check.name: check for check in doctor.self_test()}
    assert set(checks) == {"kernels", "search", "pipeline"}
    assert all(check.passed for check in checks.values()), checks


def test_a_doctor_who_finds_something(capsys, monkeypatch):
    def broken():
        raise OSError("no such library")

    monkeypatch.setattr(doctor, "_TESTS", {"search": broken})
    code, out, err = call(capsys, "doctor")
    assert code == 2
    assert "self-test search: FAILED (OSError: no such library (test_commands.py:" in out
    assert "self-test failed: search" in err
