"""The page of ``clipft inspect``: what is in a catalogue and what is wrong with it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clipft.report.html import PageImage, PageTable, render

MOST = 60
"""Thumbnails in a page."""
_IN_GROUP = 6
_ROWS = 50
# The JSON of `inspect` has said "photo" since its first version
_SHARED = {
    "photo": "same image",
    "near photo": "near-duplicate image",
    "caption": "same caption",
}

Splits = Mapping[str, Mapping[str, Any]]


def findings_page(
    heading: str,
    tables: Sequence[PageTable],
    splits: Splits,
    leaks: Splits,
    read_image: Callable[[str], PageImage],
) -> str:
    """Render the page, which runs no script.

    Args:
        heading: heading of the page.
        tables: shown first.
        splits: name -> ``SplitFacts`` as a dict.
        leaks: title -> ``Leak`` as a dict.
        read_image: reads the image of a pair by its place; called ``MOST`` times at most.
    """
    problems = list(tables)
    labels: list[PageTable] = []
    for name, split in splits.items():
        broken = [[b["pair"], b["reason"]] for b in (*split["broken"], *split["bad_captions"])]
        no_pairs = [[reason, f"{count:,}"] for reason, count in split["no_pairs"].items()]
        counts = split["categories"].get("counts", {})
        label_rows = [[label, f"{count:,}"] for label, count in counts.items()]
        for shown, title, column, rows in (
            (problems, f"Broken in {name}", "reason", broken),
            (problems, f"Members of {name} that are not pairs", "members", no_pairs),
            (labels, f"Labels in {name}", "pairs", label_rows),
        ):
            if rows:
                shown.append(PageTable(title, [column], rows[:_ROWS], heading=True))
    return render(
        "inspection.html",
        heading=heading,
        tables=problems,
        galleries=_galleries(splits, leaks, read_image),
        lists=labels,
    )


def _galleries(
    splits: Splits, leaks: Splits, read_image: Callable[[str], PageImage]
) -> dict[str, list[tuple[str, list[PageImage]]]]:
    """Title -> groups of images, each with a remark on what they have in common.

    The galleries get equal shares of ``MOST`` images, and groups are shown whole, up to
    ``_IN_GROUP`` images, while there is room.
    """
    wanted: dict[str, list[tuple[str, list[str]]]] = {}
    for title, found in leaks.items():
        wanted[title] = [
            (_shared(m["shares"].split(", ")), [m["pair"], m["other"]]) for m in found["matches"]
        ]
    for name, split in splits.items():
        wanted[f"Duplicates in {name}"] = [
            (f"{group['size']:,} pairs, {_shared(group['shares'])}", group["pairs"])
            for group in split["duplicates"]
        ]
        if split["smallest"]:
            title = f"Smaller than the model's input in {name}"
            wanted[title] = [("smallest first", split["smallest"])]
    wanted = {title: groups for title, groups in wanted.items() if groups}
    galleries = {}
    for title, groups in wanted.items():
        room = MOST // len(wanted)
        shown = []
        for remark, places in groups:
            places = places[: min(_IN_GROUP, room)]
            if not places:
                break
            room -= len(places)
            shown.append((remark, [read_image(place) for place in places]))
        if shown:
            galleries[title] = shown
    return galleries


def _shared(names: Sequence[str]) -> str:
    """Describe what pairs have in common."""
    return ", ".join(_SHARED[name] for name in names)
