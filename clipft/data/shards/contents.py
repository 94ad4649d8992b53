"""Describes the content of a folder, for error messages about missing files."""

import os
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from clipft.core.common import shell_command
from clipft.data.images.formats import IMAGE_SUFFIXES
from clipft.data.shards.names import (
    CAPTION_SUFFIX,
    SPLITS,
    TABLE_SUFFIXES,
    is_hidden,
    tars_in,
)

PACK_HINT = "pack raw files with `clipft pack SRC OUT`"

_ARCHIVES = {"zip": "unzip", "tgz": "tar -xf", "gz": "tar -xf", "7z": "7z x", "rar": "unrar x"}
# Enough to describe a folder; an error message must not wait until a million files are listed
_MOST_FILES = 20_000
_NAMED, _COUNTED = 3, 5


@dataclass
class Contents:
    """Counts the files below a folder by extension (in lower case, without the dot), and keeps the
    first few paths of each, relative to the folder. Hidden files are left out."""

    endings: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    links: int = 0
    complete: bool = True

    def add(self, name: str) -> None:
        """Count a file."""
        file = name.rpartition("/")[2]
        ending = file.rpartition(".")[2].lower() if "." in file[1:] else ""
        self.endings[ending] += 1
        names = self.first.setdefault(ending, [])
        if len(names) < _NAMED:
            names.append(name)

    def __str__(self) -> str:
        """Return text such as ``20 .jpg, 1 without an ending (a.jpg, b.jpg, c.jpg, notes)``."""
        ranked = sorted(self.endings.items(), key=lambda item: (-item[1], item[0]))
        counts = [f"{n:,} {f'.{end}' if end else 'without an ending'}" for end, n in ranked]
        listed = ", ".join(counts[:_COUNTED]) or "nothing"
        if len(counts) > _COUNTED:
            listed += f" and {len(counts) - _COUNTED} other endings"
        names = [name for end, _ in ranked[:_COUNTED] for name in self.first[end]]
        more = "" if self.complete else " and more"
        return listed + more + (f" ({', '.join(names[:_NAMED])})" if names else "")


def contents_of(folder: Path) -> Contents:
    """Count the files below a folder by extension; of a very large folder, only the first ones."""
    found = Contents()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        below = "" if place == str(folder) else f"{os.path.relpath(place, folder)}/"
        for name in sorted(name for name in names if not is_hidden(name)):
            found.add(below + name)
            found.links += os.path.islink(os.path.join(place, name))
        if found.endings.total() > _MOST_FILES:
            found.complete = False
            break
    return found


def how_to_read(folder: Path, found: Contents) -> str:
    """Return a hint: the command that makes shards from ``folder``, or the names of its shards."""
    packing, endings = shell_command("pack", folder, "OUT"), found.endings
    if shards := found.first.get("tar"):
        within = (folder / shards[0]).parent
        if within.name in SPLITS and tars_in(within.parent / "train"):
            return f"name the folder with train/ in it: {shlex.quote(str(within.parent))}"
        return f"`{packing}` splits these shards for training and validation"
    if packed := found.first.get("gz"):
        return f"shards are not compressed: `gunzip {shlex.quote(str(folder / packed[0]))}`"
    images = sum(count for ending, count in endings.items() if ending in IMAGE_SUFFIXES)
    if (images and endings[CAPTION_SUFFIX]) or endings["parquet"]:
        return f"`{packing}` makes shards of these files"
    return how_to_pack(folder, found)


def how_to_pack(folder: Path, found: Contents) -> str:
    """Return a hint: how ``clipft pack`` can read a ``folder`` with the content ``found``."""
    for ending in TABLE_SUFFIXES:
        if found.endings[ending]:
            table = found.first[ending][0]
            packing = shell_command("pack", folder / table, "OUT")
            return f"if {table} names images: `{packing}`"
    for ending, command in _ARCHIVES.items():
        if found.endings[ending]:
            archive = shlex.quote(str(folder / found.first[ending][0]))
            return f"unpack it first: `{command} {archive}`"
    if any(ending in IMAGE_SUFFIXES for ending in found.endings):
        return "each image needs a .txt of the same name beside it, or a row of a table"
    return PACK_HINT
