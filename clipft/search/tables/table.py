"""One table of embeddings, of all images or of all captions: finds and writes the missing files."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipft.data.captions.template import CaptionTemplate
from clipft.data.loader import LoaderOptions
from clipft.embedding.embed import embed_texts
from clipft.runs.load import OpenedModel
from clipft.search.images import ImagePart, JoinedParts
from clipft.search.tables.columns import Fields, columns_of, merged
from clipft.search.tables.folder import EmbeddingsFolder
from clipft.search.tables.part_file import About, VectorFormat, read_about, write_part
from clipft.search.tables.rows import Rows, image_row, text_rows
from clipft.search.tables.stored import StoredVectors
from clipft.search.vectors import embed_images

_TEXTS = 64
"""Captions per forward pass."""


@dataclass
class _Waiting:
    """A part whose images are being embedded; ``left`` images remain. Its first image has the
    number ``start`` among the images of all changed parts."""

    rows: Rows
    start: int
    vectors: dict[str, "np.ndarray[Any, Any]"]
    left: int
    bad: dict[str, str] = field(default_factory=dict)


class EmbeddedTable:
    """The table ``name`` of a folder."""

    def __init__(
        self,
        name: str,
        opened: OpenedModel,
        parts: Sequence[ImagePart],
        folder: EmbeddingsFolder,
        made_with: Mapping[str, Any],
    ) -> None:
        """Find the files that are up to date with their part."""
        self.name, self._parts, self._folder = name, parts, folder
        self._opened, self._made_with = opened, made_with
        settings = opened.settings
        template = CaptionTemplate.of(settings)
        self._template = template.for_evaluation()
        self._format = VectorFormat(made_with["dim"], made_with["dtype"])
        decides = {key: value for key, value in made_with.items() if key != "clipft"}
        self._made = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]
        self._columns, self._fields = dict[str, list[str]](), dict[str, Fields]()
        self.known = self._current()

    def file(self, part: ImagePart) -> Path:
        """Return the path of the new file of a part or, if there is none, of the earlier file,
        which may not exist."""
        new, old = self._folder.files(self.name, part.name)
        return new if new.is_file() else old

    def choose_columns(self, fields: Mapping[str, Fields]) -> list[ImagePart]:
        """Choose the columns for the fields of all parts. Return the parts that must be written
        because they have changed or their file has other columns."""
        columns = columns_of(merged(fields.values()))
        self._columns = {field: list(column) for field, column in columns.items()}
        self._fields = dict(fields)
        return self.missing()

    def missing(self) -> list[ImagePart]:
        """Return the parts without an up-to-date file that has the chosen columns."""
        known = self._current()
        return [
            part
            for part in self._parts
            if part.name not in known or known[part.name].columns != self._columns
        ]

    def _current(self) -> dict[str, About]:
        """Return the descriptions of the files that are up to date, by the name of the part."""
        abouts = ((part, read_about(self.file(part))) for part in self._parts)
        return {
            part.name: about
            for part, about in abouts
            if about and (about.made, about.state) == (self._made, _state(part))
        }

    def write(self, parts: Sequence[ImagePart], report: Callable[[int, int], None]) -> int:
        """Write the files of some parts; return how many images or captions were embedded.

        Raises:
            DataError: An image was changed or removed in the meantime.
            NotFiniteError: An embedding is not a number.
            StorageError: The disk is full, or refuses to write.
        """
        write = self._write_images if self.name == "images" else self._write_texts
        return write(parts, report)

    def _write_images(self, parts: Sequence[ImagePart], report: Callable[[int, int], None]) -> int:
        opened, waiting, embedded = self._opened, deque[_Waiting](), 0
        total = sum(part.count for part in parts)

        def to_embed() -> Iterator[int]:
            start = 0
            for part in parts:
                pairs = (part.read(number) for number in range(part.count))
                rows = Rows(part, [image_row(pair, self._template) for pair in pairs])
                vectors = self._stored.find([row.sha256 for row in rows.rows])
                # Equal images are embedded once
                first = {row.sha256: n for n, row in reversed(list(enumerate(rows.rows)))}
                numbers = sorted(n for name, n in first.items() if name not in vectors)
                if numbers:
                    waiting.append(_Waiting(rows, start, vectors, len(numbers)))
                    yield from (start + number for number in numbers)
                else:
                    self._write(rows, vectors)
                start += part.count
                if not waiting:
                    report(start, total)

        options = LoaderOptions.from_settings(opened.settings, opened.loaded.precision.device)
        for number, vector in embed_images(opened, JoinedParts(parts), to_embed(), options):
            own, embedded = waiting[0], embedded + 1
            row = own.rows.rows[number - own.start]
            if isinstance(vector, str):
                own.bad[row.sha256] = vector
            else:
                own.vectors[row.sha256] = self._format.stored(vector[None])[0]
            own.left -= 1
            if not own.left:
                waiting.popleft()
                self._write(_without(own.rows, own.bad), own.vectors)
            report(number + 1, total)
        return embedded

    def _write_texts(self, parts: Sequence[ImagePart], report: Callable[[int, int], None]) -> int:
        embedded, done, total = 0, 0, sum(part.count for part in parts)
        for part in parts:
            pairs = (part.read_texts(number) for number in range(part.count))
            rows = Rows(part, [row for pair in pairs for row in text_rows(pair, self._template)])
            vectors = self._stored.find([row.sha256 for row in rows.rows])
            new = {row.sha256: str(row.caption) for row in rows.rows if row.sha256 not in vectors}
            # Sorted by length, so that batches need little padding
            names = sorted(new, key=lambda name: (len(new[name]), name))
            for start in range(0, len(names), _TEXTS):
                batch = names[start : start + _TEXTS]
                made = embed_texts(self._opened.loaded, [new[name] for name in batch]).float()
                vectors |= zip(batch, self._format.stored(made.numpy()), strict=True)
                report(done + part.count * (start + len(batch)) // len(names), total)
            self._write(rows, vectors)
            embedded, done = embedded + len(names), done + part.count
            report(done, total)
        return embedded

    def _write(self, rows: Rows, vectors: Mapping[str, "np.ndarray[Any, Any]"]) -> None:
        part = rows.part
        about = About(
            self._made, _state(part), self._fields[part.name], self._columns, rows.skipped
        )
        new, _ = self._folder.files(self.name, part.name)
        with self._folder.alone():
            write_part(new, rows, vectors, about, self._made_with)

    @cached_property
    def _stored(self) -> StoredVectors:
        files = self._folder.complete(self.name)
        alike = [file for file in files if (at := read_about(file)) and at.made == self._made]
        return StoredVectors(alike)


def _without(rows: Rows, bad: Mapping[str, str]) -> Rows:
    """Return the rows whose images can be decoded, and list the others as skipped."""
    skipped = [
        {"key": row.key, "split": rows.part.split, "reason": bad[row.sha256]}
        for row in rows.rows
        if row.sha256 in bad
    ]
    return Rows(rows.part, [row for row in rows.rows if row.sha256 not in bad], skipped)


def _state(part: ImagePart) -> str:
    """Return a hash of the state of a part, so that its path is not published."""
    return hashlib.sha256(part.state.encode("utf-8", "surrogateescape")).hexdigest()[:32]
