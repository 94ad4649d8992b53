"""The charts of the pages, as data that ``assets/charts.js`` draws with Chart.js.

Chart.js is 210 KB. Plotly would add 4.8 MB to every page, and an ablation writes dozens of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from clipft.metrics.figures import DIRECTIONS, GENERAL_SET, RECALL_NAME, frontier_sentences

Json = Mapping[str, Any]
Interval = tuple[float, float] | None

_CATEGORIES = 20
"""Most bars in a chart. The JSON has all categories."""
_BAR_HEIGHT, _AXIS_HEIGHT, _LINE_HEIGHT, _LEGEND_HEIGHT = 18, 64, 17, 40  # pixels
_LABEL_LENGTH = 16
"""Characters after which charts.js breaks a bar's label into lines on a phone."""


@dataclass(frozen=True)
class Series:
    """One line, path, set of points or set of bars.

    ``points`` are (x, y) or (x, y, label). ``values`` are the values of bars, one for each of the
    chart's labels. ``color`` is the index of a color of the page, from 0.
    """

    name: str
    points: Sequence[Sequence[Any]] = ()
    values: Sequence[float | None] = ()
    intervals: Sequence[Interval] = ()
    color: int | None = None
    dash: int = 0


@dataclass(frozen=True)
class Chart:
    """A chart of a page. A path is a line that may turn back.

    ``percent`` and ``percent_x`` show shares of 1 as percentages; ``log`` scales the x axis;
    ``zero`` starts the axis of values at 0; ``note`` is shown below.
    """

    title: str
    kind: Literal["lines", "path", "points", "bars"]
    series: Sequence[Series]
    x: str = ""
    y: str = ""
    labels: Sequence[str] = ()
    percent: bool = False
    percent_x: bool = False
    log: bool = False
    zero: bool = True
    note: str = ""

    def data(self) -> dict[str, Any]:
        """Return the JSON values that charts.js reads."""
        return {key: value for key, value in asdict(self).items() if key not in {"title", "note"}}

    def description(self) -> str:
        """Describe the chart for screen readers, with the first and last value of each line."""

        def short(value: float | None) -> str:
            return "nothing" if value is None else f"{value:.4g}"

        parts = []
        for series in self.series:
            if series.points:
                first, last = short(series.points[0][1]), short(series.points[-1][1])
                parts.append(f"{series.name or 'value'} from {first} to {last}")
            else:
                parts.append(f"{len(series.values)} values")
        return f"{self.title}: {'; '.join(parts)}"

    def height(self) -> int | None:
        """Return the height in pixels that bars need; None for the height of the style sheet."""
        if self.kind != "bars":
            return None
        lines = sum(max(1, -(-len(label) // _LABEL_LENGTH)) for label in self.labels)
        bars = len(self.labels) * (10 + _BAR_HEIGHT * len(self.series))
        legend = _LEGEND_HEIGHT if len(self.series) > 1 else 0
        return _AXIS_HEIGHT + legend + max(bars, lines * _LINE_HEIGHT)


def run_charts(steps: Json, epochs: Json) -> list[Chart]:
    """Chart recall, loss, learning rate, throughput and waiting for data.

    ``steps`` and ``epochs`` are the curves in report.json. Returns no charts for a run without
    steps.
    """
    if not steps["step"]:
        return []
    charts = []
    if len(epochs["epoch"]) > 1:

        def recall(name: str, key: str, color: int, dash: int = 0) -> Series:
            return Series(name, _points(epochs, "epoch", key), color=color, dash=dash)

        lines = [recall(RECALL_NAME, "mean_recall", 0, 1)]
        for number, (direction, label) in enumerate(DIRECTIONS.items(), 1):
            lines.append(recall(f"{label} R@1", f"{direction}_r@1", number, 2))
            lines.append(recall(f"{label} R@10", f"{direction}_r@10", number))
        note = "Epoch 0 is the pretrained model."
        charts.append(Chart("Recall", "lines", lines, "epoch", "recall", percent=True, note=note))
    losses = [
        Series("training", _points(steps, "step", "loss"), color=1),
        Series("validation", _points(epochs, "step", "val_loss"), color=2),
    ]
    note = (
        "The validation loss compares all validation pairs at once and the training loss one "
        "batch, so compare their trends and not their values."
    )
    charts.append(Chart("Loss", "lines", losses, "step", "loss", zero=False, note=note))
    averaged = steps["averaged"]
    note = f"Each point is the mean of {averaged} steps." if averaged > 1 else ""
    for title, key, y in (
        ("Learning rate", "lr", "learning rate"),
        ("Throughput", "pairs_per_s", "pairs per second"),
        ("Waiting for data", "data_wait", "share of a step's time"),
    ):
        line = Series("", _points(steps, "step", key))
        percent = key == "data_wait"
        charts.append(Chart(title, "lines", [line], "step", y, percent=percent, note=note))
    return charts


def _points(curves: Json, x: str, y: str) -> list[tuple[float, float | None]]:
    return list(zip(curves[x], curves[y], strict=True))


def category_charts(categories: Sequence[Json]) -> list[Chart]:
    """Chart R@10 of the largest categories; returns no chart if the pairs have no labels."""
    largest = categories[:_CATEGORIES]
    if not largest:
        return []
    bars = []
    for kind, name, color in (("before", "pretrained", 0), ("after", "fine-tuned", 1)):
        figures = [category[kind] for category in largest]
        if any(figures):
            values = [figure["value"] if figure else None for figure in figures]
            bars.append(Series(name, values=values, intervals=_intervals(figures), color=color))
    note = "The lines are 95% intervals. The number of pairs is in brackets."
    if len(categories) > len(largest):
        note += f" {len(categories) - len(largest)} smaller categories are in the JSON."
    labels = [f"{category['name']} ({category['pairs']:,})" for category in largest]
    title = "Text → image R@10 by category"
    return [Chart(title, "bars", bars, y="R@10", labels=labels, percent=True, note=note)]


def interpolation_charts(found: Json | None) -> list[Chart]:
    """Chart the difference in mean recall between the pretrained and the fine-tuned weights.

    ``found`` is interpolation.json: ``points`` with ``alpha``, ``gain`` and ``keep``. If a general
    set was measured too, a second chart shows both differences against each other.
    """
    if not found or not found["points"]:
        return []
    points = found["points"]
    kept = [point for point in points if point["keep"]]
    gains = [(point["alpha"], point["gain"]) for point in points]
    general = [(point["alpha"], point["keep"]["change"]) for point in kept]
    lines = []
    for name, changes, color in (
        ("these pairs", gains, 1),
        (GENERAL_SET, general, 2),
    ):
        if changes:
            values = [(alpha, change["value"]) for alpha, change in changes]
            intervals = _intervals([change for _, change in changes])
            lines.append(Series(name, values, intervals=intervals, color=color))
    title, x = "Difference in mean recall by interpolation", "share of the fine-tuned weights"
    note = (
        "0 is the pretrained model and 1 the fine-tuned one. The largest gain without a clear "
        f"loss is at {found['best']:g}."
    )
    y = "difference to pretrained"
    charts = [Chart(title, "lines", lines, x, y, percent=True, note=note)]
    if kept:
        path = [
            [point["keep"]["change"]["value"], point["gain"]["value"], f"at {point['alpha']:g}"]
            for point in kept
        ]
        note = (
            "Each point is one share of the fine-tuned weights. Points further up and to the "
            "right are better."
        )
        title, x, y = "Both differences", f"difference, {GENERAL_SET}", "difference, these pairs"
        runs = found.get("runs")
        path_of = [Series("between both models" if runs else "", path)]
        if runs:
            ordered = sorted(runs, key=lambda run: run["preserve"])
            others = [
                [run["keep"]["change"]["value"], run["gain"]["value"], run["name"]]
                for run in ordered
            ]
            path_of.append(Series("other runs", others))
            note = " ".join([note, *frontier_sentences(runs)])
        charts.append(Chart(title, "path", path_of, x, y, percent=True, percent_x=True, note=note))
    return charts


def _intervals(figures: Sequence[Json | None]) -> list[Interval]:
    return [
        (figure["low"], figure["high"]) if figure and figure.get("low") is not None else None
        for figure in figures
    ]
