"""What ``from clipft import ...`` hands out: the whole of a job, as the command line does it
(which calls these too)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipft.config.settings import Settings
from clipft.config.sources import JUDGED_ANEW, LoadedSettings, load_settings
from clipft.core.common import Note
from clipft.core.errors import ClipftError, UsageError
from clipft.core.memory import peak_memory_so_far
from clipft.distributed.collectives import ALONE, Processes
from clipft.distributed.rank_zero import on_rank_zero
from clipft.evaluation.compare import Evaluated, Request, evaluate_checkpoint
from clipft.models.device import choose_precision, environment
from clipft.report.report import write_run_report
from clipft.runs.checkpoint import load_checkpoint
from clipft.runs.folder import RunPaths
from clipft.runs.load import find_checkpoint, open_model, saved_settings
from clipft.runs.loggers import JsonlTracker, RunRecorder, WandbTracker
from clipft.runs.records import Callbacks, Observers, TrainingCallback
from clipft.training.run import train as run_service
from clipft.training.state import TrainResult

if TYPE_CHECKING:
    from clipft.data.shards.stream import ShardSource

Given = Settings | LoadedSettings | Mapping[str, Any]
"""Settings, or some by name: the others are as ``load_settings`` has them."""


def _quiet(note: str) -> None:
    """Says nothing."""


def _nowhere(path: Path, step: int) -> None:
    """A checkpoint that stays where it was saved."""


SILENT = Callbacks(Observers(), _quiet, _nowhere)


def train(
    settings: Given,
    callbacks: Callbacks = SILENT,
    processes: Processes = ALONE,
    source: "ShardSource | None" = None,
) -> TrainResult:
    """Fine-tune on the pairs in ``data_dir``, to the end of the last epoch or of patience, and
    leave the run folder with its figures and its report.

    Pairs in a bucket are to be fetched before (``clipft sync``), or read by ``source``.
    ``callbacks`` are told of plan, steps and epochs. Ctrl-C saves the state.

    Raises:
        UsageError: settings that do not go together, or checkpoints that are to be uploaded
            with nobody who does.
        Interrupted, DataError, StorageError, ModelError, DivergedError, ProcessError: as they
            say.
    """
    loaded = _loaded(settings)
    values = loaded.values
    if values.enable_s3_checkpoints and callbacks.saved is _nowhere:
        raise UsageError(
            "enable_s3_checkpoints: only the command line uploads",
            "use `clipft train`, or upload in Callbacks.saved",
        )
    members = [callbacks.callback, *_keepers(values, callbacks.note)] if processes.rank == 0 else []
    told = Callbacks(Observers(members), callbacks.note, callbacks.saved, callbacks.progress)
    result = run_service(values, told, loaded.to_toml(), processes, source)
    on_rank_zero(processes, lambda: _report(result, callbacks.note))
    return result


def _loaded(given: Given) -> LoadedSettings:
    if isinstance(given, LoadedSettings):
        return given
    if isinstance(given, Settings):
        return LoadedSettings(given, dict.fromkeys(Settings.model_fields, "given"))
    return load_settings(given)


def _keepers(settings: Settings, note: Note) -> list[TrainingCallback]:
    """Those who write a run's figures down."""
    device, paths = choose_precision(settings).device, RunPaths.of(settings)
    keepers: list[TrainingCallback] = [
        JsonlTracker(paths.metrics),
        RunRecorder(paths.record, environment(device), partial(peak_memory_so_far, device)),
    ]
    if settings.wandb != "disabled":
        config = settings.model_dump(mode="json")
        keepers.append(WandbTracker(settings, settings.run_dir, config, note))
    return keepers


def _report(result: TrainResult, note: Note) -> None:
    try:
        write_run_report(result.folder, RunPaths.within(result.folder).report)
    except ClipftError as error:  # never a reason to lose the result of a run
        note(f"warning: no report was written: {error.message}")


@dataclass(frozen=True)
class EvaluatedModel:
    """A checkpoint, the settings it was measured with, and its figures."""

    checkpoint: Path
    settings: Settings
    found: Evaluated

    def to_dict(self) -> dict[str, Any]:
        """As ``clipft evaluate --json`` prints it."""
        at = {"scenario": self.settings.scenario, "checkpoint": str(self.checkpoint)}
        return {**at, **self.found.to_dict()}


def evaluate(
    place: str | Path | None,
    settings: Given | None = None,
    request: Request | None = None,
    note: Note = _quiet,
) -> EvaluatedModel:
    """A checkpoint or run folder (None: the run of ``settings``) beside its untouched model.

    The settings are those it was trained with, but where ``settings`` has others of
    ``JUDGED_ANEW``, or another ``model``. ``request``: what is wanted besides.

    Raises:
        DataError, ModelError, UsageError: pairs or weights cannot be had.
    """
    now = _loaded(settings or {})
    path = find_checkpoint(Path(place) if place else None, now.values)
    content = load_checkpoint(path)
    chosen = saved_settings(content, now, (*JUDGED_ANEW, "model"))
    note(f"{chosen.scenario} on {chosen.model}, weights of {path}.")
    wanted = request or Request.of(None, None, None, None)
    return EvaluatedModel(path, chosen, evaluate_checkpoint(content, chosen, wanted, note))


@dataclass(frozen=True)
class TunedModel:
    """``model``: the plain ``transformers`` model, adapters merged in, in eval mode; what it
    takes ``processor`` makes of pictures and texts."""

    model: Any
    processor: Any
    settings: Settings


def load_model(place: str | Path, device: str = "cpu") -> TunedModel:
    """The model of a run folder (its best epoch), a checkpoint, an exported folder, a hub id,
    or ``tiny``, in fp32.

    Raises:
        ModelError: there is none, or it cannot be loaded.
        UsageError: there is no such device.
    """
    from clipft.models.huggingface import merged, processor_of

    where = {"device": device, "precision": "fp32"}
    opened = open_model(str(place), load_settings(where), tuple(where))
    base = opened.loaded.base
    return TunedModel(merged(opened.loaded.model), processor_of(base), opened.settings)
