"""The vectors of an earlier run, found by the hash of the embedded image or caption."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipft.search.tables.part_file import read_vectors

_SHORT = 16
"""Hexadecimal digits of a hash that are kept in memory. The full hash is compared in the file."""


class _Places(NamedTuple):
    """Sorted short hashes, uint64, with the file and the row of each. A vector takes 16 bytes, so
    ten million take 160 MB."""

    keys: "np.ndarray[Any, np.dtype[np.uint64]]"
    files: "np.ndarray[Any, np.dtype[np.uint32]]"
    rows: "np.ndarray[Any, np.dtype[np.uint32]]"


class StoredVectors:
    """The vectors in some part files, which must all be made in the same way. The files are opened
    when the first vector is looked up."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def find(self, hashes: Collection[str]) -> "dict[str, np.ndarray[Any, Any]]":
        """Return the vectors [dim] by hash. Hashes without a vector are left out."""
        from pyarrow import ArrowException

        places = self._places
        found = dict[str, Any]()
        if not len(places.keys) or not hashes:
            return found
        wanted = _short(sorted(set(hashes)))
        at = np.minimum(np.searchsorted(places.keys, wanted), len(places.keys) - 1)
        at = at[places.keys[at] == wanted]
        rows_by_file = defaultdict[int, list[int]](list)
        for file, row in zip(places.files[at].tolist(), places.rows[at].tolist(), strict=True):
            rows_by_file[file].append(row)
        for file, rows in rows_by_file.items():
            try:
                names, vectors = read_vectors(self._files[file])
            except (OSError, ArrowException):
                continue  # another process has moved the file; its vectors are made again
            # A file of an interrupted run may have been rewritten with fewer rows
            found |= {names[row]: vectors[row].copy() for row in rows if row < len(names)}
        return {name: found[name] for name in hashes if name in found}

    @cached_property
    def _places(self) -> _Places:
        from pyarrow import ArrowException

        keys, files, rows = [np.empty(0, np.uint64)], [np.empty(0, np.uint32)], [np.empty(0, "u4")]
        for number, file in enumerate(self._files):
            try:
                own = _short(read_vectors(file)[0])
            except (OSError, ArrowException):  # its vectors are made again
                continue
            keys.append(own)
            files.append(np.full(len(own), number, np.uint32))
            rows.append(np.arange(len(own), dtype=np.uint32))
        joined = np.concatenate(keys)
        order = np.argsort(joined, kind="stable")
        return _Places(joined[order], np.concatenate(files)[order], np.concatenate(rows)[order])


def _short(hashes: Sequence[str]) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    return np.array([int(name[:_SHORT], 16) for name in hashes], np.uint64)
