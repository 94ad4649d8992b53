"""What ``train``, ``resume`` and ``demo`` share: run the training service and show it."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from clipft.api import train
from clipft.cli.console import Output, end, silent
from clipft.cli.launch import follow_launcher, launch, starts_others
from clipft.cli.options import flags_given
from clipft.cli.progress import make_progress, plan_lines
from clipft.cli.s3_checkpoints import Uploads
from clipft.cli.s3_data import bring_data, bring_validation, stream_source
from clipft.cli.tables import retrieval_table
from clipft.config.settings import Settings, StorageSettings
from clipft.config.sources import LoadedSettings
from clipft.core.common import counted, duration
from clipft.core.memory import memory_in_use
from clipft.distributed.collectives import Processes
from clipft.distributed.rank_zero import on_each_machine, on_rank_zero
from clipft.distributed.rendezvous import start_processes
from clipft.models.device import choose_precision
from clipft.runs.folder import RunPaths
from clipft.runs.records import Callbacks, Forecast
from clipft.storage.sync.sync import SyncOptions, SyncResult
from clipft.training.forecast import forecast
from clipft.training.signals import stop_on_signals
from clipft.training.state import TrainResult

if TYPE_CHECKING:
    from clipft.data.shards.stream import ShardSource


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


Work = Callable[[Processes, LoadedSettings, Output], None]


def in_processes(work: Work, loaded: LoadedSettings, out: Output, args: Sequence[str]) -> None:
    """Where this is one of several processes, work together with them; where it is to start
    them (``args``: the command line, to be run in each), by that."""
    if starts_others(loaded.values.processes):
        launch(loaded.values.processes, args)
        return
    follow_launcher()
    with start_processes(loaded.values) as processes:
        work(processes, loaded, out if processes.rank == 0 else silent())


def train_in(processes: Processes, loaded: LoadedSettings, out: Output) -> None:
    """Sync if a bucket is set, train, and show figures before and after.

    Raises:
        StorageError: training has ended, but its last checkpoint is not in the bucket.
        Interrupted: a signal came while it was on its way there.
    """
    settings = loaded.values
    source = _bring_data(processes, settings, out)
    uploads = Uploads(settings, out)
    on_rank_zero(processes, uploads.begin)
    device = choose_precision(settings).device
    display = make_progress(out.err, partial(memory_in_use, device))
    callbacks = Callbacks(display, out.note, uploads.saved, out.progress)
    with stop_on_signals() as stop:  # after those of the run, to the end of the upload
        with uploads.awaited(stop):
            result = train(loaded, callbacks, processes, source)
            uploads.finished(result.checkpoint, result.steps)
        _show(result, settings, out)
        on_rank_zero(processes, lambda: uploads.check(stop))


def _bring_data(processes: Processes, settings: Settings, out: Output) -> "ShardSource | None":
    if not settings.s3_bucket:
        return None
    if settings.stream:
        source = stream_source(settings, out)
        on_each_machine(processes, lambda: bring_validation(settings, out))
        return source
    on_each_machine(processes, lambda: bring_data(settings, out))
    return None


def _show(result: TrainResult, settings: Settings, out: Output) -> None:
    columns = {"untouched": result.before.retrieval}
    if result.best:
        columns[f"after epoch {result.best.epoch}"] = result.best.retrieval
    out.result(result.to_dict(), retrieval_table("Validation", columns))
    if result.stopped_early:
        out.note("Stopped early: no improvement any more.")
    if result.skipped_pairs:
        reasons = RunPaths(result.folder).skipped
        out.note(f"note: left out {counted(result.skipped_pairs, 'bad pair')}, see {reasons}.")
    if result.best and result.best.recall() <= result.before.recall() and not settings.mini_train:
        out.note("No gain over the untouched model: try another --lr, or more --epochs.")
    page = RunPaths(result.folder).report
    made = {"run folder": result.folder, "checkpoint": result.checkpoint, "report": page}
    there = {what: place if place.exists() else None for what, place in made.items()}
    end(out, there, ("evaluate", result.folder, "--data-dir", settings.data_dir))


def plan_in(processes: Processes, loaded: LoadedSettings, out: Output) -> None:
    """Show what the run would do and take. Pairs that are still in a bucket are counted, not
    fetched; there are no steps to measure then."""
    settings = loaded.values
    to_fetch = on_rank_zero(processes, lambda: _to_fetch(settings, out))
    if to_fetch and to_fetch.transferred:
        count, size = to_fetch.transferred, to_fetch.bytes / 2**20
        out.result(
            {"to_fetch": {"objects": count, "bytes": to_fetch.bytes}, "forecast": None},
            f"{counted(count, 'object')}, {size:,.1f} MiB, would be fetched to "
            f"{settings.data_dir} first; only then can the rest be foreseen.",
        )
        names = tuple(StorageSettings.model_fields)
        end(out, {}, ("sync", *flags_given(loaded, *names)))
        return
    source = _stream(processes, settings, out)
    foreseen = forecast(settings, out.note, processes, out.progress, source)
    _show_planned(foreseen, settings, out)
    end(out, {}, ("train", *flags_given(loaded)))


def _to_fetch(settings: Settings, out: Output) -> SyncResult | None:
    if not settings.s3_bucket or settings.stream:
        return None
    return bring_data(settings, out, SyncOptions(dry_run=True))


def _stream(processes: Processes, settings: Settings, out: Output) -> "ShardSource | None":
    if not settings.s3_bucket or not settings.stream:
        return None
    source = stream_source(settings, out)
    on_each_machine(processes, lambda: bring_validation(settings, out))
    return source


def _show_planned(foreseen: Forecast, settings: Settings, out: Output) -> None:
    place = None
    if settings.enable_s3_checkpoints:
        place = f"s3://{settings.s3_bucket}/{settings.s3_checkpoint_prefix.strip('/')}"
    data = {"forecast": foreseen.to_dict(), "uploads_to": place, "to_fetch": None}
    shown = forecast_table(foreseen, str(settings.output_dir), place)
    out.result(data, *plan_lines(foreseen.plan), shown)
