"""Trains a model from settings, from scratch or resumed, and writes the run folder."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipft.config.settings import Settings
from clipft.core.common import checked
from clipft.core.errors import DataError, DivergedError, Interrupted, MemoryShortage, ProcessError
from clipft.core.files import write_text
from clipft.data.shards.dataset import PairDataset
from clipft.distributed.collectives import Processes
from clipft.distributed.rank_zero import on_all_ranks, on_rank_zero
from clipft.embedding.finite import NotFiniteError, describe_broken
from clipft.runs.folder import RunPaths, run_lock
from clipft.runs.records import Callbacks, Choices, EpochResult, StepResult
from clipft.training.checkpointing import Best, Saver, find_best
from clipft.training.loop import find_look_alikes, fit, step_batches
from clipft.training.prepare import prepare
from clipft.training.resume import (
    check_same_run,
    checkpoint_to_resume,
    drop_later_lines,
    replace_damaged,
    set_aside,
)
from clipft.training.setup import RunSetup
from clipft.training.signals import StopRequest, stop_on_signals
from clipft.training.state import EarlyStopping, RunState, SkippedPairs, TrainResult, TrainState
from clipft.training.step.gradcache import Accumulation
from clipft.training.validation import Validation, write_results

if TYPE_CHECKING:
    from clipft.data.shards.stream import ShardSource


def train(
    settings: Settings,
    callbacks: Callbacks,
    toml: str,
    processes: Processes,
    source: "ShardSource | None" = None,
) -> TrainResult:
    """Train to the end of the last epoch, or until early stopping, and evaluate the best epoch.

    All processes of the run must call this; rank zero writes the files. ``toml`` is the text of the
    settings, which is saved in the run folder. ``source`` gives the training shards of a stream if
    they are not in ``data_dir``.

    Raises:
        Interrupted: a signal stopped the run; if a step was done, the state is saved.
        DataError: pairs are missing, or too many cannot be used.
        StorageError: the disk is full or cannot be written to.
        ModelError: the base model or the checkpoint cannot be loaded.
        DivergedError: the loss or the gradients are no longer finite.
        MemoryShortage: not even the smallest micro-batch fits.
        UsageError: settings do not fit each other, the data, or the checkpoint.
        ProcessError: another process of the run ended.
    """
    paths = RunPaths(settings.run_dir)

    def claim_folder(held: ExitStack) -> dict[str, Any] | None:
        held.enter_context(run_lock(paths.folder))
        whole = checkpoint_to_resume(settings, paths, callbacks.note)
        if whole:
            replace_damaged(whole, paths, callbacks.note)
        return whole.content if whole else None

    def begin_folder() -> None:
        if not checkpoint:
            set_aside(paths, callbacks.note)
        write_text(paths.settings, toml)

    with ExitStack() as held, stop_on_signals(processes.rank == 0) as stop:
        checkpoint = on_rank_zero(processes, lambda: claim_folder(held))
        if checkpoint and checkpoint["finished"]:
            callbacks.note(f"{paths.checkpoint} belongs to a finished run: nothing left to train.")
            # The last files may be missing after a kill or a move to a new machine
            if processes.broadcast_object(paths.result.exists()):
                return TrainResult.of_finished(checkpoint, paths)
        saved = paths.checkpoint if checkpoint else None
        progress = checked(
            callbacks.progress, lambda: stop.check("before the first step of this start", saved)
        )
        try:
            began = Choices.of(checkpoint)
            setup = prepare(settings, callbacks.note, processes, progress, source, began)
            run = _Run(setup, paths, callbacks, stop)  # may raise a UsageError
            on_rank_zero(processes, begin_folder)  # only now, because it moves an earlier run
            try:
                if checkpoint:
                    run.resume(checkpoint)
                else:
                    run.start()
                run.train_epochs()
                return run.finish()
            finally:
                run.saver.close()
                callbacks.callback.closed()
        except Interrupted:
            processes.barrier()  # the launcher ends all as soon as one has ended
            raise


class _Run:
    """A run in progress. It validates and saves between the steps.

    All processes must make the same calls in the same order. Files are written ``on_rank_zero``.
    """

    def __init__(
        self, setup: RunSetup, paths: RunPaths, callbacks: Callbacks, stop: StopRequest
    ) -> None:
        self.setup, self.paths, self.callbacks, self.stop = setup, paths, callbacks, stop
        self.processes = setup.processes
        settings = setup.settings
        self.validation = Validation.of(setup)
        training = None
        if setup.plan.epochs:
            training = setup.make_state()
        self.state = RunState(
            training,
            EarlyStopping(settings.stop_on, settings.patience, settings.min_delta),
            SkippedPairs(paths.skipped, len(setup.train), settings, setup.processes),
        )
        self.saver = Saver(self.state, setup, paths, callbacks)

    def start(self) -> None:
        """Begin a new run, and validate the pretrained model."""
        for split, pairs in (("train", self.setup.train), ("val", self.setup.val)):
            self.state.skipped.write(split, 0, map(asdict, pairs.skipped))
        self.callbacks.callback.started(self.setup.plan, 0)
        self.state.before = self._validate(epoch=0, train_loss=None)
        self._keep_rankings(self.paths.rankings_before)
        self.callbacks.callback.epoch_ended(self.state.before)

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Continue from the state in ``checkpoint``.

        Raises:
            UsageError: the checkpoint was trained from another base model or on other pairs.
            ModelError: the checkpoint does not fit the model, or the best epoch's weights are
                damaged.
        """
        on_all_ranks(self.processes, lambda: check_same_run(checkpoint, self.setup))
        self.state.load(checkpoint)
        self.saver.saved_step = self.state.step
        on_rank_zero(self.processes, lambda: drop_later_lines(self.paths, checkpoint))
        self.callbacks.note(
            f"Resuming after step {self.state.step} of {self.setup.plan.total_steps}."
        )
        self.callbacks.callback.started(self.setup.plan, self.state.step)
        if self.state.training and self.state.best:
            self._check_best(self.state.training, self.state.best)

    def _check_best(self, training: TrainState, best: EpochResult) -> None:
        """Check, before a long training, that the weights of the best epoch still exist."""
        ended = training.epoch_ended and self.state.validated
        # If the checkpoint is from the end of the best epoch, it holds the same weights
        in_checkpoint = ended and best.epoch == training.position.epoch
        path = self.paths.best
        found = on_rank_zero(
            self.processes, lambda: find_best(path, best.epoch, training.step, in_checkpoint)
        )
        if found is Best.THERE:
            return
        if in_checkpoint:
            self.saver.save_best(training)
            self.callbacks.note(f"{path} was restored from the checkpoint.")
            return
        self.state.best = None
        if found is Best.GONE:
            self.callbacks.note(
                f"warning: {path} is gone: the weights of epoch {best.epoch}, the best one so far, "
                "are lost; the best of the remaining epochs replaces them."
            )
            if ended:
                measured = self._validate(training.position.epoch, training.mean_loss)
                self._take_as_best(training, replace(measured, improved=True))

    def train_epochs(self) -> None:
        """Train the remaining steps, and validate and save in between.

        If an error or a signal ends the run, the latest steps are saved first.
        """
        training = self.state.training
        if training is None or self.state.stopping.should_stop:
            return
        try:
            if not self.state.validated:  # stopped during this epoch's validation
                self._end_epoch(training)
                self.saver.save_if_due(training)
            accumulate = self.setup.make_accumulation(training.optimizer, self.callbacks.note)
            epochs = self.setup.plan.epochs
            while training.position.epoch < epochs and not self.state.stopping.should_stop:
                find_look_alikes(self.setup, training, self._check_stop)
                self._train_steps(training, accumulate)
        except Interrupted:
            self.saver.save_rest()
            raise
        except (DataError, MemoryShortage, ProcessError) as error:
            self.saver.save_after(error, training)
            raise

    def _train_steps(self, training: TrainState, accumulate: Accumulation) -> None:
        """Train on all batches from ``step_batches``, or until early stopping."""
        skipped, copy = self.state.skipped, accumulate.start_to_copy
        batches = step_batches(self.setup, training, skipped, self._check_stop, copy)
        steps = fit(training, batches, accumulate)
        while not self.state.stopping.should_stop and (
            result := self._next_step(steps, accumulate)
        ):
            self.state.validated = not training.epoch_ended
            self.callbacks.callback.stepped(result)
            skipped.add(result.epoch, result.step, result.skipped)
            if training.epoch_ended:
                self._end_epoch(training)
            self.saver.save_if_due(training)

    def _next_step(
        self, steps: Iterator[StepResult], accumulate: Accumulation
    ) -> StepResult | None:
        """Take a step. The error for a gradient that is not finite describes NaN embeddings."""
        try:
            result = next(steps, None)
        except DivergedError as error:
            broken = self._not_finite(accumulate)
            reason = f"; in the last one, {broken}" if broken else ""
            raise DivergedError(error.message + reason, error.hint) from error
        if result and not result.applied and (broken := self._not_finite(accumulate)):
            self.callbacks.note(f"warning: step {result.step} was not applied: {broken}")
        return result

    def _not_finite(self, accumulate: Accumulation) -> str:
        """Describe the NaN embeddings of all processes in the last step; "" if there are none."""
        found, train, first = accumulate.not_finite(), self.setup.train, ""
        if found:
            what, number = found[0]
            pair = train.named(number) if isinstance(train, PairDataset) else None
            first = f"the {what} of {f'{pair.key} in {pair.shard}' if pair else f'pair {number}'}"
        told = [told for told in self.processes.gather_objects((len(found), first)) if told[0]]
        return describe_broken(sum(count for count, _ in told), told[0][1]) if told else ""

    def _end_epoch(self, training: TrainState) -> None:
        """Validate, and save the weights if the epoch is the best so far."""
        epoch = training.position.epoch
        try:
            measured = self._validate(epoch, training.mean_loss)
        except NotFiniteError as error:
            raise DivergedError(
                f"after epoch {epoch}, {error.message}",
                f"lower --lr; {self.paths.checkpoint} is the last good state, if it exists",
            ) from error
        if not math.isfinite(measured.val_loss):
            raise DivergedError(
                f"the validation loss is not finite after epoch {measured.epoch}",
                f"lower --lr; {self.paths.checkpoint} is the last good state, if it exists",
            )
        improved = self.state.stopping.update(measured) or not self.state.best
        self.state.validated = True
        seconds = training.look_alike_seconds
        result = replace(measured, improved=improved, look_alike_seconds=seconds)
        if improved:
            self._take_as_best(training, result)
        self.callbacks.callback.epoch_ended(result)

    def _take_as_best(self, training: TrainState, result: EpochResult) -> None:
        self.state.best = result
        self.saver.save_best(training)
        self._keep_rankings(self.paths.rankings_best)

    def _validate(self, epoch: int, train_loss: float | None) -> EpochResult:
        """Validate the current weights, or their averages with ``--ema``."""
        training = self.state.training
        with training.average.in_place() if training else nullcontext():
            measured, skipped = self.validation.measure(
                epoch, self.state.step, train_loss, self._check_stop
            )
        if not epoch:  # they are the same in later epochs
            self.state.skipped.write("val", self.state.step, map(asdict, skipped))
        return measured

    def _keep_rankings(self, path: Path) -> None:
        on_rank_zero(self.processes, lambda: self.validation.write_rankings(path))

    def _check_stop(self) -> None:
        """Raise ``Interrupted`` if a signal asked to stop."""
        step, finished = self.state.step, self.state.finished
        when = f"after step {step}" if step else "before the first step"
        if finished:
            when = "after the last step, while the result was evaluated"
        self.stop.check(when, self.paths.checkpoint if step or finished else None)

    def finish(self) -> TrainResult:
        """Save the last state, evaluate the best epoch in full, and write the result."""
        self.state.finished = True
        self.saver.save()
        result = TrainResult.of(self.state, self.paths)
        on_rank_zero(
            self.processes,
            lambda: write_results(self.validation, self.paths, result, self._check_stop),
        )
        return result
