"""Fetch many objects in a fixed set of threads.

Small objects are held whole; larger ones come in ranges that are written to their file as they
arrive. So memory is bounded by the number of threads times ``SMALL``.

Threads and not an event loop: for 5,000 small files obstore took about 1.2 s of processor time
in 16 threads and 1.6 s in one loop, at the same speed.
"""

import hashlib
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from clipft.core.files import disk_error
from clipft.storage.s3.bucket import RANGE, SMALL, Bucket
from clipft.storage.s3.errors import Changed, Corrupt, Stopped, explained
from clipft.storage.s3.keys import Refused, RefusedKey, RemoteObject
from clipft.storage.s3.verification import check_bytes
from clipft.storage.sync.folder import PART, Folder

_FLUSH_EVERY = 5.0
_REPORT_EVERY = 0.1
_STOP_SECONDS = 10.0
"""How long the threads get to finish their requests when the work is stopped."""


@dataclass(frozen=True)
class TransferProgress:
    """How much of what has to be transferred is done."""

    files_done: int
    files: int
    bytes_done: int
    bytes: int


@dataclass
class _Job:
    """One object on its way. ``part`` is the temporary file that it is written to, ``starts``
    holds the offsets of its ranges, ``arrived`` counts those that have arrived, and ``done``
    holds the offsets of those that an earlier sync left in the part file. ``unverified`` is the
    algorithm of a checksum that could not be computed."""

    folder: Folder
    wanted: RemoteObject
    part: Path
    starts: range
    arrived: int = 0
    begun: bool = False
    needed: bool = True
    refusal: str = ""
    unverified: str = ""
    done: set[int] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def ranges_file(self) -> Path:
        """The offsets of the ranges that are in the part file, to resume after a kill."""
        return self.part.with_suffix(".pieces")


def part_name(wanted: RemoteObject) -> str:
    """The name of the temporary file, which belongs to one version of one object."""
    version = f"{wanted.path}\0{wanted.etag}\0{wanted.size}"
    return PART + hashlib.sha256(version.encode()).hexdigest()[:24]


