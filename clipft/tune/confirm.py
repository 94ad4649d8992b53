"""Confirms the winner of a search over seeds, and measures it on pairs that did not choose it.

The defaults and the best trial are trained with the same seeds. The best trial was chosen by its
validation recall with the first seed, which may have been luck, so the other seeds decide which of
the two is recommended. The test pairs are only used to measure the improvement.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipft.config.settings import Settings
from clipft.config.sources import LoadedSettings
from clipft.core.common import counted
from clipft.core.errors import UsageError
from clipft.core.files import read_json, write_json
from clipft.data.shards.names import tars_in
from clipft.metrics.comparisons import (
    against_reference,
    differences,
    over_seeds_and_queries,
    spread,
)
from clipft.metrics.definitions import Floats
from clipft.metrics.figures import mean_recall
from clipft.runs.folder import RunPaths, run_lock
from clipft.runs.records import EpochResult, TrainingCallback
from clipft.tune.search import FAILURES, Search, best_of, remove_weights

_POLL_SECONDS = 0.5
_FAILED = "failed.json"
"""The file with the error of a confirming run, in its ``home``."""
DEFAULTS, WINNER = "defaults", "winner"
SPLIT_TITLES = {"test": "test", "val": "validation"}


@dataclass(frozen=True)
class Measured:
    """Mean recall on some pairs, and in each resample of these pairs, float64 [resamples]."""

    recall: float
    resampled: Floats


OpenPairs = Callable[[Settings, str], Callable[[Path | None], Measured]]
"""Opens the pairs of a split, and returns a function that measures a run folder on them, or the
pretrained model for None."""


@dataclass(frozen=True)
class ConfirmingRun:
    """One of the runs that confirm the winner. ``home`` is its --output-dir."""

    variant: str
    seed: int
    changes: Mapping[str, Any]
    home: Path
    settings: LoadedSettings

    @property
    def folder(self) -> Path:
        return self.home / self.settings.values.scenario

    @property
    def failed(self) -> bool:
        """Whether the run ended with an error that its settings caused."""
        return (self.home / _FAILED).is_file()

    def recall(self) -> float | None:
        """Mean recall on the validation pairs, 0 if the run failed; None until it has ended."""
        if self.failed:
            return 0.0
        result = read_json(RunPaths(self.folder).result)
        return mean_recall(result["after"] or result["before"]) if result else None


def confirming_runs(search: Search) -> list[ConfirmingRun]:
    """List the runs of the defaults and of the best trial, seed by seed.

    The runs with the first seed are trials, which exist already. If no trial was better than the
    defaults, only the runs of the defaults are listed.
    """
    trials = search.study.trials()
    best, found = best_of(trials), list[ConfirmingRun]()
    variants = {DEFAULTS: trials[0]} | ({WINNER: best} if best.number else {})
    for seed in search.seeds:
        for variant, trial in variants.items():
            home = search.study.folder / "confirmation" / variant / f"seed-{seed}"
            if seed == search.seeds[0]:
                home = search.study.home(trial.number)
            settings = search.space.settings(trial.changes, output_dir=home.resolve(), seed=seed)
            found.append(ConfirmingRun(variant, seed, trial.changes, home, settings))
    return found


def confirm(search: Search) -> None:
    """Train the runs that there is time for, and wait for runs that other processes train.

    Raises:
        Interrupted: a signal asked to stop; the search can be continued.
        ClipftError: as for ``clipft.api.train``.
    """
    runs = confirming_runs(search)
    if not any(run.variant == WINNER for run in runs):
        return  # nothing to compare
    while waiting := [run for run in runs if run.recall() is None]:
        search.check_stop()
        began = [run for run in waiting if run.home.exists()]
        if not began and not _fits(search):
            return
        if not any(_confirmed_here(search, run) for run in waiting):
            time.sleep(_POLL_SECONDS)  # other processes train them


def _fits(search: Search) -> bool:
    """Return whether there is time for the runs of another seed."""
    if search.budget.seconds is None:
        return True
    trials = search.study.trials()
    needed = trials[0].about["seconds"] + best_of(trials).about["seconds"]
    return bool(search.study.elapsed() + needed <= search.budget.seconds)


def _confirmed_here(search: Search, run: ConfirmingRun) -> bool:
    """Train a run; return False if another process is training it."""
    with ExitStack() as held:
        try:
            held.enter_context(run_lock(run.home))
        except UsageError:
            return False
        if run.recall() is None:
            search.note(f"confirming: {run.variant}, seed {run.seed} ...")
            try:
                search.train_run(run.settings, run.home, _Ticking(search))
            except FAILURES as error:
                search.note(f"confirming: {run.variant}, seed {run.seed}: failed: {error.message}")
                write_json(run.home / _FAILED, {"error": error.message, "hint": error.hint})
            search.study.tick()
            remove_weights(run.home, keep_best=not run.failed)
        return True


class _Ticking(TrainingCallback):
    def __init__(self, search: Search) -> None:
        self.search = search

    def epoch_ended(self, result: EpochResult) -> None:
        self.search.study.tick()


def compared(runs: Sequence[ConfirmingRun], chosen_by: int) -> dict[str, Any]:
    """Compare the winner with the defaults on the validation pairs, seed by seed.

    Args:
        runs: the runs that have ended.
        chosen_by: the seed with which the winner was chosen; it is left out.
    """
    recalls: dict[str, dict[int, float]] = {DEFAULTS: {}, WINNER: {}}
    for run in runs:
        recall = run.recall()
        if recall is not None and run.seed != chosen_by:
            recalls[run.variant][run.seed] = recall
    change = differences(recalls[WINNER], recalls[DEFAULTS])
    return {
        "seeds": sorted(change),
        **{name: spread({seed: of[seed] for seed in change}) for name, of in recalls.items()},
        "difference": against_reference({WINNER: change})[WINNER],
    }


def better(comparison: Mapping[str, Any]) -> str:
    """Return the variant to recommend: the one with the higher recall over the same seeds.

    If no other seed was tried, this is the winner, which was better with the first seed.
    """
    change = comparison["difference"]["mean"]
    return WINNER if change is None or change > 0 else DEFAULTS


def measured(
    search: Search, runs: Sequence[ConfirmingRun], measure: OpenPairs, place: Path
) -> dict[str, Any]:
    """Measure the pretrained model and the confirming runs, on the test pairs if there are any.

    The figures are stored in ``place``, so that nothing is measured twice. Without test pairs, the
    validation pairs are used, on which the winner looks too good because it was chosen by them.
    """
    base = search.space.base.values
    runs = [run for run in runs if not run.failed]
    split = "test" if tars_in(base.data_dir / "test") else "val"
    key = {"split": split, "runs": [[run.variant, run.seed, str(run.home)] for run in runs]}
    saved = read_json(place)
    if saved and saved.get("of") == key:
        return dict(saved["figures"])
    recall_of = measure(base, split)
    search.note(f"measuring {counted(len(runs), 'run')} on the {SPLIT_TITLES[split]} pairs ...")
    found: dict[str, dict[int, Measured]] = {DEFAULTS: {}, WINNER: {}}
    for run in runs:
        search.check_stop()
        found[run.variant][run.seed] = recall_of(run.folder)
        search.study.tick()
    pretrained = recall_of(None).recall
    figures = {"split": split, "pretrained": pretrained, **_figures(found, base.seed)}
    write_json(place, {"of": key, "figures": figures}, indent=1)
    return figures


def _figures(found: Mapping[str, Mapping[int, Measured]], seed: int) -> dict[str, Any]:
    defaults, winner = found[DEFAULTS], found[WINNER]
    both = [seed for seed in winner if seed in defaults]
    means = {
        name: float(np.mean([of[seed].recall for seed in both or of])) if of else None
        for name, of in found.items()
    }
    if not both:
        return {**means, "difference": None, "seeds": len(defaults)}
    values = [winner[seed].recall - defaults[seed].recall for seed in both]
    change: dict[str, Any] = {"value": float(np.mean(values))}
    if all(len(winner[seed].resampled) for seed in both):
        resampled = np.stack([winner[s].resampled - defaults[s].resampled for s in both])
        change = over_seeds_and_queries(values, resampled, seed)
    return {**means, "difference": change, "seeds": len(both)}


def open_pairs_to_measure(settings: Settings, split: str) -> Callable[[Path | None], Measured]:
    """Open the pairs of a split, and return a function that measures a run folder on them.

    All runs are measured with the same resamples, which depend on ``settings``.

    Raises:
        ClipftError: a checkpoint or the pairs cannot be read.
    """
    from clipft.embedding.load import load_model
    from clipft.evaluation.evaluator import EvaluationSet
    from clipft.runs.checkpoint import load_checkpoint
    from clipft.runs.load import load_fine_tuned
    from clipft.runs.places import find_checkpoint

    pretrained = load_model(settings, pretrained=True)
    pairs = EvaluationSet.open(pretrained.base.inputs, settings, split)

    def measure(folder: Path | None) -> Measured:
        loaded = pretrained
        if folder is not None:
            content = load_checkpoint(find_checkpoint(folder, settings))
            loaded = load_fine_tuned(content, Settings(**content["settings"]))
        evaluation = pairs.evaluate(loaded).evaluation
        resampled = evaluation.resampled_recall() if settings.resamples else np.empty(0)
        return Measured(evaluation.recall(), resampled)

    return measure
