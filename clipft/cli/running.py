"""What ``train``, ``resume`` and ``demo`` share: run the training service and show it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from clipft.cli.console import Output, silent
from clipft.cli.launching import follow_launcher, launch, starts_others
from clipft.cli.reports import write_run_report
from clipft.cli.sync import sync_with_progress
from clipft.errors import ClipftError
from clipft.records import Observer, Observers
from clipft.reporting.progress import make_progress
from clipft.reporting.run_record import RunRecorder
from clipft.reporting.tables import retrieval_table
from clipft.reporting.tracking import JsonlTracker, WandbTracker
from clipft.settings import Settings
from clipft.settings_sources import LoadedSettings
from clipft.training.distributed import Processes, by_first, on_each_machine
from clipft.training.environment import environment
from clipft.training.memory import memory_in_use, peak_memory_so_far
from clipft.training.precision import choose_precision
from clipft.training.result import TrainResult
from clipft.training.run import Watchers
from clipft.training.run import train as run_service
from clipft.training.starting import start_processes


def run_training(loaded: LoadedSettings, out: Output, args: Sequence[str]) -> None:
    """Sync if a bucket is set, train, and show figures before and after.

    Where this is one of several processes, together with them; where it is to start them
    (``args``: the command line, to be run in each), by that.
    """
    if starts_others(loaded.values.processes):
        launch(loaded.values.processes, args)
        return
    follow_launcher()
    with start_processes(loaded.values) as processes:
        _run_in(processes, loaded, out if processes.rank == 0 else silent())


def _run_in(processes: Processes, loaded: LoadedSettings, out: Output) -> None:
    settings = loaded.values
    if settings.s3_bucket:
        on_each_machine(processes, lambda: sync_with_progress(settings, out))
    by_first(processes, lambda: _fetch_checkpoint(settings, out))
    observer = _observers(settings, out) if processes.rank == 0 else Observers()
    watchers = Watchers(observer, out.note, _after_save(settings, out), out.progress)
    result = run_service(settings, watchers, loaded.to_toml(), processes)
    by_first(processes, lambda: _finish(result, settings, out))


def _finish(result: TrainResult, settings: Settings, out: Output) -> None:
    try:
        write_run_report(result.folder, result.folder / "report.html")
        out.note(f"Report: {result.folder / 'report.html'}")
    except ClipftError as error:  # never a reason to lose the result of a run
        out.note(f"warning: no report was written: {error.message}")
    show(result, settings, out)


def show(result: TrainResult, settings: Settings, out: Output) -> None:
    """The result for people and programs, and the next useful command."""
    columns = {"untouched": result.before.retrieval}
    if result.best:
        columns[f"after epoch {result.best.epoch}"] = result.best.retrieval
    out.result(result.to_dict(), retrieval_table("Validation", columns))
    if result.stopped_early:
        out.note("Stopped early: no improvement any more.")
    if result.skipped_pairs:
        reasons = result.folder / "skipped.jsonl"
        out.note(f"note: {result.skipped_pairs} bad pairs were left out, see {reasons}.")
    if result.best and result.best.recall() <= result.before.recall() and not settings.mini_train:
        out.note("No gain over the untouched model: try another --lr, or more --epochs.")
    out.note(f"Run folder {result.folder}, checkpoint {result.checkpoint}.")
    out.note(f"Next: clipft evaluate {result.folder} --data-dir {settings.data_dir}")


def _observers(settings: Settings, out: Output) -> Observer:
    device = choose_precision(settings).device
    peak = partial(peak_memory_so_far, device)
    members: list[Observer] = [
        make_progress(out.err, partial(memory_in_use, device)),
        JsonlTracker(settings.run_dir / "metrics.jsonl"),
        RunRecorder(settings.run_dir / "run.json", environment(device), peak),
    ]
    if settings.wandb != "disabled":
        config = settings.model_dump(mode="json")
        members.append(WandbTracker(settings, settings.run_dir, config, out.note))
    return Observers(members)


def _fetch_checkpoint(settings: Settings, out: Output) -> None:
    """Bring the checkpoint to resume from the bucket, where the machine has none."""
    wanted = settings.resume_from_checkpoint and settings.enable_s3_checkpoints
    path = settings.checkpoint_path
    if not wanted or path.exists():
        return
    from clipft.storage.checkpoints import fetch_checkpoint

    if fetch_checkpoint(path.name, path, settings):
        out.note(f"Fetched {path.name} from bucket {settings.s3_bucket}.")
    else:
        out.note(f"warning: no checkpoint {path.name} found in S3.")


def _after_save(settings: Settings, out: Output) -> Callable[[Path], None]:
    """What happens to a saved checkpoint: nothing, or an upload that never stops a run."""
    if not settings.enable_s3_checkpoints:
        return lambda path: None
    from clipft.errors import StorageError, UsageError
    from clipft.storage.checkpoints import upload_checkpoint

    if not settings.s3_bucket:
        raise UsageError(
            "--enable-s3-checkpoints needs a bucket", "name it with --s3-bucket, or leave it out"
        )

    def upload(path: Path) -> None:
        try:
            upload_checkpoint(path, settings)
        except StorageError as error:
            out.note(f"warning: the checkpoint was not uploaded: {error.message}")

    return upload
