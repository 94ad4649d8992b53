"""Starts or continues a search: its settings, its processes, and its result."""

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clipft.ablation.runner import environments
from clipft.config.settings import fixed_on_resume
from clipft.config.sources import LoadedSettings
from clipft.core.common import Note
from clipft.core.errors import ClipftError, Interrupted, ProcessError
from clipft.core.text import visible
from clipft.data.few_shot import training_pairs
from clipft.training.defaults import count_training_pairs, follow_catalogue
from clipft.training.signals import StopRequest, end_with_parent, stop_on_signals
from clipft.tune.budget import Budget
from clipft.tune.confirm import confirm, open_pairs_to_measure
from clipft.tune.search import AGAIN, Search, train_and_release
from clipft.tune.soup import greedy_soup
from clipft.tune.space import Space, open_space
from clipft.tune.study import SearchStudy
from clipft.tune.summary import finish

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Session:
    """The request for a search. ``seeds`` is the number of seeds that confirm the best trial."""

    space: Space
    budget: Budget
    seeds: int
    workers: int

    def search(self, note: Note, stop: StopRequest) -> Search:
        """Return the ``Search`` with which a process takes part."""
        settings = self.space.base.values
        study = SearchStudy(settings.output_dir, self.space, settings.seed)
        seeds = range(settings.seed, settings.seed + self.seeds)
        return Search(study, self.budget, seeds, train_and_release, note, stop)

    def identity(self) -> dict[str, Any]:
        """Return everything that must be the same to continue a search."""
        values = self.space.base.values.model_dump(mode="json")
        fixed = {name: values[name] for name in fixed_on_resume()}
        return fixed | {"searched": ", ".join(self.space.names)}


def open_session(
    loaded: LoadedSettings, wanted: Sequence[str], budget: Budget, seeds: int, workers: int
) -> tuple[Session, list[str]]:
    """Choose the settings to search. The search begins with what ``clipft train`` would do.

    Returns the session, and sentences about the defaults that depend on the catalogue.

    Raises:
        DataError: there are no training pairs.
        UsageError: a setting cannot be searched, or nothing is left to search.
    """
    notes = list[str]()
    base, settings = follow_catalogue(loaded, notes.append), loaded.values
    pairs = None if settings.stream else training_pairs(settings)
    count = count_training_pairs(settings) if pairs is None else len(pairs)
    space = open_space(base, loaded.given(), wanted, count, pairs)
    return Session(space, budget, seeds, workers), notes


def run_session(session: Session, note: Note) -> dict[str, Any]:
    """Search, confirm the best trial, and write the result. Return the content of tune.json.

    Raises:
        Interrupted: a signal asked to stop; the search can be continued.
        UsageError: the folder holds another search, or the budget ended during the first run.
        ClipftError: the run with the defaults failed, or there was an error of disk or data.
    """
    session.space.base.values.output_dir.mkdir(parents=True, exist_ok=True)
    with stop_on_signals() as stop:
        search = session.search(note, stop)
        search.study.begin(session.identity())
        if session.workers > 1:
            _side_by_side(session, stop)
        else:
            search.run()
            confirm(search)
        return finish(search, open_pairs_to_measure, greedy_soup)


def _side_by_side(session: Session, stop: StopRequest) -> None:
    """Search and confirm in several processes, and wait for them.

    Raises:
        Interrupted: a signal asked to stop; the search can be continued.
        ClipftError: the first error of any process.
        ProcessError: all of them were killed.
    """
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    workers = [
        context.Process(target=_work, args=(environment, session, errors))
        for environment in environments(session.workers)
    ]
    for worker in workers:
        worker.start()
    asked = False
    while any(worker.is_alive() for worker in workers):
        time.sleep(_POLL_SECONDS)
        if not asked and (stop.name or any((worker.exitcode or 0) > 0 for worker in workers)):
            asked = True
            for worker in workers:
                worker.terminate()  # SIGTERM: they save their state
    if stop.name:
        raise Interrupted(f"stopped by {stop.name}; everything so far is kept", AGAIN)
    if not errors.empty():
        raise errors.get()
    if all(worker.exitcode for worker in workers):  # others continue the trials of a killed one
        code = workers[0].exitcode
        raise ProcessError(f"the processes of the search ended with exit code {code}", AGAIN)


def _work(environment: dict[str, str], session: Session, errors: Any) -> None:
    """Take part in a search; runs in a separate process."""
    os.environ.update(environment)  # before CUDA lists its devices
    _use_threads(environment.get("OMP_NUM_THREADS"))
    end_with_parent()

    def note(text: str) -> None:
        print(visible(text), file=sys.stderr, flush=True)

    try:
        with stop_on_signals(speaks=False) as stop:
            search = session.search(note, stop)
            search.run()
            confirm(search)
    except ClipftError as error:
        errors.put(error)
        raise SystemExit(error.exit_code) from None


def _use_threads(count: str | None) -> None:
    """Set torch's number of threads, because torch was imported before the environment was set."""
    if count:
        import torch

        torch.set_num_threads(int(count))
