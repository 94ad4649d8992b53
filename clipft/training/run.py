"""``train``: from settings to a better model in a run folder, from scratch or resumed."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipft.data.caption_table import CaptionTable
from clipft.data.loader import StepBatch, training_batches
from clipft.errors import DataError, DivergedError, Interrupted, MemoryShortage, ProcessError
from clipft.files import replacing_folder, write_text
from clipft.modelling.export import write_adapter
from clipft.records import EpochResult, Observer, StepResult
from clipft.settings import Settings
from clipft.training.bad_pairs import BadPairs
from clipft.training.checkpoint import load_checkpoint, previous_of, save_checkpoint
from clipft.training.checkpoint_pair import save_newest
from clipft.training.distributed import Processes, by_first, together
from clipft.training.early_stopping import EarlyStopping
from clipft.training.feature_cache import Progress, silent
from clipft.training.judging import EvaluationSet, compare, load_untouched
from clipft.training.measure import embed_pairs
from clipft.training.planning import Note
from clipft.training.rankings import Ranker, Rankings
from clipft.training.result import TrainResult
from clipft.training.resuming import check_same_run, checkpoint_to_resume, go_back_to
from clipft.training.run_folder import RunLock, RunPaths, cut_lines
from clipft.training.setup import RunSetup, prepare
from clipft.training.shared_steps import agreed
from clipft.training.signals import StopRequest, stop_on_signals
from clipft.training.trainer import TrainState, fit
from clipft.words import counted

if TYPE_CHECKING:
    from clipft.data.stream import ShardSource


@dataclass(frozen=True)
class Watchers:
    """Who is told: observers of the run, notes for people, each saved checkpoint."""

    observer: Observer
    note: Note
    saved: Callable[[Path, int], None]
    """With the number of optimizer steps done."""
    progress: Progress = silent


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
        Interrupted: a signal asked to stop; the state is saved.
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

    with ExitStack() as held, stop_on_signals() as stop:
        checkpoint = by_first(processes, lambda: begin(held))
        if checkpoint and checkpoint["finished"]:
            watchers.note(f"{paths.checkpoint} is of a finished run: nothing left to train.")
            # A kill, or a new machine: what comes after training is made up for
            if processes.broadcast_object(paths.result.exists()):
                return TrainResult.of_finished(checkpoint, paths)
        setup = prepare(settings, watchers.note, processes, watchers.progress, source)
        by_first(processes, lambda: write_text(paths.settings, toml))
        try:
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
        self.judged_on = EvaluationSet.of(setup.val, setup.val_preprocessing, settings)
        self.before: EpochResult | None = None
        self.best: EpochResult | None = None
        self.bad = BadPairs(paths.skipped, len(setup.train), settings, self.processes)
        captions = setup.val_preprocessing.captions
        assert isinstance(captions, CaptionTable)  # only training pairs may be a stream
        self.rank = Ranker.of(setup.val, captions)
        self.rankings: Rankings | None = None
        """Of the last measurement."""
        self.state: TrainState | None = None
        if setup.plan.epochs:
            self.state = TrainState(
                setup.loaded.model, setup.make_optimiser(), setup.epoch_plan.steps
            )

    def start(self) -> None:
        """From scratch: set an earlier run's checkpoint aside, measure the untouched model."""
        by_first(self.processes, self._clear)
        for split, pairs in (("train", self.setup.train), ("val", self.setup.val)):
            self.bad.list(split, 0, map(asdict, pairs.skipped))
        self.watchers.observer.started(self.setup.plan, 0)
        self.before = self._measure(epoch=0, train_loss=None)
        by_first(self.processes, lambda: self._keep_rankings(self.paths.rankings_before))
        self.watchers.observer.epoch_ended(self.before)

    def _clear(self) -> None:
        p = self.paths
        previous_of(p.checkpoint).unlink(missing_ok=True)  # of that run: never to be gone on from
        if p.checkpoint.exists():
            p.checkpoint.replace(p.earlier)
            self.watchers.note(f"The checkpoint of an earlier run is now {p.earlier}.")
        for old in p.outcomes:
            old.unlink(missing_ok=True)
        cut_lines(p.metrics, -1)

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Put back the state of ``checkpoint``."""
        together(self.processes, lambda: check_same_run(checkpoint, self.setup))
        if self.state:
            self.state.load_state_dict(checkpoint)
        self.stopping.load_state_dict(checkpoint["early_stopping"])
        self.before = EpochResult(**checkpoint["before"])
        self.best = EpochResult(**checkpoint["best"]) if checkpoint["best"] else None
        self.bad.count = checkpoint["skipped_pairs"]
        by_first(self.processes, lambda: self._cut(checkpoint["step"]))
        self.watchers.note(
            f"Resuming after step {checkpoint['step']} of {self.setup.plan.total_steps}."
        )
        self.watchers.observer.started(self.setup.plan, checkpoint["step"])

    def _cut(self, done_steps: int) -> None:
        for path in (self.paths.metrics, self.paths.skipped):
            cut_lines(path, done_steps)

    def to_the_end(self) -> TrainResult:
        """Train the epochs that are left."""
        if self.state and not self.stopping.due:
            self._train(self.state)
        self._save(finished=True)
        result = self._result()
        by_first(self.processes, lambda: self._leave(result))
        return result

    def _leave(self, result: TrainResult) -> None:
        """What a finished run has in its folder."""
        self._leave_best()
        self._evaluate()
        write_text(self.paths.result, json.dumps(result.to_dict(), indent=2) + "\n")

    def _evaluate(self) -> None:
        """All figures of the untouched model and of the best epoch, with intervals."""
        tuned = self.setup.loaded if self.best else None
        judged = compare(self.judged_on, load_untouched(self.setup.settings), tuned)
        text = json.dumps(judged.to_dict(), indent=2, ensure_ascii=False)
        write_text(self.paths.evaluation, text + "\n")

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

    def _leave_best(self) -> None:
        """The best epoch's weights in the model, and for others' tools in the run folder."""
        model = self.setup.loaded.model
        if self.best and self.paths.best.exists():
            model.load_trainable_state(load_checkpoint(self.paths.best)["model_state_dict"])
        if self.setup.settings.declared_scenario.lora:
            with replacing_folder(self.paths.adapter) as temporary:
                write_adapter(model, self.setup.settings.model, temporary)

    def _train(self, state: TrainState) -> None:
        try:
            self._train_steps(state)
        except (DataError, MemoryShortage):
            if self._unsaved(state):
                self._save(finished=False)
            raise
        except ProcessError:  # nothing can be done together any more
            if self._unsaved(state) and self.processes.rank == 0:
                self._write_checkpoint(finished=False)
            raise

    def _unsaved(self, state: TrainState) -> bool:
        """At an epoch's end the state was saved, unless the epoch is still to be validated."""
        return not state.epoch_ended and state.step > 0 and math.isfinite(state.loss)

    def _train_steps(self, state: TrainState) -> None:
        accumulate = self.setup.make_accumulation(state.optimiser, self.watchers.note)
        for result in fit(state, self._batches(state), accumulate):
            self._after_step(result)
            if state.epoch_ended:
                self._after_epoch(state)
                if self.stopping.due:
                    return
            self._save_if_due(state)
            if self.processes.any(self.stop.name is not None):
                self._interrupt(state)

    def _batches(self, state: TrainState) -> Iterator[StepBatch]:
        setup = self.setup
        batches = training_batches(
            setup.train,
            setup.encoding.preprocessing,
            setup.epoch_plan,
            state.position,
            setup.plan.epochs,
            setup.loader_options,
        )
        for batch in agreed(self.processes, batches):
            if not batch.pairs:
                skipped = [asdict(skipped) for skipped in batch.skipped]
                self.bad.met(batch.epoch + 1, state.step, skipped)
                pairs = counted(len(batch.skipped), "pair")
                raise DataError(
                    f"none of the {pairs} of step {state.step + 1} can be used",
                    f"see {self.bad.path}; mend the data, or take a larger --effective-batch-size",
                )
            yield batch

    def _after_step(self, result: StepResult) -> None:
        self.watchers.observer.stepped(result)
        self.bad.met(result.epoch, result.step, result.skipped)

    def _after_epoch(self, state: TrainState) -> None:
        train_loss = state.epoch_loss_sum / state.steps_per_epoch
        measured = self._measure(state.position.epoch, train_loss)
        if not math.isfinite(measured.val_loss):
            raise DivergedError(
                f"the validation loss is not finite after epoch {measured.epoch}",
                f"lower --lr; {self.paths.checkpoint} is the last good state, if there is one",
            )
        improved = self.stopping.update(measured)
        result = EpochResult(**{**asdict(measured), "improved": improved})
        if improved:
            self.best = result
            by_first(self.processes, self._write_best)
        self.watchers.observer.epoch_ended(result)

    def _measure(self, epoch: int, train_loss: float | None) -> EpochResult:
        setup = self.setup
        embedded = embed_pairs(
            setup.loaded,
            setup.val,
            setup.val_encoding,
            setup.settings,
            setup.val_positives,
            self.processes,
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
            self._save(finished=False)

    def _interrupt(self, state: TrainState) -> None:
        self._save(finished=False)
        name = next(name for name in self.processes.gather_objects(self.stop.name) if name)
        raise Interrupted(
            f"stopped by {name} after step {state.step}; the state is saved in "
            f"{self.paths.checkpoint}",
            f"go on with `clipft resume {self.paths.checkpoint}`",
        )

    def _save(self, finished: bool) -> None:
        by_first(self.processes, lambda: self._write_checkpoint(finished))

    def _write_checkpoint(self, finished: bool) -> None:
        save_newest(self.paths.checkpoint, self._content(finished))
        self.watchers.saved(self.paths.checkpoint, self.state.step if self.state else 0)

    def _write_best(self) -> None:
        save_checkpoint(self.paths.best, self._content(finished=False, weights_only=True))
        self._keep_rankings(self.paths.rankings_best)

    def _content(self, finished: bool, weights_only: bool = False) -> dict[str, Any]:
        assert self.before
        blank = {"epoch": 0, "step_in_epoch": 0, "step": 0, "model_state_dict": {}, "loss": 0.0}
        state = self.state.state_dict() if self.state else blank
        if weights_only:
            state = {key: state[key] for key in blank}
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
            "finished": finished,
        }
