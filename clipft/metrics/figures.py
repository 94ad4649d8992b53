"""Figures before and after training as rows, shared by every table, page and logger.

A figure is ``{"value"}``, with ``low`` and ``high`` where it has an interval. A difference, which
the JSON calls ``change``, is also ``clear`` if its interval does not include 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from clipft.core.common import counted

DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}
"""The two directions of retrieval in their order: JSON key -> label."""
ALL_DIRECTIONS = {**DIRECTIONS, "image_to_image": "image → image"}
"""The two directions, and the one between photos of a product."""
PROTOCOLS = ("paired", "grouped", "graded", "photos")
"""The protocols of an evaluation in their order. ``graded`` is only there for pairs with grades,
and ``photos`` for products that have several."""
RECALLS = ("r@1", "r@5", "r@10")
NOTHING = "-"
"""Shown where there is no figure."""
RECALL_NAME = "mean recall"
MAIN_FIGURES = (
    "mean_recall",
    "text_to_image/r@1",
    "text_to_image/r@10",
    "text_to_image/median_rank",
    "image_to_text/r@1",
    "image_to_text/r@10",
)
"""Keys of the rows that every answer and every page shows first."""
GENERAL_SET = "general set"
"""What the pairs of ``evaluate --keep`` are called."""
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
    "tip_adapter": "Tip-Adapter",
    "zero_shot": "zero-shot",
}


def mean_recall(figures: Json) -> float:
    """Return the mean of R@1, R@5 and R@10 of both directions, in 0..1.

    ``figures`` are those of ``Retrieval.to_dict``.
    """
    values = [figures[direction][name] for direction in DIRECTIONS for name in RECALLS]
    return float(sum(values) / len(values))


def counted_pairs(evaluation: Json) -> str:
    """Say how many pairs an evaluation has, and how many captions and queries if these numbers
    differ.

    ``evaluation`` may also be what an epoch measured.
    """
    pairs, captions = evaluation["pairs"], evaluation.get("captions")
    shown = counted(pairs, "pair")
    if captions not in (None, pairs):
        shown += f", {counted(captions, 'caption')}"
    queries = evaluation.get("queries", pairs)
    return shown if queries == pairs else f"{shown}, {queries:,} of them as queries"


def before_and_after(metrics: Sequence[Json]) -> tuple[Json | None, Json | None]:
    """Return retrieval of the pretrained model and of the best epoch so far.

    ``metrics`` are the lines of metrics.jsonl. The first is None if nothing has been measured
    yet, the second if no epoch was better.
    """
    epochs = [line for line in metrics if line.get("kind") == "epoch"]
    pretrained = [epoch["retrieval"] for epoch in epochs if epoch["epoch"] == 0]
    improved = [epoch["retrieval"] for epoch in epochs if epoch["improved"]]
    return (pretrained or [None])[0], (improved or [None])[-1]


def main_rows(tables: Sequence[Json], general: Sequence[Json] | None = None) -> list[Json]:
    """Choose the rows that matter most from ``figure_tables``.

    ``general`` are the tables of a general set, of which mean recall is added.
    """
    found = {row["key"]: row for row in tables[0]["rows"]}
    rows = [found[key] for key in MAIN_FIGURES if key in found]
    if general:
        recall = general[0]["rows"][0]
        name = f"{RECALL_NAME}, {GENERAL_SET}"
        rows.append({**recall, "key": "general/mean_recall", "name": name})
    return rows


def verdict(recall: Json) -> str:
    """Say in a sentence what fine-tuning did; ``recall`` is the row of mean recall."""
    before, after, change = (recall[key] for key in ("before", "after", "change"))
    if not after:
        return f"Mean recall is {100 * before['value']:.1f}%."
    moved = f"from {100 * before['value']:.1f}% to {100 * after['value']:.1f}%"
    points = f"{100 * change['value']:+.1f} points"
    if change.get("low") is None:
        return f"Mean recall went {moved} ({points})."
    points += f", 95% interval {100 * change['low']:+.1f} to {100 * change['high']:+.1f}"
    if not change["clear"]:
        return f"No clear difference: mean recall went {moved} ({points})."
    if change["value"] > 0:
        return f"Fine-tuning helped: mean recall rose {moved} ({points})."
    return f"Fine-tuning hurt: mean recall fell {moved} ({points})."


def as_figure(spread: Json) -> dict[str, Any]:
    """Turn a mean over seeds, as an ablation has it, into a figure with its interval.

    If it is one of several differences to the same reference, it is ``clear`` only if it still is
    when their number is taken into account.
    """
    found = {"value": spread["mean"]}
    if spread["low"] is None:
        return found
    low, high = spread["low"], spread["high"]
    return {**found, "low": low, "high": high, "clear": spread.get("clear", low > 0 or high < 0)}


def figure_tables(metrics: Sequence[Json], evaluation: Json | None) -> list[dict[str, Any]]:
    """Return tables of figures, each with ``title``, ``definitions`` and ``rows``.

    They show ``evaluation`` (the content of evaluation.json) or, until there is one, what the
    epochs in ``metrics`` measured.
    """
    if evaluation:
        there = [protocol for protocol in PROTOCOLS if protocol in evaluation["before"]]
        tables = [_evaluated(evaluation, protocol) for protocol in there]
        return [*tables, _accuracies(evaluation)] if "classification" in evaluation else tables
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
    """The table of one of the ``PROTOCOLS`` of evaluation.json."""
    before, after, change = (evaluation[key] for key in ("before", "after", "difference"))
    rows = []
    prefix = "" if protocol == "paired" else f"{protocol}/"
    if protocol == "paired":
        recall = {"value": after["recall"]} if after else None
        old, difference = {"value": before["recall"]}, change["recall"] if after else None
        rows.append(_row("mean_recall", RECALL_NAME, old, recall, difference))
    for direction, label in directions_of(before[protocol]):
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
    title = f"{protocol.capitalize()} retrieval"
    if protocol == "photos":
        title = "Another photo of the same product"
    title += f", {protocol_size(before, protocol)}"
    return {"title": title, "definitions": words, "rows": rows}


CLASSIFIERS = {
    "zero_shot": "pretrained, same prompts",
    "linear": "pretrained, linear classifier",
    "tip_adapter": "pretrained, Tip-Adapter",
}
"""What the accuracy of a model that is trained on labels is compared with: JSON key -> label."""


def _accuracies(evaluation: Json) -> dict[str, Any]:
    """The table of accuracies: each row compares another classifier with the fine-tuned model."""
    found, definitions = evaluation["classification"], evaluation["definitions"]
    rows = [
        _row(
            f"classification/{name}/top1",
            CLASSIFIERS[name],
            figure,
            found["after"],
            found["difference"][name] if found["after"] else None,
        )
        for name, figure in found["before"].items()
    ]
    words = {**definitions["classification"], "interval": definitions["interval"]}
    return {"title": f"Accuracy, {accuracy_size(found)}", "definitions": words, "rows": rows}


def accuracy_size(classification: Json) -> str:
    """Say on how much accuracy was measured."""
    images, labels = classification["images"], classification["labels"]
    return f"{counted(images, 'image')} of {counted(labels, 'label')}"


def directions_of(protocol: Json) -> list[tuple[str, str]]:
    """The directions in which a protocol was measured, in their order, with their labels."""
    return [(key, label) for key, label in ALL_DIRECTIONS.items() if key in protocol]


def protocol_size(evaluation: Json, protocol: str) -> str:
    """Say on how much a protocol was measured."""
    if protocol == "paired":
        return counted_pairs(evaluation)
    if protocol == "photos":
        part = evaluation["photos"]["image_to_image"]
        return f"{part['queries']:,} of {counted(part['candidates'] + 1, 'image')}"
    part = evaluation[protocol]["text_to_image"]
    return f"{counted(part['queries'], 'caption')}, {counted(part['candidates'], 'image')}"


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


def frontier_sentences(runs: Sequence[Json]) -> list[str]:
    """Say of each run which points between the two models it dominates, and which dominate it.

    ``runs`` are those of interpolation.json.
    """

    def listed(alphas: Sequence[float]) -> str:
        named = [f"{alpha:g}" for alpha in alphas]
        return f"alpha {', '.join(named)}" if named else "no alpha"

    return [
        f"{run['name']} dominates {listed(run['dominates'])}; "
        f"{listed(run['dominated_by'])} dominates it."
        for run in runs
    ]
