"""What there is to pack: the pairs of a folder of raw files, or of a table that names them.

Folder: ``chair.jpg`` with ``chair.txt`` (and ``chair.json`` where there is one) is a pair.
Table (CSV, TSV, JSONL): a column with the picture's path, relative to the table's folder,
one with the caption; the other columns become the pair's metadata.
"""

import csv
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from clipft.data.captions import BadCaption, clean_caption
from clipft.data.images import BadImage, decode_image
from clipft.data.pack_options import PackOptions
from clipft.data.shard_index import CAPTION_SUFFIX, IMAGE_SUFFIXES, METADATA_SUFFIX
from clipft.errors import DataError, UsageError

TABLES = {".csv": ",", ".tsv": "\t", ".jsonl": None}
IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "path", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "text", "title", "description", "name")


@dataclass(frozen=True)
class RawPair:
    """One pair: the picture's file, its words, and what identifies both.

    ``photo`` is the SHA-256 of the picture's bytes, ``words`` the tidied caption without
    case, ``group`` the value of the metadata's group field, "" where there is none.
    """

    image: Path
    caption: bytes
    metadata: bytes | None
    photo: str
    words: str
    group: str


@dataclass(frozen=True)
class _Candidate:
    """A picture that has words; files are not read yet."""

    image: Path
    caption: Path | str
    metadata: Path | dict[str, Any] | None


@dataclass
class Scan:
    """The pairs found, and what could not be used as ``{"file", "reason"}``."""

    pairs: list[RawPair] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def skip(self, path: Path, reason: str) -> None:
        self.skipped.append({"file": str(path), "reason": reason})


def scan(source: Path, options: PackOptions, threads: Executor) -> Scan:
    """All pairs of a folder in the order of their paths, or of a table in its own.

    Raises:
        DataError: neither a folder nor a table that can be read.
        UsageError: the table has no such column.
    """
    found = Scan()
    if source.is_dir():
        candidates = list(_folder_candidates(source, found))
    else:
        candidates = list(_table_candidates(source, options, found))
    checks = threads.map(lambda candidate: _read(candidate, options), candidates)
    for candidate, pair in zip(candidates, checks, strict=True):
        if isinstance(pair, str):
            found.skip(candidate.image, pair)
        else:
            found.pairs.append(pair)
    return found


def _folder_candidates(folder: Path, found: Scan) -> Iterator[_Candidate]:
    stems: dict[Path, dict[str, Path]] = {}
    for path in _files(folder, found):
        suffix = path.suffix.removeprefix(".").lower()
        kind = "image" if suffix in IMAGE_SUFFIXES else suffix
        if kind not in {"image", CAPTION_SUFFIX, METADATA_SUFFIX}:
            continue
        members = stems.setdefault(path.with_suffix(""), {})
        if kind in members:
            found.skip(path, f"a second {kind} of one name")
        else:
            members[kind] = path
    for members in stems.values():
        image, caption = members.get("image"), members.get(CAPTION_SUFFIX)
        if image and caption:
            yield _Candidate(image, caption, members.get(METADATA_SUFFIX))
        elif image or caption:
            found.skip(*((image, "no caption") if image else (members[CAPTION_SUFFIX], "no image")))


def _files(folder: Path, found: Scan) -> Iterator[Path]:
    """Regular files, sorted; links are followed only to places inside the folder."""
    root = folder.resolve()
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(place) / name
            if name.startswith("."):
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                found.skip(path, "a link out of the folder")
            elif not path.exists() or not stat.S_ISREG(path.stat().st_mode):
                found.skip(path, "not a regular file")
            else:
                yield path


def _table_candidates(table: Path, options: PackOptions, found: Scan) -> Iterator[_Candidate]:
    rows = _rows(table)
    if not rows:
        return
    image_column = _column(options.image_column, IMAGE_COLUMNS, rows, table, "--image-column")
    caption_column = _column(
        options.caption_column, CAPTION_COLUMNS, rows, table, "--caption-column"
    )
    for number, row in enumerate(rows, start=1):
        place, words = str(row.get(image_column) or ""), str(row.get(caption_column) or "")
        image = table.parent / place
        if "://" in place:
            found.skip(Path(place), "a URL: download the pictures first")
        elif not place or not image.is_file():
            found.skip(image if place else Path(f"{table}:{number}"), "no such file")
        else:
            rest = {k: v for k, v in row.items() if k not in {image_column, caption_column}}
            yield _Candidate(image, words, rest or None)


def _rows(table: Path) -> list[dict[str, Any]]:
    if table.suffix.lower() not in TABLES or not table.is_file():
        raise DataError(
            f"{table} is neither a folder nor a table ({', '.join(TABLES)})",
            "name the folder with the raw files, or a table of them",
        )
    delimiter = TABLES[table.suffix.lower()]
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if delimiter:
                return list(csv.DictReader(file, delimiter=delimiter, restkey="_more"))
            rows = [json.loads(line) for line in file if line.strip()]
    except (ValueError, csv.Error) as error:
        raise DataError(f"cannot read {table}: {error}", "mend the table") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"not every line of {table} is a JSON object", "mend the table")
    return rows


def _column(
    named: str, usual: Sequence[str], rows: list[dict[str, Any]], table: Path, option: str
) -> str:
    columns = list(rows[0])
    for name in [named] if named else usual:
        if name in columns:
            return name
    raise UsageError(
        f"no column {named or ' or '.join(usual)} in {table}: it has {', '.join(columns)}",
        f"name the column with {option}",
    )


def _read(candidate: _Candidate, options: PackOptions) -> RawPair | str:
    """The pair, or why it cannot be used."""
    try:
        caption, metadata = _text(candidate.caption), _text(candidate.metadata)
        words = clean_caption(caption or b"").casefold()
        _check_image(candidate.image, options.check)
        with candidate.image.open("rb") as file:
            photo = hashlib.file_digest(file, "sha256").hexdigest()
    except (BadCaption, BadImage) as error:
        return str(error)
    except OSError as error:
        return error.strerror or type(error).__name__
    group = _group(metadata, options.group_field) if options.group_field else ""
    return RawPair(candidate.image, caption or b"", metadata, photo, words, group)


def _text(value: Path | str | dict[str, Any] | None) -> bytes | None:
    if isinstance(value, Path):
        return value.read_bytes()
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, default=str).encode()
    return value.encode() if value is not None else None


def _group(metadata: bytes | None, name: str) -> str:
    try:
        value = json.loads(metadata or b"{}")
    except ValueError:
        return ""
    found = value.get(name) if isinstance(value, dict) else None
    return "" if found is None else str(found)


def _check_image(path: Path, in_full: bool) -> None:
    if in_full:
        decode_image(path.read_bytes())
        return
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:  # Pillow's plug-ins raise whatever they like
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadImage(reason or type(error).__name__) from error
