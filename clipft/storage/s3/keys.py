"""Map the keys of a bucket to paths in a local folder, and refuse keys without a safe path."""

import fnmatch
import os
import unicodedata
from dataclasses import dataclass, field
from itertools import combinations

from clipft.config.sections.data import StorageSettings
from clipft.core.errors import UsageError

OWN_PREFIX = ".clipft-"
"""The prefix of the names of clipft's own files."""

_MAX_NAME_BYTES = 255


class RefusedKey(Exception):
    """A key that has no safe path in the target folder; the text is the reason."""


@dataclass(frozen=True)
class Refused:
    """A refused key and the reason, which completes "it was refused because it ..."."""

    key: str
    reason: str


@dataclass(frozen=True)
class RemoteObject:
    """An object in the bucket. ``path`` is relative to a target folder, with slashes, and ``size``
    is in bytes. ``checksum`` is the algorithm of the server's checksum of the whole object, or "".

    Paths are strings, because making path objects takes longer than the rest of a listing.
    """

    key: str
    path: str
    size: int
    etag: str
    checksum: str = ""


@dataclass(frozen=True)
class Filter:
    """Glob patterns for paths below the train and val folders. ``*`` matches slashes too."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def matches(self, path: str) -> bool:
        """Whether a path is included (all are, if ``include`` is empty) and not excluded."""
        included = not self.include or any(fnmatch.fnmatchcase(path, p) for p in self.include)
        return included and not any(fnmatch.fnmatchcase(path, p) for p in self.exclude)


def folder_prefixes(settings: StorageSettings) -> tuple[str, str, str]:
    """Return the prefixes of train, val and test. They end with a slash, so that ``data/train``
    does not match ``data/training/``.

    Raises:
        UsageError: one prefix contains the other.
    """
    given = {
        "--s3-prefix": settings.s3_prefix,
        "--s3-val-prefix": settings.s3_val_prefix,
        "--s3-test-prefix": settings.s3_test_prefix,
    }
    train, val, test = (f"{prefix.strip('/')}/".lstrip("/") for prefix in given.values())
    options = zip((train, val, test), given, strict=True)
    for (one, first), (other, second) in combinations(options, 2):
        if one.startswith(other) or other.startswith(one):
            raise UsageError(
                f"{first} {given[first]!r} and {second} {given[second]!r} overlap: a model would "
                "be measured on pairs that were used to train or to choose it",
                "give each a folder of its own in the bucket",
            )
    return train, val, test


def local_path(relative: str) -> str:
    """Check that a key without its prefix is a path below a target folder, and return it.

    Raises:
        RefusedKey: the path could leave the folder, or is not a file name on every system.
    """
    for part in relative.split("/"):
        if part in {"", ".", ".."}:
            raise RefusedKey(f"has a part {part!r}")
        if "\\" in part:
            raise RefusedKey("has a backslash")
        # isprintable is quick, and true for nearly every name
        if not part.isprintable() and any(unicodedata.category(char) == "Cc" for char in part):
            raise RefusedKey("has a control character")
        if spelling(part).startswith(OWN_PREFIX):
            raise RefusedKey(f"begins with {OWN_PREFIX}, which is reserved for clipft")
        try:
            size = len(part.encode("utf-8"))
        except UnicodeEncodeError:
            raise RefusedKey("is not valid Unicode") from None
        if size > _MAX_NAME_BYTES:
            raise RefusedKey(f"has a part of more than {_MAX_NAME_BYTES} bytes")
    if os.path.isabs(relative) or os.path.splitdrive(relative)[0]:  # Windows: C:name
        raise RefusedKey("names a drive")
    return relative


def spelling(name: str) -> str:
    """Return the same spelling for all names that are equal on some file system: macOS and Windows
    ignore case, and macOS ignores whether accents are composed."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def parents(path: str) -> list[str]:
    """The folders that contain a relative path, the outermost first."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


@dataclass
class LocalPaths:
    """Gives each key under a prefix a path that is unique on every file system."""

    prefix: str
    _taken: dict[str, str] = field(default_factory=dict)  # spelling -> "file" or "folder"
    _folders: set[str] = field(default_factory=lambda: {""})  # already checked and taken

    def take(self, key: str) -> str:
        """The path of ``key``.

        Raises:
            RefusedKey: the key has no safe path, or another key already has it.
        """
        path = local_path(key.removeprefix(self.prefix))
        name, parent = spelling(path), path.rpartition("/")[0]
        if self._taken.get(name):
            raise RefusedKey(
                f"collides with a {self._taken[name]} of another key (case is ignored)"
            )
        if parent not in self._folders:
            folders = [spelling(folder) for folder in parents(path)]
            if any(self._taken.get(folder) == "file" for folder in folders):
                raise RefusedKey("is in a folder whose name another key uses for a file")
            self._taken.update(dict.fromkeys(folders, "folder"))
            self._folders.add(parent)
        self._taken[name] = "file"
        return path
