"""The public functions of ``clipft``. The command line calls the same functions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipft.config.settings import EVALUATION_OVERRIDES, Settings
from clipft.config.sources import LoadedSettings, load_settings
from clipft.core.common import Note
from clipft.core.errors import ClipftError, UsageError
from clipft.core.memory import peak_memory_so_far
from clipft.distributed.collectives import ALONE, Processes
from clipft.distributed.rank_zero import on_rank_zero
from clipft.evaluation.compare import Evaluated, evaluate_checkpoint
from clipft.evaluation.request import Request
from clipft.models.device import choose_device, environment
from clipft.report.report import write_run_report
from clipft.runs.checkpoint import load_checkpoint
from clipft.runs.folder import RunPaths
from clipft.runs.load import open_model
from clipft.runs.loggers import FileLogger, TrackerLogger
from clipft.runs.places import find_checkpoint, saved_settings
from clipft.runs.records import CallbackList, Callbacks, TrainingCallback, ignore
from clipft.runs.trackers import check_installed, trackers_of
from clipft.training.defaults import follow_catalogue
from clipft.training.run import train as run_training
from clipft.training.state import TrainResult

if TYPE_CHECKING:
    from clipft.data.shards.stream import ShardSource

Given = Settings | LoadedSettings | Mapping[str, Any]
"""Complete settings, or some settings by name, to which ``load_settings`` adds the others."""

SILENT = Callbacks()


def train(
    settings: Given,
    callbacks: Callbacks = SILENT,
    processes: Processes = ALONE,
    source: "ShardSource | None" = None,
    *,
    watchers: Callbacks | None = None,
) -> TrainResult:
    """Fine-tune on the pairs in ``data_dir``, and write the run folder with figures and a report.

    Training ends after the last epoch, or earlier if the validation stops improving. After Ctrl-C
    or SIGTERM, the state is saved first.

    Args:
        settings: The settings of the run. Pairs in a bucket must have been fetched before
            (``clipft sync``), unless ``source`` reads them.
        callbacks: The receivers of the plan, the steps, the epochs and the checkpoints.
        processes: The processes that train together; by default this one alone.
        source: The training shards of a streamed run, if they are not in ``data_dir``.
        watchers: The former name of ``callbacks``, still accepted.

    Raises:
        UsageError: Settings contradict each other, or ask for uploads without a callback for them.
        DataError: There are no pairs, or too many of them are broken.
        ModelError: The pretrained model or the checkpoint to resume cannot be loaded.
        StorageError: The disk is full or refuses to write.
        DivergedError: The loss or the gradients stopped being finite.
        ProcessError: Another process of the run ended or hangs.
        Interrupted: A signal stopped the run; its state is saved.
    """
    callbacks = watchers or callbacks
    loaded = follow_catalogue(_loaded(settings), callbacks.note, processes, source)
    values = loaded.values
    if values.enable_s3_checkpoints and callbacks.saved is ignore:
        raise UsageError(
            "enable_s3_checkpoints: only the command line uploads checkpoints",
            "use `clipft train`, or upload them yourself in Callbacks(saved=...)",
        )
    check_installed(values.tracker_names)
    # Only rank zero writes and reports
    members = [callbacks.callback, *_loggers(values, callbacks.note)] if processes.rank == 0 else []
    told = replace(callbacks, callback=CallbackList(members))
    result = run_training(values, told, loaded.to_toml(), processes, source)

    def report() -> None:
        try:
            write_run_report(result.folder, RunPaths(result.folder).report)
        except ClipftError as error:  # the run itself has succeeded
            callbacks.note(f"warning: the report could not be written: {error.message}")

    on_rank_zero(processes, report)
    return result


def _loaded(given: Given) -> LoadedSettings:
    if isinstance(given, LoadedSettings):
        return given
    if isinstance(given, Settings):
        return LoadedSettings(given, dict.fromkeys(Settings.model_fields, "given"))
    return load_settings(given)


def _loggers(settings: Settings, note: Note) -> list[TrainingCallback]:
    """Return the callbacks that log the figures of a run."""
    device, paths = choose_device(settings), RunPaths(settings.run_dir)
    memory, price = partial(peak_memory_so_far, device), settings.price_per_hour
    loggers: list[TrainingCallback] = [FileLogger(paths, environment(device), memory, price)]
    trackers = trackers_of(settings, settings.model_dump(mode="json"))
    return loggers + [TrackerLogger(tracker, note) for tracker in trackers]


@dataclass(frozen=True)
class EvaluatedModel:
    """A checkpoint, the settings of its evaluation, and its figures."""

    checkpoint: Path
    settings: Settings
    found: Evaluated

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that ``clipft evaluate --json`` prints."""
        at = {"scenario": self.settings.scenario, "checkpoint": str(self.checkpoint)}
        return {**at, **self.found.to_dict()}


def evaluate(
    place: str | Path | None,
    settings: Given | None = None,
    request: Request | None = None,
    note: Note = ignore,
) -> EvaluatedModel:
    """Evaluate a checkpoint and its pretrained model on the validation pairs.

    Args:
        place: A checkpoint or run folder. None means the run of these ``settings``.
        settings: Replaces settings of the checkpoint's training: the data, the evaluation, the
            hardware (``EVALUATION_OVERRIDES``) and the ``model``. All others are ignored.
        request: Additional measurements, such as interpolated weights.
        note: Receives sentences for the user.

    Raises:
        DataError: There are no validation pairs, or they cannot be read.
        ModelError: There is no checkpoint, or its pretrained model cannot be loaded.
        UsageError: The settings or the request are not valid.
    """
    now = _loaded(settings or {})
    path = find_checkpoint(Path(place) if place else None, now.values)
    content = load_checkpoint(path)
    chosen = saved_settings(content, now, (*EVALUATION_OVERRIDES, "model"))
    note(f"{chosen.scenario} on {chosen.model}, weights of {path}.")
    wanted = request or Request.of(None, None, None, None)
    return EvaluatedModel(path, chosen, evaluate_checkpoint(content, chosen, wanted, note))


@dataclass(frozen=True)
class TunedModel:
    """A model that is ready to use.

    ``model`` is a plain ``transformers`` model in eval mode, with adapters merged into its
    weights. ``processor`` turns images and texts into its inputs.
    """

    model: Any
    processor: Any
    settings: Settings


def load_model(place: str | Path, device: str = "cpu") -> TunedModel:
    """Load the model of a run folder (its best epoch), a checkpoint, an exported folder, a hub id,
    or ``tiny``, in fp32.

    Raises:
        ModelError: There is no such model, or it cannot be loaded.
        UsageError: There is no such device.
    """
    from clipft.models.huggingface import merged, processor_of

    where = {"device": device, "precision": "fp32"}
    opened = open_model(str(place), load_settings(where), tuple(where))
    base = opened.loaded.base
    return TunedModel(merged(opened.loaded.model), processor_of(base), opened.settings)
