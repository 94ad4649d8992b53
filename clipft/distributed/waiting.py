"""Waits for the other processes of a run, and tells the user which ones are missing.

The processes meet at a ``TCPStore``, a small table of keys that rank zero (or torchrun's agent)
serves. torch would wait inside C++, where it prints nothing and does not react to Ctrl-C. Here each
process writes a key when it arrives, and the others look for it.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from clipft.core.common import Note, duration
from clipft.core.errors import ProcessError

SPEAK_EVERY = 5.0
"""Seconds between two lines while processes are missing at the start of a run."""
_SPEAK_LATER = 30.0
"""The same during a run, where the others may be busy for hours."""
_LOOK_EVERY = 0.1
_LISTED = 8


class Waiting:
    """Tells the user every few seconds which processes are missing, and how to end the wait."""

    def __init__(self, note: Note, world_size: int, ending: str, every: float) -> None:
        self._note, self._world_size, self._ending = note, world_size, ending
        self._every, self._began = every, time.monotonic()
        self._spoken = self._began

    def look(self, missing: Sequence[int]) -> None:
        """Print a line, unless the last one is too recent."""
        now = time.monotonic()
        if now - self._spoken < self._every:
            return
        self._spoken = now
        self._note(
            f"Waiting for {named(missing)} of {self._world_size} for {duration(now - self._began)}."
            f" {self._ending}"
        )


def named(ranks: Sequence[int]) -> str:
    """Name processes by rank: ``process 1``, ``processes 1, 2 and 5 more``."""
    listed = ", ".join(map(str, ranks[:_LISTED]))
    more = f" and {len(ranks) - _LISTED} more" if len(ranks) > _LISTED else ""
    return f"process{'' if len(ranks) == 1 else 'es'} {listed}{more}"


class Roll:
    """The keys that show which processes have arrived at a place in the run."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._calls = 0

    def arrive(self) -> int:
        """Record that this process has arrived; return the number of the place for ``missing``."""
        self._calls += 1
        self._store.set(f"roll/{self._calls}/{self._rank}", "here")
        return self._calls

    def missing(self, call: int) -> list[int]:
        """Return the ranks that have not arrived yet."""
        ranks = range(self._world_size)
        return [rank for rank in ranks if not self._store.check([f"roll/{call}/{rank}"])]

    @contextmanager
    def watched(self, note: Note) -> Iterator[None]:
        """Say on rank zero who is missing while the block waits for all processes."""
        call, ended = self.arrive(), threading.Event()
        if self._rank > 0:
            yield
            return
        ending = "They may still be busy; Ctrl-C stops this process."
        waiting = Waiting(note, self._world_size, ending, _SPEAK_LATER)

        def watch() -> None:
            while not ended.wait(_SPEAK_LATER / 10):
                try:
                    waiting.look(self.missing(call))
                except RuntimeError:  # the store is gone: the block itself will say why
                    return

        watcher = threading.Thread(target=watch, name="waiting", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def meet(
    address: str, port: int, rank: int, world_size: int, minutes: float, note: Note
) -> tuple[Any, Roll]:
    """Wait until all processes of the run are there; return their store.

    Ctrl-C ends the wait. Rank zero says which processes are missing, and the others say that rank
    zero is missing.

    Args:
        address, port: where rank zero serves the store.
        minutes: how long to wait at most.
        note: receives a line every few seconds.

    Raises:
        ProcessError: some did not come in time.
        RuntimeError: the store cannot be served, such as on a port that is taken.
    """
    timeout, deadline = timedelta(minutes=minutes), time.monotonic() + 60 * minutes
    where = f"at {address}:{port}"
    ending = (
        f"All processes meet {where}. Press Ctrl-C to stop; otherwise the wait ends after "
        f"{minutes:g} minutes (--process-timeout)."
    )
    waiting = Waiting(note, world_size, ending, SPEAK_EVERY)
    by_agent = _agent_serves(address, port)
    served = rank == 0 and not by_agent
    while not served and not _reachable(address, port):
        _give_up_after(deadline, [0], rank, world_size, where)
        waiting.look([0])
        time.sleep(_LOOK_EVERY)
    whole = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, world_size, served, timeout, wait_for_workers=False, multi_tenant=served
    )
    # A store of torchrun's serves all attempts of a job, so each needs keys of its own. One of rank
    # zero's serves one attempt only, and a machine that was replaced counts them from 0 again
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if by_agent else "0"
    store = dist.PrefixStore(f"clipft/{attempt}", whole)  # type: ignore[attr-defined]
    roll = Roll(store, rank, world_size)
    call = roll.arrive()
    while missing := roll.missing(call):
        _give_up_after(deadline, missing, rank, world_size, where)
        if rank == 0:
            waiting.look(missing)
        time.sleep(_LOOK_EVERY)
    return store, roll


def _give_up_after(
    deadline: float, missing: Sequence[int], rank: int, world_size: int, where: str
) -> None:
    if time.monotonic() < deadline:
        return
    raise ProcessError(
        f"process {rank} of {world_size} gave up waiting for {named(missing)} {where}",
        f"start all {world_size} processes, check that each machine can reach the address, or "
        "raise --process-timeout",
    )


def _agent_serves(address: str, port: int) -> bool:
    """True if torchrun's agent serves the store, so that rank zero is a client as well."""
    environ = os.environ
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and (
        (environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")) == (address, str(port))
    )


def _reachable(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True
