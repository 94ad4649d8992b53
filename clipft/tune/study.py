"""Stores the state of a search: Optuna's study in the output folder, and who runs which trial.

The study is a journal that several processes append to, so a search can continue after a kill, and
several processes can run trials. A process locks the folder of the trial that it trains. If a trial
is not finished and its folder is not locked, its process has ended, and another process continues
it from its checkpoint.
"""

import fcntl
import math
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.core.errors import UsageError
from clipft.runs.folder import run_lock
from clipft.tune.moves import Attempt, next_move
from clipft.tune.space import Parameters, Space

JOURNAL = "study.log"
_TURN = ".turn"
_NAME = "clipft"
_RANDOM_TRIALS = 4
"""The number of trials, including the defaults and the moves, from which the sampler learns."""
_NEVER_STOPPED = 4
"""The first trials are never pruned: among so few, the slower start of a higher rate or of more
dropout would decide."""
_ENOUGH_TO_TELL = 12
"""The fewest trials of a scenario from which the importance of its settings is estimated."""
_FIRST_RUNG, _KEPT = 50, 2
"""Successive halving compares trials after 50% of their epochs, and the better half continues.
After 25%, the rates that are best in the end are not better yet."""
_MOST_STARTS = 3
"""A trial is given up if its process is killed this often in one epoch: memory may run out."""
_NOTED_EVERY = 2.0
"""Seconds between two records of the elapsed time. Each record is written to the disk."""
_SETTINGS, _CHANGES, _STARTS, _ABOUT = "settings", "changes", "starts", "about"
_MOVE = "move"


