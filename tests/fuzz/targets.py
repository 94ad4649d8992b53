"""The functions that are fuzzed.

Each takes any bytes. It must return a valid result or raise the error that it documents; anything
else is a bug.
"""

import os
import posixpath
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from clipft.core.errors import DataError, UsageError
from clipft.data.captions.template import BadCaption, CaptionTemplate
from clipft.data.shards.index import index_shard, load_index, stamp_of
from clipft.data.shards.tar import plain_members, tarfile_members
from clipft.storage.s3.keys import LocalPaths, RefusedKey, spelling

_FOLDER = Path(tempfile.mkdtemp(prefix="clipft-fuzz-"))


def in_a_file(data: bytes, name: str) -> Path:
    path = _FOLDER / name
    path.write_bytes(data)
    return path


def tar(data: bytes) -> None:
    """The members of a shard lie within the file, and are the same that tarfile finds."""
    path = in_a_file(data, "a.tar")
    with suppress(DataError):
        shard = index_shard(path)
        places = shard.places[shard.places[..., 0] >= 0]
        assert not len(places) or int(places.sum(axis=1).max()) <= len(data) + 511
        for row in range(len(shard)):
            shard.key(row)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        plain = plain_members(descriptor)
    finally:
        os.close(descriptor)
    if plain is not None:
        assert plain == tarfile_members(path)


def index(data: bytes) -> None:
    """An index is refused, or points only into its shard, which has 100,000 bytes."""
    shard_path = _FOLDER / "b.tar"
    if not shard_path.exists():
        shard_path.touch()
        os.truncate(shard_path, 100_000)
        os.utime(shard_path, ns=(10**18, 10**18))
    place, stamp = in_a_file(data, "b.index"), stamp_of(shard_path.stat())
    try:
        shard = load_index(place, shard_path, stamp)
    except (OSError, ValueError, KeyError, TypeError):
        return
    there = shard.places[shard.places[..., 0] >= 0]
    assert not len(there) or (np.min(there) >= 0 and int(there[:, 0].max()) <= 100_000)
    for row in range(len(shard)):
        shard.key(row)


def template(data: bytes) -> None:
    """NUL bytes separate the template, the .txt and the .json."""
    source, caption, metadata = (*data.split(b"\0", 2), b"", b"")[:3]
    try:
        parsed = CaptionTemplate.parse(source.decode("utf-8", "replace"))
        texts = parsed.captions(caption, metadata)
    except (UsageError, BadCaption):
        return
    assert texts and len(set(texts)) == len(texts)
    assert all(text.strip() == text and text and "\0" not in text for text in texts)


def keys(data: bytes) -> None:
    """Lines are keys of one bucket: each gets its own place inside the folder, or is refused."""
    places, taken = LocalPaths("data/"), set[str]()
    for key in data.decode("utf-8", "surrogateescape").split("\n"):
        try:
            path = places.take(f"data/{key}")
        except RefusedKey:
            continue
        assert not posixpath.isabs(path) and posixpath.normpath(path) == path
        assert not {"", ".", ".."} & set(path.split("/")) and "\\" not in path and "\0" not in path
        name = spelling(path)
        assert name not in taken
        assert not any(
            other.startswith(f"{name}/") or name.startswith(f"{other}/") for other in taken
        )
        os.fsencode(path)
        taken.add(name)


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function for function in (tar, index, template, keys)
}
