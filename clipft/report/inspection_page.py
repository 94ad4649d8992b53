"""Renders the page of ``clipft inspect``: the content of a catalogue, and its problems."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipft.report.findings import Finding
from clipft.report.html import PageImage, PageTable, anchor, render

MOST = 60
"""Most thumbnails in a page."""
_IN_GROUP = 6
_ROWS = 50
_LABELS = 12
"""Most labels in a histogram. The table has more."""
# The JSON of `inspect` has used "photo" since its first version
_SHARED = {
    "photo": "same image",
    "near photo": "near-duplicate image",
    "caption": "same caption",
}

Splits = Mapping[str, Mapping[str, Any]]
Groups = Sequence[tuple[str, Sequence[PageImage]]]


@dataclass(frozen=True)
class Inspected:
    """The results of an inspection.

    Attributes:
        title: Heading of the page.
        verdict: Whether the data can be trained on.
        findings: The problems, the worst first.
        tables: All figures.
        splits: Name -> ``SplitFacts`` as a dict.
        leaks: Title -> ``Leak`` as a dict.
        samples: Name of a split -> places of some of its pairs.
        image_size: Pixels of a side of the model's input.
        context: The model's context length in tokens.
    """

    title: str
    verdict: str
    findings: Sequence[Finding]
    tables: Sequence[PageTable]
    splits: Splits
    leaks: Splits
    samples: Mapping[str, Sequence[str]]
    image_size: int
    context: int


@dataclass(frozen=True)
class Histogram:
    """Ranges or labels with their counts. ``share`` is the length of a bar in percent."""

    title: str
    note: str
    rows: Sequence[tuple[str, int, float]]


def findings_page(found: Inspected, read_image: Callable[[str], PageImage]) -> str:
    """Render the page, which contains no script.

    ``read_image`` reads the image of a pair by its place, and is called at most ``MOST`` times.
    """
    galleries = _galleries(found, read_image)
    lists = _lists(found.splits)
    shown = {*galleries, *(table.title for table in lists)}
    return render(
        "inspection.html",
        heading=found.title,
        found=found,
        stopped=any(finding.prevents for finding in found.findings),
        findings=[
            (finding, anchor(finding.section) if finding.section in shown else "")
            for finding in found.findings
        ],
        histograms={name: _histograms(name, found) for name in found.splits},
        galleries=galleries,
        lists=lists,
    )


def _lists(splits: Splits) -> list[PageTable]:
    """Return tables of the pairs that cannot be used, of other files, and of the labels."""
    tables = []
    for name, split in splits.items():
        broken = [[b["pair"], b["reason"]] for b in (*split["broken"], *split["bad_captions"])]
        no_pairs = [[reason, f"{count:,}"] for reason, count in split["no_pairs"].items()]
        counts = split["categories"].get("counts", {})
        labels = [[label, f"{count:,}"] for label, count in counts.items()]
        for title, column, rows in (
            (f"Broken in {name}", "reason", broken),
            (f"Files in {name} that are not pairs", "files", no_pairs),
            (f"Labels in {name}", "pairs", labels),
        ):
            if rows:
                tables.append(PageTable(title, [column], rows[:_ROWS], heading=True))
    return tables


def _histograms(name: str, found: Inspected) -> list[Histogram]:
    split = found.splits[name]

    def drawn(title: str, note: str, counts: Sequence[tuple[str, int]]) -> Histogram:
        most = max(count for _, count in counts)
        return Histogram(title, note, [(label, n, 100 * n / most) for label, n in counts])

    def ranges(counts: Sequence[Sequence[int]]) -> list[tuple[str, int]]:
        return [(f"{a:,}" if a == b else f"{a:,} to {b:,}", n) for a, b, n in counts]

    shown = []
    if split["shorter_side_counts"]:
        note = f"The model's input has {found.image_size} pixels a side."
        title = "Shorter side of the images in pixels"
        shown.append(drawn(title, note, ranges(split["shorter_side_counts"])))
    if split["caption_token_counts"]:
        note = f"The model reads {found.context} tokens."
        title = "Length of the captions in tokens"
        shown.append(drawn(title, note, ranges(split["caption_token_counts"])))
    counts = split["categories"].get("counts", {})
    if counts:
        more = len(counts) - _LABELS
        note = f"{more:,} rarer labels are in the table below." if more > 0 else ""
        title = f"Labels ({split['categories']['field']})"
        shown.append(drawn(title, note, [*counts.items()][:_LABELS]))
    return shown


def _galleries(found: Inspected, read_image: Callable[[str], PageImage]) -> dict[str, Groups]:
    """Return galleries by title: groups of images, each with a remark on what they have in common.

    Each gallery gets an equal share of ``MOST`` images. Each group in it shows up to ``_IN_GROUP``
    images, while there is room.
    """
    wanted: dict[str, list[tuple[str, Sequence[str]]]] = {}
    for title, leak in found.leaks.items():
        wanted[title] = [
            (_shared(m["shares"].split(", ")), [m["pair"], m["other"]]) for m in leak["matches"]
        ]
    for name, split in found.splits.items():
        wanted[f"Duplicates in {name}"] = [
            (f"{group['size']:,} pairs, {_shared(group['shares'])}", group["pairs"])
            for group in split["duplicates"]
        ]
        if split["smallest"]:
            title = f"Smaller than the model's input in {name}"
            wanted[title] = [("smallest first", split["smallest"])]
    for name, places in found.samples.items():
        wanted[f"Samples of {name}"] = [("", places)] if places else []
    wanted = {title: groups for title, groups in wanted.items() if groups}
    galleries: dict[str, Groups] = {}
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
