"""Read shards from a bucket in sequence, without a copy on disk.

An open tar is fetched in ranges. A few ranges ahead of the reader are in memory. Every request is
for the version that was listed, so if a shard is replaced in the meantime, the run stops instead of
mixing two versions.
"""

import io
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import IO, Any

from clipft.config.sections.data import StorageSettings
from clipft.core.common import Note
from clipft.core.errors import DataError
from clipft.storage.s3.bucket import RANGE, Bucket
from clipft.storage.s3.client import open_bucket
from clipft.storage.s3.keys import RemoteObject, folder_prefixes
from clipft.storage.s3.retry import Retry

AHEAD = 4
"""Ranges that are fetched ahead of the reader: 40 MiB together with the one that is being read."""

_BUFFER = 1 << 20


@dataclass(frozen=True)
class RemoteShards:
    """The tars directly under a prefix and the ``sizes*.json`` beside them: a ``ShardSource``.

    ``place`` is the URL of the prefix.
    """

    bucket: Bucket
    place: str
    _objects: dict[str, RemoteObject] = field(repr=False)

    def names(self) -> Sequence[str]:
        found = sorted(name for name in self._objects if name.endswith(".tar") and name[0] != ".")
        if not found:
            raise DataError(
                f"no .tar directly under {self.place}",
                "streaming needs shards: make them with `clipft pack`",
            )
        return found

    def sizes(self) -> dict[str, bytes]:
        names = [n for n in self._objects if n.startswith("sizes") and n.endswith(".json")]
        wanted = {name: self._objects[name] for name in sorted(names)}
        return {name: bytes(self.bucket.get(o, 0, o.size)) for name, o in wanted.items()}

    def open(self, name: str) -> IO[bytes]:
        """Open a tar at its start. Reading raises ``StorageError`` if a range cannot be fetched."""
        return io.BufferedReader(_Ranges(self.bucket, self._objects[name]), _BUFFER)

    def count(self, name: str) -> tuple[int, Sequence[Any]]:
        """Always raise a ``DataError``: to count its pairs, the whole tar would be downloaded."""
        raise DataError(
            f"no sizes.json under {self.place} has the number of pairs in {name}",
            "upload the sizes.json that `clipft pack` wrote beside the shards, or train without "
            "--stream",
        )


def open_remote_shards(settings: StorageSettings, note: Note) -> RemoteShards:
    """The training shards of the bucket.

    Raises:
        UsageError: no bucket is set.
        StorageError: the bucket cannot be listed.
    """
    bucket = open_bucket(settings, note)
    prefix = folder_prefixes(settings)[0]
    objects, _ = bucket.list(prefix)
    place = bucket.url(prefix).rstrip("/")
    return RemoteShards(bucket, place, {o.path: o for o in objects if "/" not in o.path})


class _Ranges(io.RawIOBase):
    """One object from start to end, fetched ``AHEAD`` ranges in advance."""

    def __init__(self, bucket: Bucket, wanted: RemoteObject) -> None:
        # Its own retry, because closing one shard must not stop the requests of another
        self._bucket = replace(bucket, retry=Retry(bucket.settings, bucket.retry.note))
        self._wanted = wanted
        self._starts = iter(range(0, wanted.size, RANGE))
        self._pool = ThreadPoolExecutor(AHEAD, "ranges")
        self._ahead: deque[Future[memoryview]] = deque()
        self._held = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._held:
            while len(self._ahead) < AHEAD and (start := next(self._starts, None)) is not None:
                end = min(start + RANGE, self._wanted.size)
                self._ahead.append(self._pool.submit(self._bucket.get, self._wanted, start, end))
            if self._ahead:
                self._held = self._ahead.popleft().result()
        count = min(len(buffer), len(self._held))
        buffer[:count] = self._held[:count]
        self._held = self._held[count:]
        return count

    def close(self) -> None:
        self._bucket.retry.stopping.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._ahead.clear()
        super().close()
