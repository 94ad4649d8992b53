"""``train``: from settings to a better model in a run folder, from scratch or resumed."""

import math
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipft.config.settings import Settings
from clipft.core.common import checked
from clipft.core.errors import DataError, DivergedError, Interrupted, MemoryShortage, ProcessError
from clipft.core.files import write_json, write_text
from clipft.data.captions.table import CaptionTable
from clipft.distributed.collectives import Processes
from clipft.distributed.rank_zero import on_all_ranks, on_rank_zero
from clipft.embedding.embed import embed_pairs
from clipft.evaluation.evaluator import EvaluationSet
from clipft.evaluation.gallery import Ranker, Rankings
from clipft.runs.folder import RunPaths, run_lock
from clipft.runs.records import Callbacks, EpochResult
from clipft.training.checkpointing import (
    Best,
    Saver,
    check_same_run,
    checkpoint_to_resume,
    cut_back,
    find_best,
    go_back_to,
    set_aside,
)
from clipft.training.loop import TrainState, fit, run_steps
from clipft.training.setup import RunSetup, prepare
from clipft.training.signals import StopRequest, stop_on_signals
from clipft.training.state import RunState, TrainResult

if TYPE_CHECKING:
    from clipft.data.shards.stream import ShardSource
from collections.abc import Callable
from dataclasses import dataclass

from clipft.core.files import replacing_folder
from clipft.embedding.load import LoadedModel, load_model
from clipft.evaluation.evaluator import compare
from clipft.models.huggingface import write_adapter
from clipft.runs.load import load_fine_tuned
from clipft.training.checkpointing import load_best


@dataclass(frozen=True)
class Finish:
    """The end of one run; the work of one process. ``check`` may end it between batches by what
    it raises: ``result.json`` is then missing, and the resumed run does all of it again."""

    setup: RunSetup
    paths: RunPaths
    judged_on: EvaluationSet
    check: Callable[[], None]

    def leave(self, result: TrainResult) -> None:
        """
        Raises:
            StorageError, ModelError: a disk is full; the best epoch's weights are damaged.
            Interrupted: as ``check`` has it.
        """
        loaded = self._with_best(result.best)
        self._evaluate(loaded if result.best else None)
        write_json(self.paths.result, result.to_dict(), indent=2)

    def _with_best(self, best: EpochResult | None) -> LoadedModel:
        """The best epoch's weights in the model, and for others' tools in the run folder."""
        settings, loaded = self.setup.settings, self.setup.loaded
        if best:
            content = load_best(self.paths.best, best.epoch)
            if self.setup.weights.sharded:  # whole once more: the other processes are not here
                return load_fine_tuned(content, settings)
            loaded.model.load_trainable_state(content["model_state_dict"])
        if settings.declared_scenario.lora:
            with replacing_folder(self.paths.adapter) as temporary:
                write_adapter(loaded.model, settings.model, temporary)
        return loaded

    def _evaluate(self, tuned: LoadedModel | None) -> None:
        """All figures of the untouched model and of the best epoch, with intervals."""
        untouched = load_model(self.setup.settings, pretrained=True)
        judged = compare(self.judged_on, untouched, tuned, self.check)
        write_json(self.paths.evaluation, judged.to_dict(), indent=2, ascii_only=False)


