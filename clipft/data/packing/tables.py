"""Lists the pairs of a table: CSV, TSV, JSON, JSONL, Parquet or Arrow.

One column holds the images (paths, URLs or the images themselves) and one or several hold captions.
All other columns become the pair's metadata.
"""

import json
import os
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from clipft.core.common import counted
from clipft.core.errors import DataError
from clipft.data.captions.lines import join_lines
from clipft.data.packing.fields import check_fields
from clipft.data.packing.options import PackOptions
from clipft.data.packing.records import Candidate, Listing
from clipft.data.packing.rows import delimited, json_rows
from clipft.data.packing.rows.arrow import ArrowTable, plain_value
from clipft.data.packing.rows.columns import find_columns
from clipft.data.packing.rows.delimited import MISSING, UNMATCHED, DelimitedTable
from clipft.data.packing.rows.images import ImageCells, Place, row_name
from clipft.data.packing.rows.json_rows import JsonTable
from clipft.data.shards.splits import SPLIT_COLUMN, split_named
from clipft.data.shards.tar import ByteRange

Table = DelimitedTable | JsonTable | ArrowTable

_ARROW = (".parquet", ".pq", ".arrow")
_SHEETS = (".xlsx", ".xls", ".ods", ".numbers")
_SHOWN = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
# Rows that are checked to find the folder that the paths of a table are relative to
_SAMPLED = 64
# The most rows that a note lists by number
_NAMED = 5


def list_single_table(table: Path, options: PackOptions, images: Path) -> Listing:
    """List the pairs of a table that is the whole source.

    The columns and fields that the user named are checked first. After the rows are listed, at
    least one image must exist.

    Raises:
        DataError: As ``list_table``, or none of the images exists.
        UsageError: As ``list_table``, or no row has a field that an option names.
        OSError: The disk is full, or refuses to write.
    """
    opened = open_table(table, options)
    if opened.columns:
        image, captions = _columns(table, opened, options)
        kept = set(opened.columns) - {image, *(() if options.caption else captions)}
        samples = opened.samples
        check_fields(options, lambda: ({n: row[n] for n in kept & row.keys()} for row in samples()))
    listing = list_table(table, options, images)
    if not listing.candidates and not listing.skipped:
        hint = "write the names of the columns into its first line, and a row for each pair"
        raise DataError(f"{table} has no rows", hint)
    _check_images(table, listing)
    return listing


def list_table(table: Path, options: PackOptions, images: Path) -> Listing:
    """List the rows that have an image and a caption.

    Images inside the table are saved in the folder ``images``. Other images are not checked until
    they are read.

    Raises:
        DataError: The file is not a table, or the file or most of its rows cannot be read.
        UsageError: There is no column of images or captions, or pyarrow is not installed.
        OSError: The disk is full, or refuses to write.
    """
    listing, opened = Listing(), open_table(table, options)
    if not opened.columns:
        return listing
    image, captions = _columns(table, opened, options)
    rows = opened.rows(image, *captions)
    first = list(islice(rows, _SAMPLED))
    cells = ImageCells(table, images, [row.get(image) for _, row in first if isinstance(row, dict)])
    unread = dict[int, str]()
    total = 0
    for number, row in chain(first, rows):
        total += 1
        if isinstance(row, str):
            unread[number] = row
            listing.skip(row_name(table, number), row)
            continue
        found = cells.find(row.pop(image, None), number)
        _add(listing, found, row, captions, row_name(table, number), keep=bool(options.caption))
    _check_rows(table, opened, unread, total)
    listing.notes += _notes(table, opened, cells, unread)
    return listing


def _columns(table: Path, opened: Table, options: PackOptions) -> tuple[str, tuple[str, ...]]:
    by_type = opened.image_columns if isinstance(opened, ArrowTable) else ()
    return find_columns(table, opened.columns, options, by_type)


def is_table(path: Path) -> bool:
    """Return whether a file is a table, judging by the suffix of its name."""
    known = {*delimited.SUFFIXES, *json_rows.SUFFIXES, *_ARROW}
    return path.suffix.lower() in known


def open_table(table: Path, options: PackOptions) -> Table:
    """Open a table by the suffix of its name.

    Raises:
        DataError: It is no table, or cannot be read.
        UsageError: It is Parquet, and pyarrow is not installed.
    """
    suffix = table.suffix.lower()
    if not is_table(table) or not table.is_file():
        hint = "name the folder with the raw files or shards, or a table of images"
        if suffix in _SHEETS:
            hint = "export the sheet as CSV in UTF-8"
        raise DataError(f"{table} is neither a folder nor a table ({', '.join(_SHOWN)})", hint)
    if suffix in _ARROW:
        return ArrowTable(table)
    if suffix in json_rows.SUFFIXES:
        return JsonTable(table, options)
    return DelimitedTable(table, options)


