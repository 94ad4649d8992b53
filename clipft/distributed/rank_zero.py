"""TODO"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from clipft.core.errors import ClipftError
from clipft.data.loader import StepBatch
from clipft.distributed.collectives import ALONE, Processes, T


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    error: ClipftError | None = None


def _attempt(work: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(work())
    except ClipftError as error:
        if error.alone:
            raise
        return _Outcome(error=error)


def on_all_ranks(processes: Processes, work: Callable[[], T]) -> T:
    """``work`` on each process. What one of them raises, all raise.

    Raises:
        ClipftError: the error of the lowest rank that had one.
    """
    value: T = _agreed(processes, _attempt(work))
    return value


def on_rank_zero(processes: Processes, work: Callable[[], T]) -> T:
    """``work`` on the first process, however long it takes; its result (pickled) on all.

    Raises:
        ClipftError: what it raised.
    """
    ours = _attempt(work) if processes.rank == 0 else _Outcome()
    outcome = processes.broadcast_object(ours)
    if outcome.error:
        raise outcome.error
    value: T = outcome.value
    return value


def on_each_machine(processes: Processes, work: Callable[[], object]) -> None:
    """``work`` on one process of each machine, however long it takes.

    Raises:
        ClipftError: what it raised on one of them.
    """
    ours = _attempt(work) if processes.local_rank == 0 else _Outcome()
    processes.barrier()
    _agreed(processes, ours)


def rank_zero_first(processes: Processes, work: Callable[[], T]) -> T:
    """``work`` on one process of each machine, then on the others: it leaves a cache on the
    disk that they find.

    Raises:
        ClipftError: what it raised on one of them.
    """
    made: list[T] = []
    on_each_machine(processes, lambda: made.append(work()))
    return on_all_ranks(processes, lambda: made[0] if made else work())


def _agreed(processes: Processes, ours: _Outcome) -> Any:
    for error in processes.gather_objects(ours.error):
        if error:
            raise error
    return ours.value


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

        while (batch := on_all_ranks(self.processes, read)) is not None:
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
