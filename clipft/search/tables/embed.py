"""Writes the embeddings of a data set to Parquet files.

The data are divided into parts of up to 4,096 pairs, and each part becomes one file of a table. If
a part has not changed, its file is kept. In a changed part, an image or a caption is embedded only
if no file has the vector of the same bytes yet. Only a few parts are in memory at a time.

The parts can be divided among several processes (``EmbedChoices.share``). The first process that
finds all files complete moves them into place.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clipft import __version__
from clipft.core.common import Progress, counted
from clipft.core.errors import DataError, UsageError
from clipft.core.part import ALL, Part
from clipft.models.huggingface import public_name
from clipft.runs.load import OpenedModel
from clipft.search.images import ImagePart
from clipft.search.tables.card import card
from clipft.search.tables.faiss_index import write_faiss
from clipft.search.tables.folder import EmbeddingsFolder
from clipft.search.tables.part_file import count_rows, read_about
from clipft.search.tables.rows import fields_of
from clipft.search.tables.table import EmbeddedTable
from clipft.search.vectors import embedding_width, preprocessing_of, weights_digest

FILES_PER_PART = 4096
"""Image files in a part of a folder. In a search, parts are smaller, because all files of a changed
part are embedded again."""


@dataclass(frozen=True)
class EmbedChoices:
    """What to write: some of ``folder.TABLES``, with vectors of ``dtype`` and ``dim`` dimensions
    (0: all), and with ``index`` a FAISS index of each table. ``share`` is this process's share."""

    tables: tuple[str, ...]
    dtype: str = "float32"
    dim: int = 0
    index: bool = False
    overwrite: bool = False
    share: Part = ALL


@dataclass(frozen=True)
class EmbedResult:
    """How many images or captions of each table this process embedded, and the content of the
    folder: the rows of each table, skipped images by reason, and the ``bytes`` of the tables.

    If several processes embed the data, only the one that moves the files into place describes the
    folder. For the others, ``joined`` is False. ``left`` counts the files that were still missing.
    """

    out: Path
    model: str
    dtype: str
    dim: int
    embedded_now: dict[str, int]
    rows: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    joined: bool = True
    left: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}


def embed_dataset(
    opened: OpenedModel,
    parts: Sequence[ImagePart],
    out: Path,
    choices: EmbedChoices,
    progress: Progress,
) -> EmbedResult:
    """Write the embeddings of all parts to ``out``, or update an earlier result there.

    Raises:
        UsageError: ``out`` holds the embeddings of another model or other options; or the model
            has fewer dimensions than ``choices.dim``.
        DataError: An image was changed or removed in the meantime, or there is nothing to embed.
        NotFiniteError: An embedding is not a number.
        StorageError: The disk is full, or refuses to write.
    """
    made_with, folder = _made_with(opened, choices), EmbeddingsFolder(out)
    with folder.alone():
        folder.begin(made_with, choices.overwrite)
        tables = [EmbeddedTable(name, opened, parts, folder, made_with) for name in choices.tables]
    fields = {name: about.fields for table in tables for name, about in table.known.items()}
    unread = [part for part in parts if part.name not in fields]
    if unread:
        with progress(f"Reading the fields of {counted(len(unread), 'part')}") as report:
            for done, part in enumerate(unread, 1):
                fields[part.name] = fields_of(part)
                report(done, len(unread))
    own = {part.name for number, part in enumerate(parts) if choices.share.has(number)}
    embedded = dict[str, int]()
    for table in tables:
        with folder.alone():
            changed, embedded[table.name] = table.choose_columns(fields), 0
        changed = [part for part in changed if part.name in own]
        if not changed:
            continue
        pairs = counted(sum(part.count for part in changed), "pair")
        with progress(f"Embedding the {table.name} of {pairs}") as report:
            embedded[table.name] = table.write(changed, report)
    with folder.alone():
        left = sum(len(table.missing()) for table in tables)
        # If no files are in progress, another process has moved them into place
        joins = not left and (choices.share.of == 1 or folder.in_progress)
        found = _join(tables, parts, folder, choices, made_with) if joins else {}
    return EmbedResult(
        out=out,
        model=made_with["model"],
        dtype=made_with["dtype"],
        dim=made_with["dim"],
        embedded_now=embedded,
        joined=joins,
        left=left,
        **found,
    )


def _join(
    tables: Sequence[EmbeddedTable],
    parts: Sequence[ImagePart],
    folder: EmbeddingsFolder,
    choices: EmbedChoices,
    made_with: dict[str, Any],
) -> dict[str, Any]:
    """Move the complete files into place and write the files that describe them. Return the fields
    of an ``EmbedResult`` about them.

    Raises:
        DataError: The tables have no rows.
        StorageError: The disk is full, or refuses to write.
    """
    out = folder.out
    files = {table.name: [table.file(part) for part in parts] for table in tables}
    rows = {name: sum(map(count_rows, paths)) for name, paths in files.items()}
    abouts = [about for paths in files.values() for path in paths if (about := read_about(path))]
    skipped = [entry for about in abouts for entry in about.skipped]
    if not any(rows.values()):
        folder.discard()
        raise _nothing(choices.tables, skipped)
    names = [part.name for part in parts]
    for table in tables:
        folder.publish(table.name, names)
        if choices.index:
            write_faiss(out / table.name, made_with["dim"], out / f"{table.name}.faiss")
    folder.finish(made_with, skipped, card(made_with, rows, names))
    return {
        "rows": rows,
        "skipped": dict(Counter(entry["reason"].partition(" (")[0] for entry in skipped)),
        "bytes": sum(file.stat().st_size for n in rows for file in (out / n).glob("*.parquet")),
    }


def _made_with(opened: OpenedModel, choices: EmbedChoices) -> dict[str, Any]:
    """Return all but the data that the vectors depend on, and the version, for the record."""
    width = embedding_width(opened)
    if choices.dim > width:
        raise UsageError(
            f"--dim {choices.dim}: the embeddings of this model have {width} dimensions",
            f"choose at most {width}, or leave out --dim",
        )
    settings = opened.settings
    return {
        "clipft": __version__,
        "model": public_name(opened.loaded.base.name),
        "scenario": settings.scenario,
        "weights": weights_digest(opened),
        "preprocessing": preprocessing_of(opened),
        "precision": opened.loaded.precision.name,
        "caption": settings.label_prompts or settings.fields or settings.caption,
        "caption_lines": settings.caption_lines,
        "tables": " and ".join(choices.tables),
        "dtype": choices.dtype,
        "dim": choices.dim or width,
        "normalized": True,
    }


def _nothing(tables: Sequence[str], skipped: Sequence[dict[str, str]]) -> DataError:
    if tables == ("texts",):
        return DataError(
            "no pair has a caption", "leave out --texts, or name captions with --caption"
        )
    reason = f", the first with the reason: {skipped[0]['reason']}" if skipped else ""
    return DataError(
        f"none of the {counted(len(skipped), 'image')} can be used{reason}",
        "run `clipft inspect` to see what is broken",
    )