def train(
    settings: Settings,
    callbacks: Callbacks,
    toml: str,
    processes: Processes,
    source: "ShardSource | None" = None,
) -> TrainResult:
    """Run to the end of the last epoch, or of patience.

    ``toml`` is the settings as text, kept in the run folder. Of several processes the first
    one keeps the files. ``source`` gives a stream's training shards, where they lie elsewhere
    than in ``data_dir``.

    Raises:
        Interrupted: a signal asked to stop; the state is saved, if there was one.
        DataError, StorageError, ModelError, DivergedError, UsageError, ProcessError: as they say.
    """
    paths = RunPaths(settings.run_dir)

    def begin(held: ExitStack) -> dict[str, Any] | None:
        held.enter_context(run_lock(paths.folder))
        whole = checkpoint_to_resume(settings, paths, callbacks.note)
        if not whole:
            return None
        go_back_to(whole, paths.checkpoint, callbacks.note)
        return whole.content

    with ExitStack() as held, stop_on_signals(processes.rank == 0) as stop:
        checkpoint = on_rank_zero(processes, lambda: begin(held))
        if checkpoint and checkpoint["finished"]:
            callbacks.note(f"{paths.checkpoint} is of a finished run: nothing left to train.")
            # A kill, or a new machine: what comes after training is made up for
            if processes.broadcast_object(paths.result.exists()):
                return TrainResult.of_finished(checkpoint, paths)
        saved = paths.checkpoint if checkpoint else None
        progress = checked(
            callbacks.progress, lambda: stop.check("before the first step of this start", saved)
        )
        try:
            setup = prepare(settings, callbacks.note, processes, progress, source)
            if not checkpoint:
                on_rank_zero(processes, lambda: set_aside(paths, callbacks.note))
            on_rank_zero(processes, lambda: write_text(paths.settings, toml))
            return _through(_Run(setup, paths, callbacks, stop), checkpoint)
        except Interrupted:
            processes.barrier()  # a launcher would end the others as soon as one is gone
            raise


def _through(run: "_Run", checkpoint: dict[str, Any] | None) -> TrainResult:
    try:
        if checkpoint:
            run.resume(checkpoint)
        else:
            run.start()
        return run.to_the_end()
    finally:
        run.callbacks.callback.closed()


