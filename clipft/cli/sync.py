"""``clipft sync``."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from clipft.cli.console import Output
from clipft.cli.options import settings_command
from clipft.settings import StorageSettings
from clipft.settings_sources import LoadedSettings

if TYPE_CHECKING:
    from clipft.storage.sync import SyncProgress, SyncResult

_PLAIN_EVERY = 5.0
"""Seconds between lines where there is no terminal."""

_SHOWN_REFUSED = 20


@settings_command(StorageSettings)
def sync(loaded: LoadedSettings, out: Output) -> None:
    """Bring the pairs from a bucket to --data-dir: what is there already is not fetched again.

    Each object is checked (size, ETag, md5) and appears whole or not at all, so a sync that was
    cut off goes on where it was. Nothing is deleted.

    Examples:

        clipft sync --s3-bucket catalogue --data-dir ./catalogue
        clipft sync --s3-bucket catalogue --endpoint-url http://localhost:9000 --json
    """
    result = sync_with_progress(loaded.values, out)
    out.result(result.to_dict(), *_tables(result))
    out.note(f"Next: clipft train --data-dir {loaded.values.data_dir}")


def sync_with_progress(settings: StorageSettings, out: Output) -> "SyncResult":
    """Sync and show how far it is; also the first thing that ``train`` does with a bucket."""
    from clipft.storage.sync import sync as bring

    with _progress(out) as report:
        result = bring(settings, report)
    for note in result.notes:
        out.note(f"note: {note}.")
    return result


@contextmanager
def _progress(out: Output) -> Iterator[Callable[["SyncProgress"], None]]:
    """A bar on a terminal, a line every few seconds elsewhere."""
    if not out.err.is_terminal:
        yield _PlainProgress(out).report
        return
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
    with Progress(*columns, console=out.err, transient=True) as bar:
        task = bar.add_task("listing", total=None)

        def report(now: "SyncProgress") -> None:
            files = f"{now.files_done}/{now.files} files"
            bar.update(task, description=files, completed=now.bytes_done, total=now.bytes)

        yield report


class _PlainProgress:
    def __init__(self, out: Output) -> None:
        self._out = out
        self._start = self._last = time.monotonic()

    def report(self, now: "SyncProgress") -> None:
        clock = time.monotonic()
        if clock - self._last < _PLAIN_EVERY:
            return
        self._last = clock
        rate = max(now.bytes_done, 1) / (clock - self._start)
        self._out.note(
            f"{now.files_done}/{now.files} files, {decimal(now.bytes_done)} of "
            f"{decimal(now.bytes)}, {decimal(int(rate))}/s, "
            f"{(now.bytes - now.bytes_done) / rate:.0f} s left"
        )


def _tables(result: "SyncResult") -> Iterator[Table]:
    table = Table(title="Sync", title_justify="left")
    for heading in ("objects", "downloaded", "skipped", "refused", "size", "seconds"):
        table.add_column(heading, justify="right")
    counts = (result.objects, result.downloaded, result.skipped, len(result.refused))
    size, seconds = decimal(result.bytes), f"{result.seconds:.1f}"
    table.add_row(*(f"{count:,}" for count in counts), size, seconds)
    yield table
    if result.refused:
        refused = Table("key", "refused because it", title="Refused", title_justify="left")
        for refusal in result.refused[:_SHOWN_REFUSED]:
            refused.add_row(escape(ascii(refusal.key)), escape(refusal.reason))
        if len(result.refused) > _SHOWN_REFUSED:
            refused.add_row("...", f"{len(result.refused):,} in all; --json lists them")
        yield refused
