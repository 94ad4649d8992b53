"""What ``train``, ``resume`` and ``demo`` share: run a training and show it, or show its plan."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from clipft.api import train
from clipft.cli.answers import FigureOptions, comparison_answer, footnotes, say_more
from clipft.cli.console import Output, end
from clipft.cli.options import flags_given
from clipft.cli.progress import make_progress, plan_lines
from clipft.cli.s3_checkpoints import Uploads
from clipft.cli.s3_data import bring_data, open_stream
from clipft.config.sections.data import StorageSettings
from clipft.config.settings import Settings
from clipft.config.sources import LoadedSettings
from clipft.core.common import counted, duration
from clipft.core.files import read_json
from clipft.core.memory import memory_in_use
from clipft.distributed.rank_zero import on_each_machine, on_rank_zero
from clipft.distributed.rendezvous import start_processes
from clipft.models.device import choose_device
from clipft.runs.folder import RunPaths
from clipft.runs.records import Callbacks, Forecast, Usage
from clipft.storage.sync.sync import SyncOptions
from clipft.training.defaults import follow_catalogue
from clipft.training.forecast import forecast
from clipft.training.signals import stop_on_signals
from clipft.training.state import TrainResult

if TYPE_CHECKING:
    from clipft.data.shards.stream import ShardSource

_MIB, _GIB = 1 << 20, 1 << 30


def run_training(loaded: LoadedSettings, out: Output, options: FigureOptions) -> None:
    """Fetch the pairs if they are in a bucket, train, and show what it did.

    Raises:
        StorageError: training has ended, but its last checkpoint did not reach the bucket.
        Interrupted: a signal came while that checkpoint was uploaded.
    """
    settings = loaded.values
    source: ShardSource | None = None
    with start_processes(settings, out.note) as processes:
        if processes.rank > 0:
            out = Output(as_json=False, quiet=True)
        if settings.s3_bucket and settings.stream:
            source = open_stream(settings, out, processes)
        elif settings.s3_bucket:
            on_each_machine(processes, lambda: bring_data(settings, out))
        uploads = Uploads(settings, out)
        on_rank_zero(processes, uploads.begin)
        display = make_progress(out.err, partial(memory_in_use, choose_device(settings)))
        callbacks = Callbacks(display, out.note, uploads.saved, out.progress)
        # The run catches signals itself; this request covers the upload that follows it
        with stop_on_signals() as stop:
            with uploads.awaited(stop):
                result = train(loaded, callbacks, processes, source)
                uploads.finished(result.checkpoint, result.steps)
            # The figures first: a failed upload must not hide what was trained
            _show_result(result, settings, out, options)
            on_rank_zero(processes, lambda: uploads.check(stop))


def _show_result(
    result: TrainResult, settings: Settings, out: Output, options: FigureOptions
) -> None:
    paths = RunPaths(result.folder)
    # Only the machine of rank zero has the file, and the others print nothing
    compared = read_json(paths.evaluation)
    out.result(result.to_dict(), *(_answer(result, compared, options) if compared else ()))
    if result.skipped_pairs:
        out.note(
            f"note: skipped {counted(result.skipped_pairs, 'bad pair')}, listed in {paths.skipped}."
        )
    change = (compared or {}).get("difference")
    has_gain = change and change["recall"]["value"] > 0 and change["recall"].get("clear", True)
    if change and not has_gain and not settings.mini_train:
        out.note("note: no clear gain. Try more --epochs or another --lr, or add pairs.")
    say_more(out, options, "gains and losses", command="clipft evaluate")
    made = {"run folder": result.folder, "checkpoint": result.checkpoint, "report": paths.report}
    existing = {what: place if place.exists() else None for what, place in made.items()}
    end(out, existing, ("evaluate", result.folder, "--data-dir", settings.data_dir))


def _answer(
    result: TrainResult, compared: dict[str, Any], options: FigureOptions
) -> Iterator[RenderableType]:
    yield from comparison_answer("Validation", compared, options)
    yield from footnotes(compared, options)
    if result.best:
        early = ", stopped early because mean recall no longer rose" if result.stopped_early else ""
        yield f"Best epoch: {result.best.epoch}{early}"


def plan_training(loaded: LoadedSettings, out: Output) -> None:
    """Show what a run would do, and the time, memory and disk space it would take.

    Pairs that are still in a bucket are counted but not fetched. No step can be measured
    without them, so the forecast is left out then.
    """
    settings = loaded.values
    source: ShardSource | None = None
    with start_processes(settings, out.note) as processes:
        if processes.rank > 0:
            out = Output(as_json=False, quiet=True)
        if settings.s3_bucket and settings.stream:
            source = open_stream(settings, out, processes)
        elif settings.s3_bucket:
            dry_run = SyncOptions(dry_run=True)
            missing = on_rank_zero(processes, lambda: bring_data(settings, out, dry_run))
            if missing.transferred:
                count, size = missing.transferred, missing.bytes
                out.result(
                    {"to_fetch": {"objects": count, "bytes": size}, "forecast": None},
                    f"{counted(count, 'object')} ({size / _MIB:,.1f} MiB) would be fetched to "
                    f"{settings.data_dir} first. The rest of the plan needs these pairs: fetch "
                    "them, then plan again.",
                )
                end(out, {}, ("sync", *flags_given(loaded, *StorageSettings.model_fields)))
                return
        loaded = follow_catalogue(loaded, out.note, processes, source)
        expected = forecast(loaded.values, out.note, processes, out.progress, source)
    uploads_to = None
    if settings.enable_s3_checkpoints:
        uploads_to = f"s3://{settings.s3_bucket}/{settings.s3_checkpoint_prefix.strip('/')}"
    usage = Usage(expected.plan, expected.seconds, settings.price_per_hour)
    figures = {**asdict(expected), "seconds": expected.seconds, **usage.to_dict()}
    data = {"forecast": figures, "uploads_to": uploads_to, "to_fetch": None}
    table = _forecast_table(expected, usage, str(settings.output_dir), uploads_to)
    out.result(data, *plan_lines(expected.plan), table)
    end(out, {}, ("train", *flags_given(loaded)))


def _forecast_table(f: Forecast, usage: Usage, folder: str, uploads_to: str | None) -> Table:
    """Show what a run that writes to ``folder`` would take; ``uploads_to`` is an S3 location."""
    time = f"about {duration(f.seconds)}: "
    if f.cache_bytes:
        time += f"features of frozen encoders in {_seconds(f.cache_seconds)}, "
    if f.measured_steps:
        steps = counted(f.plan.total_steps - f.done_steps, "step")
        time += f"{steps} at {_seconds(f.seconds_per_step)} each, "
    validations = counted(f.validations, "validation")
    time += f"{validations} at {_seconds(f.validation_seconds)} each"
    if f.look_alike_searches:
        epochs = counted(f.look_alike_searches, "epoch")
        time += f", {_seconds(f.look_alike_seconds)} for look-alikes before each of {epochs}"
    if f.measured_steps:
        done = f"; {f.done_steps:,} steps are already done" if f.done_steps else ""
        time += (
            f"; measured on {counted(f.measured_steps, 'step')}{done}. Early stopping may end "
            "the run sooner"
        )

    free = f"{f.disk_free / _GIB:.1f} GiB free"
    if f.checkpoint_bytes:
        warning = "warning: not enough space: " if f.disk_free < f.disk_bytes else ""
        disk = (
            f"{warning}at most {f.disk_bytes / _MIB:,.1f} MiB in {folder}: a checkpoint of "
            f"{f.checkpoint_bytes / _MIB:,.1f} MiB, twice while it is replaced, and "
            f"{f.best_bytes / _MIB:,.1f} MiB for the best epoch; {free}"
        )
    else:
        disk = f"only figures, in {folder}; {free}"

    uploads = "none"
    if uploads_to:
        each = f.checkpoint_bytes + f.best_bytes
        uploads = (
            f"up to {f.saves:,} of {each / _MIB:,.1f} MiB to {uploads_to}, "
            f"{f.saves * each / _GIB:,.2f} GiB in total; a newer checkpoint replaces one that is "
            "still waiting"
        )

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    unusable = f"{counted(f.unusable, 'pair')}, skipped" if f.unusable else "none found so far"
    table.add_row("unusable", unusable)
    table.add_row("time", time)
    table.add_row("cost", f"about {usage}")
    if f.measured_steps:
        waiting = f"{f.data_share:.0%} of the time waiting for data"
        table.add_row("speed", f"{f.pairs_per_s:.1f} pairs/s, {waiting}")
    memory = f"{f.peak_bytes / _GIB:.2f} GiB at most on {f.plan.device} while measuring"
    table.add_row("memory", f"{memory}; {f.usable_bytes / _GIB:.1f} GiB are usable")
    # Text, because the brackets of a folder's name are not markup
    table.add_row("disk", Text(disk))
    if f.cache_bytes:
        cached = (
            f"{f.cache_bytes / _MIB:,.1f} MiB of features of frozen encoders in the cache folder"
        )
        table.add_row("cache", f"{cached}, which later runs on the same pairs use too")
    table.add_row("uploads", Text(uploads))
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)
