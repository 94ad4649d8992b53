"""The folder that shards are packed into: what may stand in it, and how they come there.

Everything is built in a hidden folder inside of it. That stays when the packing breaks off,
and the next try takes its whole shards. The mark says that a pack is complete.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.core.errors import StorageError, UsageError
from clipft.core.files import read_json
from clipft.data.packing.options import Part
from clipft.data.packing.writer import SPLITS, Written

_BUILDING = ".clipft-part-pack"
_MARK = re.compile(r"\.clipft-pack(-\d+-of-(\d+))?\.json")
_OWN = ".clipft-"
_ANOTHER = "name a new folder for the shards"


@dataclass(frozen=True)
class Target:
    """``out``, as one part of a pack sees it."""

    out: Path
    part: Part

    @property
    def building(self) -> Path:
        return self.out / f"{_BUILDING}{self.part.suffix}"

    @property
    def _mark(self) -> str:
        return f".clipft-pack{self.part.suffix}.json"

    def check(self, source: Path, overwrite: bool) -> None:
        """
        Raises:
            UsageError: ``out`` is the source, holds something else, or a former pack that is
                not to be overwritten.
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
        if others and not marks and not begun:
            raise UsageError(f"{self.out} is not empty", _ANOTHER)
        if self.part.of > 1 and any(m[2] != str(self.part.of) for m in marks.values()):
            raise UsageError(f"{self.out} holds a pack that was not of {self.part.of}", _ANOTHER)
        if (marks if self.part.of == 1 else self._mark in marks) and not overwrite:
            raise UsageError(
                f"{self.out} holds a former pack", "add --overwrite, or name a new folder"
            )

    def check_others(self, content: str) -> None:
        """
        Raises:
            UsageError: another part in ``out`` is of other pairs or options.
        """
        if self.part.of == 1 or not self.out.is_dir():
            return
        for path in sorted(self.out.iterdir()):
            if path.name == self._mark or not _MARK.fullmatch(path.name):
                continue
            if _content_of(path) != content:
                raise UsageError(
                    f"{path} is of other pairs or options than this part",
                    "give every part the same SRC and options, and the same pictures to find "
                    "there; or name a new folder",
                )

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """
        Raises:
            StorageError: instead of an ``OSError``.
        """
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"cannot write {error.filename or self.out}: {error.strerror}",
                "make room and run it again: whole shards are kept; or name another folder",
            ) from error

    def publish(
        self, content: str, written: Sequence[Written], skipped: Sequence[dict[str, str]]
    ) -> None:
        """Put what was built in the former one's place.

        Raises:
            OSError: the disk does not take it.
            UsageError: as ``check_others``.
        """
        mark = {"format": 2, "content": content, "pairs": sum(shard.pairs for shard in written)}
        notes = [f"skipped{self.part.suffix}.jsonl", self._mark]
        self.building.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            sizes = {f"{s.number:05d}.tar": s.pairs for s in written if s.split == split}
            if sizes:
                self._note(f"{split}/sizes{self.part.suffix}.json", [sizes])
        self._note(notes[0], skipped)
        self._note(notes[1], [mark])
        self.check_others(content)
        # Without its mark a mixture of old and new cannot be taken for a whole
        for path in [path for path in self.out.iterdir() if self._own_note(path.name)]:
            path.unlink()
        for split in SPLITS:
            self._publish_split(split)
        for name in notes:
            if (self.building / name).exists():
                os.replace(self.building / name, self.out / name)
        # What parts left that broke off is of no use to a whole
        for path in self.out.glob(f"{_BUILDING}*" if self.part.of == 1 else self.building.name):
            shutil.rmtree(path, ignore_errors=True)

    def _note(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        """A file of JSON lines; none for no lines. Half characters of a name are escaped."""
        place = self.building / name
        place.unlink(missing_ok=True)
        if lines:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            place.write_text(text, encoding="utf-8", errors="backslashreplace")

    def _own_note(self, name: str) -> bool:
        if self.part.of > 1:
            return name in {self._mark, f"skipped{self.part.suffix}.jsonl"}
        return bool(_MARK.fullmatch(name) or re.fullmatch(r"skipped.*\.jsonl", name))

    def _publish_split(self, split: str) -> None:
        folder, built = self.out / split, self.building / split
        new = {path.name for path in built.glob("*")}
        if new:
            folder.mkdir(exist_ok=True)
        for name in sorted(new):
            os.replace(built / name, folder / name)
        former = [path for path in folder.glob("*") if self._own_shard(path.name)]
        for path in former:
            if path.name not in new:
                path.unlink()
                path.with_name(f".{path.name}.clipft-index").unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def _own_shard(self, name: str) -> bool:
        stem, _, suffix = name.rpartition(".")
        if self.part.of == 1:
            return suffix == "tar" or bool(re.fullmatch(r"sizes.*\.json", name))
        own = stem.isdecimal() and self.part.has(int(stem))
        return (suffix == "tar" and own) or name == f"sizes{self.part.suffix}.json"


def _content_of(mark: Path) -> str | None:
    found = read_json(mark) or {}  # none if it was cut off
    return str(found["content"]) if "content" in found else None
