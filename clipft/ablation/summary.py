"""The content of an ablation's report: a table of the variants, and which of them to choose."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from clipft.metrics.figures import DIRECTIONS, RECALLS, mean_recall
from clipft.report.report import epoch_curves

_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""The 97.5 % quantiles of Student's t for 1 to 20 degrees of freedom; beyond, the normal
distribution's 1.96 is close enough."""
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

Json = Mapping[str, Any]
Values = Mapping[int, float]
"""Seed -> value."""


def spread(values: Values) -> dict[str, Any]:
    """Return mean, sample standard deviation (None for fewer than two values) and the values."""
    return {
        "mean": fmean(values.values()) if values else None,
        "sd": stdev(values.values()) if len(values) > 1 else None,
        "values": {str(seed): value for seed, value in values.items()},
    }


def interval(values: Values) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean by Student's t; None for fewer than two values."""
    count = len(values)
    if count < 2:
        return None
    t = _T[count - 2] if count - 2 < len(_T) else 1.96
    reach = t * stdev(values.values()) / math.sqrt(count)
    mean = fmean(values.values())
    return mean - reach, mean + reach


def differences(one: Values, other: Values) -> dict[int, float]:
    """Subtract ``other`` from ``one`` for each seed that both have."""
    return {seed: one[seed] - other[seed] for seed in one if seed in other}


def ablation_content(folder: str, state: Json) -> dict[str, Any]:
    """Return the content of report.json.

    Args:
        folder: the ablation's folder, as the user named it.
        state: from ``ablation.runner.read_state``.
    """
    runs = state["runs"]
    by_variant: dict[str, list[Json]] = {}
    for run in runs:
        by_variant.setdefault(run["variant"], []).append(run)
    variants = [_variant(name, group) for name, group in by_variant.items()]
    finished = [run for run in runs if run["state"] == "finished"]
    shown = ("variant", "seed", "folder", "state", "exit_code", "error", "hint", "best_epoch")
    costs = ("steps", "seconds", "peak_memory_bytes", "skipped_pairs", "before", "after")
    return {
        "kind": "ablation",
        "format_version": 1,
        "title": f"Ablation of {len(variants)} variants",
        "folder": folder,
        "finished": len(finished) == len(runs),
        "verdict": _verdict(variants),
        "variants": variants,
        "runs": [{name: run.get(name) for name in (*shown, *costs)} for run in runs],
        "settings": state["settings"],
        "environment": finished[0]["environment"] if finished else {},
    }


def _variant(name: str, runs: Sequence[Json]) -> dict[str, Any]:
    """One row of the table, from the runs of all its seeds."""
    done = {run["seed"]: run for run in runs if run["state"] == "finished"}
    # Without an epoch that was better, a run's result is the pretrained model
    best = {seed: run["after"] or run["before"] for seed, run in done.items()}
    recall = {seed: mean_recall(figures) for seed, figures in best.items()}
    pretrained = {seed: mean_recall(run["before"]) for seed, run in done.items()}
    gain = differences(recall, pretrained)
    tested = {seed: run["test"] for seed, run in done.items() if run.get("test")}
    test = {seed: mean_recall(t["after"] or t["before"]) for seed, t in tested.items()}
    test_before = {seed: mean_recall(t["before"]) for seed, t in tested.items()}
    evaluations = {seed: run["evaluation"] for seed, run in done.items()}
    grouped = None
    if evaluations and all(evaluations.values()):
        grouped = {
            direction: spread(
                {
                    seed: (found["after"] or found["before"])["grouped"][direction]["figures"][
                        "recall@10"
                    ]["value"]
                    for seed, found in evaluations.items()
                }
            )
            for direction in DIRECTIONS
        }
    by_epoch: dict[int, list[float]] = {}
    for run in done.values():
        curves = epoch_curves(run["epochs"])
        for epoch, value in zip(curves["epoch"], curves["mean_recall"], strict=True):
            by_epoch.setdefault(epoch, []).append(value)
    plans = [run["plan"] for run in done.values() if run["plan"]]
    seconds = {seed: run["seconds"] for seed, run in done.items() if run["seconds"] is not None}
    return {
        "name": name,
        "scenario": runs[0]["scenario"],
        "varied": runs[0]["varied"],
        "runs": len(runs),
        "finished": len(done),
        "failed": sum(run["state"] == "failed" for run in runs),
        "mean_recall": spread(recall),
        "gain": {**spread(gain), "interval": interval(gain)},
        "test_mean_recall": spread(test),
        "test_gain": spread(differences(test, test_before)),
        "figures": {
            direction: {
                key: spread({seed: figures[direction][key] for seed, figures in best.items()})
                for key in (*RECALLS, "median_rank", "mrr")
            }
            for direction in DIRECTIONS
        },
        "grouped": grouped,
        "trains": bool(plans and plans[0]["epochs"]),
        "trainable_parameters": plans[0]["trainable_parameters"] if plans else None,
        "seconds": spread(seconds),
        "peak_memory_bytes": max((r["peak_memory_bytes"] or 0 for r in done.values()), default=0),
        "curve": [[epoch, sum(found) / len(found)] for epoch, found in sorted(by_epoch.items())],
    }


