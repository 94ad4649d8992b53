"""The output folder of a pack: the checks on what it holds, and moving a finished pack into it.

Everything is built in a hidden folder inside the output folder. If packing is interrupted, the
hidden folder stays, and the next run keeps its complete shards. The file ``.clipft-pack.json``, the
mark, says that a pack is complete.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipft.core.errors import StorageError, UsageError
from clipft.core.files import read_json
from clipft.core.part import Part
from clipft.data.packing.records import count_reasons
from clipft.data.packing.writer import Written
from clipft.data.shards.names import SPLITS

_BUILDING = ".clipft-part-pack"
_MARK = re.compile(r"\.clipft-pack(-\d+-of-(\d+))?\.json")
_OWN = ".clipft-"
_ANOTHER = "name a new folder for the shards"


class Target:
    """The folder ``out`` for one part of a pack.

    ``building`` is the hidden folder of this part. ``shared`` holds images from a table or a URL,
    and the data that the parts exchange.
    """

    def __init__(self, out: Path, part: Part) -> None:
        self.out, self.part = out, part
        self.building = out / f"{_BUILDING}{part.suffix}"
        self.shared = out / f"{_BUILDING}-shared" if part.of > 1 else self.building
        self._mark = self._mark_of(part)

    def check(self, source: Path, overwrite: bool) -> None:
        """Check, before any work, that the pack may be written to ``out``.

        Raises:
            UsageError: ``out`` is the source, holds other files, or holds an earlier pack that may
                not be overwritten.
        """
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise UsageError(f"{self.out} is not a folder", _ANOTHER)
        if self.out.resolve() == source.resolve():
            raise UsageError("SRC and OUT are the same folder", _ANOTHER)
        names = {path.name for path in self.out.iterdir()}
        marks = {name: mark for name in names if (mark := _MARK.fullmatch(name))}
        begun = any(name.startswith(_BUILDING) for name in names)
        others = [name for name in names if not name.startswith(_OWN)]
        # Publishing removes the mark first. If it is killed, the building folder is the sign that
        # the other files are from a pack
        if others and not marks and not begun:
            raise UsageError(f"{self.out} is not empty, and it holds no earlier pack", _ANOTHER)
        if self.part.of > 1 and any(m[2] != str(self.part.of) for m in marks.values()):
            raise UsageError(
                f"{self.out} holds a pack that was not made in {self.part.of} parts", _ANOTHER
            )
        if (marks if self.part.of == 1 else self._mark in marks) and not overwrite:
            raise UsageError(
                f"{self.out} holds an earlier pack", "add --overwrite, or name a new folder"
            )

    def begin(self) -> None:
        """Tell the other parts that this one has started.

        Raises:
            OSError: The disk is full, or refuses to write.
        """
        if self.part.of > 1:
            self.building.mkdir(parents=True, exist_ok=True)

    def check_others(self, content: str) -> None:
        """Check that the other parts in ``out``, if any, belong to the same pack.

        Raises:
            UsageError: Another part was made from other pairs or options.
        """
        if self.part.of == 1 or not self.out.is_dir():
            return
        for path in sorted(self.out.iterdir()):
            if path.name == self._mark or not _MARK.fullmatch(path.name):
                continue
            if (read_json(path) or {}).get("content") != content:
                raise UsageError(
                    f"{path} was made from other pairs or options than this part",
                    "use the same SRC, images and options for every part, or name a new folder",
                )

    @contextmanager
    def explain_disk_errors(self) -> Iterator[None]:
        """Raise a ``StorageError`` with a hint for an ``OSError`` inside the block."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"cannot write {error.filename or self.out}: {error.strerror}",
                "free some space and run it again, complete shards are kept; or name another "
                "folder",
            ) from error

    def publish(
        self, content: str, written: Sequence[Written], skipped: Sequence[dict[str, str]]
    ) -> None:
        """Move the finished files to ``out``, and replace an earlier pack.

        If the process is killed at any point, the pack is either complete or has no mark, and the
        next run completes it.

        Raises:
            OSError: The disk is full, or refuses to write.
            UsageError: As ``check_others``: another part may have finished meanwhile.
        """
        mark = {"format": 2, "content": content, "pairs": sum(shard.pairs for shard in written)}
        notes = [f"skipped{self.part.suffix}.jsonl", self._mark]
        self.building.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            sizes = {f"{s.number:05d}.tar": s.pairs for s in written if s.split == split}
            if sizes:
                self._write_lines(f"{split}/sizes{self.part.suffix}.json", [sizes])
        self._write_lines(notes[0], skipped)
        self._write_lines(notes[1], [mark])
        self.check_others(content)
        # Remove the mark before the first shard is moved, so that a mixture of old and new shards
        # is not taken for a complete pack
        former = [_MARK, re.compile(r"skipped.*\.jsonl")]  # a whole pack replaces that of any part
        for path in list(self.out.iterdir()):
            whole = self.part.of == 1 and any(name.fullmatch(path.name) for name in former)
            if whole or path.name in notes:
                path.unlink()
        for split in SPLITS:
            self._publish_split(split)
        for name in notes:  # the mark is last
            if (self.building / name).exists():
                os.replace(self.building / name, self.out / name)
        # A whole pack does not need the folders of interrupted parts
        for path in self.out.glob(f"{_BUILDING}*" if self.part.of == 1 else self.building.name):
            shutil.rmtree(path, ignore_errors=True)
        every = [Part(number, self.part.of) for number in range(1, self.part.of + 1)]
        at_work = any(path != self.shared for path in self.out.glob(f"{_BUILDING}*"))
        if not at_work and all((self.out / self._mark_of(part)).exists() for part in every):
            shutil.rmtree(self.shared, ignore_errors=True)

    @staticmethod
    def _mark_of(part: Part) -> str:
        return f".clipft-pack{part.suffix}.json"

    def _write_lines(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        """Write a file of JSON lines to the building folder, unless there are no lines."""
        place = self.building / name
        place.unlink(missing_ok=True)
        if lines:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            # Python represents a file name that is not UTF-8 with lone surrogates
            place.write_text(text, encoding="utf-8", errors="backslashreplace")

    def _publish_split(self, split: str) -> None:
        """Move the shards of a split to ``out`` and remove those of an earlier pack."""
        folder, built = self.out / split, self.building / split
        new = {path.name for path in built.glob("*")}
        if new:
            folder.mkdir(exist_ok=True)
        for name in sorted(new):
            os.replace(built / name, folder / name)
        for path in [path for path in folder.glob("*") if path.name not in new]:
            if self._is_own(path.name):
                path.unlink()
                path.with_name(f".{path.name}.clipft-index").unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def _is_own(self, name: str) -> bool:
        """Return whether this part replaces the file; a whole pack replaces those of all parts."""
        stem, _, suffix = name.rpartition(".")
        if self.part.of == 1:
            return suffix == "tar" or bool(re.fullmatch(r"sizes.*\.json", name))
        own = stem.isdecimal() and self.part.has(int(stem))
        return (suffix == "tar" and own) or name == f"sizes{self.part.suffix}.json"


def skipped_by_pack(out: Path) -> dict[str, int]:
    """Count what the pack in ``out`` skipped, by reason; empty if ``out`` is no pack."""
    if not any(_MARK.fullmatch(path.name) for path in out.iterdir()):
        return {}
    try:
        texts = [path.read_text(encoding="utf-8") for path in sorted(out.glob("skipped*.jsonl"))]
        return count_reasons(
            json.loads(line) for text in texts for line in text.split("\n") if line
        )
    except (OSError, ValueError, KeyError, TypeError):  # somebody changed the file
        return {}
