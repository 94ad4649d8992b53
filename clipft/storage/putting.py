"""Uploading a file and seeing that its bytes are what lies there."""

from collections.abc import Callable
from typing import Any

from clipft.storage.s3.bucket import Bucket
from clipft.storage.s3.checksums import PART_BYTES, BinaryFile, etag_of
from clipft.storage.s3.errors import Corrupt


def put_checked(
    bucket: Bucket, key: str, file: BinaryFile, size: int, unchanged: Callable[[], None]
) -> str:
    """The ETag of the object, asked again while failures may pass.

    ``unchanged`` raises if the file is no longer what it was before.

    Raises:
        StorageError: it did not arrive as it is.
        Stopped: the bucket's ``patience`` was told to stop.
    """

    def put() -> str:
        expected = etag_of(file, size, PART_BYTES)
        etag = bucket.put_once(key, file, size)
        unchanged()
        if etag == expected:
            return etag
        # Some servers give no ETag in answer to parts
        head = bucket.client.head_object(Bucket=bucket.name, Key=key)
        if head["ContentLength"] != size or not (head["ETag"] == expected or is_keyed(head)):
            raise Corrupt("it is not what was sent")
        return str(head["ETag"])

    return bucket.patience.ask(put, bucket.url(key))


def is_keyed(head: dict[str, Any]) -> bool:
    """With keys of KMS or the customer an ETag may look like an md5 and is none."""
    encryption = str(head.get("ServerSideEncryption", ""))
    return bool(head.get("SSECustomerAlgorithm")) or "kms" in encryption
