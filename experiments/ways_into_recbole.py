"""The ways into RecBole, each with the models of this package, and their figures beside those of our runner.

    python experiments/ways_into_recbole.py [--epochs=3] [--dataset=ml-100k]

Prints a line a way; ends with an error where a figure differs in its last digit.
"""

from __future__ import annotations

import argparse
import glob
import os
import subprocess
import sys
import tempfile
import types

FIGURES = ("SASRec", "DuoRec", "RaSeRec")
OPTIONS = {"metric_decimal_place": 6, "show_progress": False, "use_gpu": False, "state": "WARNING"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--dataset", default="ml-100k")
    given = parser.parse_args()
    sys.argv = sys.argv[:1]
    folder = tempfile.mkdtemp()
    os.chdir(folder)

    # RecBole's names are imported first: the import of ours comes late in many scripts.
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.quick_start import load_data_and_model, objective_function, run_recbole
    from recbole.trainer import Trainer
    from recbole.utils import get_model, get_trainer, init_seed
    from recbole.utils.case_study import full_sort_scores, full_sort_topk

    import recbole_raserec

    dataset, number = given.dataset, iter(range(1, 100))
    runner = {"epochs": given.epochs, "ram_epochs": given.epochs}

    def options(model: str, where: str) -> dict:
        chosen = runner if model == "RaSeRec" else {"epochs": given.epochs}
        return {**OPTIONS, **chosen, "checkpoint_dir": os.path.join(folder, where)}

    def done(what: str) -> None:
        print(f"{next(number):>2}  {what}", flush=True)

    def same(found: dict, wanted: dict) -> None:
        differ = {name: (found[name], wanted[name]) for name in wanted if found[name] != wanted[name]}
        if differ:
            raise SystemExit(f"figures differ: {differ}")

    ours = {}
    for model in FIGURES:
        record = recbole_raserec.run_recbole_raserec(model, dataset, config_dict=options(model, "runner"), argv=[])
        ours[model] = list(record["metrics"].values())[-1]["test"]["seen_kept"]

    for model in FIGURES:  # 1-3
        found = run_recbole(model, dataset, config_dict=options(model, "recbole"))
        same(found["test_result"], ours[model])
        done(f"run_recbole(model={model!r}): {found['test_result']['ndcg@10']}")
    config = Config("SASRec", dataset, config_dict=options("SASRec", "recbole"))  # 4
    assert config.model_class is recbole_raserec.SASRec
    done("Config(model=name)")
    assert Config(recbole_raserec.RaSeRec, dataset)["backbone"] == "DuoRec"  # 5
    done("Config(model=class)")
    assert all(get_model(name) is getattr(recbole_raserec, name) for name in (*FIGURES, "BSARec", "NARM"))  # 6
    done("get_model")
    from recbole.model.sequential_recommender.raserec import RaSeRec  # 7

    assert RaSeRec is recbole_raserec.RaSeRec
    done("from recbole.model.sequential_recommender.raserec import RaSeRec")
    data = create_dataset(config)  # 8
    train, _, test = data_preparation(config, data)
    done(f"create_dataset, data_preparation: {type(data).__name__}, {type(train).__name__}")
    for make in (get_trainer(config["MODEL_TYPE"], "SASRec"), Trainer):  # 9, 10
        loaders = data_preparation(config, create_dataset(config))
        init_seed(config["seed"], config["reproducibility"])
        model = get_model("SASRec")(config, loaders[0]._dataset)
        trainer = make(config, model)
        trainer.fit(loaders[0], loaders[1], verbose=False)
        same(trainer.evaluate(loaders[2]), ours["SASRec"])
        done(f"{make.__name__}.fit, evaluate")
    for name in ("SASRec", "RaSeRec"):  # 11, 12
        file = trainer.saved_model_file if name == "SASRec" else glob.glob(f"{folder}/recbole/RaSeRec-*.pth")[0]
        config, model, _, _, _, test = load_data_and_model(file)
        found = get_trainer(config["MODEL_TYPE"], config["model"])(config, model).evaluate(test, load_best_model=False)
        same(found, ours[name])
        done(f"load_data_and_model of RecBole's .pth of {name}")
    for name in ("SASRec", "RaSeRec"):  # 13
        file = next(path for path in glob.glob(f"{folder}/runner/{name}-*") if os.path.isdir(path))
        config, model, data, _, _, test = load_data_and_model(file)
        found = get_trainer(config["MODEL_TYPE"], config["model"])(config, model).evaluate(test, load_best_model=False)
        same(found, ours[name])
    done("load_data_and_model of our directories")
    users = data.token2id(data.uid_field, ["196", "186"]) if dataset == "ml-100k" else [1, 2]  # 14
    scores, items = full_sort_topk(users, model, test, k=10, device=config["device"])
    every = full_sort_scores(users, model, test, device=config["device"])
    assert scores.shape == (2, 10)
    assert bool((every.gather(1, items) == scores).all())
    done("full_sort_topk, full_sort_scores")
    quiet = types.SimpleNamespace(report=lambda **_: None)  # 15: objective_function reports to a session of ray
    sys.modules["recbole.quick_start.quick_start"].tune = quiet
    for rate in (0.001, 0.002):
        trial = {**options("SASRec", "trials"), "model": "SASRec", "dataset": dataset, "learning_rate": rate}
        found = objective_function(trial)
        if rate == config["learning_rate"]:
            same(found["test_result"], ours["SASRec"])
    done("objective_function, which HyperTuning calls")
    small = {**options("SASRec", "group"), "epochs": 1}  # 16
    for name in ("BSARec", "GRU4Rec", "recbole:SASRec", "Caser"):
        theirs = {"train_neg_sample_args": None} if name == "recbole:SASRec" else {}
        theirs = {"train_neg_sample_args": None, "loss_type": "CE"} if name == "Caser" else theirs
        found = run_recbole(name, dataset, config_dict={**small, **theirs})
        print(f"      {name}: {found['test_result']['ndcg@10']}")
    done("a loop over models of both, as run_recbole_group")
    plain = (
        "from recbole.utils import get_model, get_trainer; from recbole.config import Config; "
        "assert get_model('SASRec').__module__.startswith('recbole.model'); "
        "assert get_trainer(None, 'SASRec').__name__ == 'Trainer'; "
        "assert get_model.__code__.co_filename.endswith('utils.py')"
    )
    # numpy's old names, without which RecBole does not start on numpy 2, are the interpreter's to give here
    old = "import numpy as np; np.bool8, np.float_, np.complex_, np.unicode_ = np.bool_, np.float64, complex, str; "
    old += "import torch.utils.tensorboard; "
    subprocess.run([sys.executable, "-c", old + plain], check=True)
    print("without the import RecBole is as it was")


if __name__ == "__main__":
    main()
