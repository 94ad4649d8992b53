"""Decides by the names of files or tar members which ones form a pair, and which are skipped.

``chair.jpg`` and ``chair.txt`` share the name up to the last dot, so they are a pair. WebDataset's
key ends at the first dot, so ``0001.image.jpg`` and ``0001.caption.txt`` are one sample as well.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from clipft.data.images.formats import IMAGE_SUFFIXES

T = TypeVar("T")

CAPTION_SUFFIX = "txt"
METADATA_SUFFIX = "json"
TABLE_SUFFIXES = ("csv", "tsv", "jsonl", "parquet")
FIELDS = ("image", "caption", "metadata")
SPLITS = ("train", "val", "test")
"""The folders of a data set. ``test`` is used neither for training nor for choosing anything."""

# Parts between dots that can be WebDataset's names of fields, unlike those in "sofa 1.5m.jpg" and
# "v1.02.jpg".
_WORDS = re.compile(r"[^\W\d][\w-]*(\.[^\W\d][\w-]*)*")


class FileName(NamedTuple):
    """A parsed name: ``key`` is the name up to the last dot, ``sample`` the key of WebDataset, and
    ``kind`` one of ``FIELDS``."""

    key: str
    sample: str
    kind: str


def is_hidden(name: str) -> bool:
    """Return whether a file is hidden and skipped, such as the ``._...`` files that macOS adds."""
    return name.startswith(".") or name == "__MACOSX"


def tars_in(folder: Path) -> list[Path]:
    """Return the shards of a folder, sorted by name; empty if the folder does not exist."""
    return sorted(path for path in folder.glob("*.tar") if not is_hidden(path.name))


def parse_name(name: str) -> FileName | None:
    """Parse the name of a file or member.

    Returns None for files that belong to no pair: hidden files and those with other suffixes.
    """
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.rpartition(".")
    if not stem or file.startswith("."):
        return None
    suffix = suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        kind = "image"
    elif suffix in (CAPTION_SUFFIX, METADATA_SUFFIX):
        kind = "caption" if suffix == CAPTION_SUFFIX else "metadata"
    else:
        return None
    first, dot, words = stem.partition(".")
    sample = first if dot and _WORDS.fullmatch(words) else stem
    if not folder:
        return FileName(stem, sample, kind)
    if "./" in f"{folder}/" or "//" in folder:
        folder = str(PurePosixPath(folder))  # ./a.jpg and a.txt are one pair
        if folder == ".":
            return FileName(stem, sample, kind)
    return FileName(f"{folder}/{stem}", f"{folder}/{sample}", kind)


def is_pair(kinds: Collection[str]) -> bool:
    """Return whether these kinds of files form a pair: an image with a caption or metadata."""
    return "image" in kinds and ("caption" in kinds or "metadata" in kinds)


def pair_up(
    sample: str, files: Mapping[str, Mapping[str, T]]
) -> Iterator[tuple[str, Mapping[str, T], str]]:
    """Decide which files of one sample form a pair.

    Args:
        sample: The WebDataset key of the files.
        files: For each name up to the last dot, the files by kind.

    Yields:
        A key, its files, and a reason why they are no pair, which is empty if they are one.
    """
    pairs = [key for key, parts in files.items() if is_pair(parts)]
    if len(files) == 1 or len(pairs) > 1:
        for key, parts in files.items():
            yield key, parts, _missing(parts)
        return
    counts = Counter(kind for parts in files.values() for kind in parts)
    key, own = (pairs[0], files[pairs[0]]) if pairs else (sample, {})
    # A kind of file that occurs once completes the pair; of two images, neither is chosen
    for parts in files.values():
        own = {**{kind: part for kind, part in parts.items() if counts[kind] == 1}, **own}
    several = [kind for kind in ("image", "caption") if counts[kind] > 1 and kind not in own]
    if several:
        names = [name for name, parts in files.items() if several[0] in parts]
        endings = ", ".join(name[len(sample) + 1 :] or "no name" for name in names)
        yield sample, own, f"several {several[0]} files with one key ({endings})"
        return
    yield key, own, _missing(own)
    for name, parts in files.items():
        for kind in parts if name != key else ():
            if counts[kind] > 1:
                yield name, {}, f"a second {kind} with the same key"


def _missing(parts: Collection[str]) -> str:
    if is_pair(parts):
        return ""
    return "no caption" if "image" in parts else "no image"
