"""Figures before and after as rows: the same for every table and page."""

from collections.abc import Mapping, Sequence
from typing import Any

DIRECTIONS = (("text → image", "text_to_image"), ("image → text", "image_to_text"))
RECALLS = ("r@1", "r@5", "r@10")
DEFINITION = (
    "A query's own partner is the right answer. R@K: share of queries with it among the first "
    "K; MRR: mean of 1 / rank; equal scores rank by position."
)
NOTHING = "-"
"""Stands where there is no figure."""
RECALL_NAME = "mean recall"
RECALL_DEFINITION = "Mean recall: mean of R@1, R@5, R@10 of both directions"


def mean_recall(figures: Mapping[str, Any]) -> float:
    """Mean R@1/5/10 of both directions, in 0..1."""
    values = [figures[direction][name] for _, direction in DIRECTIONS for name in RECALLS]
    return float(sum(values) / len(values))


def before_and_after(
    metrics: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Retrieval of the untouched model and of the best epoch so far, from the lines of
    metrics.jsonl; None: not measured yet, or no epoch was better."""
    epochs = [line for line in metrics if line.get("kind") == "epoch"]
    untouched = [epoch["retrieval"] for epoch in epochs if epoch["epoch"] == 0]
    improved = [epoch["retrieval"] for epoch in epochs if epoch["improved"]]
    return (untouched or [None])[0], (improved or [None])[-1]


def paired_rows(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Name, percent, before, after of every figure of ``Retrieval.to_dict``, the mean first."""
    recalls = (mean_recall(before), mean_recall(after) if after else None)
    rows = [{"key": "mean_recall", **_row(RECALL_NAME, True, *recalls)}]
    for label, direction in DIRECTIONS:
        for name in (*RECALLS, "median_rank", "mrr"):
            then = after[direction][name] if after else None
            shown = name.replace("r@", "R@").replace("_", " ").replace("mrr", "MRR")
            row = _row(f"{label} {shown}", name in RECALLS, before[direction][name], then)
            rows.append({"key": f"{direction}/{name}", **row})
    return rows


def _row(name: str, percent: bool, before: float, after: float | None) -> dict[str, Any]:
    change = None if after is None else after - before
    return {"name": name, "percent": percent, "before": before, "after": after, "change": change}


def shown(value: float | None, percent: bool) -> str:
    if value is None:
        return NOTHING
    return f"{100 * value:.1f} %" if percent else f"{value:.3g}"


def shown_change(value: float | None, percent: bool) -> str:
    """With its sign; shares in percentage points."""
    if value is None:
        return NOTHING
    return f"{100 * value:+.1f}" if percent else f"{value:+.3g}"


def shown_interval(interval: tuple[float, float] | None, percent: bool) -> str:
    if not interval:
        return ""
    low, high = (f"{100 * end:.1f}" if percent else f"{end:.3g}" for end in interval)
    return f"{low} to {high}"


def shown_bytes(count: float | None) -> str:
    return f"{count / 2**30:.2f} GiB" if count else NOTHING
