"""The command line: what reaches the runner, exit codes, and messages without a traceback."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from recbole_raserec.cli import main as cli
from recbole_raserec.errors import ConfigError, DatasetError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def runner(monkeypatch):
    """Stand in for the pipeline; `calls` gets the arguments, `outcome` is raised when set."""
    stub = types.ModuleType("recbole_raserec.quick_start")
    stub.calls, stub.outcome = [], None

    def run_recbole_raserec(**arguments):
        stub.calls.append(arguments)
        if stub.outcome is not None:
            raise stub.outcome
        return {}

    stub.run_recbole_raserec = run_recbole_raserec
    monkeypatch.setitem(sys.modules, "recbole_raserec.quick_start", stub)
    return stub


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--model=RaSeRec", "--dataset=shop", "--config_files=a.yaml b.yaml", "--alpha=0.5", "--top_k=7"],
        ["--model=RaSeRec", "--dataset=shop", "--config_files=a.yaml b.yaml", "--alpha=0.5", "--top_k=7"],
        ["run", "--alpha", "0.5", "-m", "RaSeRec", "-d", "shop", "--config_files", "a.yaml b.yaml", "--top_k", "7"],
        ["-m=RaSeRec", "--alpha=0.5", "--model=RaSeRec", "-d=shop", "--config_files=a.yaml b.yaml", "--top_k=7"],
    ],
)
def test_run_hands_over_the_options(runner, words):
    assert cli.main(words) == 0
    assert runner.calls == [
        {
            "model": "RaSeRec",
            "dataset": "shop",
            "config_file_list": ["a.yaml", "b.yaml"],
            "config_dict": None,
            "argv": ["--alpha=0.5", "--top_k=7"],
        }
    ]


def test_what_is_not_given_is_left_to_the_configuration(runner):
    assert cli.main(["run"]) == 0
    assert runner.calls[0] == {
        "model": None,
        "dataset": None,
        "config_file_list": None,
        "config_dict": None,
        "argv": [],
    }


def test_values_with_signs_spaces_and_equals_pass_unchanged(runner):
    words = ["--metrics=['Recall', 'NDCG']", "--load_col={'inter': ['a=b']}", "--shift", "-1", "--note="]
    assert cli.main(words) == 0
    assert runner.calls[0]["argv"] == [*words[:2], "--shift=-1", "--note="]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "RaSeRec"], "'RaSeRec' is no option"),
        (["run", "--model"], "--model has no value"),
        (["--resume", "--seed=1"], "--resume has no value: write --resume=VALUE (for a switch --resume=True)"),
        (["--model=A", "--model=B"], "--model is given twice, as 'A' and 'B'"),
        (["--dataset="], "--dataset is empty"),
        (["-x=1"], "-x=1: the only short options"),
        (["prepre"], "unknown sub-command 'prepre': did you mean prepare?"),
        (["zzz"], "unknown sub-command 'zzz': choose one of run, prepare, regenerate, recommend"),
        (["prepare"], "not given: --input "),
        (["prepare", "--inptu=x"], "unknown option --inptu: did you mean --input?"),
        (["prepare", "--input=x", "--format=ratings", "--output=o", "--name=n", "--k_core=few"], "--k_core"),
        (
            ["prepare", "--input=x", "--format=ratings", "--output=o", "--name=n", "--header", "--no_header"],
            "--no_header",
        ),
        (["prepare", "--input=x", "--format=ratings", "--output=o", "--name=n"], "--input=x does not exist"),
    ],
)
def test_wrong_words(runner, capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""
    assert runner.calls == []


def test_several_wrong_words_are_reported_together(runner, capsys):
    assert cli.main(["run", "a", "--b", "--c=1", "-d"]) == 2
    assert capsys.readouterr().err.count("\n  - ") == 3


@pytest.mark.parametrize("error", [ConfigError(["alpha: 1.2"]), DatasetError("not there")])
def test_errors_of_the_package_are_one_message(runner, capsys, error):
    runner.outcome = error
    assert cli.main(["--model=RaSeRec"]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_other_errors_are_not_hidden(runner):
    runner.outcome = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        cli.main(["--model=RaSeRec"])


def test_interrupt(runner, capsys):
    runner.outcome = KeyboardInterrupt()
    assert cli.main(["--model=RaSeRec"]) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_prepare_end_to_end(tmp_path, capsys):
    (tmp_path / "raw.tsv").write_text("u\ti\t5\t1\nu\tj\t4\t2\nv\ti\t3\t1\n")
    words = [
        "prepare",
        f"--input={tmp_path}/raw.tsv",
        "--format",
        "ratings",
        f"--output={tmp_path}/data",
        "--name=shop",
    ]
    assert cli.main([*words, "--sep=tab", "--no_header"]) == 0
    printed = capsys.readouterr().out
    assert f"recbole-raserec run --model=RaSeRec --dataset=shop --data_path={tmp_path}/data" in printed
    assert "interactions             3" in printed
    assert (tmp_path / "data" / "shop" / "shop.inter").read_text().count("\n") == 4
    assert cli.main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite", "--k_core=2"]) == 2
    assert "leaves none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--help"], ["prepare     turn raw data", "regenerate  ", "--version"]),
        (["-h"], ["Usage:"]),
        (
            ["run", "--help"],
            ["--backbone=NAME", "--data_path=DIR", "--result_file=FILE", "--epochs=N", "--config_files"],
        ),
        (["--model=RaSeRec", "--help"], ["--backbone=NAME"]),
        (["prepare", "--help"], ["--k_core", "sequences", "--time_col", "--overwrite"]),
        (["--version"], ["recbole-raserec 0.", "recbole 1.2.1", "torch "]),
    ],
)
def test_help(runner, capsys, words, shown):
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in shown)
    assert runner.calls == []


def test_options_are_listed_from_their_declarations(capsys):
    assert cli.main(["options"]) == 0
    printed = capsys.readouterr().out
    assert "--seed=2020" in printed
    assert "--regen_gamma=0.1" in printed
    assert cli.main(["options", "RaSeRec"]) == 0
    assert "neighbours per query; K in the paper, 20 in its Beauty run (an integer >= 1 and <= 100000)" in " ".join(
        capsys.readouterr().out.split()
    )
    assert cli.main(["options", "RaSeRek"]) == 2
    assert "did you mean RaSeRec?" in capsys.readouterr().err


def test_no_words_at_all_is_a_usage_error(capsys):
    assert cli.main([]) == 2
    assert "Usage:" in capsys.readouterr().err


def test_the_prepare_examples_of_the_help_are_valid(capsys):
    assert cli.main(["prepare", "--help"]) == 0
    joined = capsys.readouterr().out.replace("\\\n", " ")
    examples = [line.split() for line in joined.splitlines() if line.strip().startswith("recbole-raserec prepare")]
    assert len(examples) == 4
    for words in examples:
        assert cli.prepare.make_context("prepare", words[2:]).params["output"] == "dataset"


def test_help_and_a_wrong_option_need_no_heavy_import():
    code = (
        "import sys; from recbole_raserec.cli import main as cli; "
        "words = (['--help'], ['prepare', '--help'], ['tune', '--help'], ['run', '--model'], ['--version']); "
        "codes = [cli.main(each) for each in words]; "
        "assert codes == [0, 0, 0, 2, 0], codes; "
        "heavy = {'torch', 'recbole', 'pandas', 'faiss', 'optuna'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_script_is_the_run_command():
    script = [sys.executable, str(ROOT / "run_recbole_raserec.py")]
    done = subprocess.run([*script, "--help"], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0
    assert "--backbone_checkpoint=DIR" in done.stdout
    done = subprocess.run([*script, "--model"], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
