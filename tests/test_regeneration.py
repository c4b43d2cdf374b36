"""Stage i in the pipeline: nothing of validation and test enters it, and it enters nothing but the training split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_log, write_log
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import figures, run

from recbole_raserec.config import Config
from recbole_raserec.data.dataset import POSITION, SequenceDataset
from recbole_raserec.data.packed import PACKED_TARGETS, PackedLoader
from recbole_raserec.data.patterns import mine_patterns
from recbole_raserec.data.regenerated import ORIGINS, Regenerated, joined
from recbole_raserec.data.sequences import SequenceStore
from recbole_raserec.errors import CheckpointError, ConfigError, DatasetError
from recbole_raserec.regenerate import REPORT, regenerate, regenerate_dataset
from recbole_raserec.regeneration.combine import combine, first_of_each
from recbole_raserec.regeneration.inference import generate
from recbole_raserec.regeneration.regenerator import Regenerator
from recbole_raserec.regeneration.sources import Sequences, make_pairs, pieces, training_sequences
from recbole_raserec.stages import prepare_data, train_model

QUICK = {
    "regeneration": True, "regen_epochs": 2, "regen_layers": 1, "regen_inner_size": 16, "regen_conditions": 2,
    "hidden_size": 16, "inner_size": 16, "n_layers": 1, "epochs": 1, "regen_batch_pairs": 64,
}  # fmt: skip


class Split:
    """As much of a training split as stage i reads: all but the last two items of each history."""

    def __init__(self, histories: list[list[int]], n_items: int):
        users = np.repeat(np.arange(1, len(histories) + 1), [len(row) for row in histories])
        self.store = SequenceStore(users, np.concatenate(histories), len(histories) + 1, n_items)
        positions = np.concatenate([np.arange(len(row)) for row in histories])
        ends = np.repeat([len(row) for row in histories], [len(row) for row in histories])
        self._rows = np.flatnonzero((positions > 0) & (positions < ends - 2))
        self._users, self._positions = users, positions

    def windows(self):
        rows = self._rows
        return self._users[rows], self._positions[rows], self.store.items[rows]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_what_users_do_last_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    histories = [rng.integers(1, 12, rng.integers(2, 14)).tolist() for _ in range(25)]
    other = [[*row[:-2], *rng.integers(1, 12, 2).tolist()] for row in histories]
    torch.manual_seed(seed)
    model = Regenerator(12, size=8, inner_size=8, layers=1, conditions=2, longest=6, pattern_length=4)
    found = []
    for rows in (histories, other):
        whole = training_sequences(Split(rows, 12))
        for user, row in enumerate(rows, start=1):
            mine = np.flatnonzero(whole.users == user)
            kept = whole.items[whole.offsets[mine[0]] : whole.offsets[mine[0] + 1]].tolist() if len(mine) else []
            assert kept == (row[:-2] if len(row) > 3 else [])  # a single item has no target to learn
        read = pieces(whole, 6)
        pairs = make_pairs(read, whole, 4, 2, 4, 5, seed)
        data = combine(whole, read, pairs.patterns, generate(model, read, 0.3, 0.5, seed))
        found.append((pairs.sequence, pairs.pattern, pairs.patterns.items, data.items, data.offsets, data.users))
    for a, b in zip(*found):
        np.testing.assert_array_equal(a, b)


def test_in_the_whole_stage_too(small_config):
    """Two logs that differ in validation and test items alone: the same regenerated rows, the same ids."""
    rng = np.random.default_rng(0)
    rows = [(0, item, time) for time, item in enumerate([*range(25), 0, 1])]  # every item, in a training split
    other = list(rows)
    for user in range(1, 30):
        items = rng.integers(0, 25, rng.integers(4, 12)).tolist()
        changed = [*items[:-2], *rng.integers(0, 25, 2).tolist()]
        rows += [(user, item, time) for time, item in enumerate(items)]
        other += [(user, item, time) for time, item in enumerate(changed)]
    found = []
    for number, log in enumerate((rows, other)):
        config = small_config("SASRec", log=log, **QUICK, regen_pretrained=False, checkpoint_dir=f"saved-{number}")
        found.append(regenerate(config).data)
    assert len(found[0])
    for name in ("items", "offsets", "users", "origin"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))


# -- combining --------------------------------------------------------------------------------------------------------


def as_rows(data) -> list[tuple[int, ...]]:
    return [tuple(data.items[a:b].tolist()) for a, b in zip(data.offsets, data.offsets[1:])]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_each_sequence_once_with_its_origin(seed):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, 6, rng.integers(1, 5)).tolist() for _ in range(20)]
    original = Sequences(
        np.concatenate(rows), np.concatenate([[0], np.cumsum([len(row) for row in rows])]), np.arange(1, 21)
    )
    patterns = mine_patterns(original.items, original.offsets, 3, 2)
    generated = np.sort(rng.integers(0, 6, (20, 3, 4)), axis=2)[:, :, ::-1].copy()
    data = combine(original, original, patterns, generated)
    found, taken = as_rows(data), {tuple(row) for row in rows}
    wanted = []
    for pattern in patterns.as_dict():
        if pattern not in taken:
            taken.add(pattern)
            wanted.append((pattern, 0, "pattern"))
    for user, ways in enumerate(generated, start=1):
        for way in ways:
            row = tuple(way[way > 0].tolist())
            if len(row) > 1 and row not in taken:
                taken.add(row)
                wanted.append((row, user, "generated"))
    assert list(zip(found, data.users.tolist(), (ORIGINS[number] for number in data.origin))) == wanted


def test_the_same_items_with_another_cut_are_another_sequence():
    assert first_of_each(np.array([1, 2, 1, 2, 1, 2]), np.array([0, 2, 4, 5, 6])).tolist() == [True, False, True, True]


def test_stored_and_read_again(tmp_path):
    data = Regenerated(
        np.array([3, 4, 5, 1, 2]), np.array([0, 3, 5]), np.array([0, 2]), np.array([1, 2], np.uint8),
        np.array([1, 0.5, 0.25, 1, 2], np.float32),
    )  # fmt: skip
    data.save(tmp_path, "mark")
    again = Regenerated.load(tmp_path, 3, 6, "mark")
    for name in ("items", "offsets", "users", "origin", "weights"):
        np.testing.assert_array_equal(getattr(again, name), getattr(data, name))
    with pytest.raises(CheckpointError, match="other data or options"):
        Regenerated.load(tmp_path, 3, 6, "another")
    for users, items in ((2, 6), (3, 5)):
        with pytest.raises(CheckpointError, match="users and items"):
            Regenerated.load(tmp_path, users, items)


def test_the_same_rows_in_another_numbering():
    old = {"users": ["[PAD]", "a", "b"], "items": ["[PAD]", "x", "y", "z"]}
    new = {"users": ["[PAD]", "b"], "items": ["[PAD]", "z", "x", "w"]}
    data = Regenerated(
        np.array([1, 3, 1, 2, 3, 1]), np.array([0, 2, 4, 6]), np.array([1, 0, 2]), np.array([2, 1, 2], np.uint8),
        np.arange(6, dtype=np.float32), old,
    )  # fmt: skip
    assert data.with_ids_of(dict(old)) is data
    found = data.with_ids_of(new)
    assert as_rows(found) == [(2, 1), (1, 2)]  # the row with y is gone
    assert found.users.tolist() == [0, 1]  # a is nobody
    assert found.origin.tolist() == [2, 2]
    assert found.weights.tolist() == [0, 1, 4, 5]
    assert found.vocabulary == new


def test_a_model_with_item_features_gets_its_own_numbers(small_config):
    from recbole.data.dataset import SequentialDataset

    assert SequentialDataset
    options = {"regeneration": True, "regen_pretrained": False, "regen_epochs": 1, "regen_hidden_size": 8}
    config = small_config("GRU4RecF", selected_features=["kind"], load_col={
        "inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "kind"],
    }, **options)  # fmt: skip
    folder = Path(config["data_path"])
    rows = "".join(f"i{item}\tk{item % 3}\n" for item in [77, *reversed(range(25))])  # one that nobody had
    (folder / "tiny.item").write_text("item_id:token\tkind:token\n" + rows)
    regenerate(config)
    made = regenerate(config)  # found again
    plain = prepare_data(config.without_regeneration())
    assert plain.vocabulary()["items"] != made.data.vocabulary["items"]
    with_it = prepare_data(config, made.data).train._dataset
    first = len(plain.train._dataset)
    tokens = plain.vocabulary()["items"]
    wanted = [
        made.data.vocabulary["items"][item]
        for start, stop in zip(made.data.offsets, made.data.offsets[1:])
        for item in made.data.items[start + 1 : stop]
    ]
    found = [tokens[item] for item in with_it.inter_feat["item_id"][first:].tolist()]
    assert found == wanted
    outcome = train_model(config, regenerated=made)
    assert outcome.seconds >= 0


def test_one_origin_alone(tiny):
    whole = tiny("SASRec", regeneration=True)
    for rows, origin in (("patterns", "pattern"), ("generated", "generated")):
        part = tiny("SASRec", regeneration=True, regen_rows=rows)
        wanted = [
            row for row, number in zip(as_rows(whole.data.data), whole.data.data.origin) if ORIGINS[number] == origin
        ]
        assert as_rows(part.data.data) == wanted != []
        assert part.data.directory == whole.data.directory  # nothing was made anew
        assert part.record["metrics"]["ours"] != whole.record["metrics"]["ours"]
        assert len(part.stages["base + (i)"].splits.train._dataset) < len(
            whole.stages["base + (i)"].splits.train._dataset
        )


BROKEN = {
    "offsets that fall": {"offsets": np.array([0, 6, 5])},
    "an empty sequence": {"offsets": np.array([0, 0, 5])},
    "offsets too short": {"offsets": np.array([0, 5])},
    "the padding item": {"items": np.array([3, 4, 0, 1, 2])},
    "an unknown origin": {"origin": np.array([1, 7], np.uint8)},
    "a negative user": {"users": np.array([0, -1])},
    "weights of another length": {"weights": np.ones(3, np.float32)},
    "weights not finite": {"weights": np.full(5, np.nan, np.float32)},
}


@pytest.mark.parametrize("harm", BROKEN)
def test_unfit_arrays_are_refused(tmp_path, harm):
    sound = {
        "items": np.array([3, 4, 5, 1, 2]), "offsets": np.array([0, 3, 5]), "users": np.array([0, 2]),
        "origin": np.array([1, 2], np.uint8),
    }  # fmt: skip
    Regenerated(**{**sound, **BROKEN[harm]}).save(tmp_path, "mark")
    with pytest.raises(CheckpointError, match="does not hold sequences"):
        Regenerated.load(tmp_path, 3, 6)


# -- the hook ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def extra():
    return Regenerated(
        np.array([3, 4, 5, 1, 2, 7, 7, 7, 7, 8, 9, 10, 11, 12]), np.array([0, 3, 5, 14]), np.array([0, 2, 5]),
        np.array([1, 2, 2], np.uint8),
    )  # fmt: skip


def test_rows_join_the_training_split(small_config, extra):
    train, valid, _ = SequenceDataset(small_config("SASRec")).build()
    both = joined(train, extra)
    assert both.original is train
    size = len(train)
    assert len(both) == size + 2 + 1 + 8
    before, after = train[np.arange(size)], both[np.arange(size)]
    for field in before.columns:
        assert torch.equal(before[field], after[field]), field
    new = both[np.arange(size, len(both))]
    windows = [row[:length].tolist() for row, length in zip(new["item_id_list"], new["item_length"])]
    tail = [7, 7, 7, 7, 8, 9, 10, 11]
    assert windows == [[3], [3, 4], [1], *(tail[:length] for length in range(1, 9))]
    assert new["item_id"].tolist() == [4, 5, 2, 7, 7, 7, 8, 9, 10, 11, 12]
    assert new["user_id"].tolist() == [0, 0, 2, *[5] * 8]
    assert new[POSITION].tolist() == [1, 2, 1, *range(1, 9)]
    assert not valid.original
    assert both.user_num == train.user_num
    assert (both.inter_matrix("csr") != train.inter_matrix("csr")).nnz == 0


def test_packed_batches_hold_every_row_once(small_config, extra):
    config = small_config("SASRec", training="packed")
    train = joined(SequenceDataset(config).build()[0], extra)
    loader = PackedLoader(config, train, None, shuffle=True)
    found = []
    for batch in loader:
        for items, targets in zip(batch["item_id_list"].tolist(), batch[PACKED_TARGETS].tolist()):
            found += [(tuple(items[: k + 1]), target) for k, target in enumerate(targets) if target]
    store, (rows, positions, targets) = train.store, train.windows()
    wanted = []
    for row, position, target in zip(rows, positions, targets):
        history = store.items[store.offsets[row] :][:position].tolist()
        wanted.append((tuple(history), int(target)))
    short = [pair for pair in wanted if len(pair[0]) <= 8]
    assert sorted(pair for pair in found if pair in set(short)) == sorted(short)
    assert len(found) == len(wanted)


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "BERT4Rec", "DIEN", "FOSSIL", "TransRec"])
def test_validation_test_and_ids_stay_as_they_are(small_config, model):
    options = {
        "regeneration": True,
        "regen_pretrained": False,
        "regen_epochs": 1,
        "regen_hidden_size": 8,
        "regen_heads": 1,
    }
    config = small_config(model, **options)
    made = regenerate(config)
    plain, with_it = prepare_data(config.without_regeneration()), prepare_data(config, made.data)
    assert plain.vocabulary() == with_it.vocabulary()
    assert plain.fingerprint == with_it.fingerprint
    for name in ("valid", "test"):
        a, b = (getattr(splits, name)._dataset for splits in (plain, with_it))
        for field in a.inter_feat.columns:
            if not field.startswith("neg_"):  # DIEN draws them
                assert torch.equal(a.inter_feat[field], b.inter_feat[field])
        assert (plain.seen[name] != with_it.seen[name]).nnz == 0
    added = len(with_it.train._dataset) - len(plain.train._dataset)
    assert added == int((np.diff(made.data.offsets) - 1).sum()) > 0
    outcome = train_model(config, regenerated=made)
    assert 0 <= outcome.metrics["test"]["seen_kept"]["ndcg@10"] <= 1


# -- the pipeline -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    write_log(tmp_path, "tiny", random_log(0))

    def build(model="RaSeRec", **options):
        given_ = {**QUICK, "MAX_ITEM_LIST_LENGTH": 8, "data_path": str(tmp_path), **options}
        if model == "RaSeRec":
            given_ = {"backbone": "SASRec", "ram_epochs": 1, "ram_inner_size": 16, "top_k": 4, **given_}
        return run(tmp_path, model, "tiny", **given_)

    return build


def test_a_row_for_each_stage(tiny):
    whole = tiny()
    names = ["SASRec", "SASRec + (i)", "SASRec + (iii)", "SASRec + (i) + (iii)", "improvement"]
    lines = [line.split("  ")[0] for line in whole.printed.splitlines()]
    assert [line for line in lines if line in names] == [name for _ in range(2) for name in names]
    stages = whole.record["metrics"]["stages"]
    assert list(stages) == ["base", "base + (i)", "base + (iii)", "base + (i) + (iii)"]
    assert stages["base"] == whole.record["metrics"]["base"]
    assert stages["base + (i) + (iii)"] == whole.record["metrics"]["ours"]
    assert stages["base"] != stages["base + (i)"]
    assert whole.record["seconds"]["regeneration"] > 0
    # what was generated is in the memory of the last row alone
    memories = {name: len(outcome.model.memory) for name, outcome in whole.stages.items() if "iii" in name}
    generated = whole.data.data.origin == ORIGINS.index("generated")
    more = int((np.diff(whole.data.data.offsets)[generated] - 1).sum())
    assert memories["base + (i) + (iii)"] == memories["base + (iii)"] + more

    again = tiny()
    assert again.trained == []
    assert figures(again.record) == figures(whole.record)

    plain = tiny(regeneration=False)  # base and stage iii are there already
    assert plain.trained == []
    assert plain.record["metrics"]["ours"] == stages["base + (iii)"]


def test_a_generated_memory_is_barred_from_its_own_users_training(tiny):
    whole = tiny()
    memory = whole.ours.model.memory
    users, positions, _ = whole.base.splits.train._dataset.windows()
    pairs = len(whole.base.splits.train._dataset)
    made = np.arange(pairs, len(memory) - len(whole.base.splits.valid._dataset))
    assert len(made)
    for entry in made:
        user = memory.users[entry]
        training = positions[users == user].max() + 1
        assert memory.positions[entry] == training - 1
        found = memory.search(np.array(memory.keys[[entry]]), len(memory), np.array([user]), np.array([training - 1]))
        assert entry not in found.ids[0]
        found = memory.search(np.array(memory.keys[[entry]]), len(memory), np.array([user]), np.array([training]))
        assert entry in found.ids[0]


def test_it_goes_on_where_it_was_killed(tiny, monkeypatch, tmp_path):
    import shutil

    from recbole_raserec.regeneration import training

    whole = tiny("SASRec")
    (directory,) = tmp_path.glob("saved/regeneration-*")
    kept = json.loads((directory / REPORT).read_text())
    shutil.rmtree(tmp_path / "saved")
    epoch = training._epoch

    def killed(*args):
        if args[5]:  # steps so far: in the second epoch
            raise KeyboardInterrupt
        return epoch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny("SASRec")
    again = tiny("SASRec")
    found = json.loads((directory / REPORT).read_text())
    assert [e["held_out"] for e in found["training"]["epochs"]] == [e["held_out"] for e in kept["training"]["epochs"]]
    assert figures(again.record) == figures(whole.record)
    assert as_rows(again.data.data) == as_rows(whole.data.data)


def test_sets_that_are_generated_otherwise_share_the_regenerator(tiny, monkeypatch, tmp_path):
    from recbole_raserec.regeneration import training

    first = tiny("SASRec")
    monkeypatch.setattr(training, "_epoch", None)  # no training any more
    other = tiny("SASRec", regen_gamma=0.9, regen_temperature=0.7)
    assert other.data.fingerprint != first.data.fingerprint
    assert len(list(tmp_path.glob("saved/regeneration-*"))) == 2
    (trained,) = tmp_path.glob("saved/regenerator-*")
    assert other.data.report["regenerator"] == first.data.report["regenerator"] == trained.name
    assert other.data.report["training"] == first.data.report["training"]


def test_a_set_made_before_is_used(tiny, tmp_path):
    whole = tiny("SASRec")
    given_ = str(whole.data.directory.relative_to("saved")) if whole.data.directory.is_relative_to("saved") else None
    directory = tmp_path / "saved" / given_
    again = tiny("SASRec", regenerated_data=str(directory), checkpoint_dir="elsewhere", regen_gamma=0.9)
    assert figures(again.record) == figures(whole.record)
    assert not list((tmp_path / "elsewhere").glob("regeneration-*"))
    with pytest.raises(CheckpointError, match=r"regenerated_data: .*nowhere"):
        tiny("SASRec", regenerated_data=str(tmp_path / "nowhere"))


def test_options_that_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"regeneration: True, but BPR reads no sequences"):
        Config("BPR", "tiny", config_dict={"regeneration": True}, argv=[])
    with pytest.raises(ConfigError, match=r"regen_gamma: 1.5.*\n.*regen_span: 1|regen_span: 1.*\n.*regen_gamma: 1.5"):
        Config("SASRec", "tiny", config_dict={"regen_gamma": 1.5, "regen_span": 1}, argv=[])
    with pytest.raises(ConfigError, match="backbone_checkpoint: x was trained already"):
        run(tmp_path, "RaSeRec", regeneration=True, backbone_checkpoint="x")


def test_a_log_without_patterns(small_config):
    log = [(user, 10 * user + k, k) for user in range(5) for k in range(5)]
    with pytest.raises(DatasetError, match=r"no pattern within 5 items occurs in 2 of the 5 training sequences"):
        regenerate(small_config("SASRec", log=log, **QUICK, regen_pretrained=False))


# -- files ------------------------------------------------------------------------------------------------------------


def test_recbole_alone_loads_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path, "tiny", random_log(0))
    options = {**QUICK, "data_path": str(tmp_path), "MAX_ITEM_LIST_LENGTH": 8, "show_progress": False}
    folder = regenerate_dataset("tiny", tmp_path, config_dict=options, argv=[])
    assert folder == tmp_path / "tiny-regenerated"
    for name in ("report.txt", "report.json", "report.png", "tiny-regenerated.yaml"):
        assert (folder / name).stat().st_size > 0

    from recbole.config import Config as RecBoleConfig
    from recbole.data import create_dataset, data_preparation

    given_ = {"data_path": str(tmp_path), "epochs": 1, "use_gpu": False, "gpu_id": "", "show_progress": False}
    config = RecBoleConfig("SASRec", "tiny-regenerated", [str(folder / "tiny-regenerated.yaml")], given_)
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)

    plain = prepare_data(Config("SASRec", "tiny", config_dict={**options, "regeneration": False}, argv=[]))
    made = regenerate(Config("SASRec", "tiny", config_dict=options, argv=[]))
    for theirs, ours in ((train, joined(plain.train._dataset, made.data)), (valid, plain.valid._dataset),
                         (test, plain.test._dataset)):  # fmt: skip
        feat, rows = theirs._dataset.inter_feat, ours[np.arange(len(ours))]
        assert len(feat) == len(ours)
        token = lambda ids: [dataset.field2id_token["item_id"][i] for i in ids if i]  # noqa: E731
        mine = plain.vocabulary()["items"]
        for number in range(0, len(ours), 7):
            wanted = [mine[i] for i in rows["item_id_list"][number].tolist() if i]
            assert token(feat["item_id_list"][number].tolist()) == wanted
            assert token([int(feat["item_id"][number])]) == [mine[int(rows["item_id"][number])]]
    lines = (folder / "tiny-regenerated.train.inter").read_text().splitlines()[1:]
    origins = [line.split("\t")[3] for line in lines]
    assert set(origins) == set(ORIGINS)
    assert origins.count("original") == len(plain.train._dataset)
    assert all(line.startswith("[pattern]\t") == line.endswith("\tpattern") for line in lines)


def test_the_command(tmp_path, monkeypatch, capsys):
    from recbole_raserec.cli import main

    monkeypatch.chdir(tmp_path)
    write_log(tmp_path, "tiny", random_log(0))
    options = [f"--{name}={value}" for name, value in QUICK.items() if name != "regeneration"]
    words = ["regenerate", "--dataset=tiny", f"--data_path={tmp_path}", "--show_progress=False", "--name=new", *options]
    assert main(words) == 2
    assert "output: is not given" in capsys.readouterr().err
    assert main([*words, "--output=made"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "made/new"
    assert (tmp_path / "made" / "new" / "new.train.inter").exists()
    assert main(["regenerate", "--help"]) == 0
    assert "--regen_gamma" in capsys.readouterr().out


# -- what must not go wrong in silence ----------------------------------------------------------------------------


def test_a_model_with_a_smaller_log_is_refused(small_config):
    """Items without features are dropped from its log: its validation targets are others' training items."""
    options = {"regeneration": True, "regen_pretrained": False, "regen_epochs": 1, "regen_hidden_size": 8}
    config = small_config("GRU4RecF", selected_features=["kind"], load_col={
        "inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "kind"],
    }, **options)  # fmt: skip
    rows = "".join(f"i{item}\tk{item % 3}\n" for item in range(20))  # five have none
    (Path(config["data_path"]) / "tiny.item").write_text("item_id:token\tkind:token\n" + rows)
    made = regenerate(config)
    with pytest.raises(DatasetError, match=r"GRU4RecF reads another training split.*filter_inter_by_user_or_item"):
        train_model(config, regenerated=made)


