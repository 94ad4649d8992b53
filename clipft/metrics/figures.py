"""Figures before and after as rows: the same for every table, page and tracker.

A figure is ``{"value"}``, with ``low`` and ``high`` where it has an interval; a change is
``clear`` where 0 is outside of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from clipft.core.common import counted

DIRECTIONS = (("text → image", "text_to_image"), ("image → text", "image_to_text"))
RECALLS = ("r@1", "r@5", "r@10")
NOTHING = "-"
"""Stands where there is no figure."""
RECALL_NAME = "mean recall"
RECALL_DEFINITION = "Mean recall: mean of R@1, R@5, R@10 of both directions"

_DEFINITION = (
    "A query's own partner is the right answer. R@K: share of queries with it among the first "
    "K; MRR: mean of 1 / rank; equal scores rank by position."
)
Json = Mapping[str, Any]
Unit = Literal["percent", "decimal", "rank"]

_PROTOCOLS = (("paired", "Paired retrieval"), ("grouped", "Grouped retrieval"))
_UNITS: dict[str, Unit] = {
    **dict.fromkeys(("median_rank", "mean_rank"), "rank"),
    **dict.fromkeys(("mrr", "map", "ndcg@10", "r_precision"), "decimal"),
}
_NAMES = {"mrr": "MRR", "map": "mAP", "ndcg@10": "nDCG@10", "r_precision": "R-precision"}


def mean_recall(figures: Json) -> float:
    """Of ``Retrieval.to_dict``: mean R@1/5/10 of both directions, in 0..1."""
    values = [figures[direction][name] for _, direction in DIRECTIONS for name in RECALLS]
    return float(sum(values) / len(values))


def before_and_after(metrics: Sequence[Json]) -> tuple[Json | None, Json | None]:
    """Retrieval of the untouched model and of the best epoch so far, from the lines of
    metrics.jsonl; None: not measured yet, or no epoch was better."""
    epochs = [line for line in metrics if line.get("kind") == "epoch"]
    untouched = [epoch["retrieval"] for epoch in epochs if epoch["epoch"] == 0]
    improved = [epoch["retrieval"] for epoch in epochs if epoch["improved"]]
    return (untouched or [None])[0], (improved or [None])[-1]


def figure_tables(metrics: Sequence[Json], evaluation: Json | None) -> list[dict[str, Any]]:
    """Title, definitions and rows: of ``evaluation.json``, or as long as there is none of the
    epochs."""
    if evaluation:
        return [_evaluated(evaluation, *protocol) for protocol in _PROTOCOLS]
    before, after = before_and_after(metrics)
    if before is None:
        return []
    title = f"Paired retrieval, {counted(before['pairs'], 'pair')}"
    rows = _short_rows(before, after)
    return [{"title": title, "definitions": {"figures": _DEFINITION}, "rows": rows}]


def _short_rows(before: Json, after: Json | None) -> list[dict[str, Any]]:
    """Of ``Retrieval.to_dict``, the mean first."""

    def row(key: str, name: str, old: float, new: float | None) -> dict[str, Any]:
        change = None if new is None else {"value": new - old}
        tuned = None if new is None else {"value": new}
        return _row(key, name, {"value": old}, tuned, change)

    recall = mean_recall(after) if after else None
    rows = [row("mean_recall", RECALL_NAME, mean_recall(before), recall)]
    for label, direction in DIRECTIONS:
        for name in (*RECALLS, "median_rank", "mrr"):
            then = after[direction][name] if after else None
            shown_name = f"{label} {figure_name(name)}"
            rows.append(row(f"{direction}/{name}", shown_name, before[direction][name], then))
    return rows


def _evaluated(evaluation: Json, protocol: str, title: str) -> dict[str, Any]:
    before, after, change = (evaluation[key] for key in ("before", "after", "difference"))
    definitions = evaluation.get("definitions") or before["definitions"]
    paired = protocol == "paired"
    rows = []
    if paired:
        recall = {"value": after["recall"]} if after else None
        old = {"value": before["recall"]}
        row = _row("mean_recall", RECALL_NAME, old, recall, change["recall"] if after else None)
        rows.append(row)
    for label, direction in DIRECTIONS:
        part = before[protocol][direction]
        for name, figure in part["figures"].items():
            row = _row(
                f"{direction}/{name}" if paired else f"grouped/{direction}/{name}",
                f"{label} {figure_name(name)}",
                figure,
                after[protocol][direction]["figures"][name] if after else None,
                change[protocol][direction][name] if after else None,
            )
            rows.append({**row, "ceiling": part.get("ceiling", {}).get(name)})
    size = counted(before["pairs"], "pair") if paired else _grouped_size(before)
    shared = {name: definitions[name] for name in ("ties", "interval")}
    words = {**definitions[protocol], **shared}
    return {"title": f"{title}, {size}", "definitions": words, "rows": rows}


def _grouped_size(before: Json) -> str:
    part = before["grouped"]["text_to_image"]
    return f"{counted(part['queries'], 'caption')}, {counted(part['candidates'], 'photo')}"


def _row(
    key: str, name: str, before: Json, after: Json | None, change: Json | None
) -> dict[str, Any]:
    return {
        "key": key,
        "name": name,
        "unit": _UNITS.get(key.rsplit("/", 1)[-1], "percent"),
        "before": dict(before),
        "after": dict(after) if after else None,
        "change": dict(change) if change else None,
        "ceiling": None,
    }


def figure_name(name: str) -> str:
    """As people write it: R@10, mAP, median rank."""
    plain = name[0].upper() + name[1:] if "@" in name else name
    return _NAMES.get(name) or plain.replace("_", " ")


def shown(value: float | None, unit: Unit) -> str:
    if value is None:
        return NOTHING
    return f"{_number(value, unit)} %" if unit == "percent" else _number(value, unit)


def shown_change(value: float | None, unit: Unit) -> str:
    """With its sign; shares in percentage points."""
    return NOTHING if value is None else _number(value, unit, "+")


def shown_interval(figure: Json | None, unit: Unit) -> str:
    """Its ends; "" where it has none."""
    if not figure or figure.get("low") is None:
        return ""
    return f"{_number(figure['low'], unit)} to {_number(figure['high'], unit)}"


def _number(value: float, unit: Unit, sign: str = "") -> str:
    if unit == "decimal":
        return f"{value:{sign}.3f}"
    return f"{100 * value if unit == 'percent' else value:{sign}.1f}"


def shown_bytes(count: float | None) -> str:
    return f"{count / 2**30:.2f} GiB" if count else NOTHING
