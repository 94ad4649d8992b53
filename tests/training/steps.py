"""Put something around the accumulation of each step of a real run."""

from collections.abc import Callable
from typing import Any

from clipft.training.setup import RunSetup

Around = Callable[[Any, int, list[Any]], Any]
"""(the real accumulation, the step from 0, its micro-batches as split) -> the loss."""


def around_each_step(monkeypatch, around: Around) -> None:
    make = RunSetup.make_accumulation

    def made(self, optimizer, note):
        real = make(self, optimizer, note)

        class Around:
            def __getattr__(self, name):
                return getattr(real, name)

            def __call__(self, step, micro_batches, pairs, general):
                return around(real, step, real.recovery.split(micro_batches))

        return Around()

    monkeypatch.setattr(RunSetup, "make_accumulation", made)