def test_a_set_of_another_split_or_data_set_is_refused(small_config, tmp_path):
    options = {**QUICK, "regen_pretrained": False}
    made = regenerate(small_config("SASRec", **options))
    given_ = {**options, "regenerated_data": str(made.directory)}
    assert len(regenerate(small_config("SASRec", **given_)).data) == len(made.data)
    split = {"split": {"LS": "test_only"}, "order": "TO", "group_by": "user", "mode": "full"}
    with pytest.raises(CheckpointError, match=r"regenerated_data: .* another training split"):
        regenerate(small_config("SASRec", **given_, eval_args=split))
    with pytest.raises(CheckpointError, match=r"regenerated_data: .* users and items"):
        regenerate(small_config("SASRec", log_seed=1, **given_))


@pytest.mark.parametrize("backbone", ["FPMC", "HGN", "Caser"])
def test_memories_of_generated_sequences_under_backbones_with_user_vectors(tmp_path, backbone):
    write_log(tmp_path, "tiny", random_log(0))
    options = {name: value for name, value in QUICK.items() if name.startswith("regen")}
    options.update(regen_pretrained=False, regen_hidden_size=8, MAX_ITEM_LIST_LENGTH=8, epochs=1)
    options.update(data_path=str(tmp_path), ram_epochs=1, ram_inner_size=16, top_k=4)
    whole = run(tmp_path, "RaSeRec", "tiny", backbone=backbone, **options)
    memory = whole.ours.model.memory
    assert len(memory) > len(whole.base.splits.train._dataset) + len(whole.base.splits.valid._dataset)


