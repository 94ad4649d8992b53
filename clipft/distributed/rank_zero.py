"""Runs functions on one process for all others, and raises the same error on all processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clipft.core.errors import ClipftError
from clipft.data.batch import StepBatch
from clipft.distributed.collectives import Processes, T


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    error: ClipftError | None = None


def _attempt(work: Callable[[], Any]) -> _Outcome:
    """Run ``work`` and store its error, so that it can be sent to the other processes."""
    try:
        return _Outcome(work())
    except ClipftError as error:
        if error.alone:  # the others can no longer be reached
            raise
        return _Outcome(error=error)


def _agree(processes: Processes, outcome: _Outcome, numbers: Sequence[int] = ()) -> list[list[int]]:
    """Return the numbers of all processes, or raise the error of the lowest rank that had one.

    Errors are rare, so they are gathered only if a number from some process announces one.
    """
    told = processes.gather_integers([int(outcome.error is not None), *numbers])
    if any(header[0] for header in told):
        for error in processes.gather_objects(outcome.error):
            if error:
                raise error
    return [header[1:] for header in told]


def on_all_ranks(processes: Processes, work: Callable[[], T]) -> T:
    """Run ``work`` on every process. If it fails on one, it fails on all.

    Raises:
        ClipftError: the error of the lowest rank that had one.
    """
    outcome = _attempt(work)
    _agree(processes, outcome)
    value: T = outcome.value
    return value


def on_rank_zero(processes: Processes, work: Callable[[], T]) -> T:
    """Run ``work`` on rank zero, however long it takes, and return its result on every rank.

    The result is pickled on its way. An error of ``work`` is raised on every rank.
    """
    outcome = _attempt(work) if processes.rank == 0 else _Outcome()
    outcome = processes.broadcast_object(outcome)
    if outcome.error:
        raise outcome.error
    value: T = outcome.value
    return value


def on_each_machine(processes: Processes, work: Callable[[], object]) -> None:
    """Run ``work`` on one process of each machine, however long it takes.

    An error on one machine is raised on every rank.
    """
    outcome = _attempt(work) if processes.local_rank == 0 else _Outcome()
    processes.barrier()
    _agree(processes, outcome)


def rank_zero_first(processes: Processes, work: Callable[[], T]) -> T:
    """Run ``work`` on one process of each machine, and then on the others.

    Use it for work that writes a cache on disk, which the other processes then read. If the first
    process fails, the others do not try, and its error is raised on every rank.
    """
    made: list[T] = []
    on_each_machine(processes, lambda: made.append(work()))
    return on_all_ranks(processes, lambda: made[0] if made else work())


def in_lockstep(
    processes: Processes, batches: Iterator[T], check: Callable[[], None] = lambda: None
) -> Iterator[T]:
    """Yield this process's batches, each only after every process has read its own.

    All processes must have equally many batches. ``check`` is called before each batch and may
    end the iteration by raising a ``ClipftError``. An error of reading or of ``check`` on one
    process is raised on all.
    """
    while (batch := on_all_ranks(processes, lambda: _next(batches, check))) is not None:
        yield batch


def steps_in_lockstep(
    processes: Processes, batches: Iterator[StepBatch], check: Callable[[], None] = lambda: None
) -> Iterator[StepBatch]:
    """Yield this process's part of each training step, once every process has read its own.

    ``pairs`` and ``skipped`` of the yielded batch are those of all processes. ``check`` and errors
    are handled as in ``in_lockstep``.
    """
    while True:
        outcome = _attempt(lambda: _next(batches, check))
        batch: StepBatch | None = outcome.value
        counts = (batch.pairs, len(batch.skipped)) if batch else (0, 0)
        told = _agree(processes, outcome, counts)
        if batch is None:
            return
        skipped = batch.skipped
        if any(skips for _, skips in told):
            gathered = processes.gather_objects(skipped)
            skipped = [entry for entries in gathered for entry in entries]
        yield replace(batch, skipped=skipped, pairs=sum(pairs for pairs, _ in told))


def _next(batches: Iterator[T], check: Callable[[], None]) -> T | None:
    check()
    return next(batches, None)