def _verdict(variants: Sequence[Json]) -> str:
    """Say which variant is best, and what it reaches on pairs that have not chosen it."""
    rated = [variant for variant in variants if variant["finished"]]
    if not rated:
        return "No run has finished."
    best = max(rated, key=lambda variant: variant["mean_recall"]["mean"])
    chosen, test = _choice(best, rated), best["test_mean_recall"]
    if test["mean"] is None:
        return chosen
    sd = f" ± {100 * test['sd']:.1f}" if test["sd"] is not None else ""
    gain = best["test_gain"]["mean"]
    return (
        f"{chosen} On the test pairs, {best['name']} reaches {100 * test['mean']:.1f} %{sd}, "
        f"{100 * gain:+.1f} points over the pretrained model."
    )


def _choice(best: Json, rated: Sequence[Json]) -> str:
    """Say by how much a variant is better, and which others the seeds cannot tell from it."""
    recall = best["mean_recall"]
    sd = f" ± {100 * recall['sd']:.1f}" if recall["sd"] is not None else ""
    words = f"Best mean recall: {best['name']}, {100 * recall['mean']:.1f} %{sd}"
    gain = best["gain"]["mean"]
    if gain <= 0:
        return f"{words}. No variant is better than the pretrained model, so use that."
    words += f", {100 * gain:+.1f} points over the pretrained model."
    if len(rated) == 1:
        return words
    seeds = best["finished"]
    if seeds < 2:
        return f"{words} One seed says nothing about the spread, so the order may be chance."
    close = [v["name"] for v in rated if v is not best and not _surely_better(best, v)]
    number = _NUMBERS[seeds] if seeds < len(_NUMBERS) else str(seeds)
    if not close:
        return f"{words} With {number} seeds, it is clearly better than all others."
    are = "is" if len(close) == 1 else "are"
    names = ", ".join(close[:-1]) + " and " * (len(close) > 1) + close[-1]
    return (
        f"{words} With {number} seeds, {names} {are} statistically indistinguishable from "
        f"{best['name']}."
    )


def _surely_better(best: Json, other: Json) -> bool:
    """Whether the 95 % interval of the paired differences over the seeds lies above zero."""

    def by_seed(variant: Json) -> dict[int, float]:
        return {int(seed): value for seed, value in variant["mean_recall"]["values"].items()}

    ours, theirs = by_seed(best), by_seed(other)
    if not other["trains"]:  # measured once, because its figure does not depend on the seed
        theirs = dict.fromkeys(ours, next(iter(theirs.values())))
    found = interval(differences(ours, theirs))
    return found is not None and found[0] > 0
