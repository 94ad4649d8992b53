"""Putting something around each step's accumulation of a real run."""

from collections.abc import Callable
from typing import Any

from clipft.training.setup import RunSetup

Around = Callable[[Any, int, list[Any]], Any]
"""(the real accumulation, step from 0, its micro-batches) -> the loss."""


def around_each_step(monkeypatch, around: Around) -> None:
    make = RunSetup.make_accumulation

    def made(self, optimiser, note):
        shrink = make(self, optimiser, note)
        real = shrink.accumulate

        class Around:
            floor = real.floor

            def __call__(self, step, micro_batches):
                return around(real, step, micro_batches)

        shrink.accumulate = Around()
        return shrink

    monkeypatch.setattr(RunSetup, "make_accumulation", made)
