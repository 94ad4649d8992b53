"""``train``: from settings to a better model in a run folder, from scratch or resumed."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipft.data.caption_table import CaptionTable
from clipft.errors import (
    ClipftError,
    DataError,
    DivergedError,
    Interrupted,
    MemoryShortage,
    ProcessError,
)
from clipft.files import settle, write_text
from clipft.records import EpochResult, StepResult
from clipft.settings import Settings
from clipft.training.bad_pairs import BadPairs
from clipft.training.best_weights import Best, find_best
from clipft.training.checkpoint import save_checkpoint
from clipft.training.checkpoint_pair import save_newest
from clipft.training.distributed import Processes, by_first, together
from clipft.training.early_stopping import EarlyStopping
from clipft.training.feature_cache import checked
from clipft.training.finishing import Finish
from clipft.training.judging import EvaluationSet
from clipft.training.measure import embed_pairs
from clipft.training.rankings import Ranker, Rankings
from clipft.training.result import TrainResult
from clipft.training.resuming import (
    check_same_run,
    checkpoint_to_resume,
    cut_back,
    go_back_to,
    set_aside,
)
from clipft.training.run_folder import RunLock, RunPaths
from clipft.training.run_steps import run_steps
from clipft.training.setup import RunSetup, prepare
from clipft.training.shared_steps import Rounds
from clipft.training.signals import StopRequest, stop_on_signals
from clipft.training.trainer import TrainState, fit
from clipft.training.watchers import Watchers

if TYPE_CHECKING:
    from clipft.data.stream import ShardSource


_BLANK = {"epoch": 0, "step_in_epoch": 0, "step": 0, "model_state_dict": {}, "loss": 0.0}
"""Where nothing trains; and of a state, what weights alone come with."""


def train(
    settings: Settings,
    watchers: Watchers,
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
    paths = RunPaths.of(settings)

    def begin(held: ExitStack) -> dict[str, Any] | None:
        held.enter_context(RunLock(paths))
        whole = checkpoint_to_resume(settings, paths, watchers.note)
        if not whole:
            return None
        go_back_to(whole, paths.checkpoint, watchers.note)
        return whole.content

    with ExitStack() as held, stop_on_signals(processes.rank == 0) as stop:
        checkpoint = by_first(processes, lambda: begin(held))
        if checkpoint and checkpoint["finished"]:
            watchers.note(f"{paths.checkpoint} is of a finished run: nothing left to train.")
            # A kill, or a new machine: what comes after training is made up for
            if processes.broadcast_object(paths.result.exists()):
                return TrainResult.of_finished(checkpoint, paths)
        saved = paths.checkpoint if checkpoint else None
        progress = checked(
            watchers.progress, lambda: stop.check("before the first step of this start", saved)
        )
        try:
            setup = prepare(settings, watchers.note, processes, progress, source)
            if not checkpoint:
                by_first(processes, lambda: set_aside(paths, watchers.note))
            by_first(processes, lambda: write_text(paths.settings, toml))
            return _through(_Run(setup, paths, watchers, stop), checkpoint)
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
        run.watchers.observer.closed()


class _Run:
    """One run under way: its state, and what happens between steps. All processes go the same
    way through it; what leaves a trace is done ``by_first``."""

    def __init__(
        self, setup: RunSetup, paths: RunPaths, watchers: Watchers, stop: StopRequest
    ) -> None:
        self.setup, self.paths, self.watchers, self.stop = setup, paths, watchers, stop
        self.processes = setup.processes
        settings = setup.settings
        self.stopping = EarlyStopping(settings.stop_on, settings.patience, settings.min_delta)
        judged_on = EvaluationSet.of(setup.val, setup.val_preprocessing, settings)
        self.finish = Finish(setup, paths, judged_on, self._check)
        self.before: EpochResult | None = None
        self.best: EpochResult | None = None
        self.bad = BadPairs(paths.skipped, len(setup.train), settings, self.processes)
        captions = setup.val_preprocessing.captions
        assert isinstance(captions, CaptionTable)  # only training pairs may be a stream
        self.rank = Ranker.of(setup.val, captions)
        self.rankings: Rankings | None = None
        """Of the last measurement."""
        self.validated, self.finished = True, False
        """The last epoch that ended is; nothing is left to train."""
        self.saved_step = 0
        """Of the newest checkpoint, where it has all that is known."""
        self.state: TrainState | None = None
        if setup.plan.epochs:
            self.state = TrainState(
                setup.loaded.model, setup.make_optimiser(), setup.epoch_plan.steps
            )

    def start(self) -> None:
        """From scratch: measure the untouched model."""
        for split, pairs in (("train", self.setup.train), ("val", self.setup.val)):
            self.bad.list(split, 0, map(asdict, pairs.skipped))
        self.watchers.observer.started(self.setup.plan, 0)
        self.before = self._measure(epoch=0, train_loss=None)
        by_first(self.processes, lambda: self._keep_rankings(self.paths.rankings_before))
        self.watchers.observer.epoch_ended(self.before)

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Put back the state of ``checkpoint``."""
        together(self.processes, lambda: check_same_run(checkpoint, self.setup))
        if self.state:
            self.state.load_state_dict(checkpoint)
        self.stopping.load_state_dict(checkpoint["early_stopping"])
        self.before = EpochResult(**checkpoint["before"])
        self.best = EpochResult(**checkpoint["best"]) if checkpoint["best"] else None
        self.bad.count = checkpoint["skipped_pairs"]
        self.validated, self.saved_step = checkpoint.get("validated", True), checkpoint["step"]
        by_first(self.processes, lambda: cut_back(self.paths, checkpoint))
        self.watchers.note(
            f"Resuming after step {checkpoint['step']} of {self.setup.plan.total_steps}."
        )
        self.watchers.observer.started(self.setup.plan, checkpoint["step"])
        if self.state and self.best:
            self._look_after_best(self.state, self.best)

    def _look_after_best(self, state: TrainState, best: EpochResult) -> None:
        """Before hours of training, not after: are the best epoch's weights still there? Where
        they are lost, the best of what follows will be the best.

        Raises:
            ModelError: they are damaged, and nowhere else.
        """
        ended = state.epoch_ended and self.validated
        held = ended and best.epoch == state.position.epoch  # by the checkpoint, too
        path = self.paths.best
        found = by_first(
            self.processes, lambda: find_best(path, best.epoch, state.step, mendable=held)
        )
        if found is Best.THERE:
            return
        if held:
            self._save_best_weights(state)
            return self.watchers.note(f"{path} is written anew, from the checkpoint.")
        self.best = None
        if found is Best.GONE:
            self.watchers.note(
                f"warning: {path} is gone: the weights of epoch {best.epoch}, the best one so far, "
                "are lost; the best of the epochs from here on takes their place."
            )
            if ended:
                self._take_for_best(state)

    def _take_for_best(self, state: TrainState) -> None:
        """The last epoch, measured once more."""
        measured = self._measure(state.position.epoch, state.mean_loss)
        self.best = replace(measured, improved=True)
        self._save_best(state)

    def to_the_end(self) -> TrainResult:
        """Train the epochs that are left."""
        if self.state and not self.stopping.due:
            self._train(self.state)
        self.finished = True
        self._save()
        result = self._result()
        by_first(self.processes, lambda: self.finish.leave(result))
        return result

    def _result(self) -> TrainResult:
        assert self.before
        return TrainResult(
            before=self.before,
            best=self.best,
            steps=self.state.step if self.state else 0,
            stopped_early=self.stopping.due,
            skipped_pairs=self.bad.count,
            folder=self.paths.folder,
            checkpoint=self.paths.checkpoint,
        )

    def _train(self, state: TrainState) -> None:
        try:
            self._train_steps(state)
        except Interrupted:
            if state.step > self.saved_step:
                self._save()
            raise
        except (DataError, MemoryShortage, ProcessError) as error:
            if self._unsaved(state):
                self._save_after(error)
            raise

    def _save_after(self, error: ClipftError) -> None:
        if not error.alone:
            self._save()
        elif self.processes.rank == 0 and not self.setup.weights.sharded:
            self._write_checkpoint(self._state_dict())

    def _unsaved(self, state: TrainState) -> bool:
        return state.step > self.saved_step and math.isfinite(state.loss)

    def _train_steps(self, state: TrainState) -> None:
        if not self.validated:  # its validation was cut off
            self._after_epoch(state)
            self._save_if_due(state)
        accumulate = self.setup.make_accumulation(state.optimiser, self.watchers.note)
        steps = fit(state, run_steps(self.setup, state, self.bad), accumulate)
        while not self.stopping.due and (result := next(steps, None)):
            self.validated = not state.epoch_ended
            self._after_step(result)
            if state.epoch_ended:
                self._after_epoch(state)
            self._save_if_due(state)
            together(self.processes, self._check)

    def _check(self) -> None:
        """
        Raises:
            Interrupted: a signal asked to stop.
        """
        step = self.state.step if self.state else 0
        when = f"after step {step}" if step else "before the first step"
        if self.finished:
            when = "after the last step, while the result was evaluated"
        self.stop.check(when, self.paths.checkpoint if step or self.finished else None)

    def _after_step(self, result: StepResult) -> None:
        self.watchers.observer.stepped(result)
        self.bad.met(result.epoch, result.step, result.skipped)

    def _after_epoch(self, state: TrainState) -> None:
        measured = self._measure(state.position.epoch, state.mean_loss)
        if not math.isfinite(measured.val_loss):
            raise DivergedError(
                f"the validation loss is not finite after epoch {measured.epoch}",
                f"lower --lr; {self.paths.checkpoint} is the last good state, if there is one",
            )
        improved = self.stopping.update(measured) or not self.best
        self.validated = True
        result = replace(measured, improved=improved)
        if improved:
            self.best = result
            self._save_best(state)
        self.watchers.observer.epoch_ended(result)

    def _measure(self, epoch: int, train_loss: float | None) -> EpochResult:
        setup = self.setup
        embedded = embed_pairs(
            setup.loaded,
            setup.val,
            setup.val_encoding,
            setup.settings,
            setup.val_positives,
            Rounds(self.processes, self._check),
        )
        step = self.state.step if self.state else 0
        if not epoch:  # later epochs meet the same ones again
            self.bad.list("val", step, map(asdict, embedded.skipped))

        def figures() -> EpochResult:
            found = embedded.retrieval(setup.settings.evaluation_bytes).to_dict()
            self.rankings = self.rank(embedded)
            loss, floor = setup.validation_loss(embedded), setup.loss.floor(embedded.groups)
            return EpochResult(epoch, step, train_loss, loss, found, val_floor=floor)

        return by_first(self.processes, figures)

    def _keep_rankings(self, path: Path) -> None:
        assert self.rankings
        self.rankings.write(path)

    def _save_if_due(self, state: TrainState) -> None:
        every = self.setup.settings.checkpoint_every
        due = state.epoch_ended or (every and state.step % every == 0)
        if due and math.isfinite(state.loss):  # never in the place of a good state
            self._save()

    def _save(self) -> None:
        state_dict = self._state_dict()
        by_first(self.processes, lambda: self._write_checkpoint(state_dict))
        self.saved_step = self.state.step if self.state else 0

    def _state_dict(self) -> Callable[[], dict[str, Any]]:
        return self.setup.weights.now(self.state.state_dict) if self.state else _BLANK.copy

    def _write_checkpoint(self, state_dict: Callable[[], dict[str, Any]]) -> None:
        # After a power cut no checkpoint may be newer than the lines of its steps
        settle(self.paths.folder, self.paths.metrics.name, self.paths.skipped.name)
        save_newest(self.paths.checkpoint, self._content(state_dict()))
        self.watchers.saved(self.paths.checkpoint, self.state.step if self.state else 0)

    def _save_best(self, state: TrainState) -> None:
        """The weights alone, and their rankings."""
        self._save_best_weights(state)
        by_first(self.processes, lambda: self._keep_rankings(self.paths.rankings_best))

    def _save_best_weights(self, state: TrainState) -> None:
        state_dict = self.setup.weights.now(state.weights_dict)
        by_first(self.processes, lambda: self._write_best(state_dict))

    def _write_best(self, state_dict: Callable[[], dict[str, Any]]) -> None:
        weights = state_dict()
        content = self._content({key: weights[key] for key in _BLANK})
        save_checkpoint(self.paths.best, {**content, "finished": False})

    def _content(self, state: dict[str, Any]) -> dict[str, Any]:
        assert self.before
        return {
            **state,
            "settings": self.setup.settings.model_dump(mode="json"),
            "base_model": self.setup.loaded.identity,
            "data": self.setup.train.identity(),
            "train_pairs": len(self.setup.train),
            "early_stopping": self.stopping.state_dict(),
            "before": asdict(self.before),
            "best": asdict(self.best) if self.best else None,
            "skipped_pairs": self.bad.count,
            "validated": self.validated,
            "finished": self.finished,
        }
