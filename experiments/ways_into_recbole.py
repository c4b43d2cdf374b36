"""The ways into RecBole, each with the models of this package, and their figures beside those of our runner.

    python experiments/ways_into_recbole.py [--epochs=3] [--dataset=ml-100k] [--output=results/ways_into_recbole.md]

Prints a line a way; ends with an error where a figure differs in its last digit. hyperopt, which RecBole's HyperTuning
needs, is not installed with this package (pip install hyperopt); without it its objective_function is called alone.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import os
import subprocess
import sys
import tempfile

FIGURES = ("SASRec", "DuoRec", "RaSeRec")
OPTIONS = {"metric_decimal_place": 6, "show_progress": False, "use_gpu": False, "state": "WARNING"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--output", type=os.path.abspath, help="write the lines here, as Markdown")
    given = parser.parse_args()
    sys.argv = sys.argv[:1]
    folder = tempfile.mkdtemp()
    os.chdir(folder)

    # RecBole's names are imported first: the import of ours comes late in many scripts.
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.quick_start import load_data_and_model, objective_function, run_recbole
    from recbole.trainer import HyperTuning, Trainer
    from recbole.utils import get_model, get_trainer, init_seed
    from recbole.utils.case_study import full_sort_scores, full_sort_topk

    import recbole_raserec

    dataset, number, lines = given.dataset, iter(range(1, 100)), []
    runner = {"epochs": given.epochs, "ram_epochs": given.epochs}

    def options(model: str, where: str) -> dict:
        chosen = runner if model == "RaSeRec" else {"epochs": given.epochs}
        return {**OPTIONS, **chosen, "checkpoint_dir": os.path.join(folder, where)}

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    def done(what: str) -> None:
        say(f"{next(number):>2}  {what}")

    def same(found: dict, wanted: dict) -> None:
        differ = {name: (found[name], wanted[name]) for name in wanted if found[name] != wanted[name]}
        if differ:
            raise SystemExit(f"figures differ: {differ}")

    ours = {}
    for model in FIGURES:
        record = recbole_raserec.run_recbole_raserec(model, dataset, config_dict=options(model, "runner"), argv=[])
        ours[model] = list(record["metrics"].values())[-1]["test"]["seen_kept"]
        say(f"    our runner, {model}: {shown(ours[model])}")

    for model in FIGURES:  # 1-3
        found = run_recbole(model, dataset, config_dict=options(model, "recbole"))
        same(found["test_result"], ours[model])
        done(f"run_recbole(model={model!r}): {shown(found['test_result'])}")
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
    rates, found = (0.001, 0.002), []  # 15

    def trial(config_dict: dict, config_file_list: list) -> dict:
        base = {**options("SASRec", "trials"), "model": "SASRec", "dataset": dataset}
        found.append(objective_function({**base, **config_dict}, config_file_list))
        if config_dict["learning_rate"] == rates[0]:
            same(found[-1]["test_result"], ours["SASRec"])
        return found[-1]

    if importlib.util.find_spec("hyperopt"):
        choices = {"choice": {"learning_rate": list(rates)}}
        search = HyperTuning(trial, params_dict=choices, algo="exhaustive", fixed_config_file_list=[])
        search.run()
        assert len(found) == len(rates)
        done(f"HyperTuning, objective_function: best {search.best_params}")
    else:
        for rate in rates:
            trial({"learning_rate": rate}, [])
        done("objective_function, which HyperTuning calls")
    small = {**options("SASRec", "group"), "epochs": 1}  # 16
    for name in ("BSARec", "GRU4Rec", "STAMP", "recbole:SASRec"):
        theirs = {"train_neg_sample_args": None} if name in ("STAMP", "recbole:SASRec") else {}
        found = run_recbole(name, dataset, config_dict={**small, **theirs})
        print(f"    {name}, 1 epoch: {shown(found['test_result'])}")
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
    say("    without the import RecBole is as it was")
    if given.output:
        command = f"python experiments/ways_into_recbole.py --epochs={given.epochs} --dataset={dataset}"
        head = f"# The ways into RecBole\n\n`{command}`; seen items kept, 6 digits. Figures of one model are equal.\n"
        with open(given.output, "w", encoding="utf-8") as file:
            file.write(head + "\n```\n" + "\n".join(lines) + "\n```\n")


def shown(figures: dict) -> str:
    return ", ".join(f"{name} {figures[name]}" for name in ("recall@10", "ndcg@10"))


if __name__ == "__main__":
    main()
