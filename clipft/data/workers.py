"""Worker processes that die, hang or are left over: the error names the pairs that they were at."""

import ctypes
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.sharedctypes import RawArray
from typing import Any

from torch.utils.data import get_worker_info

from clipft.core.errors import DataError

_MOST_BYTES = 200
"""The length to which the description of a worker's work is cut."""


class UnderWay:
    """What each worker is doing at this moment, in memory that the main process sees as well."""

    def __init__(self, workers: int) -> None:
        self._texts: Any = RawArray(ctypes.c_char * _MOST_BYTES, max(1, workers))

    def set(self, what: str) -> None:
        """Called by a worker: say what it is doing; "" when it has done it."""
        info = get_worker_info()
        text = self._texts[info.id if info else 0]
        text.value = what.encode("utf-8", "replace")[: _MOST_BYTES - 1]

    def __str__(self) -> str:
        texts = (text.value.decode("utf-8", "replace") for text in self._texts)
        return ", ".join(text for text in texts if text)


class _ChildSignals:
    """Puts off torch's reaction to the death of a worker until a batch is waited for.

    torch raises an exception from its SIGCHLD handler. In the middle of an optimizer step, that
    would leave some weights updated and others not.
    """

    torch_handler: Callable[..., Any] | None = None
    waiting = False

    def install(self) -> None:
        """Take the place of torch's handler, once the first iterator has installed it."""
        now = signal.getsignal(signal.SIGCHLD)
        if threading.current_thread() is threading.main_thread() and callable(now):
            if now != self.handle:
                self.torch_handler = now
            signal.signal(signal.SIGCHLD, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        if self.waiting and self.torch_handler:
            self.torch_handler(number, frame)


_child_signals = _ChildSignals()


def started(batches: Iterator[Any]) -> Iterator[Any]:
    """Prepare the iterator of a DataLoader, which from now on only ``next_batch`` may read."""
    _child_signals.install()
    return batches


def next_batch(batches: Iterator[Any], under_way: UnderWay) -> Any:
    """Return the next batch.

    Raises:
        DataError: A worker died, gave nothing within the loader's timeout, or sent this error.
    """
    _child_signals.waiting = True
    try:
        if _child_signals.torch_handler:  # for a worker that died since the last batch
            _child_signals.torch_handler(signal.SIGCHLD, None)
        batch = next(batches)
    except RuntimeError as error:
        if "DataLoader" not in str(error):  # how torch words a dead or hung worker
            raise
        at = f"; under way were {under_way}" if str(under_way) else ""
        raise DataError(
            f"a data worker died or hung: {' '.join(str(error).split())}{at}",
            "use fewer --num-workers if memory is short, or a larger --worker-timeout if the "
            "disk is slow, then `clipft resume`",
        ) from error
    finally:
        _child_signals.waiting = False
    if isinstance(batch, DataError):
        raise batch
    return batch


def ignore_signals(worker: int) -> None:
    """Make a worker ignore Ctrl-C, which reaches the whole process group: when to stop is for the
    main process to decide."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def kill_workers() -> None:
    """Kill all child processes; to be called at exit.

    An iterator that a traceback keeps alive leaves its workers running. multiprocessing would send
    them SIGTERM, which they ignore, and wait for them forever.
    """
    for child in multiprocessing.active_children():
        child.kill()
