"""Work shared among processes, which end with this one however it ends."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, TypeVar

from clipft.core.common import processors
from clipft.core.errors import DataError

Task = TypeVar("Task")
Done = TypeVar("Done")
_AHEAD = 4
"""Results per process that may wait for an earlier one, and be held in memory."""


class Workers:
    """Up to ``processes`` processes (0: one per processor), started when there is work for
    more than one; a single one is this process. Leaving the block on an exception ends them
    at once.

    Not concurrent.futures: there a worker that ends in the middle of a large result leaves
    the parent waiting for the rest forever. Here each has a pipe of its own, which then ends.
    """

    def __init__(self, processes: int) -> None:
        self.count = processes or processors()
        self._running: list[tuple[SpawnProcess, Connection]] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: object, __: TracebackType | None
    ) -> None:
        for process, pipe in self._running:
            if kind is not None:
                process.terminate()
            pipe.close()
        for process, _pipe in self._running:
            process.join()

    def map(self, work: Callable[[Task], Done], tasks: Sequence[Task]) -> Iterator[Done]:
        """``work`` of each task, in their order. ``work``, tasks and results are pickled.

        Raises:
            DataError: a process was killed, or crashed.
        """
        if self.count == 1 or len(tasks) < 2:
            yield from map(work, tasks)
            return
        self._start(min(self.count, len(tasks)))
        idle, busy = [pipe for _, pipe in self._running], dict[Any, int]()
        results, following = dict[int, Done](), 0
        for wanted in range(len(tasks)):
            while wanted not in results:
                while idle and following < min(len(tasks), wanted + _AHEAD * self.count):
                    # Never two tasks at once: both ends would wait for the other to read
                    pipe = idle.pop()
                    _send(pipe, (work, tasks[following]))
                    busy[pipe] = following
                    following += 1
                for ready in wait(list(busy)):
                    assert isinstance(ready, Connection)
                    results[busy.pop(ready)] = _receive(ready)
                    idle.append(ready)
            yield results.pop(wanted)

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        for _ in range(count - len(self._running)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            with _without_interrupts():
                process.start()
                self._running.append((process, ours))
            theirs.close()


def _send(pipe: Connection, message: object) -> None:
    try:
        pipe.send(message)
    except OSError as error:
        raise _killed() from error


def _receive(pipe: Connection) -> Any:
    try:
        fine, result = pipe.recv()
    except (EOFError, OSError) as error:
        raise _killed() from error
    if not fine:
        raise result
    return result


def _killed() -> DataError:
    return DataError(
        "a worker process was killed: out of memory, or a picture crashes the decoder",
        "run it again with fewer --processes; with 1 a crash shows where it happens",
    )


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits. A process started meanwhile never sees it: not before ``_serve`` either."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection) -> None:
    """A worker: do what comes through the pipe until it ends, or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            pipe.send(_answer(*pipe.recv()))


def _answer(work: Callable[[Any], Any], task: Any) -> tuple[bool, Any]:
    try:
        return True, work(task)
    except Exception as error:  # raised again where the result is awaited
        error.add_note(traceback.format_exc())
        return False, error


def _end_with_parent() -> None:
    """A parent that is killed cannot say so to one that is at work."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
