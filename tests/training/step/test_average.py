"""The moving average of the trained weights."""

import pytest
import torch
from torch import nn

from clipft.api import evaluate, train
from clipft.distributed.collectives import ALONE
from clipft.runs.checkpoint import load_checkpoint
from clipft.training.loop import fit
from clipft.training.step.average import MovingAverage
from tests.training.step.sharded_runs import Run


def weights(*values: float) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([value])) for value in values]


def test_the_decay_rises_to_the_one_that_was_asked_for():
    parameters = weights(0.0)
    average, expected = MovingAverage(parameters, 0.5), 0.0
    for step in range(20):
        with torch.no_grad():
            parameters[0].fill_(step + 1)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1)
    with average.in_place():
        assert parameters[0].item() == pytest.approx(expected, rel=1e-6)


def test_weights_and_averages_are_exchanged_and_come_back_to_the_bit():
    parameters = weights(0.1, 0.7)
    average = MovingAverage(parameters, 0.9)
    with torch.no_grad():
        parameters[0].fill_(0.3)
    for _ in range(2):
        with pytest.raises(KeyError), average.in_place():
            assert [p.item() for p in parameters] == [pytest.approx(0.1), pytest.approx(0.7)]
            raise KeyError
        assert torch.equal(parameters[0], torch.tensor([0.3]))
    average.restart()
    with average.in_place():
        assert torch.equal(parameters[0], torch.tensor([0.3]))


def test_a_checkpoint_holds_the_averages_and_what_they_are_made_from(catalogue):
    run = Run.of({"data_dir": catalogue, "scenario": "dual_lora", "ema": 0.9}, ALONE)
    mean = run.state.model.trainable_state()
    accumulate = run.setup.make_accumulation(run.state.optimizer, print)
    for done in fit(run.state, run.setup.step_batches(run.state.position), accumulate):
        decay = min(0.9, done.step / (9 + done.step))
        now = run.state.model.trainable_state()
        mean = {name: decay * mean[name] + (1 - decay) * now[name] for name in now}
    state = run.state.state_dict()
    for name, weight in now.items():
        assert torch.equal(state["trained_state_dict"][name], weight)
        torch.testing.assert_close(state["model_state_dict"][name], mean[name])
    assert not torch.equal(mean[name], now[name])
    assert "trained_state_dict" not in run.state.weights_dict()


def test_what_is_validated_and_kept_is_the_average(catalogue, tmp_path):
    given = {"data_dir": catalogue, "model": "tiny", "precision": "fp32", "device": "cpu"}
    given |= {"output_dir": tmp_path, "epochs": 2, "effective_batch_size": 24, "num_workers": 0}
    given |= {"micro_batch_size": 24, "ema": 0.9, "stop_on": "never", "lr": 1e-3}
    result = train(given)
    newest, best = (
        load_checkpoint(result.checkpoint),
        load_checkpoint(tmp_path / "dual_lora/best.pt"),
    )
    assert newest["trained_state_dict"].keys() == newest["model_state_dict"].keys()
    assert "trained_state_dict" not in best
    assert result.best
    found = evaluate(tmp_path / "dual_lora", {"data_dir": catalogue, "num_workers": 0})
    figures = found.found.figures.to_dict()
    for direction in ("text_to_image", "image_to_text"):
        assert figures[direction] == pytest.approx(result.best.retrieval[direction])
