"""The search for adapter sizes: it resumes, writes a file that a run takes, and counts parameters rightly."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs the extra llm")
pytest.importorskip("optuna", reason="needs the extra tune")

from conftest import random_log
from darec_helpers import small, tiny_llm, write_data

from recbole_raserec.config.config import Config
from recbole_raserec.tuning import adaption
from recbole_raserec.tuning.adaption import Adaption, main, search


@pytest.mark.parametrize("sampler", ["gp", "random"])
def test_a_search_goes_on_where_it_stopped(workdir, sampler):
    write_data(workdir, random_log(0))
    config = Config("DARec", "tiny", config_dict=small(workdir, tiny_llm(workdir)), argv=[])
    journal = workdir / "trials.journal"
    first = search(config, 2, 1, 1, journal, sampler, (0, 2, 4))
    found = search(config, 2, 3, 1, journal, sampler, (0, 2, 4))
    assert found.trials[:1] == first.trials
    assert len(found.trials) == 3
    assert (found.sizes, found.value) == max(found.trials, key=lambda pair: pair[1])
    assert all(size in (0, 2, 4) for sizes, _ in found.trials for pair in sizes for size in pair)
    assert search(config, 2, 3, 1, journal, sampler, (0, 2, 4)).trials == found.trials  # nothing left to do


def test_uniform_adapters_have_as_many_parameters():
    assert Adaption([(0, 8), (16, 0)], 0.0, []).uniform_size() == 6
    assert Adaption([(0, 0)], 0.0, []).uniform_size() == 1


def test_the_command_writes_what_a_run_reads(workdir, monkeypatch, capsys):
    write_data(workdir, random_log(0))
    monkeypatch.setattr(adaption, "CHOICES", (0, 2))
    options = [f"--{name}={value}" for name, value in small(workdir, tiny_llm(workdir)).items()]
    output = workdir / "adapters.yaml"
    assert main([f"--output={output}", "--dataset=tiny", "--trials=2", "--adaption_epochs=1", *options]) == 0
    assert "uniform adapters of as many parameters" in capsys.readouterr().out
    sizes = Config("DARec", "tiny", [str(output)], {"data_path": str(workdir)}, [])["adapter_sizes"]
    assert len(sizes) == 2
    told = [line for line in output.read_text().splitlines() if line.startswith(("# 0: ", "# 1: "))]
    chosen = " ".join(f"{a}/{b}" for a, b in sizes)
    assert len(told) == 2
    assert max(told, key=lambda line: float(line.split()[2])).endswith(chosen)
    assert main(["--dataset=tiny", "--output=x.yaml", "--sampler=guess"]) == 2
    assert "sampler" in capsys.readouterr().err
    assert main([f"--output={output}", "--dataset=tiny", "--nproc=2", *options]) == 2
    assert "nproc: 2 processes" in capsys.readouterr().err
