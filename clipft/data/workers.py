"""Worker processes that die, hang, or are left over: said where batches are waited for, with the
pairs that were in their hands."""

import atexit
import ctypes
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.sharedctypes import RawArray
from typing import Any

from torch.utils.data import get_worker_info

from clipft.core.errors import DataError

_LETTERS = 200
"""Bytes kept of what a worker does."""

_Text = ctypes.c_char * _LETTERS


class UnderWay:
    """What each worker does at this moment, in memory that the main process sees."""

    def __init__(self, workers: int) -> None:
        self._texts: Any = RawArray(_Text, max(1, workers))

    @contextmanager
    def at(self, what: str) -> Iterator[Callable[[str], None]]:
        """Within the block the worker does ``what``, until it says otherwise."""
        info = get_worker_info()
        text = self._texts[info.id if info else 0]

        def say(what: str) -> None:
            text.value = what.encode("utf-8", "replace")[: _LETTERS - 1]

        say(what)
        yield say
        text.value = b""  # not after an error: it is what was under way

    def __str__(self) -> str:
        texts = (text.value.decode("utf-8", "replace") for text in self._texts)
        return ", ".join(text for text in texts if text)


class _Deaths:
    """torch raises a worker's death from a signal handler: in the middle of an optimizer step
    too, which would leave some weights moved and others not. Here it is put off until the next
    batch is waited for."""

    def __init__(self) -> None:
        self._raise: Callable[..., Any] | None = None
        self._waiting = False

    def hear(self) -> None:
        """Once torch has its handler in place."""
        now = signal.getsignal(signal.SIGCHLD)
        if threading.current_thread() is threading.main_thread() and callable(now):
            if now != self._heard:
                self._raise = now
            signal.signal(signal.SIGCHLD, self._heard)

    @contextmanager
    def waited(self) -> Iterator[None]:
        self._waiting = True
        try:
            if self._raise:
                self._raise(signal.SIGCHLD, None)
            yield
        finally:
            self._waiting = False

    def _heard(self, number: int, frame: Any) -> None:
        if self._waiting and self._raise:
            self._raise(number, frame)


_deaths = _Deaths()


def started(batches: Iterator[Any]) -> Iterator[Any]:
    """What ``iter`` of a loader gave, from now on to be read by ``next_batch`` alone."""
    _deaths.hear()
    return batches


def next_batch(batches: Iterator[Any], under_way: UnderWay) -> Any:
    """
    Raises:
        DataError: a worker died, or none gave anything within the loader's timeout.
    """
    try:
        with _deaths.waited():
            return next(batches)
    except RuntimeError as error:  # torch's word for a dead or hung worker
        if "DataLoader" not in str(error):
            raise
        at = f"; under way were {under_way}" if str(under_way) else ""
        raise DataError(
            f"a data worker died or hung: {' '.join(str(error).split())}{at}",
            "use fewer --num-workers if memory is short, or a larger --worker-timeout if the "
            "disk is slow, then `clipft resume`",
        ) from error


def ignore_signals(worker: int) -> None:
    """Ctrl-C reaches the whole process group; when to stop is the main process's decision."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@cache
def kill_workers_at_exit() -> None:
    """An iterator that a traceback keeps alive leaves its workers running; multiprocessing then
    sends SIGTERM, which they ignore, and would wait for them for ever."""

    def kill() -> None:
        for child in multiprocessing.active_children():
            child.kill()

    atexit.register(kill)
