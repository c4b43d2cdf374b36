"""Ranks against a sorted float64 reference; metrics and protocols against RecBole's own Trainer.evaluate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranking_helpers import sorted_rank
from scipy.sparse import csr_matrix

from recbole_raserec import compat
from recbole_raserec.config.checks import evaluation_problems
from recbole_raserec.errors import ConfigError, DatasetError
from recbole_raserec.evaluation.protocols import SEEN_KEPT, SEEN_REMOVED, collect_ranks, evaluate, metrics_from_ranks


def seen_from_interactions(users, items, n_users, n_items):
    """Seen items of each user from parallel arrays of internal ids: bool [n_users, n_items]."""
    seen = np.zeros((n_users, n_items), dtype=bool)
    seen[users, items] = True
    return csr_matrix(seen)


# --- against RecBole -----------------------------------------------------------------------------------------------

N_USERS, N_ITEMS = 60, 40


@pytest.fixture(scope="module", autouse=True)
def data_path(tmp_path_factory):
    """A log in which users meet some items more than once."""
    compat.apply()
    rng = np.random.default_rng(3)
    folder = tmp_path_factory.mktemp("data") / "tiny"
    folder.mkdir()
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(N_USERS):
        for time, item in enumerate(rng.integers(0, N_ITEMS, rng.integers(5, 25))):
            lines.append(f"u{user}\ti{item}\t{time}")
    (folder / "tiny.inter").write_text("\n".join(lines) + "\n")
    from recbole.config import Config

    # RecBole's metrics use numpy names that its Config puts back when it is made, so no test may come before one.
    Config(model="BPR", dataset="tiny", config_dict={"data_path": str(folder.parent)})
    return folder.parent


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """RecBole's Trainer writes its logs below the working directory."""
    monkeypatch.chdir(tmp_path)


