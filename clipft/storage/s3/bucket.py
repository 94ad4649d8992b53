"""One bucket: botocore for the session and small requests, obstore to move bytes.

obstore (written in Rust) moved small objects in a third of boto3's time and a quarter of its
processor time. Its own retries are switched off: ``Retry`` repeats requests instead, each time
with current credentials.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from clipft.config.sections.data import StorageSettings
from clipft.core.errors import did_you_mean, sentences
from clipft.storage.s3.checksums import (
    PART_BYTES,
    BinaryFile,
    RunningEtag,
    checksum_in,
    has_checksum,
)
from clipft.storage.s3.errors import Changed, Corrupt, code_and_status
from clipft.storage.s3.keys import LocalPaths, Refused, RefusedKey, RemoteObject
from clipft.storage.s3.listing import Entry, Listing
from clipft.storage.s3.retry import Retry

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import S3Store

RANGE = 8 << 20
"""The most bytes in one request. A larger object is fetched in several ranges."""

SMALL = 1 << 20
"""Objects of up to this many bytes are held in memory while they are fetched."""

_CHUNK, _BLOCK = 256 << 10, 1 << 20
_NAMES, _LISTED = 1000, 10
"""If a prefix does not exist: the names that are requested, and those that a message lists."""


@dataclass(frozen=True)
class Bucket:
    """An open bucket, made by ``open_bucket``. Threads may share it.

    obstore limits the time of a whole request, so there is one store for small and one for large
    requests.
    """

    settings: StorageSettings
    name: str
    retry: Retry
    _client: Callable[[], Any]
    _listing: Listing
    _small: "S3Store"
    _large: "S3Store"

    @property
    def client(self) -> Any:
        """A boto3 client, made on first use: making it takes 0.2 s, and a sync often needs none."""
        return self._client()

    def url(self, key: str = "") -> str:
        """``s3://bucket/key``, for messages."""
        return f"s3://{self.name}/{key}"

    def call(self, operation: str, about: str, **request: Any) -> dict[str, Any]:
        """Call a boto3 client method, with retries. Errors name the key or prefix ``about``."""
        answer: dict[str, Any] = self.retry(
            lambda: getattr(self.client, operation)(Bucket=self.name, **request), self.url(about)
        )
        return answer

    def list(self, prefix: str) -> tuple[list[RemoteObject], list[Refused]]:
        """List the objects under ``prefix`` with a path in a local folder, and the refused keys.

        Raises:
            StorageError: the bucket cannot be listed.
        """
        objects: list[RemoteObject] = []
        refused: list[Refused] = []
        paths = LocalPaths(prefix)
        for entry in self.entries(prefix):
            if entry.key.endswith("/") and entry.size == 0:  # S3 consoles mark folders like this
                continue
            try:
                path = paths.take(entry.key)
                objects.append(
                    RemoteObject(entry.key, path, entry.size, entry.etag, entry.checksum)
                )
            except RefusedKey as refusal:
                refused.append(Refused(entry.key, str(refusal)))
        return objects, refused

    def entries(self, prefix: str, page_size: int = 1000) -> Iterator[Entry]:
        """List all objects under ``prefix``, in requests for ``page_size`` objects.

        Raises:
            StorageError: the bucket cannot be listed.
        """
        ask, token = partial(self._listing.page, prefix, page_size), None
        while True:
            entries, token = self.retry(partial(ask, token), self.url(prefix))
            yield from entries
            if token is None:
                return

    def names_near(self, prefix: str) -> str:
        """Return a hint for a ``prefix`` that does not exist: the existing and closest prefixes.

        Returns "" if the bucket cannot be listed.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        place = ""
        for part in prefix.strip("/").split("/"):
            try:
                answer = self.client.list_objects_v2(
                    Bucket=self.name, Prefix=place, Delimiter="/", MaxKeys=_NAMES
                )
            except (BotoCoreError, ClientError):
                return ""
            found = [entry["Prefix"] for entry in answer.get("CommonPrefixes", ())]
            names = [name[len(place) : -1] for name in found]
            if part not in names:
                meant = did_you_mean(part, names, place.__add__)
                listed = ", ".join(found[:_LISTED]) + (", ..." if len(found) > _LISTED else "")
                return sentences(meant, f"the bucket has {listed}") if found else ""
            place += f"{part}/"
        return ""

    def get(self, wanted: RemoteObject, start: int, end: int) -> memoryview:
        """Fetch the bytes ``start`` to ``end`` of the version that was listed.

        Raises:
            StorageError: they cannot be fetched, or the object has changed.
            Stopped: ``retry`` was told to stop.
        """
        return self.retry(lambda: self.get_once(wanted, start, end), self.url(wanted.key))

    def get_once(self, wanted: RemoteObject, start: int, end: int) -> memoryview:
        """Do the same as ``get`` without retries. Raises errors of obstore, or ``Changed``."""
        body = memoryview(self._request(wanted, start, end).bytes())
        if len(body) != end - start:
            raise Changed
        return body

    def get_into(
        self,
        wanted: RemoteObject,
        start: int,
        end: int,
        descriptor: int,
        arrived: Callable[[memoryview], None] = lambda chunk: None,
    ) -> None:
        """Fetch a range and write it at the same offset of an open file.

        Writing the bytes as they arrive takes a third of the processor time of buffering 8 MiB
        first, and little memory. ``arrived`` is called once with each chunk, in order: a retry
        continues where the last attempt ended.
        """
        offset = start

        def fetch() -> None:
            nonlocal offset
            if offset == end:  # the last attempt failed after the last byte
                return
            for chunk in self._request(wanted, offset, end).stream(min_chunk_size=_CHUNK):
                body = memoryview(chunk)
                if offset + len(body) > end:
                    raise Changed
                arrived(body)
                while body:
                    written = os.pwrite(descriptor, body, offset)
                    body, offset = body[written:], offset + written
            if offset != end:
                raise Changed

        self.retry(fetch, self.url(wanted.key))

    def _request(self, wanted: RemoteObject, start: int, end: int) -> "GetResult":
        import obstore

        options: Any = {"if_match": wanted.etag}
        if (start, end) != (0, wanted.size):
            options["range"] = (start, end)
        store = self._small if end - start <= SMALL else self._large
        answer = obstore.get(store, wanted.key, options=options)
        # Some servers ignore If-Match
        if (answer.meta["size"], answer.meta["e_tag"]) != (wanted.size, wanted.etag):
            raise Changed
        return answer

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Fetch a small object and its ETag; None if S3 itself says that it does not exist."""
        from botocore.exceptions import ClientError

        def fetch() -> tuple[bytes, str] | None:
            try:
                answer = self.client.get_object(Bucket=self.name, Key=key)
            except ClientError as error:
                # A 404 without this code may come from any web server or from a wrong path
                if code_and_status(error)[0] == "NoSuchKey":
                    return None
                raise
            return answer["Body"].read(), answer["ETag"]

        return self.retry(fetch, self.url(key))

    def put(
        self,
        key: str,
        file: BinaryFile,
        size: int,
        unchanged: Callable[[], bool] = lambda: True,
        concurrency: int = 4,
    ) -> str:
        """Upload a file, check that the server has the same bytes, and return the ETag.

        ``unchanged`` is called after the upload and returns whether the file has not changed.
        ``concurrency`` is the number of parts of a large file that are sent at a time.

        Raises:
            StorageError: the object did not arrive as it was sent, or the file changed.
            Stopped: ``retry`` was told to stop.
        """
        import obstore

        in_parts = size > PART_BYTES

        def send() -> str:
            file.seek(0)
            running = RunningEtag(PART_BYTES if in_parts else 0)

            def blocks() -> Iterator[bytes]:
                while block := file.read(_BLOCK if in_parts else -1):
                    running.update(block)  # while other parts are being sent
                    yield block

            answer = obstore.put(
                self._large,
                key,
                blocks() if in_parts else b"".join(blocks()),
                use_multipart=in_parts,
                chunk_size=PART_BYTES,
                max_concurrency=concurrency,
            )
            expected = running.etag()
            if not unchanged():
                raise Changed
            if answer["e_tag"] == expected:
                return expected
            # Some servers return no ETag for an upload in parts
            head = self.client.head_object(Bucket=self.name, Key=key, ChecksumMode="ENABLED")
            same = head["ETag"] == expected
            if not same and has_opaque_etag(head):
                checksum = checksum_in(head)
                same = checksum is None or has_checksum(file, checksum) is not False
            if head["ContentLength"] != size or not same:
                raise Corrupt("the server received something else than what was sent")
            return str(head["ETag"])

        return self.retry(send, self.url(key))


def has_opaque_etag(head: dict[str, Any]) -> bool:
    """Return whether the object is encrypted with a KMS or customer key. Its ETag is then not an
    md5, even if it looks like one. ``head`` is the answer to ``head_object``."""
    encryption = str(head.get("ServerSideEncryption", ""))
    return bool(head.get("SSECustomerAlgorithm")) or "kms" in encryption
