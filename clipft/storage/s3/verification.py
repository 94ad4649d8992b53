"""Check that the bytes that arrived are those of an object, by what the server says about it.

An ETag that is an md5 is enough, and costs no request. For all others one HEAD request asks for
the checksum that newer servers keep: it also tells where the ETag is no md5 (KMS), and is quicker
than the md5 of parts whose size must be guessed. Where there is none, the ETag of the parts counts.
"""

from clipft.storage.s3.bucket import Bucket, has_opaque_etag
from clipft.storage.s3.checksums import BinaryFile, checksum_in, has_checksum, matches, plain_md5
from clipft.storage.s3.errors import Changed, Corrupt
from clipft.storage.s3.keys import RemoteObject


def check_bytes(bucket: Bucket, wanted: RemoteObject, file: BinaryFile) -> str:
    """Check that ``file`` has the bytes of an object.

    Returns:
        The algorithm of the checksum that would have told it, but is not installed; otherwise "".

    Raises:
        Corrupt: the file has other bytes.
        Changed: the object has been replaced.
    """
    etag_first = bool(plain_md5(wanted.etag)) or not wanted.has_checksum
    if etag_first and _has_etag(bucket, wanted, file) is not False:
        return ""
    head = bucket.call("head_object", wanted.key, Key=wanted.key, ChecksumMode="ENABLED")
    if head["ETag"] != wanted.etag:
        raise Changed
    checksum = checksum_in(head)
    if checksum and (same := has_checksum(file, checksum)) is not None:
        if not same:
            raise Corrupt(f"its bytes do not have the {checksum.algorithm} that the server states")
        return ""
    same = None if has_opaque_etag(head) else _has_etag(bucket, wanted, file)
    if same is False:
        raise Corrupt("its bytes do not have the md5 that its ETag names")
    return checksum.algorithm if checksum and not same else ""


def _has_etag(bucket: Bucket, wanted: RemoteObject, file: BinaryFile) -> bool | None:
    def first_part() -> int:
        """Bytes of the first part of the upload, or 0 if the server does not say."""
        answer = bucket.call("head_object", wanted.key, Key=wanted.key, PartNumber=1)
        size = int(answer["ContentLength"])
        return size if size < wanted.size else 0

    return matches(file, wanted.size, wanted.etag, first_part)
