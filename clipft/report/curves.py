"""The lines of metrics.jsonl as curves, of a bounded number of points."""

from collections.abc import Mapping, Sequence
from typing import Any

from clipft.metrics.figures import DIRECTIONS, RECALL_NAME, mean_recall
from clipft.report.charts import Chart, Interval, Series

_POINTS = 500

Record = Mapping[str, Any]


def step_curves(steps: Sequence[Record]) -> dict[str, Any]:
    """Lists of equal length; of many steps the means of ``averaged`` at a time."""
    size = max(1, -(-len(steps) // _POINTS))
    parts = [steps[at : at + size] for at in range(0, len(steps), size)]
    return {
        "averaged": size,
        "step": [part[-1]["step"] for part in parts],
        "loss": [_mean(part, "loss") for part in parts],
        "lr": [_mean(part, "lr") for part in parts],
        "pairs_per_s": [_ratio(part, "pairs", "seconds") for part in parts],
        "data_wait": [_ratio(part, "data_seconds", "seconds") for part in parts],
    }


def epoch_curves(epochs: Sequence[Record]) -> dict[str, Any]:
    """Lists of equal length, the untouched model (epoch 0) first."""
    curves: dict[str, Any] = {
        name: [epoch[name] for epoch in epochs]
        for name in ("epoch", "step", "train_loss", "val_loss")
    }
    curves["mean_recall"] = [mean_recall(epoch["retrieval"]) for epoch in epochs]
    for direction in DIRECTIONS:
        for name in ("r@1", "r@10"):
            values = [epoch["retrieval"][direction][name] for epoch in epochs]
            curves[f"{direction}_{name}"] = values
    return curves


def run_charts(steps: Mapping[str, Any], epochs: Mapping[str, Any]) -> list[Chart]:
    """Recall, loss, learning rate, throughput and waiting; none of a run without steps."""
    if not steps["step"]:
        return []
    averaged = steps["averaged"]
    note = f"Each point is the mean of {averaged} steps." if averaged > 1 else ""
    apart = (
        "Validation loss is over all validation pairs at once, training loss over one "
        "batch: look at the course of each, not at their distance."
    )
    validation = Series("validation", _points(epochs["step"], epochs["val_loss"]), colour=2)
    training = Series("training", _points(steps["step"], steps["loss"]), colour=1)
    return [
        *([_recall_chart(epochs)] if len(epochs["epoch"]) > 1 else []),
        Chart("Loss", "lines", [training, validation], "step", "loss", zero=False, note=apart),
        _line("Learning rate", steps, "lr", "learning rate", note),
        _line("Throughput", steps, "pairs_per_s", "pairs per second", note),
        _line("Waiting for data", steps, "data_wait", "share of a step's time", note, True),
    ]


def _recall_chart(epochs: Mapping[str, Any]) -> Chart:
    def series(name: str, key: str, colour: int, dash: int = 0) -> Series:
        return Series(name, _points(epochs["epoch"], epochs[key]), colour=colour, dash=dash)

    lines = [series(RECALL_NAME, "mean_recall", 0, 1)]
    for number, (direction, label) in enumerate(DIRECTIONS.items(), 1):
        lines.append(series(f"{label} R@1", f"{direction}_r@1", number, 2))
        lines.append(series(f"{label} R@10", f"{direction}_r@10", number))
    note = "Epoch 0 is the untouched model."
    return Chart("Recall", "lines", lines, "epoch", "recall", percent=True, note=note)


def _line(
    title: str, steps: Mapping[str, Any], key: str, y: str, note: str, percent: bool = False
) -> Chart:
    series = Series("", _points(steps["step"], steps[key]))
    return Chart(title, "lines", [series], "step", y, percent=percent, note=note)


def _points(x: Sequence[float], y: Sequence[float | None]) -> list[tuple[float, float | None]]:
    return list(zip(x, y, strict=True))


def _mean(part: Sequence[Record], name: str) -> float | None:
    values = [record[name] for record in part if record.get(name) is not None]
    return sum(values) / len(values) if values else None


def _ratio(part: Sequence[Record], over: str, under: str) -> float:
    return float(sum(r[over] for r in part) / max(1e-9, sum(r[under] for r in part)))


_CATEGORIES = 20

Json = Mapping[str, Any]


def category_charts(categories: Sequence[Json]) -> list[Chart]:
    """R@10 of the largest categories; none where the pairs have no labels."""
    largest = categories[:_CATEGORIES]
    if not largest:
        return []
    bars = []
    for kind, name, colour in (("before", "untouched", 0), ("after", "tuned", 1)):
        figures = [category[kind] for category in largest]
        if any(figures):
            values = [figure["value"] if figure else None for figure in figures]
            bars.append(Series(name, values=values, intervals=_ends(figures), colour=colour))
    more = len(categories) - len(largest)
    note = "Lines: 95 % intervals; in brackets the pairs."
    if more:
        note += f" {more} smaller categories are in the JSON."
    labels = [f"{category['name']} ({category['pairs']:,})" for category in largest]
    title = "Text → image R@10 by category"
    return [Chart(title, "bars", bars, y="R@10", labels=labels, percent=True, note=note)]


def interpolation_charts(found: Json | None) -> list[Chart]:
    """Gain over the weights' way, and against what is kept on general pairs where measured.

    ``found`` is interpolation.json: ``points`` with ``alpha``, ``gain`` and ``keep``.
    """
    if not found or not found["points"]:
        return []
    points = found["points"]
    kept = [point for point in points if point["keep"]]
    courses = [_course("on these pairs", [(p["alpha"], p["gain"]) for p in points], 1)]
    if kept:
        general = [(p["alpha"], p["keep"]["change"]) for p in kept]
        courses.append(_course("on the general pairs", general, 2))
    note = f"0: untouched, 1: tuned; the most gain without a clear loss at {found['best']:g}."
    charts = [
        Chart(
            "Change in mean recall along the way",
            *("lines", courses, "share of the tuned weights", "change in mean recall"),
            percent=True,
            note=note,
        )
    ]
    if kept:
        way = [
            [p["keep"]["change"]["value"], p["gain"]["value"], f"at {p['alpha']:g}"] for p in kept
        ]
        charts.append(
            Chart(
                "Gain against kept ability",
                *("path", [Series("", way)], "change on the general pairs", "gain"),
                percent=True,
                percent_x=True,
                note="Each point is a share of the tuned weights; up and to the right is better.",
            )
        )
    return charts


def _course(name: str, points: Sequence[tuple[float, Json]], colour: int) -> Series:
    values = [(alpha, change["value"]) for alpha, change in points]
    return Series(name, values, intervals=_ends([c for _, c in points]), colour=colour)


def _ends(figures: Sequence[Json | None]) -> list[Interval]:
    return [
        (figure["low"], figure["high"]) if figure and figure.get("low") is not None else None
        for figure in figures
    ]
