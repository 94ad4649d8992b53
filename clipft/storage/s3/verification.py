"""Check that the bytes that arrived are those of an object, by its ETag or checksum.

If the ETag is an md5, it is enough, and no request is needed. Otherwise one HEAD request gets the
checksum that newer servers store. It also works if the ETag is not an md5 (KMS), and is faster than
the md5 of parts whose size must be guessed. If there is no checksum, the ETag of the parts is used.

The bytes of large objects are digested while they arrive, by the threads that fetch them. For these
objects a CRC is preferred if the server has one: it takes a tenth of the processor time of an md5.
"""

from dataclasses import dataclass

from clipft.storage.s3.bucket import Bucket, has_opaque_etag
from clipft.storage.s3.checksums import (
    ALGORITHMS,
    QUICK,
    BinaryFile,
    Checksum,
    Running,
    RunningEtag,
    checksum_in,
    has_checksum,
    matches,
    plain_md5,
    possible_parts,
)
from clipft.storage.s3.errors import Changed, Corrupt
from clipft.storage.s3.keys import RemoteObject


@dataclass(frozen=True)
class Arriving:
    """The digest that is computed while the bytes of an object arrive: an ETag or, if ``algorithm``
    is not "", a checksum."""

    running: RunningEtag | Running
    algorithm: str = ""

    def is_etag(self, etag: str) -> bool:
        return isinstance(self.running, RunningEtag) and self.running.etag() == etag

    def is_checksum(self, stated: Checksum) -> bool | None:
        """Return whether the bytes have the checksum ``stated``; None if it was not computed."""
        if isinstance(self.running, RunningEtag) or self.algorithm != stated.algorithm:
            return None
        return self.running.digest() == stated.value


def digest_while_arriving(wanted: RemoteObject) -> Arriving | None:
    """Return the digest to compute for ``wanted``, or None if the right one is not known yet."""
    if wanted.checksum in QUICK and (running := ALGORITHMS[wanted.checksum]()):
        return Arriving(running, wanted.checksum)
    if plain_md5(wanted.etag):
        return Arriving(RunningEtag())
    parts = possible_parts(wanted.size, wanted.etag)
    return Arriving(RunningEtag(parts[0])) if len(parts) == 1 else None


def check_bytes(
    bucket: Bucket, wanted: RemoteObject, file: BinaryFile, arrived: Arriving | None = None
) -> str:
    """Check that ``file`` has the bytes of an object; ``arrived`` has digested all of them.

    Returns:
        The algorithm that the check would need, if it is not installed; otherwise "".

    Raises:
        Corrupt: the file has other bytes.
        Changed: the object has been replaced.
    """
    if arrived and arrived.is_etag(wanted.etag):
        return ""
    etag_first = not arrived and (bool(plain_md5(wanted.etag)) or not wanted.checksum)
    if etag_first and _has_etag(bucket, wanted, file) is not False:
        return ""
    head = bucket.call("head_object", wanted.key, Key=wanted.key, ChecksumMode="ENABLED")
    if head["ETag"] != wanted.etag:
        raise Changed
    if checksum := checksum_in(head):
        same = arrived.is_checksum(checksum) if arrived else None
        same = has_checksum(file, checksum) if same is None else same
        if same is False:
            raise Corrupt(f"its bytes do not have the {checksum.algorithm} that the server states")
        if same:
            return ""
    same = None if has_opaque_etag(head) else _has_etag(bucket, wanted, file)
    if same is False:
        raise Corrupt("its bytes do not have the md5 that its ETag names")
    return checksum.algorithm if checksum and not same else ""


def _has_etag(bucket: Bucket, wanted: RemoteObject, file: BinaryFile) -> bool | None:
    def first_part() -> int:
        """Return the bytes of the first part of the upload, or 0 if the server does not say."""
        answer = bucket.call("head_object", wanted.key, Key=wanted.key, PartNumber=1)
        size = int(answer["ContentLength"])
        return size if size < wanted.size else 0

    return matches(file, wanted.size, wanted.etag, first_part)
