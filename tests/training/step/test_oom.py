"""A step that runs out of memory takes longer, but its loss stays the same."""

import json

import pytest
import torch

from clipft.cli.app import run
from clipft.core.errors import MemoryShortage
from clipft.data.batch import Batch
from clipft.distributed.step_channel import ALONE
from clipft.training.step.gradcache import ExactAccumulation, LocalAccumulation
from clipft.training.step.oom import SmallerPieces
from tests.training.process_helpers import results
from tests.training.step.test_gradcache import gradients, load
from tests.training.steps import around_each_step


class Device:
    """Accumulates over micro-batches of up to ``room`` pairs, and raises torch's error beyond."""

    def __init__(self, model, room: int, kind=torch.OutOfMemoryError) -> None:
        self.model, self.room, self.kind = model, room, kind
        self.tried: list[list[int]] = []

    def __call__(self, micro_batches: list[Batch]) -> torch.Tensor:
        self.tried.append([len(batch) for batch in micro_batches])
        total = torch.zeros(())
        for batch in micro_batches:
            if len(batch) > self.room:
                raise self.kind("CUDA out of memory. Tried to allocate 2.00 GiB")
            loss = sum(p.sum() for _, p in self.model.trainable()) * len(batch)
            loss.backward()
            total += loss.detach()
        return total


def batch(pairs: int) -> Batch:
    return Batch(torch.zeros(pairs, 3, 2, 2), torch.zeros(pairs, 4), tuple(range(pairs)))


@pytest.fixture(scope="module")
def loaded():
    return load("dual_lora")


@pytest.fixture(scope="module")
def model(loaded):
    return loaded.model


def smaller_pieces(
    model, micro, said, kind=ExactAccumulation, channel=ALONE, released=None
) -> SmallerPieces:
    def halve() -> bool:  # as with graphs to spare in the first attempt alone
        if released is None or released:
            return False
        released.append(True)
        return True

    smallest, consequence = kind.smallest_micro_batch, kind.if_smaller
    return SmallerPieces(halve, model, channel, smallest, consequence, micro, said.append)


def take(step: int, recovery: SmallerPieces, accumulate, micro_batches: list[Batch]):
    """A step as the training loop takes it."""
    for attempt in recovery.attempts(step):
        with attempt:
            loss = accumulate(recovery.split(micro_batches))
    return loss


def test_halved_until_it_fits_and_the_gradient_is_that_of_one_pass(loaded, model):
    Device(model, 100)([batch(12), batch(5)])
    expected = gradients(loaded)
    said: list[str] = []
    released: list[bool] = []
    device = Device(model, room=3)
    recovery = smaller_pieces(model, 12, said, released=released)
    take(4, recovery, device, [batch(12), batch(5)])
    ours = gradients(loaded)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert device.tried == [[12, 5], [12, 5], [6, 6, 5], [3, 3, 3, 3, 3, 2]]
    assert released == [True]
    assert "half as many activation graphs" in said[0]
    assert "micro-batches of 6 pairs" in said[1] and "micro-batches of 3 pairs" in said[2]
    assert all("memory ran out in step 5" in line for line in said) and len(said) == 3
    take(5, recovery, device, [batch(12)])  # stays that way, without another warning
    assert device.tried[-1] == [3, 3, 3, 3] and len(said) == 3


@pytest.mark.slow
def test_a_local_loss_needs_two_pairs_and_the_warning_says_that_it_changes(model):
    said: list[str] = []
    recovery = smaller_pieces(model, 8, said, LocalAccumulation)
    take(0, recovery, Device(model, room=2), [batch(8)])
    assert "changes the loss" in said[-1] and "stay as they were" not in said[-1]
    narrower = smaller_pieces(model, 8, said, LocalAccumulation)
    with pytest.raises(MemoryShortage, match="micro-batches of 2, the smallest"):
        take(0, narrower, Device(model, room=1), [batch(8)])


def test_not_even_one_pair(model):
    with pytest.raises(MemoryShortage, match="micro-batches of 1, the smallest") as raised:
        take(0, smaller_pieces(model, 4, []), Device(model, room=0), [batch(4)])
    assert raised.value.exit_code == 9


def test_other_errors_go_through(model):
    device = Device(model, room=0, kind=lambda text: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        take(0, smaller_pieces(model, 4, []), device, [batch(4)])


def test_all_processes_shrink_when_one_runs_out():
    body = """
    from clipft.distributed.step_channel import open_channel
    from tests.training.step.test_gradcache import load
    from tests.training.step.test_oom import Device, batch, smaller_pieces, take
    model = load("dual_lora").model
    channel = open_channel(processes, 100)
    own = Device(model, 3 if rank == 1 else 100)
    def accumulate(micro_batches):
        own(micro_batches)
        return channel.exchange(torch.ones(1, 1), torch.ones(1, 1)).images.sum()
    said = []
    recovery = smaller_pieces(model, 8, said, channel=channel)
    total = float(take(0, recovery, accumulate, [batch(8), batch(8)]))
    result = [total, own.tried[-1], len(said)]
"""
    first, second = results(body)
    assert first == second == [2.0, [2] * 8, 2]


def test_a_run_that_runs_out_of_memory_is_the_same_run(catalogue, tmp_path, monkeypatch, capsys):
    """The real accumulation, on a device with room for 8 pairs at once."""
    args = ["train", "--model", "tiny", "--epochs", "1", "--effective-batch-size", "32"]
    args += ["--micro-batch-size", "32", "--num-workers", "0", "--precision", "fp32"]
    args += ["--stop-on", "never", "--data-dir", str(catalogue), "--output-dir"]
    assert run([*args, str(tmp_path / "roomy")]) == 0

    def narrow(real, step, micro_batches):
        if max(map(len, micro_batches)) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(step, micro_batches)

    around_each_step(monkeypatch, narrow)
    assert run([*args, str(tmp_path / "narrow")]) == 0
    assert "using micro-batches of 8 pairs from now on" in capsys.readouterr().err
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "dual_lora" / "metrics.jsonl").read_text().splitlines()
            if '"step"' in line and json.loads(line)["kind"] == "step"
        ]
        for name in ("roomy", "narrow")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0]
