"""A pool of worker processes that end with this process, even if it is killed."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, TypeVar

from clipft.core.common import processors
from clipft.core.errors import DataError

Task = TypeVar("Task")
Done = TypeVar("Done")
# Results per process that may be held in memory while an earlier result is missing
_AHEAD = 4
_KILLED = (
    "a worker process was killed: memory ran out, or an image crashes the decoder",
    "run it again with fewer --processes; with --processes 1 a crash shows where it happens",
)


class Workers:
    """A context manager with up to ``processes`` worker processes (0: one per processor).

    They start when there is more than one task. With ``processes`` 1, tasks run in this process. If
    the block raises, the workers are terminated at once.

    ``concurrent.futures`` is not used because, if a worker is killed while it sends a large result,
    the parent waits for the rest forever. Here each worker has its own pipe, which closes when the
    worker ends.
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
        """Yield ``work(task)`` of each task, in the order of the tasks.

        ``work``, the tasks and the results are pickled. An exception in ``work`` is raised here.

        Raises:
            DataError: A process was killed, or crashed.
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
                    # Never send two tasks at once: both ends could wait for the other to read
                    pipe = idle.pop()
                    try:
                        pipe.send((work, tasks[following]))
                    except OSError as error:
                        raise DataError(*_KILLED) from error
                    busy[pipe] = following
                    following += 1
                for ready in wait(list(busy)):
                    assert isinstance(ready, Connection)
                    try:
                        succeeded, result = ready.recv()
                    except (EOFError, OSError) as error:
                        raise DataError(*_KILLED) from error
                    if not succeeded:
                        raise result
                    results[busy.pop(ready)] = result
                    idle.append(ready)
            yield results.pop(wanted)

    def _start(self, count: int) -> None:
        """Start processes until there are ``count``."""
        # Spawned: a forked process would inherit whatever locks other threads hold
        context = multiprocessing.get_context("spawn")
        for _ in range(count - len(self._running)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            # SIGINT is blocked so that Ctrl-C does not interrupt the worker, which inherits the
            # block, before _serve ignores the signal, nor this process before it records the worker
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
                self._running.append((process, ours))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()  # or the pipe would not close with the worker


def _serve(pipe: Connection) -> None:
    """Run the tasks that come through the pipe until it closes or the parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            work, task = pipe.recv()
            try:
                answer = True, work(task)
            except Exception as error:  # raised in the parent, where the traceback is lost
                error.add_note(traceback.format_exc())
                answer = False, error
            pipe.send(answer)


def _end_with_parent() -> None:
    # A parent that is killed closes its pipe, but a worker notices that only after its task
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
