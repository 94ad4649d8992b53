"""The runs of an ablation -> its table and its word on which variant to take, as JSON values."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from clipft.metrics.figures import DIRECTIONS, RECALLS, mean_recall
from clipft.report.curves import epoch_curves

_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""Student's t, 97.5 %, from 1 degree of freedom on; beyond it the normal's 1.96."""

Values = Mapping[int, float]
"""By seed."""


def spread(values: Values) -> dict[str, Any]:
    """Mean, sample standard deviation (None of a single value), and the values themselves."""
    several = len(values) > 1
    return {
        "mean": fmean(values.values()) if values else None,
        "sd": stdev(values.values()) if several else None,
        "values": {str(seed): value for seed, value in values.items()},
    }


def interval(values: Values) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t; None of fewer than two values."""
    count = len(values)
    if count < 2:
        return None
    t = _T[count - 2] if count - 2 < len(_T) else 1.96
    reach = t * stdev(values.values()) / math.sqrt(count)
    mean = fmean(values.values())
    return mean - reach, mean + reach


def differences(one: Values, other: Values) -> dict[int, float]:
    """``one`` minus ``other``, seed by seed, over the seeds that both have."""
    return {seed: one[seed] - other[seed] for seed in one if seed in other}


Run = Mapping[str, Any]


def ablation_content(folder: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` is as ``training.ablation_state.read_state`` gives it."""
    runs = state["runs"]
    variants = [_variant(name, group) for name, group in _by_variant(runs).items()]
    finished = [run for run in runs if run["state"] == "finished"]
    return {
        "kind": "ablation",
        "format_version": 1,
        "title": f"Ablation of {len(variants)} variants",
        "folder": folder,
        "finished": len(finished) == len(runs),
        "verdict": _verdict(variants),
        "variants": variants,
        "runs": [_run(run) for run in runs],
        "settings": state["settings"],
        "environment": finished[0]["environment"] if finished else {},
    }


def _by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["variant"], []).append(run)
    return groups


def _variant(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """One row of the table. ``gain`` is over the untouched model as the same run measured it."""
    done = {run["seed"]: run for run in runs if run["state"] == "finished"}
    tuned = {seed: run["after"] or run["before"] for seed, run in done.items()}
    recall = {seed: mean_recall(figures) for seed, figures in tuned.items()}
    untouched = {seed: mean_recall(run["before"]) for seed, run in done.items()}
    gain = differences(recall, untouched)
    plans = [run["plan"] for run in done.values() if run["plan"]]
    seconds = {s: run["seconds"] for s, run in done.items() if run["seconds"] is not None}
    return {
        "name": name,
        "scenario": runs[0]["scenario"],
        "varied": runs[0]["varied"],
        "runs": len(runs),
        "finished": len(done),
        "failed": sum(run["state"] == "failed" for run in runs),
        "mean_recall": spread(recall),
        "gain": {**spread(gain), "interval": interval(gain)},
        "figures": {
            direction: {
                key: spread({seed: figures[direction][key] for seed, figures in tuned.items()})
                for key in (*RECALLS, "median_rank", "mrr")
            }
            for direction in DIRECTIONS
        },
        "grouped": _grouped(done),
        "trains": bool(plans and plans[0]["epochs"]),
        "trainable_parameters": plans[0]["trainable_parameters"] if plans else None,
        "seconds": spread(seconds),
        "peak_memory_bytes": max((r["peak_memory_bytes"] or 0 for r in done.values()), default=0),
        "curve": _mean_curve(list(done.values())),
    }


def _grouped(runs: Mapping[int, Run]) -> dict[str, Any] | None:
    """Grouped recall@10 of the tuned model, or of the untouched where none was better; None
    where a run has no evaluation."""
    if not runs or not all(run["evaluation"] for run in runs.values()):
        return None
    judged = {s: r["evaluation"]["after"] or r["evaluation"]["before"] for s, r in runs.items()}
    return {
        direction: spread(
            {
                seed: found["grouped"][direction]["figures"]["recall@10"]["value"]
                for seed, found in judged.items()
            }
        )
        for direction in DIRECTIONS
    }


def _mean_curve(runs: Sequence[Run]) -> list[list[float]]:
    """Epoch and mean recall over the runs that came so far."""
    by_epoch: dict[int, list[float]] = {}
    for run in runs:
        curves = epoch_curves(run["epochs"])
        for epoch, recall in zip(curves["epoch"], curves["mean_recall"], strict=True):
            by_epoch.setdefault(epoch, []).append(recall)
    return [[epoch, sum(found) / len(found)] for epoch, found in sorted(by_epoch.items())]


def _run(run: Run) -> dict[str, Any]:
    kept = ("variant", "seed", "folder", "state", "exit_code", "error", "hint", "best_epoch")
    costs = ("steps", "seconds", "peak_memory_bytes", "skipped_pairs", "before", "after")
    return {name: run.get(name) for name in (*kept, *costs)}


def _verdict(variants: Sequence[Mapping[str, Any]]) -> str:
    """Which to take, and which of the others the seeds do not tell from it."""
    rated = [variant for variant in variants if variant["finished"]]
    if not rated:
        return "No run has finished."
    best = max(rated, key=lambda variant: variant["mean_recall"]["mean"])
    words = f"Best mean recall: {best['name']}, {_amount(best['mean_recall'])}"
    if best["gain"]["mean"] <= 0:
        return f"{words}. Nothing is better than the untouched model: leave it as it is."
    words += f", {100 * best['gain']['mean']:+.1f} points over the untouched model"
    if len(rated) == 1:
        return f"{words}."
    seeds = best["finished"]
    if seeds < 2:
        return f"{words}. With one seed nobody knows the spread: the order may be chance."
    close = [v["name"] for v in rated if v is not best and not _surely_better(best, v)]
    if not close:
        return f"{words}. Over {seeds} seeds it is told apart from all others."
    return f"{words}. Over {seeds} seeds not told apart from it: {', '.join(close)}."


def _surely_better(best: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """The 95 % interval of the paired differences over the seeds lies above zero."""
    ours, theirs = _values(best), _values(other)
    if not other["trains"]:  # the same figure whatever the seed
        theirs = dict.fromkeys(ours, next(iter(theirs.values())))
    found = interval(differences(ours, theirs))
    return found is not None and found[0] > 0


def _values(variant: Mapping[str, Any]) -> Values:
    return {int(seed): value for seed, value in variant["mean_recall"]["values"].items()}


def _amount(found: Mapping[str, Any]) -> str:
    spread_words = f" ± {100 * found['sd']:.1f}" if found["sd"] is not None else ""
    return f"{100 * found['mean']:.1f} %{spread_words}"