def build(model_name, data_path, split=None, **options):
    """(config, model, trainer, {"valid": loader, "test": loader}, {phase: seen}) with random weights."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    init_seed(7, True)
    config = Config(
        model=model_name,
        dataset="tiny",
        config_dict={
            "data_path": str(data_path),
            "checkpoint_dir": str(data_path / "saved"),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "eval_args": {
                "split": split or {"LS": "valid_and_test"},
                "group_by": "user",
                "order": "TO",
                "mode": "full",
            },
            "metrics": ["Recall", "NDCG", "MRR", "Hit", "Precision", "MAP"],
            "topk": [1, 5, 10],
            "valid_metric": "NDCG@10",
            "metric_decimal_place": 8,
            "train_neg_sample_args": None if model_name == "SASRec" else {"distribution": "uniform", "sample_num": 1},
            "MAX_ITEM_LIST_LENGTH": 5,  # shorter than most histories: what is seen is more than what the model reads
            "use_gpu": False,
            "show_progress": False,
            "state": "ERROR",
            **options,
        },
    )
    dataset = create_dataset(config)
    log = dataset.inter_feat.copy()
    train, valid, test = data_preparation(config, dataset)
    model = get_model(model_name)(config, train.dataset)
    # Wide random weights keep the scores apart; NeuMF's end in a sigmoid, which wider ones would saturate into ties.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if model_name == "NeuMF" else 0.5)
    trainer = get_trainer(config["MODEL_TYPE"], model_name)(config, model)

    seen, users, items = {}, [], []
    for phase, loader in (("valid", train), ("test", valid)):
        users.append(loader.dataset.inter_feat["user_id"].numpy())
        items.append(loader.dataset.inter_feat["item_id"].numpy())
        earlier = np.concatenate(users), np.concatenate(items)
        seen[phase] = seen_from_interactions(*earlier, N_USERS + 1, dataset.item_num)
    if split is None:  # leave-one-out: the same from the log itself, where RecBole's augmented parts may differ
        seen = {phase: leave_out(log, 2 if phase == "valid" else 1, dataset.item_num) for phase in seen}
    return config, model, trainer, {"valid": valid, "test": test}, seen


def leave_out(log, last, n_items):
    """All but the last interactions of each user, in time order, straight from the log."""
    order = np.lexsort((log["timestamp"].to_numpy(), log["user_id"].to_numpy()))
    users, items = log["user_id"].to_numpy()[order], log["item_id"].to_numpy()[order]
    from_the_end = np.array([(users[index + 1 :] == user).sum() for index, user in enumerate(users)])
    early = from_the_end >= last
    return seen_from_interactions(users[early], items[early], N_USERS + 1, n_items)


def recbole_result(trainer, loader):
    return dict(trainer.evaluate(loader, load_best_model=False))


@pytest.mark.parametrize("phase", ["valid", "test"])
@pytest.mark.parametrize("options", [{}, {"eval_batch_size": 7}, {"eval_memory_mb": 0.002}])
def test_sequential_model_with_seen_items_kept_equals_recbole(data_path, phase, options):
    config, model, trainer, loaders, seen = build("SASRec", data_path, **options)
    ours = evaluate(model, loaders[phase], config, seen[phase])
    assert ours[SEEN_KEPT] == recbole_result(trainer, loaders[phase])
    assert ours[SEEN_REMOVED] != ours[SEEN_KEPT]
    assert evaluate(model, loaders[phase], config) == {SEEN_KEPT: ours[SEEN_KEPT]}


@pytest.mark.parametrize("phase", ["valid", "test"])
@pytest.mark.parametrize("model_name", ["BPR", "NeuMF"])  # NeuMF has no full_sort_predict
@pytest.mark.parametrize("split", [None, {"RS": [0.6, 0.2, 0.2]}])  # ratio split: several targets a user
def test_general_model_with_seen_items_removed_equals_recbole(data_path, phase, model_name, split):
    # Batches of 45 pairs: less than two users at a time, so that the way around a missing full_sort_predict is cut up.
    config, model, trainer, loaders, seen = build(model_name, data_path, split, eval_batch_size=45)
    ours = evaluate(model, loaders[phase], config, seen[phase])
    assert ours[SEEN_REMOVED] == recbole_result(trainer, loaders[phase])
    assert ours[SEEN_REMOVED] != ours[SEEN_KEPT]


def test_sequential_removed_equals_the_definition_with_the_whole_history(data_path):
    config, model, _, loaders, seen = build("SASRec", data_path)
    ranks = collect_ranks(model, loaders["test"], config, seen["test"])
    (interaction, _, _, targets) = next(iter(loaders["test"]))
    model.eval()
    scores = model.full_sort_predict(interaction).detach().numpy()
    wanted = [
        sorted_rank(row, int(target), set(seen["test"][int(user)].indices))
        for row, target, user in zip(scores, targets, interaction["user_id"])
    ]
    assert ranks.removed.tolist() == wanted
    assert ranks.users.tolist() == interaction["user_id"].tolist()
    by_query = seen["test"][interaction["user_id"].numpy()]
    assert collect_ranks(model, loaders["test"], config, by_query, seen_by="query").removed.tolist() == wanted


@pytest.mark.parametrize("model_name", ["SASRec", "BPR"])
def test_a_model_that_gives_vectors_is_ranked_the_same_without_a_score_matrix(data_path, model_name, monkeypatch):
    config, model, _, loaders, seen = build(model_name, data_path, {"RS": [0.6, 0.2, 0.2]})
    by_scores = evaluate(model, loaders["test"], config, seen["test"])

    def vectors(interaction):
        if model_name == "BPR":
            return model.user_embedding(interaction["user_id"]), model.item_embedding.weight, None
        h = model.forward(interaction["item_id_list"], interaction["item_length"])
        return h, model.item_embedding.weight, torch.zeros(model.n_items)

    monkeypatch.setattr(model, "full_sort_vectors", vectors, raising=False)
    monkeypatch.setattr(model, "full_sort_predict", None)
    assert evaluate(model, loaders["test"], config, seen["test"]) == by_scores


def test_evaluation_restores_the_training_mode_and_draws_no_dropout(data_path):
    config, model, _, loaders, seen = build("SASRec", data_path)
    model.train()
    first = evaluate(model, loaders["test"], config, seen["test"])
    assert model.training
    assert evaluate(model, loaders["test"], config, seen["test"]) == first


# --- metrics and their errors --------------------------------------------------------------------------------------

OPTIONS = {"eval_args": None, "metrics": ["Recall", "NDCG", "MRR"], "topk": [1, 3], "metric_decimal_place": 4}


def test_metrics_by_hand():
    ranks = torch.tensor([1, 2, 3, 4])
    assert metrics_from_ranks(ranks, OPTIONS) == {
        "recall@1": 0.25,
        "recall@3": 0.75,
        "ndcg@1": 0.25,
        "ndcg@3": round((1 + 1 / np.log2(3) + 0.5) / 4, 4),
        "mrr@1": 0.25,
        "mrr@3": round((1 + 1 / 2 + 1 / 3) / 4, 4),
    }
    two_queries = metrics_from_ranks(ranks, OPTIONS, queries=torch.tensor([0, 0, 1, 1]))
    assert two_queries["recall@1"] == 0.25
    assert two_queries["recall@3"] == 0.75
    assert metrics_from_ranks(ranks, OPTIONS, decimals=1)["mrr@3"] == 0.5


def test_every_wrong_evaluation_option_is_named_with_its_remedy():
    mode = {"valid": "uni100", "test": "labeled"}
    given = {
        **OPTIONS,
        "metrics": ["NDCG", "AUC", "Nonsense"],
        "eval_args": {"mode": mode},
        "valid_protocol": "seen_kept",
    }
    nonsense, labeled, protocol = evaluation_problems(given)
    assert "Nonsense is unknown" in nonsense
    assert "mode of test is 'labeled'" in labeled
    assert "valid_protocol: seen_kept" in protocol
    assert "AUC needs the score" in evaluation_problems({**OPTIONS, "metrics": ["AUC"]})[0]
    with pytest.raises(ConfigError, match="3 problems"):
        metrics_from_ranks(torch.tensor([1]), given)
    assert evaluation_problems({**OPTIONS, "metrics": ["NDCG", "GAUC", "GiniIndex"]}) == []


def test_metrics_that_need_more_than_ranks_are_left_out_without_it():
    config = {**OPTIONS, "metrics": ["GAUC", "Recall"]}
    assert metrics_from_ranks(torch.tensor([1, 2]), config) == {"recall@1": 0.5, "recall@3": 1.0}


def test_seen_items_of_another_data_set_are_an_error(data_path):
    config, model, _, loaders, seen = build("SASRec", data_path)
    with pytest.raises(ValueError, match="the seen items have 3 rows"):
        evaluate(model, loaders["test"], config, seen["test"][:3])


class NoBatches(list):
    def __init__(self, dataset):
        super().__init__()
        self._dataset = dataset


def test_an_empty_evaluation_set_is_an_error(data_path):
    config, model, _, loaders, _ = build("SASRec", data_path)
    with pytest.raises(DatasetError, match="evaluation set is empty"):
        evaluate(model, NoBatches(loaders["test"]._dataset), config)


@pytest.mark.parametrize("model_name", ["SASRec", "DuoRec"])
def test_queries_encoded_by_length_rank_alike(small_config, monkeypatch, model_name):
    from conftest import random_log

    from recbole_raserec.config import get_model
    from recbole_raserec.data.splits import prepare_data
    from recbole_raserec.evaluation import ranking as scoring

    config = small_config(model_name, log=random_log(4, users=50, longest=12), MAX_ITEM_LIST_LENGTH=10)
    splits = prepare_data(config)
    model = get_model(model_name)(config, splits.dataset)
    torch.nn.init.normal_(model.item_embedding.weight)
    widths, ranks = {}, {}
    forward = model.forward
    for group in (1000, 7):
        monkeypatch.setattr(scoring, "GROUP", group)
        seen = widths[group] = []
        monkeypatch.setattr(
            model, "forward", lambda seq, length, seen=seen: (seen.append(seq.shape), forward(seq, length))[1]
        )
        ranks[group] = collect_ranks(model, splits.test, config, splits.seen["test"])
    assert len(widths[1000]) == 1
    assert len(widths[7]) == -(-50 // 7)
    assert sum(rows * width for rows, width in widths[7]) < sum(rows * width for rows, width in widths[1000])
    for field in ("kept", "removed", "users", "queries"):
        assert torch.equal(getattr(ranks[7], field), getattr(ranks[1000], field))
