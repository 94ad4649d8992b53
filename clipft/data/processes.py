"""Work shared among processes, which end with this one however it ends."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TypeVar

from clipft.errors import DataError

Task = TypeVar("Task")
Done = TypeVar("Done")
_AHEAD = 4
"""Tasks under way per process: enough that none waits, few enough to hold in memory."""


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """Up to ``processes`` processes (0: one per processor), started when there is work for
    more than one; a single one is this process. Leaving the block on an exception ends them
    at once."""

    def __init__(self, processes: int) -> None:
        self.count = processes or processors()
        self._pool: ProcessPoolExecutor | None = None
        self._leash: Connection | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: object, __: TracebackType | None
    ) -> None:
        if not self._pool or not self._leash:
            return
        if kind is not None:
            self._leash.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._leash.close()

    def map(self, work: Callable[[Task], Done], tasks: Sequence[Task]) -> Iterator[Done]:
        """``work`` of each task, in their order. ``work``, tasks and results are pickled.

        Raises:
            DataError: a process was killed, or crashed.
        """
        if self.count == 1 or len(tasks) < 2:
            yield from map(work, tasks)
            return
        waiting: deque[Future[Done]] = deque()
        try:
            for task in tasks:
                waiting.append(self._submit(work, task))
                if len(waiting) > _AHEAD * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed: out of memory, or a picture crashes the decoder",
                "run it again with fewer --processes; with 1 a crash shows where it happens",
            ) from error

    def _submit(self, work: Callable[[Task], Done], task: Task) -> Future[Done]:
        if not self._pool:
            context = multiprocessing.get_context("spawn")
            held, self._leash = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(self.count, context, _begin, (held,))
        with _without_interrupts():
            return self._pool.submit(work, task)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits. A process started meanwhile never sees it: not before ``_begin`` either."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(leash: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(leash,), daemon=True).start()


def _end_with(leash: Connection) -> None:
    """Only the parent holds the other end: it closes when the parent does, or is killed."""
    with suppress(EOFError, OSError):
        leash.recv()
    os._exit(1)
