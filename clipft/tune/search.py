"""The search: runs one trial after the other, each a normal run, until the budget is used up."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipft.config.sources import LoadedSettings
from clipft.core.common import Note, duration
from clipft.core.errors import (
    ClipftError,
    DivergedError,
    Interrupted,
    MemoryShortage,
    ModelError,
    UsageError,
)
from clipft.core.out_of_memory import memory_ran_out
from clipft.runs.folder import RunPaths
from clipft.runs.records import Callbacks, EpochResult, Plan, StepResult, TrainingCallback
from clipft.training.signals import StopRequest
from clipft.training.state import TrainResult
from clipft.tune.budget import Budget
from clipft.tune.space import Space, described
from clipft.tune.study import Claim, SearchStudy, Trial

Train = Callable[[LoadedSettings, Callbacks], TrainResult]
"""Trains a run from its settings, as ``clipft.api.train`` does."""

FAILURES = (DivergedError, MemoryShortage, ModelError, UsageError)
"""Errors that settings can cause. The search continues with other settings."""
_POLL_SECONDS = 0.5
_KEPT_EVERY = 2.0
"""Seconds between two notes about a running trial. Each note is written to the disk."""
AGAIN = "run the same command again to continue"


@dataclass(frozen=True)
class Search:
    """Everything that a process needs to take part in a search.

    Attributes:
        study: the trials of the search, stored on disk.
        budget: the number of trials or the time.
        seeds: the seeds of the runs that confirm the winner; trials use the first.
        train: trains a run.
        note: receives a sentence when a trial begins and when it ends.
        stop: set by a signal that asks to stop.
    """

    study: SearchStudy
    budget: Budget
    seeds: Sequence[int]
    train: Train
    note: Note
    stop: StopRequest

    @property
    def space(self) -> Space:
        return self.study.space

    def run(self) -> None:
        """Run trials until the budget is used up and all other processes have finished theirs.

        Raises:
            Interrupted: a signal asked to stop; the search can be continued.
            UsageError: the budget ended during the first run.
            ClipftError: the run with the defaults failed, or there was an error of disk or data.
        """
        while True:
            self.check_stop()
            with self.study.claim(self.epochs_of_next) as claim:
                if claim:
                    self._try(claim)
            if not claim:
                if not any(trial.state == "running" for trial in self.study.trials()):
                    return
                time.sleep(_POLL_SECONDS)  # another process is still running its last trial

    def train_run(
        self, settings: LoadedSettings, home: Path, callback: TrainingCallback
    ) -> TrainResult:
        """Train or continue a run. Its notes are written to ``log.txt`` in its ``home``.

        Raises:
            Interrupted: a signal asked to stop; the state is saved.
            ClipftError: as for ``clipft.api.train``.
        """
        begun = {"resume_from_checkpoint": any(home.glob("*_checkpoint*.pt"))}
        settings = replace(settings, values=settings.values.model_copy(update=begun))
        try:
            return self.train(settings, _logged(home, callback, self.note))
        except Interrupted as stopped:
            raise Interrupted(stopped.message, AGAIN) from stopped

    def check_stop(self) -> None:
        """Raise ``Interrupted`` if a signal asked to stop between two runs."""
        if self.stop.name:
            raise Interrupted(
                f"stopped by {self.stop.name}; everything so far is in {self.study.folder}", AGAIN
            )

    def epochs_of_next(self) -> float:
        """Return the most epochs that another trial may have; 0 if no more trials may begin."""
        trials = self.study.trials()
        if self.budget.trials is not None:
            return math.inf if len(trials) < self.budget.trials else 0
        done = [t for t in trials if t.state == "finished"]
        if not done:  # the time of a trial is unknown until the first one has ended
            return math.inf
        per_epoch = max(t.about["seconds"] / t.about["epochs_run"] for t in done)
        epochs = self.seconds_left() / per_epoch
        return epochs if epochs >= self.space.fewest_epochs else 0

    def seconds_left(self) -> float:
        """Return the seconds that are left for trials."""
        assert self.budget.seconds
        confirming = (len(self.seeds) - 1) * self._seconds_of_both()
        return self.budget.seconds - self.budget.reserve(confirming) - self.study.elapsed()

    def _seconds_of_both(self) -> float:
        """Return the total seconds of the run with the defaults and of the best run."""
        done = [t for t in self.study.trials() if t.state == "finished"]
        if not done:
            return 0.0
        return float(done[0].about["seconds"] + best_of(done).about["seconds"])

    def _try(self, claim: Claim) -> None:
        """Train a trial, and record in the study how it ended."""
        settings = self.space.settings(
            claim.changes, output_dir=claim.home.resolve(), seed=self.seeds[0]
        )
        watch = _Watch(self, claim, settings.values.epochs)
        self.note(f"trial {claim.number}: {described(claim.changes)} ...")
        try:
            ended = self._trained(settings, watch, claim)
        except Interrupted:
            claim.release()
            raise
        if ended is not None:
            claim.finish(ended)
            best = best_of(self.study.trials())
            record = ", the best so far" if best.number == claim.number else ""
            self.note(f"trial {claim.number}: mean recall {ended:.1%}{record}")
        remove_weights(claim.home, keep_best=ended is not None)

    def _trained(self, settings: LoadedSettings, watch: "_Watch", claim: Claim) -> float | None:
        """Return the trial's mean recall; None if it was pruned, ended or failed."""
        try:
            try:
                result = self.train_run(settings, claim.home, watch)
            finally:
                self.study.tick()
                watch.keep()
        except _Ended as ended:
            claim.prune(str(ended))
            self.note(f"trial {claim.number}: {ended}; its mean recall was {watch.best:.1%}")
            return None
        except (RuntimeError, MemoryError, *FAILURES) as error:
            failure = _failure(error)
            if failure is None or claim.number == 0:
                raise
            claim.fail(failure.message, failure.hint)
            self.note(f"trial {claim.number}: failed: {failure.message}")
            return None
        assert result.best
        return result.best.recall()


