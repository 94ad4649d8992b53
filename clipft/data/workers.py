"""Worker processes: the memory that they share with the main process, and how workers are handled
that die, hang or are left over. Errors name the pairs that the workers were decoding."""

import ctypes
import mmap
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing.reduction import DupFd
from multiprocessing.sharedctypes import RawArray
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from clipft.core.errors import DataError

_MOST_BYTES = 200
"""The length to which the description of a worker's work is cut."""


class SharedPixels:
    """Uint8 pixels [slots, rows, 3, S, S] that workers write and the main process reads.

    The memory is not in /dev/shm, which containers limit to 64 MiB, and nothing has to be cleaned
    up. It is reused, because allocating new memory takes longer than copying the pixels.
    """

    def __init__(self, shape: tuple[int, ...], descriptor: int = -1) -> None:
        size = max(1, torch.Size(shape).numel())
        if descriptor < 0:
            descriptor = _unnamed_file(size)
        self.shape, self._descriptor = shape, descriptor
        self.slots: Tensor = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
        self.slots = self.slots[: torch.Size(shape).numel()].view(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the same memory in workers that are not forked."""
        return _reopened, (self.shape, DupFd(self._descriptor))

    def __del__(self) -> None:
        os.close(self._descriptor)  # the mapping lives as long as its tensor


def _reopened(shape: tuple[int, ...], descriptor: Any) -> SharedPixels:
    return SharedPixels(shape, descriptor.detach())


def _unnamed_file(size: int) -> int:
    """Open anonymous memory with a file descriptor, or a deleted file if the system has none."""
    # By ctypes, because many builds of Python lack os.memfd_create although the system has it
    create = getattr(ctypes.CDLL(None), "memfd_create", None)
    descriptor = create(b"clipft", 1) if create else -1  # 1: closed in programs that are started
    if descriptor < 0:
        descriptor, name = tempfile.mkstemp()
        os.unlink(name)
    os.ftruncate(descriptor, size)
    return int(descriptor)


class UnderWay:
    """What each worker is currently doing, in memory shared with the main process."""

    def __init__(self, workers: int) -> None:
        self._texts: Any = RawArray(ctypes.c_char * _MOST_BYTES, max(1, workers))

    def set(self, what: str) -> None:
        """Record what the calling worker is doing; "" when it is done."""
        info = get_worker_info()
        text = self._texts[info.id if info else 0]
        text.value = what.encode("utf-8", "replace")[: _MOST_BYTES - 1]

    def __str__(self) -> str:
        texts = (text.value.decode("utf-8", "replace") for text in self._texts)
        return ", ".join(text for text in texts if text)


class _ChildSignals:
    """Delays torch's reaction to the death of a worker until the main process waits for a batch.

    torch raises an exception from its SIGCHLD handler. In the middle of an optimizer step, that
    would leave some weights updated and others not.
    """

    torch_handler: Callable[..., Any] | None = None
    waiting = False

    def install(self) -> None:
        """Replace torch's handler, after the first iterator has installed it."""
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
    """Prepare the iterator of a DataLoader. Afterwards only ``next_batch`` may read it."""
    _child_signals.install()
    return batches


def next_batch(batches: Iterator[Any], under_way: UnderWay) -> Any:
    """Return the next batch.

    Raises:
        DataError: A worker died, returned nothing within the timeout, or sent this error.
    """
    _child_signals.waiting = True
    try:
        if _child_signals.torch_handler:  # for a worker that died since the last batch
            _child_signals.torch_handler(signal.SIGCHLD, None)
        batch = next(batches)
    except RuntimeError as error:
        if "DataLoader" not in str(error):  # torch's message for a dead or hung worker has this
            raise
        at = f"; in progress: {under_way}" if str(under_way) else ""
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


def end_workers(batches: Iterator[Any]) -> None:
    """Kill the workers of an iterator at once.

    Otherwise torch ends them when the iterator is garbage-collected. If the queues are collected at
    the same time, such as after an error whose traceback refers to them, torch can no longer reach
    the workers, and waits ten seconds for each.
    """
    workers = [w for w in getattr(batches, "_workers", ()) if w._parent_pid == os.getpid()]
    for worker in workers:
        worker.kill()
    if workers:
        # If a worker was killed while it checked this event, its lock is never released, and torch
        # would wait for it forever. No other process uses the event any more
        batches._workers_done_event = threading.Event()  # type: ignore[attr-defined]
        batches._shutdown_workers()  # type: ignore[attr-defined]


def ignore_signals(worker: int) -> None:
    """Make a worker ignore SIGINT and SIGTERM. Ctrl-C reaches the whole process group, but the main
    process decides when to stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def kill_workers() -> None:
    """Kill all child processes. Call this at exit.

    If a traceback keeps an iterator alive, its workers keep running. multiprocessing would send
    them SIGTERM, which they ignore, and wait for them forever.
    """
    for child in multiprocessing.active_children():
        child.kill()
