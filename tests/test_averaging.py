"""The moving average of the weights: its values, its place in a training, its way through a resume."""

from __future__ import annotations

import pytest
import torch

from recbole_raserec.errors import CheckpointError
from recbole_raserec.recommendation.stage import train_model
from recbole_raserec.storage.files import read_tensors
from recbole_raserec.training.trainer import WARM_UP, ResumableTrainer, WeightAverage


def net():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    model[1].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_the_average_written_out(decay):
    model = net()
    average = WeightAverage(model, decay)
    assert "1.bias" not in average.tensors()
    wanted = model[0].weight.detach().double()
    for step in range(1, 60):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 3))
        average.update()
        keep = min(decay, (1 + step) / (WARM_UP + step))
        wanted = keep * wanted + (1 - keep) * model[0].weight.detach().double()
    assert torch.allclose(average.tensors()["0.weight"].double(), wanted, atol=1e-5)


def test_applied_swaps_and_swaps_back_whatever_happens():
    model = net()
    average = WeightAverage(model, 0.9)
    parameter = model[0].weight
    with torch.no_grad():
        parameter.fill_(4.0)
    before = average.tensors()["0.weight"].clone()

    def broken():
        with average.applied():
            assert model[0].weight is parameter
            assert torch.equal(parameter.detach(), before)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert (parameter == 4.0).all()
    assert torch.equal(average.tensors()["0.weight"], before)


def test_restore_goes_on_and_refuses_what_does_not_fit():
    model = net()
    first = WeightAverage(model, 0.9)
    first.update()
    kept = {name: value.clone() for name, value in first.tensors().items()}
    second = WeightAverage(net(), 0.9)
    second.restore(kept, first.steps)
    assert second.steps == 1
    assert all(torch.equal(value, second.tensors()[name]) for name, value in kept.items())
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        second.restore({**kept, "0.weight": torch.zeros(1)}, 1)
    with pytest.raises(CheckpointError):
        second.restore({}, 1)


def test_a_training_keeps_the_average_and_trains_as_before(small_config):
    """The path of the weights is the same with and without; validated and kept is the average."""
    states, runs = [], []
    for decay in (0, 0.9):
        run = train_model(small_config("SASRec", epochs=3, weight_averaging=decay))
        runs.append(run)
        states.append(read_tensors(run.directory / "state.safetensors")[0])
    plain, averaged = states
    for name in (name for name in plain if name.startswith("model.")):
        assert torch.equal(plain[name], averaged[name]), name
    kept = read_tensors(runs[1].directory / "model.safetensors")[0]
    name = "item_embedding.weight"
    assert not torch.equal(kept[name], averaged[f"model.{name}"])
    assert (kept[name] - averaged[f"average.{name}"]).abs().max() < 0.1
    assert torch.equal(dict(runs[1].model.named_parameters())[name], kept[name])
    assert runs[0].metrics != runs[1].metrics


def test_the_last_epochs_average_is_what_was_validated(small_config):
    config = small_config("SASRec", epochs=1, weight_averaging=0.9)
    seen = []
    original = ResumableTrainer._valid_epoch

    def valid_epoch(trainer, *args, **kwargs):
        evaluate = trainer._evaluate
        trainer._evaluate = lambda model, data: (
            seen.append(model.item_embedding.weight.clone()) or evaluate(model, data)
        )
        try:
            return original(trainer, *args, **kwargs)
        finally:
            trainer._evaluate = evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResumableTrainer, "_valid_epoch", valid_epoch)
        run = train_model(config)
    kept = read_tensors(run.directory / "model.safetensors")[0]["item_embedding.weight"]
    assert len(seen) == 1
    assert torch.equal(seen[0], kept)
    assert torch.equal(kept, read_tensors(run.directory / "state.safetensors")[0]["average.item_embedding.weight"])
