"""The training loop."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict

from clipft.core.common import counted
from clipft.core.errors import DataError
from clipft.core.out_of_memory import no_second_attempt
from clipft.data.batch import StepBatch
from clipft.runs.records import StepResult
from clipft.training.setup import RunSetup
from clipft.training.state import SkippedPairs, TrainState
from clipft.training.step.gradcache import Accumulation

_IN_UPDATE = " when the weights were updated, which cannot be repeated in smaller pieces"
_AFTER_UPDATE = "use --optimizer adamw8bit, a scenario that trains fewer weights, or more memory"


def fit(
    state: TrainState, batches: Iterable[StepBatch], accumulate: Accumulation
) -> Generator[StepResult, None, None]:
    """Train on each batch and yield the result of the step.

    The caller (``_Run.train_epochs`` in ``run.py``) shows the result, validates and saves.
    """
    state.model.train()
    started = time.perf_counter()
    for batch in batches:
        got_data = time.perf_counter()

        for attempt in accumulate.recovery.attempts(state.step):  # one, unless memory runs out
            with attempt:
                # This also leaves the gradient in the parameters
                loss = accumulate(state.step, batch.micro_batches, batch.pairs, batch.general)
        with no_second_attempt(_IN_UPDATE, _AFTER_UPDATE):
            update = state.optimizer.update(loss)
        state.model.clamp_logit_scale()
        state.average.update(state.step)

        state.advance(batch, update.loss)
        batch.free_images()
        ended = time.perf_counter()
        yield StepResult(
            epoch=batch.epoch + 1,
            step=state.step,
            loss=update.loss,
            lr=update.lr,
            grad_norm=update.grad_norm,
            pairs=batch.pairs,
            seconds=ended - started,
            data_seconds=got_data - started,
            applied=update.applied,
            skipped=tuple(asdict(skipped) for skipped in batch.skipped),
            loss_floor=accumulate.lower_bound,
            drift=accumulate.drift,
        )
        started = time.perf_counter()


def step_batches(
    setup: RunSetup,
    state: TrainState,
    skipped: SkippedPairs,
    check: Callable[[], None] = lambda: None,
    start_to_copy: Callable[[StepBatch], None] = lambda batch: None,
) -> Iterator[StepBatch]:
    """Yield the batches of the remaining steps, to the end of the last epoch, or to the end of this
    epoch if each epoch finds its own look-alikes.

    On CUDA, ``start_to_copy`` is called with each batch during the step before it. ``check`` is
    called before each step and may end the iteration by raising a ``ClipftError``.

    Raises:
        DataError: none of a step's pairs can be used; they are listed in ``skipped``.
    """
    for batch in setup.step_batches(state.position, check, start_to_copy, state.look_alikes):
        if not batch.pairs:
            skipped.add(batch.epoch + 1, state.step, [asdict(pair) for pair in batch.skipped])
            raise DataError(
                f"none of the {counted(len(batch.skipped), 'pair')} of step {state.step + 1} can "
                "be used",
                f"see {skipped.path}; repair the data, or use a larger --effective-batch-size",
            )
        yield batch


def find_look_alikes(
    setup: RunSetup, state: TrainState, check: Callable[[], None] = lambda: None
) -> None:
    """Find the look-alikes for the next epoch, if each epoch of the run finds its own.

    With ``--ema``, the averages of the weights are used, as in validations.
    """
    # An epoch in progress keeps its look-alikes, which are in its checkpoints
    if setup.look_alike_search is None or state.position.step:
        return
    began = time.perf_counter()
    with state.average.in_place():
        state.look_alikes = setup.look_alike_search.find(setup.processes, check)
    state.look_alike_seconds = time.perf_counter() - began
