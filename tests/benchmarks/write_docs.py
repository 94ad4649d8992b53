"""Write the generated tables of the documentation.

The tables in docs/benchmarks.md and README.md are made from the JSON files of the benchmarks, and
the table in docs/guides/evaluate.md from the definitions in the code. A table is between
``<!-- NAME -->`` and ``<!-- end -->``, where NAME is the name of its file.

    python tests/benchmarks/write_docs.py
"""

import json
import re
from pathlib import Path
from typing import Any

from clipft.metrics.classification import CLASSIFICATION
from clipft.metrics.definitions import DEFINITIONS

DOCS = Path(__file__).parents[2] / "docs"
_MARKED = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.DOTALL)

_DEFINITIONS = re.compile(r"<!-- definitions -->\n.*?<!-- end definitions -->", re.DOTALL)

_SUMMARY = re.compile(r"<!-- summary -->\n.*?<!-- end summary -->", re.DOTALL)
_SUMMARIZED = (
    (
        "p1_training",
        "exact, sentence-transformers' cached loss",
        "training with the exact loss, against sentence-transformers' cached loss",
    ),
    (
        "p2_frozen",
        "linear_probe, transformers' Trainer",
        "`linear_probe`, against transformers' Trainer",
    ),
    (
        "p3",
        "packed --size 256, transformers' way",
        "reading packed shards, against webdataset with transformers' processor",
    ),
)
"""The file, row and task of each figure in the README."""

Rows = list[dict[str, Any]]


def written(text: str) -> str:
    """Return ``text`` with the tables from the JSON files."""

    def table(found: "re.Match[str]") -> str:
        name = found.group(1)
        file = DOCS / "benchmarks" / f"{name}.json"
        if not file.exists() and found.group(0).count("\n") == 1:
            return found.group(0)  # nothing has been measured yet
        figures = json.loads(file.read_text(encoding="utf-8"))
        machine = figures["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in figures["versions"].items())
        lines = _table(figures["rows"])
        gpu = f", {machine['gpu']}" if "gpu" in machine else ""
        where = f"{figures['date']}, {machine['cores']} cores ({machine['cpu']}){gpu}; {versions}."
        return "\n".join([f"<!-- {name} -->", *lines, "", where, "<!-- end -->"])

    return _MARKED.sub(table, text)


def _table(rows: Rows) -> list[str]:
    columns = _speeds if "ratio" in rows[0] else _plain
    cells = [columns(row) for row in rows]
    head = list(cells[0])
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    return lines + [_line(list(row.values())) for row in cells]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _speeds(row: dict[str, Any]) -> dict[str, str]:
    goal = f"{row['goal']:g}x{'' if row['met'] else ', missed'}" if row["goal"] else ""
    return {
        "samples/s": row["name"],
        "ours": _speed(row["ours"]),
        "peer": _speed(row["peer"]),
        "ratio": f"{row['ratio']:.2f}x",
        "spread": f"{row['spread'][0]:.2f}..{row['spread'][1]:.2f}",
        "goal": goal,
    }


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _plain(row: dict[str, Any]) -> dict[str, str]:
    return {name.replace("_", " "): _shown(value) for name, value in row.items()}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6f}" if 0.99 < value < 1 else _speed(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def defined(text: str) -> str:
    """Return ``text`` with the definitions of the figures from the code."""
    groups = {
        "paired": DEFINITIONS["paired"],
        "grouped": DEFINITIONS["grouped"],
        "graded": DEFINITIONS["graded"],
        "photos": DEFINITIONS["photos"],
        "classification": CLASSIFICATION,
    }
    rows = [
        [group, f"`{name}`", words]
        for group, named in groups.items()
        for name, words in named.items()
        if name != "protocol"
    ]
    lines = [_line(["", "figure", "definition"]), _line(["---"] * 3), *map(_line, rows)]
    table = "\n".join(["<!-- definitions -->", *lines, "<!-- end definitions -->"])
    return _DEFINITIONS.sub(lambda found: table, text)


def summarised(text: str) -> str:
    """Return ``text`` with the figures of ``_SUMMARIZED``."""
    rows = [["", "ratio", "spread"], ["---", "---:", "---:"]]
    for stem, name, task in _SUMMARIZED:
        figures = json.loads((DOCS / "benchmarks" / f"{stem}.json").read_text(encoding="utf-8"))
        row = next(row for row in figures["rows"] if row["name"] == name)
        low, high = row["spread"]
        rows.append([task, f"{row['ratio']:.2f}x", f"{low:.2f}..{high:.2f}"])
    table = "\n".join(["<!-- summary -->", *map(_line, rows), "<!-- end summary -->"])
    return _SUMMARY.sub(lambda found: table, text)


if __name__ == "__main__":
    for name, make in (("benchmarks", written), ("guides/evaluate", defined)):
        page = DOCS / f"{name}.md"
        page.write_text(make(page.read_text(encoding="utf-8")), encoding="utf-8")
    readme = DOCS.parent / "README.md"
    readme.write_text(summarised(readme.read_text(encoding="utf-8")), encoding="utf-8")