class Download:
    """Fetch ``work``: threads of its own fetch, and the caller's thread records and reports.

    After ``run``, ``fetched`` and ``bytes`` count what was really transferred, and ``unverified``
    the objects whose checksum could not be computed, by its algorithm.
    """

    def __init__(self, bucket: Bucket, work: list[tuple[Folder, RemoteObject]]) -> None:
        self._bucket, self._stopping = bucket, bucket.retry.stopping
        self._work = work
        jobs = (
            # An empty object has one range too
            _Job(folder, o, folder.path / part_name(o), range(0, max(1, o.size), RANGE))
            for folder, o in work
        )
        # A generator, because there may be millions of ranges
        self._ranges = ((job, start) for job in jobs for start in job.starts)
        self._lock = threading.Lock()
        self._finished: deque[_Job] = deque()
        self._failed: list[BaseException] = []
        self._total = sum(wanted.size for _, wanted in work)
        self._files_done = self._bytes_done = self.fetched = self.bytes = 0
        self.unverified = Counter[str]()

    def run(self, report: Callable[[TransferProgress], None]) -> None:
        """Fetch everything, calling ``report`` ten times a second.

        Raises:
            StorageError: the first failure of an object.
        """
        count = min(self._bucket.settings.s3_requests, len(self._work) * 4)
        threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(count)]
        folders = {id(folder): folder for folder, _ in self._work}.values()
        flushed = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(_REPORT_EVERY)
                    progress = self._record_finished()
                    if time.monotonic() - flushed >= _FLUSH_EVERY:
                        flushed = time.monotonic()
                        for folder in folders:
                            folder.flush()
                    report(progress)
        finally:
            self._stopping.set()
            end = time.monotonic() + _STOP_SECONDS
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
            progress = self._record_finished()
        if self._failed:
            raise self._failed[0]
        report(progress)

    def _record_finished(self) -> TransferProgress:
        """Record the objects that the threads have finished since the last call."""
        while self._finished:
            job = self._finished.popleft()
            if job.refusal:
                job.folder.refused.append(Refused(job.wanted.key, job.refusal))
            else:
                job.folder.record(job.wanted)
                self.fetched += job.needed
                self.bytes += job.wanted.size if job.needed else 0
                if job.unverified:
                    self.unverified[job.unverified] += 1
            self._files_done += 1
        return TransferProgress(self._files_done, len(self._work), self._bytes_done, self._total)

    def _serve(self) -> None:
        """A thread: fetch one range after the other until there are none left."""
        try:
            while not self._stopping.is_set():
                with self._lock:
                    following = next(self._ranges, None)
                if following is None:
                    return
                self._fetch(*following)
        except Stopped:
            pass
        except BaseException as error:
            self._failed.append(error)
            self._stopping.set()

    def _fetch(self, job: _Job, start: int) -> None:
        """Fetch one range; the thread that brings the last one gives the file its name."""
        wanted, large = job.wanted, job.wanted.size > SMALL
        try:
            end = min(start + RANGE, wanted.size)
            if self._begin(job) and start not in job.done:
                if large:
                    descriptor = os.open(job.part, os.O_WRONLY)
                    try:
                        self._bucket.get_into(wanted, start, end, descriptor)
                    finally:
                        os.close(descriptor)
                    with job.lock, open(job.ranges_file, "a") as file:
                        file.write(f"{start}\n")
                else:
                    self._fetch_small(job)
            with self._lock:
                self._bytes_done += end - start
            with job.lock:
                job.arrived += 1
                last = job.arrived == len(job.starts)
            if last and job.needed and large:
                self._finish_large(job)
        except OSError as error:
            raise disk_error(Path(job.folder.local(wanted)), error, wanted.size) from error
        if last:
            self._finished.append(job)

    def _begin(self, job: _Job) -> bool:
        """Whether the object has to be fetched. The first thread that gets to it finds out, and
        makes room for a large one."""
        with job.lock:
            if job.begun:
                return job.needed
            job.begun = True
            try:
                job.needed = job.folder.needs(job.wanted)
            except RefusedKey as refusal:
                job.refusal, job.needed = str(refusal), False
            if job.needed and job.wanted.size > SMALL:
                with suppress(OSError, ValueError):  # there is nothing to resume
                    if job.part.stat().st_size == job.wanted.size:
                        job.done = {int(line) for line in job.ranges_file.read_text().splitlines()}
                with open(job.part, "ab") as file:
                    file.truncate(job.wanted.size)
            return job.needed

    def _fetch_small(self, job: _Job) -> None:
        wanted, bucket = job.wanted, self._bucket

        def get_checked() -> memoryview:
            body = bucket.get_once(wanted, 0, wanted.size)
            job.unverified = check_bytes(bucket, wanted, BytesIO(body))
            return body

        body = bucket.retry(get_checked, bucket.url(wanted.key))
        try:
            # Unbuffered: with many small files a copy per file is noticeable
            descriptor = os.open(job.part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                while body:
                    body = body[os.write(descriptor, body) :]
            finally:
                os.close(descriptor)
            self._publish(job)
        except BaseException:
            job.part.unlink(missing_ok=True)
            raise

    def _finish_large(self, job: _Job) -> None:
        """Check the bytes of a large object, all of whose ranges are there, and publish it."""
        wanted, bucket = job.wanted, self._bucket

        try:
            with open(job.part, "rb") as file:
                job.unverified = check_bytes(bucket, wanted, file)
        except (Corrupt, Changed) as error:
            job.part.unlink()
            job.ranges_file.unlink(missing_ok=True)
            raise explained(error, bucket.settings, bucket.url(wanted.key)) from error
        job.ranges_file.unlink(missing_ok=True)
        self._publish(job)

    def _publish(self, job: _Job) -> None:
        if self._stopping.is_set():
            raise Stopped
        os.replace(job.part, job.folder.local(job.wanted))
