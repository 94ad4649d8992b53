"""What a run left -> the content of its report: report.json as it is, the page drawn of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from clipft.runs.records import RunRecords
from clipft.report.curves import epoch_curves, step_curves
from clipft.metrics.figures import before_and_after, figure_tables, mean_recall


def run_content(
    records: RunRecords, gallery: Sequence[Mapping[str, Any]], gallery_note: str
) -> dict[str, Any]:
    """JSON values alone. ``gallery_note`` says why there is no gallery, or is empty."""
    return {
        "kind": "run",
        "format_version": 1,
        "title": f"{records.setting('scenario')} on {records.setting('model')}",
        "folder": records.folder,
        "finished": records.result is not None,
        "verdict": _verdict(records, *_recall(records)),
        "plan": records.run.get("plan"),
        "seconds": records.run.get("seconds"),
        "peak_memory_bytes": records.run.get("peak_memory_bytes"),
        "environment": records.run.get("environment", {}),
        "figures": figure_tables(records.epochs, records.evaluation),
        "steps": step_curves(records.steps),
        "epochs": epoch_curves(records.epochs),
        "categories": _categories(records.evaluation),
        "interpolation": records.interpolation,
        "kept": _kept(records.kept),
        "gallery": list(gallery),
        "gallery_note": gallery_note,
        "skipped": {"counts": records.skipped_counts, "listed": records.skipped},
        "settings": records.settings,
    }


def _categories(evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """R@10 from text to image of each category, the largest first."""
    if not evaluation:
        return []

    def figure(part: str, name: str) -> Any:
        of = (evaluation[part] or {}).get("by_category", {}).get(name)
        return of["paired"]["text_to_image"]["figures"]["r@10"] if of else None

    before = evaluation["before"]["by_category"]
    return [
        {
            "name": name,
            "pairs": category["pairs"],
            "before": figure("before", name),
            "after": figure("after", name),
        }
        for name, category in before.items()
    ]


def _kept(kept: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The paired figures on the general pairs."""
    if not kept:
        return None
    return {"keep_dir": kept["keep_dir"], "figures": figure_tables([], kept)[:1]}


def _recall(records: RunRecords) -> tuple[float | None, float | None]:
    """Mean recall before and after, as the tables below have it."""
    if records.evaluation:
        before, after = records.evaluation["before"], records.evaluation["after"]
        return before["recall"], after["recall"] if after else None
    parts = before_and_after(records.epochs)
    untouched, tuned = (mean_recall(part) if part else None for part in parts)
    return untouched, tuned


def _verdict(records: RunRecords, before: float | None, after: float | None) -> str:
    if before is None:
        return "The untouched model has not been measured yet."
    untouched = f"{100 * before:.1f} %"
    last = records.epochs[-1]["epoch"]
    if after is None:
        why = "no epoch was better" if last else "nothing was trained"
        return f"Mean recall of the untouched model {untouched}; {why}."
    gain = 100 * (after - before)
    best = next((e["epoch"] for e in reversed(records.epochs) if e["improved"]), last)
    end = f"epoch {best} of {last}" + ("" if records.result else " so far")
    advice = "" if gain > 0 else " No gain over the untouched model."
    around = _around(records.evaluation)
    return (
        f"Mean recall {untouched} before, {100 * after:.1f} % after "
        f"({gain:+.1f} points{around}) at {end}.{advice}"
    )


def _around(evaluation: Mapping[str, Any] | None) -> str:
    """The interval of the gain in words."""
    change = ((evaluation or {}).get("difference") or {}).get("recall") or {}
    if change.get("low") is None:
        return ""
    words = f", 95 % interval {100 * change['low']:+.1f} to {100 * change['high']:+.1f}"
    return words if change["clear"] else f"{words}: it may be chance"