class _Ended(Exception):
    """Ends a run after an epoch; the text says why."""


class _Watch(TrainingCallback):
    """Follows a trial. It reports each epoch, and ends the trial if it is pruned or time is up."""

    def __init__(self, search: Search, claim: Claim, epochs: int) -> None:
        self.search, self.claim, self.epochs = search, claim, epochs
        self.seconds_before = claim.about().get("seconds", 0.0)
        self.best, self.began = 0.0, time.monotonic()
        self.kept = self.began
        self.facts: dict[str, Any] = {}

    def started(self, plan: Plan, done_steps: int) -> None:
        self.epochs = plan.epochs
        self.facts["epochs"] = plan.epochs
        self.best = max(self.claim.reported().values(), default=0.0)

    def stepped(self, result: StepResult) -> None:
        self.facts["steps"] = result.step

    def epoch_ended(self, result: EpochResult) -> None:
        if not result.epoch:
            return
        self.best = max(self.best, result.recall())
        self.facts["epochs_run"] = result.epoch
        self.search.study.tick()
        if time.monotonic() - self.kept > _KEPT_EVERY:
            self.keep()
        behind = self.claim.report(round(100 * result.epoch / self.epochs), self.best)
        if result.epoch == self.epochs:
            return
        if behind:
            raise _Ended(f"stopped after epoch {result.epoch} of {self.epochs}, as it fell behind")
        if self.search.budget.seconds is not None and self.search.seconds_left() < 0:
            self._end_in_time(result.epoch)

    def _end_in_time(self, epoch: int) -> None:
        budget = self.search.budget
        if self.claim.number == 0:
            self.keep()
            needed = self.facts["seconds"] / epoch * self.epochs
            raise BudgetTooSmall(
                f"the budget of {budget} ended after epoch {epoch} of {self.epochs} of the first "
                "run, which uses the defaults",
                f"a search needs several runs of about {duration(needed)}; set a larger --budget, "
                f"and {AGAIN}",
            )
        raise _Ended(f"stopped after epoch {epoch} of {self.epochs}, as the budget is used up")

    def keep(self) -> None:
        """Record in the study how long the trial has taken."""
        self.kept = time.monotonic()
        self.facts["seconds"] = self.seconds_before + self.kept - self.began
        self.claim.note(**self.facts)


class BudgetTooSmall(UsageError):
    """The budget ended within the first run, which can be continued with a larger one."""


def _logged(home: Path, callback: TrainingCallback, note: Note) -> Callbacks:
    """Return callbacks that write the notes of a run to ``log.txt`` and pass on warnings."""
    home.mkdir(parents=True, exist_ok=True)

    def write(text: str) -> None:
        with (home / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"{text}\n")
        if text.startswith("warning:"):
            note(f"{text} (in {home})")

    return Callbacks(callback, write)


def best_of(trials: Sequence[Trial]) -> Trial:
    """Return the finished trial with the highest recall, or the earliest of several equal ones."""
    done = [trial for trial in trials if trial.state == "finished"]
    return max(done, key=lambda trial: (trial.recall, -trial.number))


def _failure(error: BaseException) -> ClipftError | None:
    """Return the error if a trial's settings caused it, otherwise None."""
    if isinstance(error, BudgetTooSmall):
        return None
    if isinstance(error, FAILURES):
        return error
    if memory_ran_out(error):
        return MemoryShortage("memory ran out", "use a smaller --micro-batch-size")
    return None


def train_and_release(settings: LoadedSettings, callbacks: Callbacks) -> TrainResult:
    """Train as ``clipft.api.train`` does, and release all memory for the next run."""
    import torch

    from clipft.api import train

    try:
        return train(settings, callbacks)
    finally:
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without CUDA


def remove_weights(home: Path, keep_best: bool) -> None:
    """Remove the checkpoint of a trial that has ended, because it is never resumed.

    Also remove the weights of its best epoch, unless ``keep_best`` is set.
    """
    for checkpoint in home.glob("*_checkpoint.pt"):
        best = RunPaths(home / checkpoint.name.removesuffix("_checkpoint.pt")).best
        if best.exists() or not keep_best:
            checkpoint.unlink()
        if not keep_best:
            best.unlink(missing_ok=True)
    for previous in home.glob("*_checkpoint.previous.pt"):
        previous.unlink()
