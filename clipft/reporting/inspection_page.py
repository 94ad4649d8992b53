"""Findings about a catalogue as one HTML file that needs no network and runs no script."""

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from clipft.files import replacing

SIDE = 96
"""Thumbnails fit in a square of so many pixels; the file stays small enough to be mailed."""

MOST = 60
"""More thumbnails are not in a page."""

_IN_GROUP = 6
_LISTED = 50
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1a; --faint: #66645e; --line: #d9d6cf;
  --ground: #fbfaf7; --card: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e9e7e1; --faint: #a19e95; --line: #3b3a36; --ground: #191917; --card: #242421; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } .lists { display: flex; flex-wrap: wrap; gap: 0 4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; font-weight: normal; }
th:first-child, td:first-child { text-align: left; }
thead th, figcaption, .remark { color: var(--faint); font-size: .85rem; }
.remark { margin: 1rem 0 .35rem; }
.group { display: flex; flex-wrap: wrap; gap: .5rem; }
figure { margin: 0; width: 8.5rem; padding: .5rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .4rem; }
figure img { display: block; margin: 0 auto .35rem; max-width: 100%; }
figcaption { line-height: 1.3; } figcaption b { color: var(--ink); font-weight: 600; }
""".strip()


@dataclass(frozen=True)
class PageTable:
    """``rows`` hold a label and a cell for each of ``columns``."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    place: str
    caption: str
    jpeg: bytes


@dataclass(frozen=True)
class Gallery:
    """Groups of pictures, each with a remark of what they have in common."""

    title: str
    groups: Sequence[tuple[str, Sequence[Picture]]]


def thumbnail(image: Image.Image) -> bytes:
    """A small JPEG of an upright RGB picture, which is made small itself."""
    buffer = io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def findings_page(
    heading: str,
    tables: Sequence[PageTable],
    splits: Mapping[str, Mapping[str, Any]],
    leaks: Mapping[str, Mapping[str, Any]],
    picture: Callable[[str], Picture],
) -> str:
    """The page of what ``SplitFacts.to_dict`` (by split) and ``Leak.to_dict`` (by title) hold;
    ``picture`` fetches a pair's by its place, ``MOST`` times at most."""
    wrong = [table for name, split in splits.items() for table in _wrong(name, split)]
    labels = [table for name, split in splits.items() for table in _labels(name, split)]
    wanted = {title: groups for title, groups in _wanted(splits, leaks).items() if groups}
    share = MOST // max(1, len(wanted))
    galleries = [
        Gallery(title, _fetched(groups, share, picture)) for title, groups in wanted.items()
    ]
    return inspection_page(heading, [*tables, *wrong], galleries, labels)


def _wrong(name: str, split: Mapping[str, Any]) -> list[PageTable]:
    broken = [[b["pair"], b["reason"]] for b in (*split["broken"], *split["bad_captions"])]
    no_pairs = [[reason, f"{count:,}"] for reason, count in split["no_pairs"].items()]
    found = (
        (f"Broken in {name}", "why", broken),
        (f"Members of {name} that are no pairs", "members", no_pairs),
    )
    return [PageTable(title, [column], rows[:_LISTED]) for title, column, rows in found if rows]


def _labels(name: str, split: Mapping[str, Any]) -> list[PageTable]:
    counts = split["categories"].get("counts", {})
    rows = [[label, f"{count:,}"] for label, count in counts.items()]
    return [PageTable(f"Labels in {name}", ["pairs"], rows[:_LISTED])] if rows else []


def _wanted(
    splits: Mapping[str, Mapping[str, Any]], leaks: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[tuple[str, list[str]]]]:
    """By gallery: groups of a remark and the places of pairs."""
    wanted = {
        title: [(_shared(m["shares"]), [m["pair"], m["other"]]) for m in found["matches"]]
        for title, found in leaks.items()
    }
    for name, split in splits.items():
        wanted[f"Duplicates in {name}"] = [
            (f"{group['size']:,} pairs, {_shared(', '.join(group['shares']))}", group["pairs"])
            for group in split["duplicates"]
        ]
        small = split["smallest"]
        wanted[f"Smaller than the model's input in {name}"] = (
            [("smallest first", small)] if small else []
        )
    return wanted


def _shared(names: str) -> str:
    return f"same {names}".replace("same near photo", "near-identical photo")


def _fetched(
    groups: Sequence[tuple[str, list[str]]], most: int, picture: Callable[[str], Picture]
) -> list[tuple[str, list[Picture]]]:
    """Whole groups, of ``_IN_GROUP`` pictures at most, while there is room."""
    fetched = []
    for remark, places in groups:
        shown = places[: min(_IN_GROUP, most)]
        most -= len(shown)
        if not shown or most < 0:
            break
        fetched.append((remark, [picture(place) for place in shown]))
    return fetched


def inspection_page(
    heading: str,
    tables: Iterable[PageTable],
    galleries: Iterable[Gallery],
    lists: Iterable[PageTable] = (),
) -> str:
    """The whole page, ``lists`` beside each other at its end; every string is shown as it is,
    markup in it included."""
    parts = [*map(_table, tables), *(_gallery(gallery) for gallery in galleries if gallery.groups)]
    parts += ['<div class="lists">\n', *map(_table, lists), "</div>\n"]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(heading)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        f"<h1>{escape(heading)}</h1>\n{''.join(parts)}</body>\n</html>\n"
    )


def _table(table: PageTable) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>\n"
        for label, *cells in table.rows
    )
    return (
        f'<section><h2>{escape(table.title)}</h2>\n<div class="wide"><table>\n'
        f"<thead><tr><th></th>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div></section>\n"
    )


def _gallery(gallery: Gallery) -> str:
    groups = "".join(
        f'<p class="remark">{escape(remark)}</p>\n'
        f'<div class="group">\n{"".join(map(_figure, pictures))}</div>\n'
        for remark, pictures in gallery.groups
    )
    return f"<h2>{escape(gallery.title)}</h2>\n{groups}"


def _figure(picture: Picture) -> str:
    source = f"data:image/jpeg;base64,{base64.b64encode(picture.jpeg).decode()}"
    return (
        f'<figure><img src="{source}" alt=""><figcaption><b>{escape(picture.place)}</b><br>'
        f"{escape(picture.caption)}</figcaption></figure>\n"
    )


def write_page(path: Path, page: str) -> None:
    """Write all of the page or nothing; a former one is replaced at once.

    Raises:
        StorageError: it cannot be written there.
    """
    with replacing(path) as temporary:
        # A file name in a tar may hold bytes that are no UTF-8
        temporary.write_text(page, encoding="utf-8", errors="replace")
