"""``train --plan``: what a run would do and take, from its own set-up and some of its own
steps. The output folder is not touched; what the set-up keeps in the cache folder (indexes,
captions, features, the micro-batch) is what the run would have made first."""

import shutil
import time
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from clipft.config.settings import Settings
from clipft.core.common import Note, Progress
from clipft.core.errors import DataError
from clipft.core.files import nearest_folder
from clipft.core.memory import Peak, peak_memory, usable_memory
from clipft.data.captions.table import CaptionTable
from clipft.data.loader import training_batches
from clipft.data.order import Position
from clipft.data.shards.dataset import PairDataset
from clipft.distributed.collectives import Processes
from clipft.distributed.rank_zero import steps_in_lockstep
from clipft.embedding.embed import embed_pairs
from clipft.runs.checkpoint import checkpoint_size
from clipft.runs.folder import RunPaths
from clipft.runs.records import Forecast, StepResult
from clipft.training.checkpointing import check_same_run, checkpoint_to_resume
from clipft.training.loop import TrainState, fit
from clipft.training.setup import RunSetup, prepare

if TYPE_CHECKING:
    from clipft.data.shards.stream import ShardSource

_STEPS = 8
_ENOUGH = 30.0
"""Seconds after which no further step is measured, once there are two."""
_VALIDATED = 512
"""Pairs whose embedding is measured."""
_COMPARED = 2
"""Validation passes after training: the untouched model and the best epoch, in full."""


def forecast(
    settings: Settings,
    note: Note,
    processes: Processes,
    progress: Progress,
    source: "ShardSource | None" = None,
) -> Forecast:
    """Set the run up, train some steps of it and forget them.

    Raises:
        DataError, ModelError, UsageError: what the run itself would raise before it starts.
    """
    paths = RunPaths(settings.run_dir)
    whole = checkpoint_to_resume(settings, paths, note)
    checkpoint = whole.content if whole else None
    setup = prepare(settings, note, processes, progress, source)
    if checkpoint:
        check_same_run(checkpoint, setup)
    measured = _measure(setup, note)
    return _foreseen(setup, checkpoint, measured, shutil.disk_usage(nearest_folder(paths.folder)))


@dataclass(frozen=True)
class _Measured:
    steps: list[StepResult]
    peak: Peak
    validation_seconds: float
    unusable: int
    """Met on the way."""
    checkpoint_bytes: int
    weights_bytes: int

    @property
    def settled(self) -> list[StepResult]:
        """The first step starts workers and libraries, which a run does once."""
        return self.steps[1:] or self.steps


def _measure(setup: RunSetup, note: Note) -> _Measured:
    steps, checkpoint_bytes, weights_bytes = list[StepResult](), 0, 0
    with peak_memory(setup.loaded.precision.device) as peak:
        if setup.plan.epochs:
            optimiser = setup.make_optimiser()
            state = TrainState(setup.loaded.model, optimiser, setup.epoch_plan.steps)
            steps = _train(setup, state, note)
            content = state.state_dict()
            checkpoint_bytes = checkpoint_size(content)
            weights_bytes = checkpoint_size({"weights": content["model_state_dict"]})
        seconds, bad = _validate(setup)
    bad += sum(len(step.skipped) for step in steps)
    return _Measured(steps, peak, seconds, bad, checkpoint_bytes, weights_bytes)


def _train(setup: RunSetup, state: TrainState, note: Note) -> list[StepResult]:
    """As many steps of the first epochs as there is time for.

    Raises:
        DataError: none of their pairs can be used.
    """
    accumulate = setup.make_accumulation(state.optimiser, note)
    batches = training_batches(
        setup.train,
        setup.encoding.preprocessing,
        setup.epoch_plan,
        Position(),
        setup.plan.epochs,
        setup.loader_options,
    )
    usable = (batch for batch in steps_in_lockstep(setup.processes, batches) if batch.pairs)
    results, began = list[StepResult](), time.perf_counter()
    with closing(fit(state, usable, accumulate)) as steps:
        for result in steps:
            results.append(result)
            late = len(results) > 1 and time.perf_counter() - began > _ENOUGH
            if setup.processes.any(late or len(results) == _STEPS):
                break
    if not results:
        raise DataError(
            f"none of the {len(setup.train)} training pairs can be used",
            "`clipft inspect` names what is broken",
        )
    return results


def _validate(setup: RunSetup) -> tuple[float, int]:
    """Seconds of a whole pass, by some of the pairs, and how many of these cannot be used."""
    some = PairDataset(setup.val.shards, min(len(setup.val), _VALIDATED))
    started = time.perf_counter()
    embedded = embed_pairs(
        setup.loaded,
        some,
        setup.val_encoding,
        setup.settings,
        setup.val_positives,
        setup.processes,
    )
    seconds = time.perf_counter() - started
    return seconds * len(setup.val) / len(some), len(embedded.skipped)


def _foreseen(
    setup: RunSetup, checkpoint: dict[str, Any] | None, measured: _Measured, disk: Any
) -> Forecast:
    plan, settled = setup.plan, measured.settled
    done = checkpoint["step"] if checkpoint else 0
    epochs_left = plan.epochs - (checkpoint["epoch"] if checkpoint else 0)
    seconds = median(step.seconds for step in settled) if settled else 0.0
    waited, worked = (sum(getattr(s, n) for s in settled) for n in ("data_seconds", "seconds"))
    adapter = measured.weights_bytes if setup.settings.declared_scenario.lora else 0
    device = setup.loaded.precision.device
    return Forecast(
        plan=plan,
        done_steps=done,
        unusable=_known_unusable(setup) + measured.unusable,
        measured_steps=len(measured.steps),
        seconds_per_step=seconds,
        pairs_per_s=sum(step.pairs for step in settled) / worked if worked else 0.0,
        data_share=waited / worked if worked else 0.0,
        validations=(0 if checkpoint else 1) + epochs_left + (_COMPARED if plan.epochs else 1),
        validation_seconds=measured.validation_seconds,
        peak_bytes=measured.peak.bytes,
        usable_bytes=usable_memory(device, setup.processes.local_world_size),
        saves=_saves(setup, done),
        checkpoint_bytes=measured.checkpoint_bytes,
        best_bytes=measured.weights_bytes,
        disk_bytes=2 * measured.checkpoint_bytes + measured.weights_bytes + adapter,
        disk_free=disk.free,
    )


def _known_unusable(setup: RunSetup) -> int:
    """What the shards' indexes and the captions' table tell without a picture read."""
    members = len(setup.train.skipped) + len(setup.val.skipped)
    captions = (setup.encoding.preprocessing.captions, setup.val_encoding.preprocessing.captions)
    return members + sum(c.figures.none for c in captions if isinstance(c, CaptionTable))


def _saves(setup: RunSetup, done: int) -> int:
    """Every so many steps, at each epoch's end, and at the very end."""
    every, epoch = setup.settings.checkpoint_every, setup.plan.steps_per_epoch
    steps = range(done + 1, setup.plan.total_steps + 1)
    return 1 + sum(1 for s in steps if s % epoch == 0 or (every and s % every == 0))
