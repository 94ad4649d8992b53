"""The batches and steps of a run, as all of its processes know them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from clipft.data.loader import StepBatch
from clipft.distributed.collectives import ALONE, Processes, together

T = TypeVar("T")


def go_on() -> None:
    """The check that nothing ends."""


@dataclass(frozen=True)
class Rounds:
    """How processes go through their batches: all read one, then all work. ``check`` is called
    before each and may raise a ``ClipftError`` to end it."""

    processes: Processes = ALONE
    check: Callable[[], None] = go_on

    def of(self, batches: Iterator[T]) -> Iterator[T]:
        """This process's batches, of which each process has as many.

        Raises:
            ClipftError: what reading or ``check`` raised on one of them.
        """

        def read() -> T | None:
            self.check()
            return next(batches, None)

        while (batch := together(self.processes, read)) is not None:
            yield batch


ON_ITS_OWN = Rounds()
"""One process, to the end."""


def agreed(processes: Processes, batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
    """Each process's part of each step, with the pairs and the skipped of all.

    Raises:
        DataError: one of them cannot read its part.
    """
    for batch in Rounds(processes).of(batches):
        told = processes.gather_objects((batch.pairs, batch.skipped))
        skipped = [entry for _, entries in told for entry in entries]
        yield replace(batch, skipped=skipped, pairs=sum(pairs for pairs, _ in told))
