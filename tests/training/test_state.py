import math

import pytest

from clipft.data.batch import StepBatch
from clipft.runs.records import EpochResult
from clipft.training.state import EarlyStopping, TrainState


def epoch(loss: float, recall: float = 0.0) -> EpochResult:
    figures = {f"r@{k}": recall for k in (1, 5, 10)}
    return EpochResult(1, 1, 0.0, loss, {"text_to_image": figures, "image_to_text": figures})


def run(watch: str, losses: list[float]) -> tuple[list[bool], int]:
    stopping, improved = EarlyStopping(watch, 2, 0.001), []
    for loss in losses:
        improved.append(stopping.update(epoch(loss)))
        if stopping.should_stop:
            break
    return improved, len(improved)


def test_two_epochs_without_improvement_stop():
    assert run("loss", [1.0, 0.9, 0.8995, 0.8993, 0.1]) == ([True, True, False, False], 4)


def test_improvement_starts_the_wait_over():
    assert run("loss", [1.0, 1.1, 0.5, 0.6, 0.4])[1] == 5


def test_not_a_number_is_the_worst_value_first_or_later():
    assert run("loss", [math.nan, 1.0]) == ([False, True], 2)
    assert run("loss", [1.0, math.nan, math.nan])[1] == 3


def test_recall_is_better_when_higher():
    stopping = EarlyStopping("recall", 1, 0.001)
    assert stopping.update(epoch(9.0, 0.2))
    assert stopping.update(epoch(99.0, 0.3))
    assert not stopping.update(epoch(0.0, 0.3))
    assert stopping.should_stop


def test_never_remembers_but_does_not_stop():
    assert run("never", [1.0, 2.0, 2.0, 2.0])[1] == 4


def test_state_round_trip():
    one = EarlyStopping("loss", 2, 0.0)
    one.update(epoch(1.0))
    one.update(epoch(2.0))
    other = EarlyStopping("loss", 2, 0.0)
    other.load_state_dict(one.state_dict())
    assert other == one


def test_the_loss_of_an_epoch_counts_each_pair_once():
    """A last step of few pairs, or one with skipped pairs, does not weigh as much as the others."""
    state = TrainState(None, None, 3)  # type: ignore[arg-type]
    for epoch, losses in enumerate(([1.0, 2.0, 10.0], [3.0, 3.0, 5.0])):
        for step, (loss, pairs) in enumerate(zip(losses, (32, 31, 8), strict=True)):
            state.advance(StepBatch(epoch, step, [], [], pairs), loss)
        expected = (32 * losses[0] + 31 * losses[1] + 8 * losses[2]) / 71
        assert state.mean_loss == pytest.approx(expected)
