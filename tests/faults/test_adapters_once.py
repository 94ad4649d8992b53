"""A resumed run has its adapters once: PEFT wraps a wrapped model without a word."""

import os
import signal

import pytest

from clipft.cli.app import run
from tests.faults.outside import command
from tests.training.steps import around_each_step


def shape(model) -> tuple[list[str], list[str], dict[str, tuple[int, ...]]]:
    """Names of modules, of adapters, and the trainable parameters with their shapes."""
    modules = [name for name, _ in model.named_modules()]
    adapters = sorted({name for m in model.modules() for name in getattr(m, "lora_A", {})})
    return modules, adapters, {name: tuple(p.shape) for name, p in model.trainable()}


@pytest.mark.slow
def test_peft_wraps_once_however_often_a_run_is_resumed(catalogue, tmp_path, monkeypatch):
    seen = []

    def look(real, step, micro_batches):
        seen.append(shape(real.model))
        if step in (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(step, micro_batches)

    around_each_step(monkeypatch, look)
    codes = [run(command(catalogue, tmp_path, "--epochs", "2")) for _ in range(3)]
    assert codes == [75, 75, 0]
    assert len(seen) == 6 and all(each == seen[0] for each in seen)
    modules, adapters, trainable = seen[0]
    assert adapters == ["default"]
    assert trainable and not any(name.count("lora_A") > 1 for name in (*modules, *trainable))
