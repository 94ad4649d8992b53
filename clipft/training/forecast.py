"""``train --plan``: estimates what a run would do, and the time, memory and disk it would take.

The run is set up as usual and trains a few steps. Nothing is written to the output folder. The
setup fills the cache folder (indexes, captions, the micro-batch), and the run itself will use these
files. The features of frozen towers, which can take hours, are computed only for a sample of pairs.
"""

import shutil
import time
from contextlib import closing
from dataclasses import asdict, replace
from statistics import median
from typing import TYPE_CHECKING

from clipft.config.settings import Settings
from clipft.core.common import Note, Progress
from clipft.core.errors import DataError
from clipft.core.files import nearest_folder
from clipft.core.memory import peak_memory, usable_memory
from clipft.data.captions.table import CaptionTable
from clipft.data.order import Position
from clipft.distributed.collectives import Processes
from clipft.embedding.embed import embed_pairs
from clipft.embedding.feature_cache import CacheForecast
from clipft.runs.checkpoint_format import checkpoint_size
from clipft.runs.folder import RunPaths
from clipft.runs.records import Choices, Forecast, StepResult
from clipft.training.checkpointing import is_save_due
from clipft.training.loop import find_look_alikes, fit
from clipft.training.prepare import prepare
from clipft.training.resume import check_same_run, checkpoint_to_resume
from clipft.training.setup import RunSetup
from clipft.training.state import TrainState

if TYPE_CHECKING:
    from clipft.data.shards.stream import ShardSource

_STEPS = 8
# Measuring ends after this many seconds and at least two steps
_ENOUGH_SECONDS = 30.0
# Validation pairs whose embedding is measured
_VALIDATED = 512
# Training images for which look-alikes are searched, to measure the time
_COMPARED = 512
# The evaluation at the end embeds with the pretrained model and with the best epoch
_FINAL_PASSES = 2


def forecast(
    settings: Settings,
    note: Note,
    processes: Processes,
    progress: Progress,
    source: "ShardSource | None" = None,
) -> Forecast:
    """Set up the run and train some of its steps, without saving anything.

    Raises:
        DataError, ModelError, UsageError: the run would raise this before its first step.
    """
    paths = RunPaths(settings.run_dir)
    whole = checkpoint_to_resume(settings, paths, note)
    checkpoint = whole.content if whole else None
    cache = CacheForecast()
    setup = prepare(settings, note, processes, progress, source, Choices.of(checkpoint), cache)
    if checkpoint:
        check_same_run(checkpoint, setup)

    steps, checkpoint_bytes, weights_bytes = list[StepResult](), 0, 0
    look_alike_seconds = 0.0
    with peak_memory(setup.loaded.precision.device) as peak:
        if setup.plan.epochs:
            state = setup.make_state()
            look_alike_seconds = _find_some_look_alikes(setup, state)
            steps = _train_some(setup, state, note)
            content = {**state.state_dict(), "choices": asdict(setup.choices)}
            checkpoint_bytes = checkpoint_size(content)
            weights_bytes = checkpoint_size({"weights": content["model_state_dict"]})
        validation_seconds, unusable = _validate_some(setup)

    settled = steps[1:] or steps  # the first step is slower, because workers and libraries start
    worked, waited = sum(s.seconds for s in settled), sum(s.data_seconds for s in settled)
    plan, done = setup.plan, checkpoint["step"] if checkpoint else 0
    epochs_left = plan.epochs - (checkpoint["epoch"] if checkpoint else 0)
    under_way = bool(checkpoint and checkpoint["step_in_epoch"])
    final_passes = _FINAL_PASSES if plan.epochs else 1
    adapter_bytes = weights_bytes if settings.declared_scenario.lora else 0
    saves = sum(
        is_save_due(step, plan.steps_per_epoch, settings.checkpoint_every)
        for step in range(done + 1, plan.total_steps + 1)
    )
    return Forecast(
        plan=plan,
        done_steps=done,
        unusable=_known_unusable(setup) + unusable + sum(len(s.skipped) for s in steps),
        measured_steps=len(steps),
        seconds_per_step=median(s.seconds for s in settled) if settled else 0.0,
        pairs_per_s=sum(s.pairs for s in settled) / worked if worked else 0.0,
        data_share=waited / worked if worked else 0.0,
        validations=(0 if checkpoint else 1) + epochs_left + final_passes,
        validation_seconds=validation_seconds,
        cache_seconds=sum(cache.seconds.values()),
        cache_bytes=sum(cache.bytes.values()),
        peak_bytes=peak.bytes,
        usable_bytes=usable_memory(setup.loaded.precision.device, processes.local_world_size),
        saves=saves + 1,  # one more at the end of the run
        checkpoint_bytes=checkpoint_bytes,
        best_bytes=weights_bytes,
        disk_bytes=2 * checkpoint_bytes + weights_bytes + adapter_bytes,
        disk_free=shutil.disk_usage(nearest_folder(paths.folder)).free,
        look_alike_searches=max(0, epochs_left - under_way) if setup.look_alike_search else 0,
        look_alike_seconds=look_alike_seconds,
    )


def _find_some_look_alikes(setup: RunSetup, state: TrainState) -> float:
    """Find the look-alikes of some images. Return the estimated seconds for all images, or 0 if
    epochs do not search for look-alikes."""
    search = setup.look_alike_search
    if search is None:
        return 0.0
    some = search.on_some(_COMPARED)
    find_look_alikes(replace(setup, look_alike_search=some), state)
    return (state.look_alike_seconds or 0.0) * len(search.pairs) / len(some.pairs)


def _train_some(setup: RunSetup, state: TrainState, note: Note) -> list[StepResult]:
    """Train as many steps of the first epochs as there is time for.

    Raises:
        DataError: none of the pairs of a step can be used.
    """
    accumulate = setup.make_accumulation(state.optimizer, note)
    batches = setup.step_batches(Position(), look_alikes=state.look_alikes)
    usable = (batch for batch in batches if batch.pairs)
    results, began = list[StepResult](), time.perf_counter()
    with closing(fit(state, usable, accumulate)) as steps:
        for result in steps:
            results.append(result)
            late = len(results) > 1 and time.perf_counter() - began > _ENOUGH_SECONDS
            if setup.processes.any(late or len(results) == _STEPS):
                break
    if not results:
        raise DataError(
            f"none of the {len(setup.train)} training pairs can be used",
            "run `clipft inspect` to see what is broken",
        )
    return results


def _validate_some(setup: RunSetup) -> tuple[float, int]:
    """Embed some validation pairs. Return the estimated seconds for all validation pairs, and how
    many of the embedded ones are unusable."""
    some = setup.val.first(_VALIDATED)
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


def _known_unusable(setup: RunSetup) -> int:
    """Return how many pairs are unusable according to the shards' indexes and caption tables."""
    members = len(setup.train.skipped) + len(setup.val.skipped)
    captions = (setup.encoding.preprocessing.captions, setup.val_encoding.preprocessing.captions)
    return members + sum(c.figures.none for c in captions if isinstance(c, CaptionTable))
