"""What ``train``, ``resume`` and ``demo`` share: run the training service and show it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from clipft.api import train
from clipft.cli.console import Output, silent
from clipft.cli.ending import end
from clipft.cli.launch import follow_launcher, launch, starts_others
from clipft.cli.s3_checkpoints import Uploads
from clipft.cli.s3_data import bring_data, bring_validation, stream_source
from clipft.cli.progress import make_progress
from clipft.cli.tables import retrieval_table
from clipft.config.settings import Settings
from clipft.config.sources import LoadedSettings
from clipft.distributed.collectives import Processes, by_first, on_each_machine
from clipft.core.memory import memory_in_use
from clipft.models.device import choose_precision
from clipft.training.result import TrainResult
from clipft.runs.folder import RunPaths
from clipft.training.signals import stop_on_signals
from clipft.distributed.rendezvous import start_processes
from clipft.training.watchers import Watchers
from clipft.words import counted

if TYPE_CHECKING:
    from clipft.data.shards.stream import ShardSource


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
    by_first(processes, uploads.begin)
    device = choose_precision(settings).device
    display = make_progress(out.err, partial(memory_in_use, device))
    watchers = Watchers(display, out.note, uploads.saved, out.progress)
    with stop_on_signals() as stop:  # after those of the run, to the end of the upload
        with uploads.awaited(stop):
            result = train(loaded, watchers, processes, source)
            uploads.finished(result.checkpoint, result.steps)
        _show(result, settings, out)
        by_first(processes, lambda: uploads.check(stop))


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
        reasons = RunPaths.within(result.folder).skipped
        out.note(f"note: left out {counted(result.skipped_pairs, 'bad pair')}, see {reasons}.")
    if result.best and result.best.recall() <= result.before.recall() and not settings.mini_train:
        out.note("No gain over the untouched model: try another --lr, or more --epochs.")
    page = RunPaths.within(result.folder).report
    made = {"run folder": result.folder, "checkpoint": result.checkpoint, "report": page}
    there = {what: place if place.exists() else None for what, place in made.items()}
    end(out, there, ("evaluate", result.folder, "--data-dir", settings.data_dir))