def _add(
    listing: Listing,
    found: Place | str,
    row: dict[str, Any],
    columns: Sequence[str],
    where: str,
    *,
    keep: bool,
) -> None:
    """Add the pair of a row. ``keep`` leaves the captions in the metadata, so that a template can
    use the names of their columns."""
    texts = _texts([row.get(column) if keep else row.pop(column, None) for column in columns])
    if isinstance(found, str):
        listing.skip(where, found)
    elif texts is None and not keep:
        listing.skip(found[1], "the caption is not text")
    else:
        # "replace", because JSON may hold half of a surrogate pair
        rest = json.dumps(plain_value(row), ensure_ascii=False).encode("utf-8", "replace")
        caption = join_lines(texts or [])
        split = split_named(str(row.get(SPLIT_COLUMN, "")))
        listing.candidates.append(Candidate(*found, caption, rest if row else None, split))


def _texts(cells: Sequence[object]) -> list[str] | None:
    """Return the captions in some cells. Each cell holds a caption or a list of captions; return
    None if a cell holds anything else."""
    texts = []
    for cell in cells:
        for value in cell if isinstance(cell, list) else [cell]:
            if isinstance(value, dict):  # COCO's captions in many data sets of the Hugging Face Hub
                value = value.get("raw") or value.get("caption") or value.get("text") or value
            if isinstance(value, bool) or not isinstance(value, bytes | str | int | float | None):
                return None
            text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
            if value is not None and text not in MISSING:  # MISSING has NaN too
                texts.append(text)
    return texts


def _check_rows(table: Path, opened: Table, unread: dict[int, str], total: int) -> None:
    """Check that most rows could be read. Otherwise the table is probably in another format.

    Raises:
        DataError: More than half of the rows were skipped.
    """
    if 2 * len(unread) <= total:
        return
    number, reason = next(iter(unread.items()))
    hint = "correct these rows, or save the table again"
    if reason == UNMATCHED:
        hint = "write each quotation mark inside of a quoted cell twice"
    elif isinstance(opened, DelimitedTable):
        hint = (
            f"the cells are separated by {opened.delimiter}: put quotation marks around the texts "
            "that contain one, or name the right --delimiter"
        )
    raise DataError(
        f"{len(unread):,} of the {counted(total, 'row')} of {table} cannot be read; row {number}: "
        f"{reason}",
        hint,
    )


def _check_images(table: Path, listing: Listing) -> None:
    """Check that the table names at least one image that exists or may be downloaded.

    Raises:
        DataError: All images are paths, and none of the files exists.
    """
    images = [candidate.image for candidate in listing.candidates]
    if not images or any(isinstance(at, str) or os.path.exists(at.path) for at in images):
        return
    assert isinstance(images[0], ByteRange)
    raise DataError(
        f"none of the {counted(len(images), 'image')} named in {table} was found; the first would "
        f"be {images[0].path}",
        "write paths relative to the folder of the table or to the working folder",
    )


def _notes(table: Path, opened: Table, cells: ImageCells, unread: dict[int, str]) -> Iterator[str]:
    """Yield notes about repaired, skipped and left-out rows or columns, and about image paths."""
    by_reason: dict[str, list[int]] = {}
    for number, reason in unread.items():
        by_reason.setdefault(reason.partition(" (")[0], []).append(number)
    for reason, numbers in by_reason.items():
        yield f"{table}: skipped {_listed(numbers)}: {reason}."
    if isinstance(opened, DelimitedTable) and opened.repaired:
        yield (
            f"{table}: guessed where cells end in {_listed(opened.repaired)}, because of their "
            "quotation marks or delimiters."
        )
    if isinstance(opened, ArrowTable):
        for name, reason in opened.left_out.items():
            yield f"{table}: left out the column {name}, which cannot be read ({reason})."
    if cells.prefix:
        yield f"{table}: found the images in {cells.root}, without {cells.prefix} in their paths."
    elif cells.root != table.parent:
        yield f"{table}: the paths of the images are relative to the working folder."


def _listed(numbers: list[int]) -> str:
    """Name the first rows: ``row 4``, ``rows 4, 9, 12, 13, 20 and 7 more``."""
    named = ", ".join(map(str, numbers[:_NAMED]))
    more = f" and {len(numbers) - _NAMED:,} more" if len(numbers) > _NAMED else ""
    return f"row{'' if len(numbers) == 1 else 's'} {named}{more}"
