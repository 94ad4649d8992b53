"""The download of one object to its file.

A small object is held in memory. A larger one is fetched in ranges, which several threads write to
the same part file. Its digest is computed while the bytes arrive, by the thread whose range comes
next in the digest. Ranges that arrived too early are read back from the part file, which is still
in the page cache then.
"""

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO

from clipft.storage.s3.bucket import SMALL, Bucket
from clipft.storage.s3.errors import Changed, Corrupt, Stopped, explained
from clipft.storage.s3.keys import RefusedKey, RemoteObject
from clipft.storage.s3.verification import Arriving, check_bytes, digest_while_arriving
from clipft.storage.sync.folder import PART, Folder

RANGE = 32 << 20
"""The largest number of bytes in one request. Larger requests take less processor time: on
loopback, 64 MiB took a seventh less than 16 MiB, including the MD5. With smaller requests, more
threads can work on the last objects."""

_BLOCK = 1 << 20


def part_name(wanted: RemoteObject) -> str:
    """The name of the temporary file, which belongs to one version of one object."""
    version = f"{wanted.path}\0{wanted.etag}\0{wanted.size}"
    return PART + hashlib.sha256(version.encode()).hexdigest()[:24]


class Incoming:
    """One object and the state of its ranges; several threads may ``fetch``.

    ``needed`` is False if the file is already there, and ``refusal`` says why the object cannot
    have a file. ``unverified`` is the algorithm of a checksum that could not be computed.
    """

    def __init__(self, folder: Folder, wanted: RemoteObject) -> None:
        self.folder, self.wanted = folder, wanted
        self.needed, self.refusal, self.unverified = True, "", ""
        self._part = folder.path / part_name(wanted)
        # The offsets of the ranges in the part file, to resume after a kill
        self._ranges_file = self._part.with_suffix(".pieces")
        # An empty object has one range too
        self._starts = range(0, max(1, wanted.size), RANGE)
        self._lock = threading.Lock()
        self._begun = self._hashing = False
        self._taken = self._passed = self._hashed = 0
        self._arrived: set[int] = set()
        self._digest: Arriving | None = None

    @property
    def untaken(self) -> bool:
        """Whether some ranges have not been taken by a thread yet."""
        return self._taken < len(self._starts)

    def take(self) -> int:
        """Return the start of the next range, which the caller must fetch."""
        self._taken += 1
        return self._starts[self._taken - 1]

    def fetch(self, bucket: Bucket, start: int, arrived: Callable[[int], None]) -> bool:
        """Fetch a range. Return True if that completes the object, which is then renamed.

        ``arrived`` is called several times with the number of new bytes.

        Raises:
            StorageError: the range cannot be fetched, or the object has other bytes.
            Stopped: the sync is being stopped.
            OSError: the disk failed.
        """
        size = min(RANGE, self.wanted.size - start)
        if not self._begin() or start in self._arrived:
            arrived(size)
        elif self.wanted.size <= SMALL:
            self._fetch_small(bucket)
            arrived(size)
        else:
            self._fetch_range(bucket, start, start + size, arrived)
        self._catch_up()
        with self._lock:
            self._passed += 1
            last = self._passed == len(self._starts)
        if last and self.needed and self.wanted.size > SMALL:
            self._finish(bucket)
        return last

    def _begin(self) -> bool:
        """Return whether the object has to be fetched. The first thread checks this, and reserves
        space for a large object."""
        with self._lock:
            if self._begun:
                return self.needed
            self._begun = True
            try:
                self.needed = self.folder.needs(self.wanted)
            except RefusedKey as refusal:
                self.refusal, self.needed = str(refusal), False
            if self.needed and self.wanted.size > SMALL:
                self._digest = digest_while_arriving(self.wanted)
                with suppress(OSError, ValueError):  # nothing to resume
                    if self._part.stat().st_size == self.wanted.size:
                        lines = self._ranges_file.read_text().splitlines()
                        self._arrived = {int(line) for line in lines} & {*self._starts}
                with open(self._part, "ab") as file:
                    file.truncate(self.wanted.size)
            return self.needed

    def _fetch_small(self, bucket: Bucket) -> None:
        wanted = self.wanted

        def get_checked() -> memoryview:
            body = bucket.get_once(wanted, 0, wanted.size)
            self.unverified = check_bytes(bucket, wanted, BytesIO(body))
            return body

        body = bucket.retry(get_checked, bucket.url(wanted.key))
        try:
            # Unbuffered, because with many small files one more copy per file is noticeable
            descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                while body:
                    body = body[os.write(descriptor, body) :]
            finally:
                os.close(descriptor)
            self._publish(bucket)
        except BaseException:
            self._part.unlink(missing_ok=True)
            raise

    def _fetch_range(
        self, bucket: Bucket, start: int, end: int, arrived: Callable[[int], None]
    ) -> None:
        digest = self._digest
        with self._lock:
            digests = digest is not None and self._hashed == start and not self._hashing
            self._hashing |= digests

        def take_in(chunk: memoryview) -> None:
            if digest and digests:
                digest.running.update(chunk)
            arrived(len(chunk))

        descriptor = os.open(self._part, os.O_WRONLY)
        try:
            bucket.get_into(self.wanted, start, end, descriptor, take_in)
        finally:
            os.close(descriptor)
        with self._lock:
            if digests:
                self._hashed, self._hashing = end, False
            self._arrived.add(start)
            with open(self._ranges_file, "a") as file:
                file.write(f"{start}\n")

    def _catch_up(self) -> None:
        """Digest the ranges that have arrived and come next, unless another thread is doing it."""
        while digest := self._digest:
            with self._lock:
                start = self._hashed
                if self._hashing or start not in self._arrived:
                    return
                self._hashing = True
            end = min(start + RANGE, self.wanted.size)
            with open(self._part, "rb", buffering=0) as file:
                file.seek(start)
                while start < end and (block := file.read(min(_BLOCK, end - start))):
                    digest.running.update(block)
                    start += len(block)
            with self._lock:
                self._hashed, self._hashing = end, False

    def _finish(self, bucket: Bucket) -> None:
        """Check the bytes of a large object after all ranges have arrived, and publish it."""
        try:
            with open(self._part, "rb") as file:
                self.unverified = check_bytes(bucket, self.wanted, file, self._digest)
        except (Corrupt, Changed) as error:
            self._part.unlink()
            self._ranges_file.unlink(missing_ok=True)
            raise explained(error, bucket.settings, bucket.url(self.wanted.key)) from error
        self._ranges_file.unlink(missing_ok=True)
        self._publish(bucket)

    def _publish(self, bucket: Bucket) -> None:
        if bucket.retry.stopping.is_set():
            raise Stopped
        os.replace(self._part, self.folder.local(self.wanted))
