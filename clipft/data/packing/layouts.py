"""Recognizes the usual layouts of data sets: the names of splits, and the tables that hold the
captions of the images beside them.

====================== ===========================================================================
Split                  a folder (``train/``, ``validation/``, ``val2017/``), or the beginning of a
                       file's name (``test-00000-of-00001.parquet``)
Hugging Face           ``metadata.csv``, ``.jsonl`` or ``.parquet`` beside the images; Parquet files
                       that hold the images; folders that ``save_to_disk`` of datasets wrote
COCO                   ``captions_val2017.json``, and Karpathy's ``dataset_coco.json``
Flickr8k, Flickr30k    ``results.csv``, ``captions.txt``, ``results_20130124.token``
====================== ===========================================================================
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from clipft.core.errors import DataError
from clipft.core.text import NotText, read_text
from clipft.data.captions.lines import join_lines
from clipft.data.images.formats import IMAGE_SUFFIXES
from clipft.data.packing.options import PackOptions
from clipft.data.packing.records import Candidate, Listing
from clipft.data.packing.rows.arrow import saved_split
from clipft.data.packing.tables import list_table
from clipft.data.shards.splits import SPLIT_NAMES, split_named, split_of, split_of_file
from clipft.data.shards.tar import ByteRange

_TABLE = re.compile(
    rf"(metadata|results|captions|({'|'.join(SPLIT_NAMES)})([-_.].*)?)\.(csv|tsv|jsonl|parquet)",
    re.IGNORECASE,
)
_COCO = re.compile(r"(captions|dataset)(?!_info\.|_dict\.)(_\w+)?\.json", re.IGNORECASE)
_FLICKR = re.compile(r"captions\.txt|.*\.token(\.txt)?", re.IGNORECASE)


def is_layout(name: str) -> bool:
    """Return whether a file with this name usually has the captions of the images beside it."""
    return any(pattern.fullmatch(name) for pattern in (_TABLE, _COCO, _FLICKR))


@dataclass(frozen=True)
class Photos:
    """The image files of a source, ``paths`` below ``root``."""

    root: Path
    paths: list[str]
    _splits: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        found = defaultdict[str, list[str]](list)
        for path in self.paths:
            found[path.rpartition("/")[2]].append(path)
        return found

    def find(self, table: Path, name: str, split: str) -> str | None:
        """Return the path of the image that a table calls ``name``, or None.

        ``name`` is relative to the table, or anywhere in the source if only one image fits.
        """
        direct = str(table.parent / name)
        fitting = self._by_name.get(PurePath(name).name, [])
        if direct in fitting:
            return direct
        below = [path for path in fitting if PurePath(path).is_relative_to(table.parent)]
        for places in (fitting, below, [p for p in fitting if self.split_of(p) == split]):
            if len(places) == 1:
                return places[0]
        return None

    def split_of(self, path: str) -> str:
        """Return the split that the folders of an image name, or ""."""
        folder = path.rpartition("/")[0]  # cached, because many images share a folder
        if folder not in self._splits:
            place = PurePath(path)
            within = place.is_relative_to(self.root)
            self._splits[folder] = split_of(place.relative_to(self.root)) if within else ""
        return self._splits[folder]


def list_layout(table: Path, options: PackOptions, images: Path, photos: Photos) -> Listing:
    """List the pairs of a file for which ``is_layout`` is true.

    Raises:
        DataError: The file cannot be read, or its content does not match its name.
        UsageError: It lacks a column.
        OSError: The disk is full, or refuses to write.
    """
    split = split_of_file(table.relative_to(photos.root)) or split_named(saved_split(table))
    if _COCO.fullmatch(table.name):
        listing = _list_coco(table, photos, split)
    elif _FLICKR.fullmatch(table.name):
        listing = _list_lines(table, photos, split)
    else:
        listing = list_table(table, options, images)
        listing.candidates = [_located(c, table, photos, split) for c in listing.candidates]
        if table.stem.lower() in {"results", "captions"}:
            listing.candidates = list(_merged(listing.candidates))
    return listing


def _located(candidate: Candidate, table: Path, photos: Photos, split: str) -> Candidate:
    """Return a row of a table with the image and the split that it has in this source."""
    image = candidate.image
    if not isinstance(image, ByteRange):
        return replace(candidate, split=candidate.split or split)
    name = PurePath(image.path)
    if name.is_relative_to(table.parent):
        name = name.relative_to(table.parent)
    path = photos.find(table, str(name), split) or image.path
    own = candidate.split or split or photos.split_of(path)
    where = candidate.where if path == image.path else path
    return replace(candidate, image=ByteRange(path), where=where, split=own)


def _merged(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """Merge the rows of one image into a pair with several captions."""
    rows = defaultdict[tuple[object, str], list[Candidate]](list)
    for candidate in candidates:
        rows[candidate.image, candidate.split].append(candidate)
    for same in rows.values():
        captions = [row.caption.decode() for row in same if isinstance(row.caption, bytes)]
        metadata = same[0].metadata if len(same) == 1 else _common(same)
        yield replace(same[0], caption=join_lines(captions), metadata=metadata)


def _common(rows: Iterable[Candidate]) -> bytes | None:
    """Return the metadata that all rows of an image have in common."""
    first, *others = (json.loads(r.metadata) if isinstance(r.metadata, bytes) else {} for r in rows)
    shared = {k: v for k, v in first.items() if all(other.get(k, ...) == v for other in others)}
    return json.dumps(shared, ensure_ascii=False).encode("utf-8", "replace") if shared else None


def _list_coco(table: Path, photos: Photos, split: str) -> Listing:
    """List the images of COCO's caption annotations, or of one of Karpathy's splits."""
    try:
        content = json.loads(table.read_bytes())
        images: list[dict[str, Any]] = content["images"]
        captions = defaultdict[Any, list[str]](list)
        for annotation in content.get("annotations", ()):
            captions[annotation["image_id"]].append(str(annotation["caption"]))
        rows = [(*_coco_names(image), image, captions.get(image.get("id"))) for image in images]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{table} does not have captions in COCO's format: {error!r}",
            "correct it, or name the table with the captions",
        ) from error
    listing = Listing()
    for name, own_split, image, found in rows:
        said = found or [str(s.get("raw", "")) for s in image.get("sentences", ())]
        rest = {k: v for k, v in image.items() if isinstance(v, str | int | float)}
        listing.candidates.append(_candidate(table, photos, name, said, own_split or split, rest))
    return listing


def _coco_names(image: dict[str, Any]) -> tuple[str, str]:
    """Return the path and the split of an image in COCO's or in Karpathy's JSON."""
    name = image.get("file_name") or image["filename"]
    folder = image.get("filepath", "")
    return f"{folder}/{name}".lstrip("/"), split_named(str(image.get("split", "")))


def _candidate(
    table: Path,
    photos: Photos,
    name: str,
    captions: list[str],
    split: str,
    metadata: dict[str, Any] | None = None,
) -> Candidate:
    path = photos.find(table, name, split) or str(table.parent / name)
    text = json.dumps(metadata, ensure_ascii=False).encode("utf-8", "replace")
    return Candidate(
        name=PurePath(name).stem,
        where=path,
        image=ByteRange(path),
        caption=join_lines(captions),
        metadata=text if metadata else None,
        split=split or photos.split_of(path),
    )


def _list_lines(table: Path, photos: Photos, split: str) -> Listing:
    """List the images of Flickr8k's and Flickr30k's files, which have a line for each caption:
    ``1000.jpg#0<tab>A dog runs`` or ``1000.jpg,A dog runs``."""
    captions = defaultdict[str, list[str]](list)
    try:
        lines = read_text(table).split("\n")
        for name, caption in _parse_lines(lines, table.name.lower() != "captions.txt"):
            captions[name].append(caption)
    except (OSError, NotText) as error:
        hint = "correct the error, or save the file again as UTF-8"
        raise DataError(f"cannot read {table}: {error}", hint) from error
    listing = Listing()
    for name, said in captions.items():
        if PurePath(name).suffix[1:].lower() in IMAGE_SUFFIXES:  # the first line may be a header
            listing.candidates.append(_candidate(table, photos, name, said, split))
    return listing


def _parse_lines(lines: Iterable[str], tabs: bool) -> Iterator[tuple[str, str]]:
    """Yield the image and the caption of each line."""
    for line in lines:
        name, _, caption = line.rstrip("\r").partition("\t" if tabs else ",")
        if tabs:
            name = name.partition("#")[0]
        elif len(caption) > 1 and caption[0] == caption[-1] == '"':
            # Quotes end with the line, so that an unmatched quote does not swallow the next lines
            caption = caption[1:-1].replace('""', '"')
        yield name, caption
