"""What a comparison is asked for, plans and refuses."""

from __future__ import annotations

import pytest
from compare_helpers import go

from recbole_raserec.cli import main as cli
from recbole_raserec.comparison.driver import compare
from recbole_raserec.comparison.plan import Problems, make_plan, parse_seeds, parse_specs, split_outside
from recbole_raserec.errors import ConfigError

# ------------------------------------------------------------------ what is asked for


def test_specs_are_split_outside_of_brackets_and_quotes():
    problems = Problems()
    text = "SASRec, RaSeRec:backbone=SASRec;topk=[5,10],BPR:eval_args={'split': {'LS': 'x'}}:note='a,b;c:d'"
    specs = parse_specs(text, problems)
    assert [spec.model for spec in specs] == ["SASRec", "RaSeRec", "BPR"]
    assert specs[1].options == {"backbone": "SASRec", "topk": "[5,10]"}
    assert specs[2].options == {"eval_args": "{'split': {'LS': 'x'}}", "note": "'a,b;c:d'"}
    assert specs[1].label == "RaSeRec:backbone=SASRec:topk=[5,10]"
    assert parse_specs(["SASRec", "A:b=1"], problems)[1].options == {"b": "1"}
    assert problems.found == {}
    assert split_outside("", ",") == [""]


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        ("5", (2020, 2021, 2022, 2023, 2024)), (2, (2020, 2021)), ("1", (2020,)), ("2020,2021", (2020, 2021)),
        ("2020,", (2020,)), ("7, 3", (7, 3)), ([7], (7,)), ("1,2", (1, 2)),
    ],
)  # fmt: skip
def test_seeds(given, seeds):
    problems = Problems()
    assert parse_seeds(given, problems) == seeds
    assert problems.found == {}


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("0", "--seeds=5"), ("-1", "--seeds=5"), ("few", "--seeds=5"), ("", "--seeds=5"), ("1.5", "--seeds=5"),
        ("2020", "--seeds=2020,"), ("1,1", "twice"), ([1, "2"], "--seeds=5"), ([], "--seeds=5"), (",", "--seeds=5"),
    ],
)  # fmt: skip
def test_wrong_seeds(given, word):
    problems = Problems()
    assert parse_seeds(given, problems) == ()
    (problem,) = problems.found
    assert problem.startswith("seeds: ")
    assert str(given) in problem
    assert word in problem


def test_all_that_is_wrong_is_told_at_once_and_nothing_runs(stand_in, capsys, workdir):
    words = ["compare", "--models=SASRek,RaSeRec:top_k=0:alhpa=1,BPR:seed=3:backbone,SASRec", "--datasets=nowhere,tiny"]
    words += ["--seeds=2020", "--jobs=none", "--format=html", "--data_path=data", "--result_file=x", "--dataset=tiny"]
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    problems = printed.err.split("\n  - ")
    assert problems[0] == "error: 12 problems in the configuration:", printed.err
    for start in (
        "dataset: 'tiny': a comparison has several; write --datasets=tiny",
        "format: 'html' is unknown; choose one of text, markdown, latex, csv, json",
        "jobs: 'none' is no number of processes; write for example --jobs=2",
        "models: 'BPR:seed=3:backbone': seed cannot be given there; write --seeds=...",
        "models: 'BPR:seed=3:backbone': 'backbone' is not of the form key=value",
        "seeds: 2020 would be 2020 seeds; for the seed 2020 write --seeds=2020,",
        "output: is not given; name the directory",
        "result_file: cannot be given here; the figures go into the output directory",
        "models: SASRek: model: 'SASRek' is not a model; did you mean SASRec?",
        "models: RaSeRec:top_k=0:alhpa=1: alhpa: 1 (on the command line) is not an option; did you mean alpha?",
        "datasets: the data set 'nowhere' is not there",
        "models: RaSeRec:top_k=0:alhpa=1: top_k: 0 (on the command line) is not an integer >= 1",
    ):
        assert any(problem.startswith(start) for problem in problems[1:]), (start, printed.err)
    assert printed.out == ""
    assert stand_in.started() == []
    assert sorted(path.name for path in workdir.iterdir()) == ["base.npz", "data", "ours.npz", "runner.py"]


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"datasets": "nowhere"}, "datasets: the data set 'nowhere' is not there"),
        ({"models": "RaSeRec,RaSeRec:backbone=DuoRec"}, "RaSeRec and RaSeRec:backbone=DuoRec are the same run"),
        ({"models": "SASRec,SASRec"}, "SASRec is given twice"),
        ({"models": ""}, "--models=SASRec,RaSeRec:backbone=SASRec"),
        ({"models": "SASRec:data_path=x"}, "write --data_path=x"),
        ({"models": "RaSeRec:backbone=GRU4RecKG"}, "GRU4RecKG"),
        ({"argv": ["--backbone_checkpoint=x"], "models": "RaSeRec"}, "every base is trained with every seed"),
        ({"argv": ["--resume=false"]}, "resume: cannot be given here"),
        ({"argv": ["--top_k=3"]}, "give it to those that do, as NAME:top_k=VALUE"),
        ({"argv": ["--top_k=3"], "models": "SASRec,RaSeRec"}, "models: SASRec: top_k: 3 (on the command line)"),
        ({"models": "SASRec:top_k=3"}, "this run does not read it, remove it"),
        ({"output": "runner.py"}, "runner.py is a file"),
        ({"models": "SASRec,BPR:topk=[5,10]"}, "topk is [5, 10, 20] for SASRec, and [5, 10] for BPR:topk=[5,10]"),
        ({"models": "SASRec,BPR:user_inter_num_interval='[2,inf)'"}, "user_inter_num_interval"),
    ],
)
def test_refused(stand_in, given, word):
    with pytest.raises(ConfigError) as error:
        go(**given)
    assert word in str(error.value), error.value
    assert len(error.value.problems) == 1
    assert stand_in.started() == []


