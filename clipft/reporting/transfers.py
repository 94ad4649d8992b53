"""How far a transfer is: files, bytes, rate, time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.filesize import decimal

_PLAIN_EVERY = 5.0
"""Seconds between lines where there is no terminal."""


class Transferred(Protocol):
    """What is watched: done and all of both."""

    @property
    def files_done(self) -> int: ...
    @property
    def files(self) -> int: ...
    @property
    def bytes_done(self) -> int: ...
    @property
    def bytes(self) -> int: ...


Report = Callable[[Transferred], None]


@contextmanager
def bar(console: Console) -> Iterator[Report]:
    """A bar that is gone at the end."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    text, left = TextColumn("{task.description}"), TimeRemainingColumn(compact=True)
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), left)
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("listing", total=None)

        def report(now: Transferred) -> None:
            files = f"{now.files_done:,}/{now.files:,} files"
            shown.update(task, description=files, completed=now.bytes_done, total=now.bytes)

        yield report


@contextmanager
def lines(note: Callable[[str], None]) -> Iterator[Report]:
    """A line every few seconds."""
    start = last = time.monotonic()

    def report(now: Transferred) -> None:
        nonlocal last
        clock = time.monotonic()
        if clock - last < _PLAIN_EVERY:
            return
        last = clock
        rate = max(now.bytes_done, 1) / (clock - start)
        note(
            f"{now.files_done:,}/{now.files:,} files, {decimal(now.bytes_done)} of "
            f"{decimal(now.bytes)}, {decimal(int(rate))}/s, "
            f"{(now.bytes - now.bytes_done) / rate:.0f} s left"
        )

    yield report