def test_generated_memories_are_of_the_latest_time(tiny):
    whole = tiny()
    memory, base = whole.ours.model.memory, whole.base.splits
    pairs = len(base.train._dataset)
    made = slice(pairs, len(memory) - len(base.valid._dataset))
    assert (memory.times[made] == memory.times[:pairs].max()).all()


def test_labels_of_regenerated_rows(small_config, extra):
    log = [(user, item, time) for user, item, time in random_log(0)]
    config = small_config("SASRec", log=log)
    train = SequenceDataset(config).build()[0]
    from recbole.data.interaction import Interaction

    for feat in (train.inter_feat, train._log):
        feat.update(Interaction({train.label_field: torch.zeros(len(feat))}))
    both = joined(train, extra)
    assert both.inter_feat[train.label_field][len(train) :].eq(1).all()
    assert not both.inter_feat[train.label_field][: len(train)].any()


def test_what_does_not_go_together(tmp_path):
    def refused(words, model="SASRec", **options):
        with pytest.raises(ConfigError, match=words):
            run(tmp_path, model, "tiny", **{"regeneration": True, "data_path": str(tmp_path), **options})

    personal = {"regeneration": "personalised", "loss_type": "BPR"}
    personal["train_neg_sample_args"] = {"distribution": "uniform"}
    refused("personalised weighs rows of loss_type: CE; it is BPR", **personal)
    refused("benchmark files have no histories", benchmark_filename=["train", "valid", "test"])
    write_log(tmp_path, "tiny", random_log(0))
    refused(r"regen_heads: 3 does not divide vectors of length 64", regen_heads=3)


def test_sizes_of_another_model_are_not_those_of_the_embeddings():
    given_ = {"regeneration": True, "hidden_size": 129, "num_layers": 2, "seed": 3}
    config = Config("GRU4Rec", "ml-100k", config_dict=given_, argv=[]).for_embeddings()
    assert (config["hidden_size"], config["seed"], config["model"]) == (64, 3, "SASRec")
    plain = Config("SASRec", "ml-100k", config_dict={"seed": 3}, argv=[])
    assert config.training_options() == plain.training_options()


def test_what_makes_the_data_is_in_their_fingerprint_alone():
    one, two = (
        Config("SASRec", "ml-100k", config_dict={"regeneration": True, **more}, argv=[])
        for more in ({}, {"regenerated_data": "x", "regen_gamma": 0.9, "regen_personal_every": 3})
    )
    assert one.training_options() == two.training_options()
    plain = Config("SASRec", "ml-100k", config_dict={}, argv=[])
    assert one.training_options() == plain.training_options()
