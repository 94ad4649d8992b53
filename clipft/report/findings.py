"""Judges an inspection: whether the data can be trained on, what is wrong, and what to do."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from clipft.core.common import counted

Json = Mapping[str, Any]

SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
_FEW = {"train": 300, "val": 100, "test": 100}
"""Pairs that a split needs for reliable results."""
_CLEAR_LIMIT, _MANY_SMALL, _MANY_CUT = 0.95, 0.1, 0.01
"""Limits for a finding: an upper bound of R@1 below the first; a share of small images and a share
of truncated captions above the others."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with the data, and what to do about it.

    ``prevents`` is true if training would stop because of it. ``section`` is the title of the
    section of the page that shows the pairs, or "".
    """

    text: str
    advice: str
    prevents: bool = False
    section: str = ""


def findings(
    splits: Mapping[str, Json], leaks: Mapping[str, Json], max_bad: float
) -> list[Finding]:
    """Return the findings of an inspection, the worst first.

    Args:
        splits: name -> ``SplitFacts`` as a dict.
        leaks: title -> ``Leak`` as a dict.
        max_bad: the setting: the share of unreadable pairs that a run tolerates.
    """
    found = [*_split_of(splits)]
    for name, split in splits.items():
        found += _unusable(name, split, max_bad)
        found += _few(name, split)
    for title, leak in leaks.items():
        found += _leaked(title, leak)
    for name, split in splits.items():
        found += _captions(name, split)
        found += _images(name, split)
    return sorted(found, key=lambda finding: not finding.prevents)


def verdict(found: list[Finding], splits: Mapping[str, Json]) -> str:
    """Say in a sentence whether the data can be trained on."""
    stops = [finding for finding in found if finding.prevents]
    if stops:
        return f"This data cannot be trained on yet: {stops[0].text}."
    pairs = [
        f"{counted(split['usable'], f'{SPLIT_NAMES.get(name, name)} pair')}"
        for name, split in splits.items()
    ]
    words = f"This data can be trained on: {', '.join(pairs)}"
    if not found:
        return f"{words}, and nothing wrong was found."
    return f"{words}. {counted(len(found), 'thing')} to look at first."


def _split_of(splits: Mapping[str, Json]) -> Iterator[Finding]:
    missing = [name for name in ("train", "val") if name not in splits]
    if not missing:
        return
    names = " and no ".join(SPLIT_NAMES[name] for name in missing)
    yield Finding(
        f"there are no {names} pairs", "`clipft pack` splits a data set into both.", prevents=True
    )


def _unusable(name: str, split: Json, max_bad: float) -> Iterator[Finding]:
    """Yield a finding about pairs that cannot be used, counted as in a run."""
    bad, pairs, kind = split["pairs"] - split["usable"], split["pairs"], SPLIT_NAMES.get(name, name)
    section = f"Broken in {name}"
    if not split["usable"]:
        yield Finding(f"no {kind} pair can be used", "Repair them.", True, section)
    elif bad > max(1.0, max_bad * pairs) and name in SPLIT_NAMES:
        yield Finding(
            f"{bad:,} of {counted(pairs, f'{kind} pair')} cannot be used, and --max-bad allows "
            f"{max_bad:.2g} of them",
            "Repair them or leave them out, or raise `--max-bad`.",
            name != "test",
            section,
        )
    elif bad:
        yield Finding(
            f"{bad:,} of {counted(pairs, f'{kind} pair')} cannot be used",
            "Training skips them. Repair them if they matter.",
            section=section,
        )
    others = sum(split["no_pairs"].values())
    if others:
        yield Finding(
            f"{counted(others, 'file')} in {name} {'is' if others == 1 else 'are'} not part of a "
            "pair",
            "Each image needs a caption under the same name.",
            section=f"Files in {name} that are not pairs",
        )
    if split["bad_metadata"]:
        yield Finding(
            f"the metadata of {counted(len(split['bad_metadata']), f'{kind} pair')} cannot be read",
            "They count as pairs without metadata.",
        )


def _few(name: str, split: Json) -> Iterator[Finding]:
    usable = split["usable"]
    if not 0 < usable < _FEW.get(name, 0):
        return
    if name == "train":
        yield Finding(
            f"there {'is' if usable == 1 else 'are'} only {counted(usable, 'training pair')}",
            "Expect a small gain, and add pairs if you can.",
        )
        return
    # Half of the 95% interval of a share, where it is widest
    reach = 98 / usable**0.5
    yield Finding(
        f"there {'is' if usable == 1 else 'are'} only "
        f"{counted(usable, f'{SPLIT_NAMES[name]} pair')}",
        f"Intervals of R@K will reach up to {reach:.0f} points to either side.",
    )


def _leaked(title: str, leak: Json) -> Iterator[Finding]:
    images, captions = leak["same_photo"] + leak["near_photo"], leak["same_caption"]
    if not images and not captions:
        return
    parts = [f"{images:,} by their image"] if images else []
    parts += [f"{captions:,} by their caption"] if captions else []
    advice = (
        "These pairs make figures look better than they are. `clipft pack` keeps them in one "
        "split, unless its source is split already."
    )
    yield Finding(f"{title[0].lower()}{title[1:]}: {', '.join(parts)}", advice, section=title)


def _captions(name: str, split: Json) -> Iterator[Finding]:
    cut, kind = split["captions_cut"], SPLIT_NAMES.get(name, name)
    if cut > _MANY_CUT * split["captions"]:
        yield Finding(
            f"{counted(cut, f'{kind} caption')} {'is' if cut == 1 else 'are'} longer than the "
            f"model reads and {'loses' if cut == 1 else 'lose'} {split['tokens_lost']:.0%} of "
            f"{'its' if cut == 1 else 'their'} tokens",
            "Put what matters first, or shorten captions with `--caption`.",
        )
    html = split["captions_with_html"]["pairs"]
    if html:
        yield Finding(
            f"the captions of {counted(html, f'{kind} pair')} have HTML",
            "The model reads tags as words. Remove them.",
        )
    broken = split["captions_with_broken_characters"]["pairs"]
    if broken:
        yield Finding(
            f"the captions of {counted(broken, f'{kind} pair')} have broken characters",
            "Their encoding is wrong. Convert the source to UTF-8.",
        )
    bound = min(figures.get("r@1", 1.0) for figures in split["ceiling"].values())
    if name != "train" and split["usable"] and bound < _CLEAR_LIMIT:
        yield Finding(
            f"equal captions or images limit paired R@1 of {kind} to {100 * bound:.1f}%",
            "Compare grouped figures, or tell the pairs apart with `--caption`.",
            section=f"Duplicates in {name}",
        )


def _images(name: str, split: Json) -> Iterator[Finding]:
    small, kind = split["smaller_than_model"], SPLIT_NAMES.get(name, name)
    if small > _MANY_SMALL * split["usable"]:
        yield Finding(
            f"{counted(small, f'{kind} image')} {'is' if small == 1 else 'are'} smaller than the "
            "model's input",
            "They are enlarged. Use larger originals if you have them.",
            section=f"Smaller than the model's input in {name}",
        )
