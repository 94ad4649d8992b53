"""Charts for a page, drawn by Chart.js, whose script the page carries.

Chart.js and not Plotly: 210 KB instead of 4.8 MB in every page of an ablation of dozens of runs.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, Literal

from clipft.report.html import asset

Interval = tuple[float, float] | None

_BAR, _AXIS, _LINE = 18, 64, 17
_LABEL = 16
"""Characters in a line of a label, where the page is narrow."""


@dataclass(frozen=True)
class Series:
    """``points`` (x, y) or (x, y, label) of lines; ``values`` of bars, one for each of the
    chart's labels. ``colour`` is the number of the page's colours, from 0."""

    name: str
    points: Sequence[Sequence[Any]] = ()
    values: Sequence[float | None] = ()
    intervals: Sequence[Interval] = ()
    colour: int | None = None
    dash: int = 0

    def ends(self) -> str:
        """First and last value in words."""
        if not self.points:
            return f"{len(self.values)} values"
        first, last = self.points[0][1], self.points[-1][1]
        return f"{self.name or 'value'} from {_short(first)} to {_short(last)}"


@dataclass(frozen=True)
class Chart:
    """A path is a line that may turn back. ``percent``: shares of 1 are shown as percent.
    ``zero``: the axis of values starts at 0."""

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


def chart_figures(charts: Sequence[Chart], start: int = 0) -> str:
    """The charts beside each other; ``start`` numbers the first, unlike any other of the page."""
    if not charts:
        return ""
    figures = "".join(_figure(chart, f"chart-{at}") for at, chart in enumerate(charts, start))
    return f'<div class="charts">\n{figures}</div>\n'


def chart_scripts() -> str:
    """What a page with charts ends with."""
    library = re.sub(r"\n//# sourceMappingURL=.*", "", asset("chart.umd.min.js"))
    return "".join(f"<script>\n{text}</script>\n" for text in (library, asset("charts.js")))


def data_script(content: Any, attributes: str) -> str:
    """JSON within a page; ``<`` is spelled so that no text in it can end the element."""
    text = json.dumps(content, ensure_ascii=True).replace("<", "\\u003c")
    return f'<script type="application/json" {attributes}>{text}</script>\n'


def _figure(chart: Chart, name: str) -> str:
    words = f"{chart.title}: " + "; ".join(series.ends() for series in chart.series)
    content = {key: value for key, value in asdict(chart).items() if key not in {"title", "note"}}
    height = f' style="height: {_height(chart)}px"' if chart.kind == "bars" else ""
    note = f'<p class="remark">{escape(chart.note)}</p>\n' if chart.note else ""
    data = data_script(content, f'class="chart-data" data-canvas="{name}"')
    return (
        f'<figure class="chart"><figcaption><b>{escape(chart.title)}</b></figcaption>\n'
        f'<div class="canvas"{height}><canvas id="{name}" role="img" aria-label="{escape(words)}">'
        f"</canvas></div>\n{note}{data}</figure>\n"
    )


def _height(chart: Chart) -> int:
    lines = sum(max(1, -(-len(label) // _LABEL)) for label in chart.labels)
    bars = len(chart.labels) * (10 + _BAR * len(chart.series))
    return _AXIS + 40 * (len(chart.series) > 1) + max(bars, lines * _LINE)


def _short(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.4g}"
