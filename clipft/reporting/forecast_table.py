"""A forecast as people read it."""

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from clipft.runs.records import Forecast
from clipft.cli.progress import duration
from clipft.words import counted

_MIB, _GIB = 1 << 20, 1 << 30


def forecast_table(foreseen: Forecast, place: str, uploads_to: str | None) -> Table:
    """What the run would take; ``place``: its output folder, ``uploads_to``: where checkpoints
    are sent, if anywhere."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _rows(foreseen, place, uploads_to):
        table.add_row(label, Text(text))
    return table


def _rows(f: Forecast, place: str, uploads_to: str | None) -> Iterator[tuple[str, str]]:
    unusable = f"{counted(f.unusable, 'pair')}, left out" if f.unusable else "no pairs known so far"
    yield "unusable", unusable
    yield "time", _time(f)
    if f.measured_steps:
        yield (
            "speed",
            f"{f.pairs_per_s:.1f} pairs/s, {f.data_share:.0%} of the time waiting for data",
        )
    yield (
        "memory",
        f"{f.peak_bytes / _GIB:.2f} GiB at most on {f.plan.device} while measured, of "
        f"{f.usable_bytes / _GIB:.1f} GiB usable",
    )
    yield "disk", _disk(f, place)
    yield "uploads", _uploads(f, uploads_to)


def _time(f: Forecast) -> str:
    passes = f"{counted(f.validations, 'validation')} of {_seconds(f.validation_seconds)}"
    if not f.measured_steps:
        return f"about {duration(f.seconds)}: {passes}"
    left = f.plan.total_steps - f.done_steps
    after = f" (after the {f.done_steps:,} that are done)" if f.done_steps else ""
    return (
        f"about {duration(f.seconds)}: {counted(left, 'step')} of {_seconds(f.seconds_per_step)}"
        f"{after}, {passes}; from {counted(f.measured_steps, 'step')} run now. Early stopping may "
        "end it sooner"
    )


def _disk(f: Forecast, place: str) -> str:
    free = f"{f.disk_free / _GIB:.1f} GiB free"
    if not f.checkpoint_bytes:
        return f"figures alone, in {place}; {free}"
    short = "warning: too little room: " if f.disk_free < f.disk_bytes else ""
    return (
        f"{short}at most {f.disk_bytes / _MIB:,.1f} MiB in {place}: checkpoint "
        f"{f.checkpoint_bytes / _MIB:,.1f} MiB, twice while it is replaced; best epoch "
        f"{f.best_bytes / _MIB:,.1f} MiB; {free}"
    )


def _uploads(f: Forecast, uploads_to: str | None) -> str:
    if uploads_to is None:
        return "none"
    each = f.checkpoint_bytes + f.best_bytes
    return (
        f"up to {f.saves:,} of {each / _MIB:,.1f} MiB to {uploads_to}, "
        f"{f.saves * each / _GIB:,.2f} GiB in all; the newest goes first, others may be left out"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)
