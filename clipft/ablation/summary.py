"""Collects the content of an ablation's report: a table of the variants, and the one to choose."""

from collections.abc import Mapping, Sequence
from typing import Any

from clipft.metrics.comparisons import (
    Values,
    against_reference,
    differences,
    interval,
    spread,
)
from clipft.metrics.figures import DIRECTIONS, RECALLS, as_figure, mean_recall
from clipft.report.report import epoch_curves

_NAMED = 3
"""Most variants that a sentence lists by name. If there are more, it contains their number."""
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

Json = Mapping[str, Any]


def ablation_content(folder: str, state: Json) -> dict[str, Any]:
    """Return the content of report.json.

    Args:
        folder: the ablation's folder, as the user wrote it.
        state: from ``ablation.runner.read_state``.
    """
    runs = state["runs"]
    by_variant: dict[str, list[Json]] = {}
    for run in runs:
        by_variant.setdefault(run["variant"], []).append(run)
    variants = [_variant(name, group) for name, group in by_variant.items()]
    best = _best(variants)
    others = [v for v in variants if v["finished"] and v is not best]
    to_best = against_reference({v["name"]: _to_best(v, best) for v in others if best})
    trained = {v["name"]: _by_seed(v["gain"]) for v in variants if v["trains"]}
    gains = against_reference(trained)
    for variant in variants:
        variant["to_best"] = to_best.get(variant["name"])
        variant["gain"] |= gains.get(variant["name"], {})
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
    """Return a row of the table, from the runs of a variant with all seeds."""
    done = {run["seed"]: run for run in runs if run["state"] == "finished"}
    # If no epoch was better, the result of a run is the pretrained model
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
        "pretrained": spread(pretrained),
        "mean_recall": spread(recall),
        "gain": {**spread(gain), "interval": interval(gain)},  # the interval's former name
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


def _best(variants: Sequence[Json]) -> Json | None:
    """Return the variant with the highest mean recall; None before any run has finished."""
    rated = [variant for variant in variants if variant["finished"]]
    return max(rated, key=lambda variant: variant["mean_recall"]["mean"], default=None)


def _to_best(variant: Json, best: Json) -> Values:
    """Return mean recall of ``variant`` minus that of ``best``, seed by seed."""

    ours, theirs = _by_seed(variant["mean_recall"]), _by_seed(best["mean_recall"])
    if not variant["trains"]:  # measured once, because its figure does not depend on the seed
        ours = dict.fromkeys(theirs, next(iter(ours.values())))
    return differences(ours, theirs)


def _by_seed(spread: Json) -> dict[int, float]:
    return {int(seed): value for seed, value in spread["values"].items()}


def _verdict(variants: Sequence[Json]) -> str:
    """Return a sentence with the best variant and its figures on pairs that were not used to choose
    it."""
    best = _best(variants)
    if not best:
        return "No run has finished."
    before, after = best["pretrained"]["mean"], best["mean_recall"]["mean"]
    if best["gain"]["mean"] <= 0:
        return (
            "No variant is better than the pretrained model, so use that: its mean recall is "
            f"{100 * before:.1f}%."
        )
    moved = f"from {100 * before:.1f}% to {100 * after:.1f}% ({_points(best['gain'])})"
    if _is_clear(best["gain"]) is False:
        words = f"No clear difference: with {best['name']}, mean recall went {moved}."
    else:
        words = f"{best['name']} is best: mean recall rose {moved}."
    words += _compared(best, [v for v in variants if v["to_best"]])
    if best["test_gain"]["mean"] is None:
        return words
    test = f"{100 * best['test_mean_recall']['mean']:.1f}%"
    return f"{words} On the test pairs it reaches {test} ({_points(best['test_gain'])})."


def _compared(best: Json, others: Sequence[Json]) -> str:
    """Return a sentence with the variants that do not differ clearly from the best, and the
    distance of the next one."""
    seeds = best["finished"]
    if not others:
        return ""
    if seeds < 2:
        return " One seed says nothing about the spread, so the order may be due to chance."
    number = _NUMBERS[seeds] if seeds < len(_NUMBERS) else str(seeds)
    following = max(others, key=lambda variant: variant["mean_recall"]["mean"])
    behind = f"{following['name']} ({_points(following['to_best'])})"
    close = [v["name"] for v in others if not _is_clear(v["to_best"])]
    if not close:
        return f" With {number} seeds, it is clearly better than all others; the next is {behind}."
    if close == [following["name"]]:
        return f" With {number} seeds, {behind} is statistically indistinguishable from it."
    names = ", ".join(close[:-1]) + " and " * (len(close) > 1) + close[-1]
    if len(close) > _NAMED:
        names = f"{len(close)} others"
    are = "is" if len(close) == 1 else "are"
    return (
        f" With {number} seeds, {names} {are} statistically indistinguishable from it; the next "
        f"is {behind}."
    )


def _points(change: Json) -> str:
    points = f"{100 * change['mean']:+.1f} points"
    if change["low"] is None:
        return points
    return f"{points}, 95% interval {100 * change['low']:+.1f} to {100 * change['high']:+.1f}"


def _is_clear(change: Json) -> bool | None:
    """Return whether a difference is beyond chance; None for a single seed."""
    return as_figure(change).get("clear")
