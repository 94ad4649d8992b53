"""Keys of a bucket as paths of a folder: only those that have a safe place in it."""

import fnmatch
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from clipft.config.settings import StorageSettings
from clipft.core.errors import UsageError

OWN_PREFIX = ".clipft-"
"""Names that clipft keeps for itself in a target folder."""

_MAX_NAME_BYTES = 255


class RefusedKey(Exception):
    """A key that has no safe place in the target; its text is the reason."""


@dataclass(frozen=True)
class Refused:
    key: str
    reason: str


@dataclass(frozen=True)
class RemoteObject:
    """One object of the bucket and its place in a target folder, with slashes. ``size`` in
    bytes. Text and no path object: those take longer than all the rest of a listing."""

    key: str
    path: str
    size: int
    etag: str

    @property
    def folder(self) -> str:
        """The folder it lies in; "" is the target itself."""
        return self.path.rpartition("/")[0]


@dataclass(frozen=True)
class Filter:
    """Which paths below the two folders are meant. ``*`` in a pattern stands for ``/`` too."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def takes(self, path: str) -> bool:
        """Included, where anything is, and not excluded."""
        wanted = not self.include or _any(path, self.include)
        return wanted and not _any(path, self.exclude)


def _any(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def local_path(relative: str) -> str:
    """A key without its prefix, as the path under a target folder that it is.

    Raises:
        RefusedKey: the key could leave the target or is no file name everywhere.
    """
    parts = relative.split("/")
    for part in parts:
        if reason := _fault(part):
            raise RefusedKey(reason)
    if os.path.isabs(relative) or os.path.splitdrive(relative)[0]:  # Windows: C:name
        raise RefusedKey("names a drive")
    return relative


def _fault(part: str) -> str | None:
    """Why a part of a key cannot be a file name, if so."""
    if part in {"", ".", ".."}:
        return f"has a part {part!r}"
    if "\\" in part:
        return "has a backslash"
    if not part.isprintable() and any(unicodedata.category(letter) == "Cc" for letter in part):
        return "has a control character"
    if spelling(part).startswith(OWN_PREFIX):
        return f"begins with {OWN_PREFIX}, which clipft keeps for itself"
    try:
        size = len(part.encode("utf-8"))
    except UnicodeEncodeError:
        return "is not valid Unicode"
    return f"has a part of over {_MAX_NAME_BYTES} bytes" if size > _MAX_NAME_BYTES else None


def spelling(name: str) -> str:
    """One form for all names that some file system takes for the same."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def parents(path: str) -> list[str]:
    """The folders that a path lies in, the outermost first."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def folder_prefixes(settings: StorageSettings) -> tuple[str, str]:
    """Of train and val, as folders: ``data/train`` must not bring ``data/training/``."""
    given = (settings.s3_prefix, settings.s3_val_prefix)
    train, val = (f"{prefix.strip('/')}/".lstrip("/") for prefix in given)
    if train.startswith(val) or val.startswith(train):
        raise UsageError(
            f"--s3-prefix {given[0]!r} and --s3-val-prefix {given[1]!r} overlap: a model would "
            "be validated on its training pairs",
            "give each its own folder in the bucket",
        )
    return train, val


class Places:
    """Gives each key its path below a folder, once: as every file system would."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._taken: dict[str, str] = {}
        self._folders = {""}

    def take(self, key: str) -> str:
        """
        Raises:
            RefusedKey: the key has no safe place, or another key has it already.
        """
        path = local_path(key.removeprefix(self._prefix))
        name, parent = spelling(path), path.rpartition("/")[0]
        if self._taken.get(name):
            raise RefusedKey(
                f"is another key's {self._taken[name]} (upper and lower case are alike)"
            )
        if parent not in self._folders:
            self._take_folders(path)
        self._taken[name] = "file"
        return path

    def _take_folders(self, path: str) -> None:
        folders = [spelling(parent) for parent in parents(path)]
        if any(self._taken.get(folder) == "file" for folder in folders):
            raise RefusedKey("lies in a folder that is another key's file")
        self._taken.update(dict.fromkeys(folders, "folder"))
        self._folders.add(path.rpartition("/")[0])
