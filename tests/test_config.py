"""The configuration: shipped files, RecBole's models, what is derived."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Annotated, Literal, Optional

import pydantic
import pytest
import recbole
import recbole.model.general_recommender
import recbole.model.sequential_recommender
import yaml
from config_helpers import only_problem, write
from pipeline_helpers import figures
from pydantic import Field
from recbole.config import Config as RecBoleConfig
from recbole.model.abstract_recommender import GeneralRecommender, SequentialRecommender
from recbole.utils import InputType

from recbole_raserec.config import options, properties, sources
from recbole_raserec.config.config import Config
from recbole_raserec.errors import ConfigError
from recbole_raserec.recommendation.sasrec import SASRec, SASRecOptions
from recbole_raserec.retrieval.raserec import RaSeRecOptions

RECBOLE = Path(recbole.__file__).parent
SHIPPED = sorted(path for path in sources.PROPERTIES.rglob("*.yaml") if path.parent.name != "tune")
MODELS = sorted(
    name
    for package, base in (
        (recbole.model.general_recommender, GeneralRecommender),
        (recbole.model.sequential_recommender, SequentialRecommender),
    )
    for name, value in vars(package).items()
    if isinstance(value, type) and issubclass(value, base) and value.__module__.startswith(package.__name__ + ".")
)


# ---------------------------------------------------------------------- shipped files


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_yaml_makes_a_configuration_and_holds_known_options(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    model = path.stem if path.parent.name == "model" else "RaSeRec"
    dataset = path.stem if path.parent.name == "dataset" else "ml-100k"
    # Given as the user's own file, every option in it passes the checks for unknown names and for values.
    config = Config(model, dataset, config_file_list=[path], argv=[])
    for name in content:
        assert config[name] is not None or content[name] is None


def test_shipped_files_are_those_promised():
    assert {path.relative_to(sources.PROPERTIES).as_posix() for path in SHIPPED} >= {
        "overall.yaml",
        *(f"model/{name}.yaml" for name in ("RaSeRec", "DuoRec", "SASRec")),
        *(f"dataset/amazon-{name}.yaml" for name in ("beauty", "toys-games", "sports-outdoors")),
        *(f"dataset/{name}.yaml" for name in ("ml-100k", "planted")),
    }


def test_every_option_of_the_retrieval_stage_has_a_default_and_a_rule():
    shipped = yaml.safe_load((sources.PROPERTIES / "model" / "RaSeRec.yaml").read_text(encoding="utf-8"))
    assert set(shipped) == set(RaSeRecOptions.model_fields)


def test_options_of_the_retrieval_stage_that_hide_one_of_a_backbone():
    keys = sources.model_keys()
    backbones = [name for name in keys if hasattr(recbole.model.sequential_recommender, name) and name != "RaSeRec"]
    assert len(backbones) > 25
    hidden = {name: keys[name] & set(RaSeRecOptions.model_fields) for name in backbones}
    # Known: these two keep their own default in a RaSeRec run. Any other would need a new name here.
    assert {name: set(names) for name, names in hidden.items() if names} == {"DIEN": {"alpha"}, "FOSSIL": {"alpha"}}
    assert Config("RaSeRec", "ml-100k", argv=["--backbone=FOSSIL", "--alpha=0.9"]).for_backbone()["alpha"] == 0.6


@pytest.mark.parametrize("dataset", ["amazon-beauty", "amazon-toys-games", "amazon-sports-outdoors", "ml-100k"])
@pytest.mark.parametrize("model", ["RaSeRec", "SASRec", "BPR", "GRU4Rec"])
def test_protocol_of_the_published_data_sets(model, dataset):
    config = Config(model, dataset, argv=[])
    assert config["eval_args"] == {
        "split": {"LS": "valid_and_test"},
        "order": "TO",
        "group_by": "user",
        "mode": {"valid": "full", "test": "full"},
    }
    assert (config["metrics"], config["topk"]) == (["Recall", "NDCG"], [5, 10, 20])
    assert config["valid_metric"] == "NDCG@10"
    assert config["MAX_ITEM_LIST_LENGTH"] == 50
    assert config["user_inter_num_interval"] == config["item_inter_num_interval"] == "[5,inf)"
    assert config["load_col"] == {"inter": ["user_id", "item_id", "timestamp"]}


@pytest.mark.parametrize("given", ["[5,60]", [5, 60], "[5, 60]"])
def test_a_closed_interval_is_an_interval(given):
    """Command line and YAML make a list of it."""
    named = {"user_inter_num_interval": given}
    assert Config("SASRec", "ml-100k", config_dict=named, argv=[])["user_inter_num_interval"] == "[5,60]"
    argv = [f"--user_inter_num_interval={given}"]
    assert Config("SASRec", "ml-100k", argv=argv)["user_inter_num_interval"] == "[5,60]"


def test_yaml_reads_as_recbole_reads_it_but_safely(tmp_path):
    recbole_loader = RecBoleConfig._build_yaml_loader(None)
    files = [path for path in RECBOLE.glob("properties/**/*.yaml") if path.parent.name != "dataset"]
    assert len(files) > 80
    for path in [*files, *SHIPPED]:
        # Trusted files of the library and of this package: the loader that RecBole uses is the reference.
        expected = yaml.load(path.read_text(encoding="utf-8"), Loader=recbole_loader)
        assert sources.read_yaml(path) == (expected or {}), path
    evil = write(tmp_path, "seed: !!python/object/apply:os.getcwd []\n")
    assert "not valid YAML" in only_problem(config_file_list=[evil])


# ---------------------------------------------------------------------- declarations


def test_the_written_files_are_those_of_the_declarations(tmp_path, capsys, monkeypatch):
    assert properties.main(["--check"]) == 0, capsys.readouterr().out
    stale = {tmp_path / "overall.yaml": "seed: 1\n", tmp_path / "X.yaml": "a: 1\n"}
    monkeypatch.setattr(properties, "files", lambda: stale)
    write(tmp_path, "seed: 1\n", "overall.yaml")
    assert properties.main(["--check"]) == 1
    assert capsys.readouterr().out == f"stale: {tmp_path}/X.yaml\n"
    assert not (tmp_path / "X.yaml").exists()
    assert properties.main([]) == 0
    assert properties.main(["--check"]) == 0


def test_written_yaml_holds_the_declared_defaults():
    for path, text in properties.files().items():
        if path.suffix == ".yaml":
            name = path.stem
            declared = (
                options.overall_defaults() if name == "overall" else options.defaults(*sources.options_of(name, None))
            )
            assert yaml.safe_load(text) == declared
            assert max(map(len, text.splitlines())) <= 128


class WidenedOptions(SASRecOptions):
    """A model of a user, with one option more."""

    widening: Annotated[int, Field(ge=1, lt=9)] = options.option(3, "how much wider the last layer is")
    shape: Optional[Literal["round", "square"]] = options.option(None, "of the last layer", training=False)
    slack: options.Share = options.option(0, "of the widening", later=True)


class Widened(SASRec):
    options = WidenedOptions


def test_a_new_option_of_a_model_is_written_in_one_place():
    config = Config(Widened, "planted", argv=[])
    assert (config["widening"], config["shape"], config["n_layers"]) == (3, None, 2)
    assert Config(Widened, "planted", argv=["--widening=8", "--shape=round"])["widening"] == 8
    given = {"widening": 9, "shape": "rund", "widenin": 1, "n_layers": 0}
    with pytest.raises(ConfigError) as caught:
        Config(Widened, "planted", config_dict=given, argv=[])
    assert caught.value.problems == [
        "widenin: 1 (in config_dict) is not an option; did you mean widening?",
        "n_layers: 0 (in config_dict) is not an integer >= 1; write for example n_layers: 2",
        "widening: 9 (in config_dict) is not an integer >= 1 and < 9; write for example widening: 3",
        "shape: 'rund' (in config_dict) is not one of round, square, or null; did you mean round?",
    ]
    changed = Config(Widened, "planted", argv=["--widening=4"]).training_options()
    assert {**changed, "widening": 3} == config.training_options()
    assert Config(Widened, "planted", argv=["--shape=square"]).training_options() == config.training_options()
    plain = Config(SASRec, "planted", argv=[]).training_options()
    assert config.training_options() == {**plain, "model": "test_config:Widened", "widening": 3}
    slack = Config(Widened, "planted", argv=["--slack=1"]).training_options()
    assert slack == {**config.training_options(), "slack": 1.0}
    assert "  # (int) how much wider the last layer is\n" in properties.yaml_of(WidenedOptions)
    assert "| `shape` | | one of round, square, or null | of the last layer |" in properties.table(WidenedOptions)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (int, "an integer"),
        (Annotated[int, Field(ge=1)], "an integer >= 1"),
        (Annotated[int, Field(gt=1, le=5)], "an integer > 1 and <= 5"),
        (Annotated[float, Field(ge=0)], "a number >= 0"),
        (Annotated[float, Field(le=0.5)], "a number <= 0.5"),
        (Optional[Annotated[float, Field(gt=0, lt=1)]], "a number in (0, 1), or null"),
        (options.Dropout, "a number in [0, 1)"),
        (options.PositiveShare, "a number in (0, 1]"),
        (Optional[options.Text], "a non-empty text, or null"),
        (str, "a text"),
        (bool, "true or false"),
        (Optional[dict], "a mapping, or null"),
        (list, "a list"),
        (Literal["a", "b"], "one of a, b"),
        (Optional[options.Names], "a list of names, or null"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_a_type_accepts_in_words(kind, words):
    made = pydantic.create_model("Made", __base__=options.Options, option=(kind, options.option(sentence="x")))
    assert options.in_words(made.model_fields["option"]).requirement == words


# ---------------------------------------------------------------------- RecBole's models


def test_all_models_of_recbole_are_tried():
    assert len(MODELS) > 60
    assert {"BPR", "LightGCN", "EASE", "SASRecF", "BERT4Rec", "RepeatNet", "DIEN"} <= set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_recbole_gets_a_configuration(name):
    config = Config(name, "ml-100k", argv=[])
    assert config["model"] == name
    assert config["eval_args"]["mode"] == {"valid": "full", "test": "full"}
    # All of its own options can be given by the user.
    path = RECBOLE / "properties" / "model" / f"{name}.yaml"
    if path.is_file() and name not in sources.MODELS:
        again = Config(name, "ml-100k", config_file_list=[path], argv=[])
        assert again.training_options() == config.training_options()


def test_negatives_only_where_a_model_learns_from_them():
    def sampled(model, **given):
        return Config(model, "ml-100k", config_dict=given, argv=[])["train_neg_sample_args"]["distribution"]

    assert [sampled(name) for name in ("SASRec", "GRU4Rec", "BERT4Rec", "RepeatNet", "RaSeRec")] == ["none"] * 5
    assert [sampled(name) for name in ("BPR", "FPMC", "TransRec", "NeuMF", "DIN")] == ["uniform"] * 5
    assert sampled("GRU4Rec", loss_type="BPR") == "uniform"
    assert Config("GRU4Rec", "ml-100k", config_dict={"loss_type": "BPR"}, argv=[])["MODEL_INPUT_TYPE"] == (
        InputType.PAIRWISE
    )


def test_a_data_set_asks_for_packed_only_where_the_loss_allows_it():
    given = {"loss_type": "BPR"}
    assert Config("GRU4Rec", "ml-100k", argv=[])["training"] == "packed"
    assert Config("GRU4Rec", "ml-100k", config_dict=given, argv=[])["training"] == "prefix"
    backbone = Config("RaSeRec", "ml-100k", config_dict={**given, "backbone": "SASRec"}, argv=[]).for_backbone()
    assert (backbone["training"], backbone["loss_type"]) == ("prefix", "BPR")
    asked = Config("SASRec", "ml-100k", config_dict={**given, "training": "packed"}, argv=[])
    assert asked["training"] == "packed"  # refused where the data are prepared


def test_models_that_read_features_load_them():
    assert "class" in Config("SASRecF", "ml-100k", argv=[])["load_col"]["item"]
    assert "class" in Config("RaSeRec", "ml-100k", argv=["--backbone=SASRecF"])["load_col"]["item"]


def test_model_class_and_context_model():
    from recbole.model.general_recommender import BPR

    assert Config(BPR, "ml-100k", argv=[])["model"] == "BPR"
    assert Config("FM", "ml-100k", argv=[])["metrics"] == ["AUC", "LogLoss"]


def test_keys_that_recbole_reads_are_all_known():
    known = sources.all_keys() | options.COMPUTED_KEYS | {"full"}  # "full" is an evaluation mode
    missing = {}
    for path in RECBOLE.rglob("*.py"):
        for key in sources.keys_in_source(path.read_text(encoding="utf-8")) - known:
            missing.setdefault(key, path.relative_to(RECBOLE))
    assert missing == {}


# ---------------------------------------------------------------------- what is derived


def test_recbole_keeps_its_copy_of_ml_100k_unless_the_user_has_one(tmp_path):
    embedded = Config("SASRec", "ml-100k", argv=[])["data_path"]
    assert os.path.isfile(os.path.join(embedded, "ml-100k.inter"))
    assert Config("SASRec", "ml-100k", argv=[f"--data_path={tmp_path}"])["data_path"] == embedded
    (tmp_path / "ml-100k").mkdir()
    write(tmp_path / "ml-100k", "", "ml-100k.inter")
    assert Config("SASRec", "ml-100k", argv=[f"--data_path={tmp_path}"])["data_path"] == str(tmp_path / "ml-100k")
    assert Config("SASRec", "planted", argv=["--data_path=x"])["data_path"] == os.path.join("x", "planted")


def test_use_gpu_false_means_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("recbole_raserec.config.config._VISIBLE_DEVICES", None)
    assert Config("SASRec", "planted", argv=[])["device"].type == "cuda"
    assert Config("SASRec", "planted", argv=["--use_gpu=false"])["device"].type == "cpu"
    assert Config("SASRec", "planted", argv=["--gpu_id="])["device"].type == "cpu"
    assert Config("SASRec", "planted", config_dict={"gpu_id": [0, 1]}, argv=[])["gpu_id"] == "0,1"


def test_devices_chosen_in_the_environment_stay_chosen(monkeypatch):
    monkeypatch.setattr("recbole_raserec.config.config._VISIBLE_DEVICES", "3")
    assert Config("SASRec", "planted", argv=[])["gpu_id"] == "3"
    assert Config("SASRec", "planted", argv=["--gpu_id=1"])["gpu_id"] == "1"


def test_copies_missing_options_and_texts():
    config = Config("RaSeRec", "ml-100k", argv=["--alpha=1", "--topk=5,10"])
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin.explain() == config.explain()
        twin["eval_args"]["order"] = "RO"
        assert config["eval_args"]["order"] == "TO"
    assert config["missing"] is None
    assert "missing" not in config
    assert isinstance(config["alpha"], float)  # 1 and 1.0 are one configuration
    assert config["topk"] == [5, 10]
    assert "alpha" in str(config)


def test_explain_is_json():
    config = Config("RaSeRec", "ml-100k", argv=["--gpu_id=0,1"])
    explained = json.loads(json.dumps(config.explain()))
    assert explained == config.explain()
    assert explained["MODEL_TYPE"] == "SEQUENTIAL"
    assert explained["alpha"] == 0.5


def test_recbole_lists_of_arguments_do_not_grow():
    from recbole.utils import dataset_arguments

    before = list(dataset_arguments)
    Config("SASRec", "ml-100k", argv=[])
    assert dataset_arguments == before


def test_weight_decay_of_the_retrieval_stage(tiny_run):
    plain, decayed = (tiny_run(ram_weight_decay=value, ram_learning_rate=0.1) for value in (None, 10.0))
    assert decayed.trained == [("RaSeRec", 0)]  # the backbone was found
    assert figures(plain.record)["base"] == figures(decayed.record)["base"]
    assert figures(plain.record)["ours"] != figures(decayed.record)["ours"]
