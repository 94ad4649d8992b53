"""Figures before and after training as rows, shared by every table, page and logger.

A figure is ``{"value"}``, with ``low`` and ``high`` where it has an interval. A change is also
``clear`` if its interval does not include 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from clipft.core.common import counted

DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}
"""The two directions of retrieval in their order: JSON key -> label."""
RECALLS = ("r@1", "r@5", "r@10")
NOTHING = "-"
"""Shown where there is no figure."""
RECALL_NAME = "mean recall"
RECALL_DEFINITION = "Mean recall: mean of R@1, R@5, R@10 of both directions"

_DEFINITION = (
    "Only a query's own partner is right. R@K: share of queries with it among the first K; "
    "MRR: mean of 1 / rank; equal scores rank by position."
)
Json = Mapping[str, Any]
Unit = Literal["percent", "decimal", "rank"]

_UNITS: dict[str, Unit] = {
    **dict.fromkeys(("median_rank", "mean_rank"), "rank"),
    **dict.fromkeys(("mrr", "map", "ndcg@10", "r_precision"), "decimal"),
}
_NAMES = {
    "mrr": "MRR",
    "map": "mAP",
    "ndcg@10": "nDCG@10",
    "r_precision": "R-precision",
    "ceiling": "upper bound",
}


def mean_recall(figures: Json) -> float:
    """Return the mean of R@1, R@5 and R@10 of both directions, in 0..1.

    ``figures`` are those of ``Retrieval.to_dict``.
    """
    values = [figures[direction][name] for direction in DIRECTIONS for name in RECALLS]
    return float(sum(values) / len(values))


def counted_pairs(evaluation: Json) -> str:
    """Say how many pairs an evaluation has, and how many captions if that is another number."""
    pairs, captions = evaluation["pairs"], evaluation.get("captions")
    shown = counted(pairs, "pair")
    return f"{shown}, {counted(captions, 'caption')}" if captions not in (None, pairs) else shown


def before_and_after(metrics: Sequence[Json]) -> tuple[Json | None, Json | None]:
    """Return retrieval of the pretrained model and of the best epoch so far.

    ``metrics`` are the lines of metrics.jsonl. The first is None if nothing has been measured
    yet, the second if no epoch was better.
    """
    epochs = [line for line in metrics if line.get("kind") == "epoch"]
    pretrained = [epoch["retrieval"] for epoch in epochs if epoch["epoch"] == 0]
    improved = [epoch["retrieval"] for epoch in epochs if epoch["improved"]]
    return (pretrained or [None])[0], (improved or [None])[-1]


def figure_tables(metrics: Sequence[Json], evaluation: Json | None) -> list[dict[str, Any]]:
    """Return tables of figures, each with ``title``, ``definitions`` and ``rows``.

    They show ``evaluation`` (the content of evaluation.json) or, until there is one, what the
    epochs in ``metrics`` measured.
    """
    if evaluation:
        return [_evaluated(evaluation, "paired"), _evaluated(evaluation, "grouped")]
    before, after = before_and_after(metrics)
    if before is None:
        return []

    def row(key: str, name: str, old: float, new: float | None) -> dict[str, Any]:
        if new is None:
            return _row(key, name, {"value": old}, None, None)
        return _row(key, name, {"value": old}, {"value": new}, {"value": new - old})

    recall = mean_recall(after) if after else None
    rows = [row("mean_recall", RECALL_NAME, mean_recall(before), recall)]
    for direction, label in DIRECTIONS.items():
        for name in (*RECALLS, "median_rank", "mrr"):
            old, new = before[direction][name], after[direction][name] if after else None
            rows.append(row(f"{direction}/{name}", f"{label} {figure_name(name)}", old, new))
    title = f"Paired retrieval, {counted(before['pairs'], 'pair')}"
    return [{"title": title, "definitions": {"figures": _DEFINITION}, "rows": rows}]


def _evaluated(evaluation: Json, protocol: str) -> dict[str, Any]:
    """The table of one protocol, ``paired`` or ``grouped``, of evaluation.json."""
    before, after, change = (evaluation[key] for key in ("before", "after", "difference"))
    rows = []
    if protocol == "paired":
        size, prefix = counted_pairs(before), ""
        recall = {"value": after["recall"]} if after else None
        old, difference = {"value": before["recall"]}, change["recall"] if after else None
        rows.append(_row("mean_recall", RECALL_NAME, old, recall, difference))
    else:
        part, prefix = before["grouped"]["text_to_image"], "grouped/"
        size = f"{counted(part['queries'], 'caption')}, {counted(part['candidates'], 'image')}"
    for direction, label in DIRECTIONS.items():
        part = before[protocol][direction]
        for name, figure in part["figures"].items():
            row = _row(
                f"{prefix}{direction}/{name}",
                f"{label} {figure_name(name)}",
                figure,
                after[protocol][direction]["figures"][name] if after else None,
                change[protocol][direction][name] if after else None,
            )
            rows.append({**row, "ceiling": part.get("ceiling", {}).get(name)})
    definitions = evaluation.get("definitions") or before["definitions"]
    words = {**definitions[protocol], **{name: definitions[name] for name in ("ties", "interval")}}
    title = f"{protocol.capitalize()} retrieval, {size}"
    return {"title": title, "definitions": words, "rows": rows}


def _row(
    key: str, name: str, before: Json, after: Json | None, change: Json | None
) -> dict[str, Any]:
    return {
        "key": key,
        "name": name,
        "unit": unit_of(key.rsplit("/", 1)[-1]),
        "before": dict(before),
        "after": dict(after) if after else None,
        "change": dict(change) if change else None,
        "ceiling": None,
    }


def unit_of(name: str) -> Unit:
    """Return how the figure ``name`` is shown: as a percentage, a decimal or a rank."""
    return _UNITS.get(name, "percent")


def figure_name(name: str) -> str:
    """Return the name as people write it: R@10, mAP, median rank."""
    plain = name[0].upper() + name[1:] if "@" in name else name
    return _NAMES.get(name) or plain.replace("_", " ")


def number(value: float | None, unit: Unit, sign: str = "") -> str:
    """Format a figure without its unit; ``sign="+"`` shows the sign of a change.

    Percentages and ranks have one decimal, shares of 1 have three.
    """
    if value is None:
        return NOTHING
    if unit == "decimal":
        return f"{value:{sign}.3f}"
    return f"{100 * value if unit == 'percent' else value:{sign}.1f}"


def shown_bytes(count: float | None) -> str:
    """Format bytes as GiB."""
    return f"{count / 2**30:.2f} GiB" if count else NOTHING