def test_a_set_checkpoint_in_a_file_is_refused_too(stand_in, workdir):
    (workdir / "o.yaml").write_text("backbone_checkpoint: x\nresume: false\n")
    with pytest.raises(ConfigError) as error:
        compare("RaSeRec", "tiny", 1, "out", config_file_list=["o.yaml"], argv=["--data_path=data"])
    assert [problem.split(":")[0] for problem in error.value.problems] == ["backbone_checkpoint", "resume"]


# ------------------------------------------------------------------ what is planned


def plan(models, seeds=1, datasets="tiny", argv=(), files=()):
    return make_plan(models, datasets, seeds, "out", list(files), ["--data_path=data", *argv])


def test_the_base_is_one_row_and_one_run_and_comes_first(stand_in):
    models = "RaSeRec:backbone=SASRec,RaSeRec:backbone=SASRec:alpha=0.3,SASRec,RaSeRec:backbone=SASRec:n_layers=1,BPR"
    made = plan(models)
    assert made.rows == {
        "tiny": {
            "SASRec": None,
            "RaSeRec:backbone=SASRec": "SASRec",
            "RaSeRec:backbone=SASRec:alpha=0.3": "SASRec",
            "SASRec:n_layers=1": None,
            "RaSeRec:backbone=SASRec:n_layers=1": "SASRec:n_layers=1",
            "BPR": None,
        }
    }
    assert [run.row for run in made.runs] == list(made.rows["tiny"])
    by_row = {run.row: run for run in made.runs}
    assert by_row["RaSeRec:backbone=SASRec"].base == by_row["SASRec"].name
    assert by_row["BPR"].needs == by_row["SASRec"].needs == frozenset()
    first, second = (by_row[row].needs for row in list(made.rows["tiny"])[1:3])
    assert first == second == {by_row["SASRec"].name}


def test_a_row_with_regeneration_stands_on_the_row_without(stand_in):
    made = plan("RaSeRec:backbone=SASRec:regeneration=true,DuoRec:regeneration=true:lmd=0.2,RaSeRec:backbone=SASRec")
    assert made.rows["tiny"] == {
        "SASRec": None,
        "RaSeRec:backbone=SASRec:regeneration=true": "SASRec",
        "DuoRec:lmd=0.2": None,
        "DuoRec:regeneration=true:lmd=0.2": "DuoRec:lmd=0.2",
        "RaSeRec:backbone=SASRec": "SASRec",
    }
    names = {run.row: run.name for run in made.runs}
    first, second = (run.needs for run in made.runs if "regeneration" in run.options)
    assert first == {names["SASRec"]}
    assert second == {names["SASRec"], names["DuoRec:lmd=0.2"]}  # the regenerator starts from SASRec's item vectors


def test_what_decides_a_figure_names_the_run(stand_in, workdir):
    def names(models="RaSeRec:backbone=SASRec", **given):
        return [run.name for run in plan(models, **given).runs]

    before = names()
    assert [name.rpartition("-")[0] for name in before] == ["SASRec-tiny-2020", "RaSeRec-tiny-2020"]
    for same in ("threads=1", "checkpoint_dir=x", "show_progress=true", "eval_memory_mb=64", "learning_rate=0.001"):
        assert names(argv=[f"--{same}"]) == before
    for other in ("epochs=3", "topk=[5,10]", "metrics=['NDCG','MRR']", "eval_args={'split':{'LS':'test_only'}}"):
        assert not set(names(argv=[f"--{other}"])) & set(before)
    changed = names("RaSeRec:backbone=SASRec:alpha=0.4")
    assert (changed[0] == before[0], changed[1] == before[1]) == (True, False)
    (workdir / "o.yaml").write_text("top_k: 7\n")
    from_file = names(files=["o.yaml"])
    assert (from_file[0] == before[0], from_file[1] == before[1]) == (True, False)
    log = workdir / "data" / "tiny" / "tiny.inter"
    log.write_text(log.read_text().replace("u1\t", "u99\t"))
    assert not set(names()) & set(before)


def test_other_versions_are_other_runs(stand_in, monkeypatch):
    from recbole_raserec.comparison import plan as names

    before = [run.name for run in plan("SASRec").runs]
    found = names.versions()
    monkeypatch.setattr(names, "versions", lambda: {**found, "torch": "9.9"})
    assert [run.name for run in plan("SASRec").runs] != before
