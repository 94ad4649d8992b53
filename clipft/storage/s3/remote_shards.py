"""Shards in a bucket, read in sequence without a copy on the disk.

Each open tar is fetched in ranges, some of them ahead of the reader, and no more are held than
those. Every range asks for the version that was listed: a shard that is replaced meanwhile
stops the run instead of mixing with its former self.
"""

import io
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any

from clipft.config.settings import StorageSettings
from clipft.core.errors import DataError
from clipft.storage.s3.bucket import PIECE, Bucket
from clipft.storage.s3.client import open_bucket
from clipft.storage.s3.keys import RemoteObject, folder_prefixes

AHEAD = 4
"""Ranges that are fetched ahead of the reader: with the one being read 40 MiB."""

_BUFFER = 1 << 20


@dataclass(frozen=True)
class RemoteShards:
    """The tars right under a prefix, and the ``sizes*.json`` beside them."""

    bucket: Bucket
    prefix: str
    _objects: dict[str, RemoteObject] = field(repr=False)

    @property
    def place(self) -> str:
        return self.bucket.url(self.prefix).rstrip("/")

    def names(self) -> Sequence[str]:
        """
        Raises:
            DataError: there is none.
        """
        found = sorted(name for name in self._objects if name.endswith(".tar"))
        if not found:
            raise DataError(
                f"no .tar right under {self.place}", "streaming needs shards: see `clipft pack`"
            )
        return found

    def sizes(self) -> dict[str, bytes]:
        names = [n for n in self._objects if n.startswith("sizes") and n.endswith(".json")]
        return {name: bytes(self._whole(self._objects[name])) for name in sorted(names)}

    def open(self, name: str) -> IO[bytes]:
        """
        Raises:
            StorageError: while it is read.
        """
        return io.BufferedReader(_Ranges(self.bucket, self._objects[name]), _BUFFER)

    def count(self, name: str) -> tuple[int, Sequence[Any]]:
        """
        Raises:
            DataError: always; counting would be reading all of it.
        """
        raise DataError(
            f"no sizes.json under {self.place} gives the pairs of {name}",
            "put the sizes.json that `clipft pack` wrote beside the shards, or train without "
            "--stream",
        )

    def _whole(self, wanted: RemoteObject) -> memoryview:
        return self.bucket.get(wanted, 0, wanted.size)


def open_remote_shards(settings: StorageSettings, say: Any) -> RemoteShards:
    """The training shards of the bucket.

    Raises:
        UsageError: no bucket is set.
        StorageError: it cannot be listed.
    """
    bucket = open_bucket(settings, say)
    prefix = folder_prefixes(settings)[0]
    objects, _ = bucket.list(prefix)
    found = {o.path: o for o in objects if not o.folder}
    return RemoteShards(bucket, prefix, found)


class _Ranges(io.RawIOBase):
    """One object from its start to its end."""

    def __init__(self, bucket: Bucket, wanted: RemoteObject) -> None:
        self._bucket, self._wanted = bucket.apart(), wanted
        self._starts = iter(range(0, wanted.size, PIECE))
        self._pool = ThreadPoolExecutor(AHEAD, "ranges")
        self._ahead: deque[Future[memoryview]] = deque()
        self._held = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._held:
            self._held = self._next()
        count = min(len(buffer), len(self._held))
        buffer[:count] = self._held[:count]
        self._held = self._held[count:]
        return count

    def _next(self) -> memoryview:
        while len(self._ahead) < AHEAD and (start := next(self._starts, None)) is not None:
            end = min(start + PIECE, self._wanted.size)
            self._ahead.append(self._pool.submit(self._bucket.get, self._wanted, start, end))
        return self._ahead.popleft().result() if self._ahead else memoryview(b"")

    def close(self) -> None:
        self._bucket.patience.stopping.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._ahead.clear()
        super().close()
