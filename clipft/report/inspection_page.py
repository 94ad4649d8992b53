"""Findings about a catalogue as one page, which runs no script."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipft.report.html import PageTable, Picture, document, group, paragraph, section, table

MOST = 60
"""More thumbnails are not in a page."""

_IN_GROUP = 6
_LISTED = 50


@dataclass(frozen=True)
class Gallery:
    """Groups of pictures, each with a remark of what they have in common."""

    title: str
    groups: Sequence[tuple[str, Sequence[Picture]]]


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
    return [_titled(title, column, rows) for title, column, rows in found if rows]


def _labels(name: str, split: Mapping[str, Any]) -> list[PageTable]:
    counts = split["categories"].get("counts", {})
    rows = [[label, f"{count:,}"] for label, count in counts.items()]
    return [_titled(f"Labels in {name}", "pairs", rows)] if rows else []


def _titled(title: str, column: str, rows: Sequence[Sequence[str]]) -> PageTable:
    return PageTable(title, [column], rows[:_LISTED], heading=True)


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
    """The whole page, ``lists`` beside each other at its end."""
    shown = [gallery for gallery in galleries if gallery.groups]
    parts = [*map(table, tables), *map(_gallery, shown)]
    return document(heading, [*parts, '<div class="lists">\n', *map(table, lists), "</div>\n"])


def _gallery(gallery: Gallery) -> str:
    groups = (paragraph(remark, "remark") + group(found) for remark, found in gallery.groups)
    return section(gallery.title, *groups)
