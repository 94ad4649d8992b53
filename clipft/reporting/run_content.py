"""What a run left -> the content of its report: report.json as it is, the page drawn of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from clipft.records import RunRecords
from clipft.reporting.curves import epoch_curves, step_curves
from clipft.reporting.figures import DEFINITION, before_and_after, mean_recall, paired_rows


def run_content(
    records: RunRecords, gallery: Sequence[Mapping[str, Any]], gallery_note: str
) -> dict[str, Any]:
    """JSON values alone. ``gallery_note`` says why there is no gallery, or is empty."""
    before, after = before_and_after(records.epochs)
    return {
        "kind": "run",
        "format_version": 1,
        "title": f"{records.setting('scenario')} on {records.setting('model')}",
        "folder": records.folder,
        "finished": records.result is not None,
        "verdict": _verdict(records, before, after),
        "plan": records.run.get("plan"),
        "seconds": records.run.get("seconds"),
        "peak_memory_bytes": records.run.get("peak_memory_bytes"),
        "environment": records.run.get("environment", {}),
        "figures": _figures(before, after),
        "steps": step_curves(records.steps),
        "epochs": epoch_curves(records.epochs),
        "gallery": list(gallery),
        "gallery_note": gallery_note,
        "skipped": {"counts": records.skipped_counts, "listed": records.skipped},
        "settings": records.settings,
    }


def _figures(before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[dict[str, Any]]:
    if before is None:
        return []
    title = f"Retrieval over {before['pairs']:,} validation pairs"
    return [{"title": title, "definition": DEFINITION, "rows": paired_rows(before, after)}]


def _verdict(
    records: RunRecords, before: dict[str, Any] | None, after: dict[str, Any] | None
) -> str:
    if before is None:
        return "The untouched model has not been measured yet."
    untouched = f"{100 * mean_recall(before):.1f} %"
    last = records.epochs[-1]["epoch"]
    if after is None:
        why = "no epoch was better" if last else "nothing was trained"
        return f"Mean recall of the untouched model {untouched}; {why}."
    gain = 100 * (mean_recall(after) - mean_recall(before))
    best = next(e["epoch"] for e in reversed(records.epochs) if e["improved"])
    end = f"epoch {best} of {last}" + ("" if records.result else " so far")
    advice = "" if gain > 0 else " No gain over the untouched model."
    return (
        f"Mean recall {untouched} before, {100 * mean_recall(after):.1f} % after "
        f"({gain:+.1f} points) at {end}.{advice}"
    )