def quiet_optuna() -> Any:
    """Import Optuna, which otherwise logs each trial, and return it."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    # A move may use values outside the sampler's range
    warnings.filterwarnings("ignore", message="Fixed parameter .* is out of range")
    return optuna


@dataclass(frozen=True)
class Trial:
    """The current state of a trial.

    Attributes:
        number: counted from 0, which is the run without any change.
        state: ``running``, ``finished``, ``pruned`` or ``failed``.
        changes: the settings that differ from the base run.
        recall: the best mean recall on the validation pairs so far, None before the first epoch.
        about: recorded facts, such as ``error``, ``seconds`` and ``steps``.
    """

    number: int
    state: str
    changes: dict[str, Any]
    recall: float | None
    about: dict[str, Any]


@dataclass
class Claim:
    """A trial that this process runs. ``handle`` is the trial of Optuna."""

    handle: Any
    changes: dict[str, Any]
    home: Path

    @property
    def number(self) -> int:
        return int(self.handle.number)

    def report(self, percent: int, recall: float) -> bool:
        """Report the best recall after ``percent``% of the epochs; return True to end the trial."""
        if percent in self.reported():
            return False  # an earlier process has reported it
        self.handle.report(recall, percent)
        prune = bool(self.handle.should_prune())  # always asked, because later trials compare
        return prune and self.number >= _NEVER_STOPPED

    def note(self, **facts: Any) -> None:
        """Add facts about the trial to the stored ones."""
        self.handle.set_user_attr(_ABOUT, {**self.handle.user_attrs.get(_ABOUT, {}), **facts})

    def about(self) -> dict[str, Any]:
        """Return the stored facts."""
        return dict(self.handle.user_attrs.get(_ABOUT, {}))

    def release(self) -> None:
        """Let another process continue the trial, because the user has stopped this one."""
        self.handle.set_user_attr(_STARTS, (0, 0))

    def reported(self) -> dict[int, float]:
        """Return the reported recall by percent, from this process or an earlier one."""
        trials = self.handle.study.get_trials(deepcopy=False)
        return dict(trials[self.number].intermediate_values)

    def finish(self, recall: float) -> None:
        self.handle.study.tell(self.handle, recall)

    def prune(self, why: str) -> None:
        self.note(why=why)
        self._end("PRUNED")

    def fail(self, error: str, hint: str) -> None:
        self.note(error=error, hint=hint)
        self._end("FAIL")

    def _end(self, state: str) -> None:
        import optuna

        self.handle.study.tell(self.handle, state=optuna.trial.TrialState[state])


class SearchStudy:
    """The study in a folder. The sampler depends on ``seed`` and the number of the trial."""

    def __init__(self, folder: Path, space: Space, seed: int) -> None:
        self.folder, self.space, self.seed = folder, space, seed
        self._optuna = quiet_optuna()
        journal = self._optuna.storages.journal
        storage = self._optuna.storages.JournalStorage(
            journal.JournalFileBackend(str(folder / JOURNAL))
        )
        self.study = self._optuna.create_study(
            study_name=_NAME,
            storage=storage,
            direction="maximize",
            load_if_exists=True,
            pruner=self._optuna.pruners.SuccessiveHalvingPruner(
                min_resource=_FIRST_RUNG, reduction_factor=_KEPT
            ),
        )
        self._worker = f"worker {uuid.uuid4().hex[:8]}"
        self._began = self._noted = time.time()

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Begin the search, or check that the search in the folder is the same.

        Raises:
            UsageError: the folder holds a search with other settings.
        """
        with self.turn():
            saved = self.study.user_attrs.get(_SETTINGS)
            if saved is None:
                self.study.set_user_attr(_SETTINGS, dict(settings))
                return
        names = sorted(saved.keys() | settings.keys())
        changed = [n for n in names if saved.get(n) != settings.get(n)]
        if changed:
            listed = ", ".join(f"{n} {saved.get(n)} -> {settings.get(n)}" for n in changed)
            raise UsageError(
                f"{self.folder} holds a search with other settings: {listed}",
                "set them back, or choose another --output-dir",
            )

    @contextmanager
    def claim(self, most_epochs: Callable[[], float]) -> Iterator[Claim | None]:
        """Claim an abandoned trial, or begin a new one.

        Args:
            most_epochs: returns the most epochs of another trial, 0 if none may begin. While it
                runs, no other process can begin a trial.

        Yields None if there is nothing to do now. No other process can claim the trial inside the
        block.
        """
        with ExitStack() as held:
            with self.turn():
                handle, epochs = self._abandoned(held), math.inf
                if handle is None and (epochs := most_epochs()):
                    handle = self._ask(held)
                claim = self._claimed(handle, epochs) if handle is not None else None
            yield claim

    def home(self, number: int) -> Path:
        """The --output-dir of a trial's run."""
        return self.folder / "trials" / f"{number:04d}"

    def _abandoned(self, held: ExitStack) -> Any:
        for frozen in self.study.get_trials(deepcopy=False, states=[self._state("RUNNING")]):
            try:
                held.enter_context(run_lock(self.home(frozen.number)))
            except UsageError:  # its process is alive
                continue
            self._prepare_sampler(frozen.number)
            handle = self._optuna.trial.Trial(self.study, frozen._trial_id)
            epochs, starts = frozen.user_attrs.get(_STARTS, (0, 0))
            if starts < _MOST_STARTS or not frozen.number:
                return handle
            error = f"its process was killed {starts} times after epoch {epochs}"
            about = frozen.user_attrs.get(_ABOUT, {})
            handle.set_user_attr(_ABOUT, {**about, "error": error})
            self.study.tell(handle, state=self._state("FAIL"))
        return None

    def _ask(self, held: ExitStack) -> Any:
        trials = self.study.get_trials(deepcopy=False)
        begun = [trial for trial in trials if trial.state != self._state("WAITING")]
        move = next_move(self.space, self._attempts()) if len(begun) == len(trials) else None
        if move is not None:
            self.study.enqueue_trial(move[1], user_attrs={_MOVE: move[0]})
        self._prepare_sampler(len(begun))
        handle = self.study.ask()
        held.enter_context(run_lock(self.home(handle.number)))
        return handle

    def _attempts(self) -> list[Attempt]:
        done = self._state("COMPLETE")
        return [
            Attempt(t.params, t.value if t.state == done else None, t.user_attrs.get(_MOVE))
            for t in self.study.get_trials(deepcopy=False)
        ]

    def _best_parameters(self) -> Parameters:
        """Return the parameters of the best trial that has ended; empty if none has."""
        done = [attempt for attempt in self._attempts() if attempt.recall is not None]
        best = max(done, key=lambda attempt: attempt.recall or 0.0, default=None)
        return best.parameters if best else {}

    def _prepare_sampler(self, number: int) -> None:
        """Seed the sampler by the trial's number, so that a killed search continues as before."""
        self.study.sampler = self._optuna.samplers.TPESampler(
            n_startup_trials=_RANDOM_TRIALS,
            seed=self.seed * 100_003 + number,
            # The multivariate sampler needs the same ranges in all trials, but the ranges of the
            # learning rates follow the best trial
            multivariate=False,
        )

    def _claimed(self, handle: Any, most_epochs: float) -> Claim:
        changes = handle.user_attrs.get(_CHANGES)
        if changes is None:
            best = self._best_parameters()
            changes = self.space.changes(self.space.suggest(handle, most_epochs, best))
            handle.set_user_attr(_CHANGES, changes)
        epochs = len(self.study.get_trials(deepcopy=False)[handle.number].intermediate_values)
        before, starts = handle.user_attrs.get(_STARTS, (epochs, 0))
        handle.set_user_attr(_STARTS, (epochs, starts + 1 if epochs == before else 1))
        return Claim(handle, changes, self.home(handle.number))

    def trials(self) -> list[Trial]:
        """All trials that have begun, by number."""
        names = {"RUNNING": "running", "COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
        found = []
        for frozen in self.study.get_trials(deepcopy=False):
            about = frozen.user_attrs.get(_ABOUT, {})
            changes = frozen.user_attrs.get(_CHANGES)
            if frozen.state.name not in names or changes is None:
                continue
            reported = list(frozen.intermediate_values.values())
            values = [frozen.value] if frozen.state.name == "COMPLETE" else reported
            recall = max(values, default=None)
            found.append(Trial(frozen.number, names[frozen.state.name], changes, recall, about))
        return found

    def importances(self) -> dict[str, float]:
        """Return the importance of each setting: its share in what makes the best trials better.

        It is computed by PED-ANOVA (Watanabe et al. 2023) for the trials in the scenario of the
        best one; empty if there are too few.
        """
        trials, frozen = self.trials(), self.study.get_trials(deepcopy=False)
        done = [t for t in trials if t.state in ("finished", "pruned") and t.recall is not None]
        best = max(done, key=lambda trial: trial.recall or 0.0, default=None)
        scenario = frozen[best.number].params.get("scenario") if best else None
        # Optuna only uses finished trials, which all have good values of the important settings
        every = self._optuna.create_study(direction="maximize")
        for trial in done:
            own = frozen[trial.number]
            if own.params.get("scenario") == scenario:
                every.add_trial(
                    self._optuna.trial.create_trial(
                        params=own.params, distributions=own.distributions, value=trial.recall
                    )
                )
        if len(every.trials) < _ENOUGH_TO_TELL:
            return {}
        found = self._optuna.importance.get_param_importances(every)
        return {name: float(share) for name, share in found.items() if name != "scenario"}

    def tick(self) -> None:
        """Record from time to time that this process is still running."""
        now = time.time()
        if now - self._noted > _NOTED_EVERY:
            self._noted = now
            self.study.set_user_attr(self._worker, [self._began, now])

    def elapsed(self) -> float:
        """Return the seconds in which any process has been running, including earlier starts."""
        times = [v for n, v in self.study.user_attrs.items() if n.startswith("worker ")]
        return covered([*times, [self._began, time.time()]])

    def _state(self, name: str) -> Any:
        return self._optuna.trial.TrialState[name]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other process is choosing a trial or writing the result."""
        descriptor = os.open(self.folder / _TURN, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def covered(intervals: Sequence[Sequence[float]]) -> float:
    """Return the total length of intervals; overlaps count once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted((start, end) for start, end in intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