class _Run:
    """One run under way, and what happens between steps. All processes go the same way through
    it; what leaves a trace is done ``on_rank_zero``."""

    def __init__(
        self, setup: RunSetup, paths: RunPaths, callbacks: Callbacks, stop: StopRequest
    ) -> None:
        self.setup, self.paths, self.callbacks, self.stop = setup, paths, callbacks, stop
        self.processes = setup.processes
        judged_on = EvaluationSet.of(setup.val, setup.val_preprocessing, setup.settings)
        self.finish = Finish(setup, paths, judged_on, self._check)
        captions = setup.val_preprocessing.captions
        assert isinstance(captions, CaptionTable)  # only training pairs may be a stream
        self.rank = Ranker.of(setup.val, captions)
        self.rankings: Rankings | None = None
        """Of the last measurement."""
        self.state = RunState.of(setup, paths.skipped)
        self.saver = Saver(self.state, setup, paths, callbacks)

    def start(self) -> None:
        """From scratch: measure the untouched model."""
        for split, pairs in (("train", self.setup.train), ("val", self.setup.val)):
            self.state.bad.list(split, 0, map(asdict, pairs.skipped))
        self.callbacks.callback.started(self.setup.plan, 0)
        self.state.before = self._measure(epoch=0, train_loss=None)
        self._keep_rankings(self.paths.rankings_before)
        self.callbacks.callback.epoch_ended(self.state.before)

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Put back the state of ``checkpoint``."""
        on_all_ranks(self.processes, lambda: check_same_run(checkpoint, self.setup))
        self.state.load(checkpoint)
        self.saver.saved_step = self.state.step
        on_rank_zero(self.processes, lambda: cut_back(self.paths, checkpoint))
        self.callbacks.note(
            f"Resuming after step {self.state.step} of {self.setup.plan.total_steps}."
        )
        self.callbacks.callback.started(self.setup.plan, self.state.step)
        if self.state.training and self.state.best:
            self._look_after_best(self.state.training, self.state.best)

    def _look_after_best(self, training: TrainState, best: EpochResult) -> None:
        """Before hours of training, not after: are the best epoch's weights still there? Where
        they are lost, the best of what follows will be the best.

        Raises:
            ModelError: they are damaged, and nowhere else.
        """
        ended = training.epoch_ended and self.state.validated
        held = ended and best.epoch == training.position.epoch  # by the checkpoint, too
        path = self.paths.best
        found = on_rank_zero(
            self.processes, lambda: find_best(path, best.epoch, training.step, mendable=held)
        )
        if found is Best.THERE:
            return
        if held:
            self.saver.save_best(training)
            return self.callbacks.note(f"{path} is written anew, from the checkpoint.")
        self.state.best = None
        if found is Best.GONE:
            self.callbacks.note(
                f"warning: {path} is gone: the weights of epoch {best.epoch}, the best one so far, "
                "are lost; the best of the epochs from here on takes their place."
            )
            if ended:
                measured = self._measure(training.position.epoch, training.mean_loss)
                self._take_for_best(training, replace(measured, improved=True))

    def _take_for_best(self, training: TrainState, result: EpochResult) -> None:
        self.state.best = result
        self.saver.save_best(training)
        self._keep_rankings(self.paths.rankings_best)

    def to_the_end(self) -> TrainResult:
        """Train the epochs that are left."""
        if self.state.training and not self.state.stopping.due:
            self._train(self.state.training)
        self.state.finished = True
        self.saver.save()
        result = TrainResult.of(self.state, self.paths)
        on_rank_zero(self.processes, lambda: self.finish.leave(result))
        return result

    def _train(self, training: TrainState) -> None:
        try:
            self._train_steps(training)
        except Interrupted:
            if training.step > self.saver.saved_step:
                self.saver.save()
            raise
        except (DataError, MemoryShortage, ProcessError) as error:
            self.saver.save_after(error, training)
            raise

    def _train_steps(self, training: TrainState) -> None:
        if not self.state.validated:  # its validation was cut off
            self._after_epoch(training)
            self.saver.save_if_due(training)
        accumulate = self.setup.make_accumulation(training.optimiser, self.callbacks.note)
        steps = fit(training, run_steps(self.setup, training, self.state.bad), accumulate)
        while not self.state.stopping.due and (result := next(steps, None)):
            self.state.validated = not training.epoch_ended
            self.callbacks.callback.stepped(result)
            self.state.bad.met(result.epoch, result.step, result.skipped)
            if training.epoch_ended:
                self._after_epoch(training)
            self.saver.save_if_due(training)
            on_all_ranks(self.processes, self._check)

    def _check(self) -> None:
        """
        Raises:
            Interrupted: a signal asked to stop.
        """
        step, finished = self.state.step, self.state.finished
        when = f"after step {step}" if step else "before the first step"
        if finished:
            when = "after the last step, while the result was evaluated"
        self.stop.check(when, self.paths.checkpoint if step or finished else None)

    def _after_epoch(self, training: TrainState) -> None:
        measured = self._measure(training.position.epoch, training.mean_loss)
        if not math.isfinite(measured.val_loss):
            raise DivergedError(
                f"the validation loss is not finite after epoch {measured.epoch}",
                f"lower --lr; {self.paths.checkpoint} is the last good state, if there is one",
            )
        improved = self.state.stopping.update(measured) or not self.state.best
        self.state.validated = True
        result = replace(measured, improved=improved)
        if improved:
            self._take_for_best(training, result)
        self.callbacks.callback.epoch_ended(result)

    def _measure(self, epoch: int, train_loss: float | None) -> EpochResult:
        setup = self.setup
        embedded = embed_pairs(
            setup.loaded,
            setup.val,
            setup.val_encoding,
            setup.settings,
            setup.val_positives,
            self.processes,
            self._check,
        )
        step = self.state.step
        if not epoch:  # later epochs meet the same ones again
            self.state.bad.list("val", step, map(asdict, embedded.skipped))

        def figures() -> EpochResult:
            found = embedded.retrieval(setup.settings.evaluation_bytes).to_dict()
            self.rankings = self.rank(embedded)
            loss, floor = setup.validation_loss(embedded), setup.loss.floor(embedded.groups)
            return EpochResult(epoch, step, train_loss, loss, found, val_floor=floor)

        return on_rank_zero(self.processes, figures)

    def _keep_rankings(self, path: Path) -> None:
        def write() -> None:
            assert self.rankings
            self.rankings.write(path)

        on_rank_zero(self.processes, write)
