"""Checkpoints in the bucket: uploaded whole, fetched whole, absent only when proven so."""

import hashlib
import os
import random
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipft.errors import StorageError
from clipft.settings import StorageSettings
from clipft.storage.locations import (
    OWN_PREFIX,
    PLAIN_MD5,
    RefusedKey,
    bucket_url,
    disk_error,
    error_code,
    local_path,
    open_client,
    storage_errors,
)

FOLDER = "checkpoints"

BODY_ATTEMPTS = 5
BODY_PAUSE = 0.25
"""Tries of a body that breaks off, and seconds before the second (then doubled):
boto3 itself retries only what comes before the body."""

_CHUNK = 1 << 20


def upload_checkpoint(path: Path, settings: StorageSettings) -> str:
    """Upload a checkpoint to ``checkpoints/{file name}`` and return its s3:// URL.

    The object appears at once and whole; its sha256 is kept in its metadata.

    Raises:
        UsageError: no bucket is set.
        StorageError: the file cannot be read, or did not arrive as it is.
    """
    client = open_client(settings)
    key = _key(path.name)
    url = bucket_url(settings, key)
    try:
        # One open file for hash and upload: a newer save renamed over it cannot mix in
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            extra = {"Metadata": {"sha256": digest}}
            with storage_errors(settings, url):
                client.upload_fileobj(file, settings.s3_bucket, key, ExtraArgs=extra)
                found = client.head_object(Bucket=settings.s3_bucket, Key=key)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", "check the file") from error
    if (found["ContentLength"], found["Metadata"].get("sha256")) != (size, digest):
        raise StorageError(
            f"{url} is not what was uploaded", "another run may write to it: see --s3-bucket"
        )
    return url


def fetch_checkpoint(name: str, target: Path, settings: StorageSettings) -> bool:
    """Fetch ``checkpoints/{name}`` to the file ``target``; False: proven not to exist.

    Raises:
        UsageError: no bucket is set.
        StorageError: whatever else keeps it from being seen, or it did not arrive whole;
            ``target`` is then as it was.
    """
    client = open_client(settings)
    key = _key(name)
    part = target.parent / f"{OWN_PREFIX}part-{uuid.uuid4().hex}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        answer = _download(client, settings, key, part)
        if answer is None:
            return False
        _check(part, answer, bucket_url(settings, key))
        os.replace(part, target)
    except OSError as error:
        raise disk_error(error, target, 0) from error
    finally:
        part.unlink(missing_ok=True)
    return True


def _key(name: str) -> str:
    try:
        local_path(name)
    except RefusedKey as refusal:
        raise StorageError(
            f"{name!r} is no name for a checkpoint: it {refusal}", "name a file"
        ) from None
    return f"{FOLDER}/{name}"


def _download(
    client: Any, settings: StorageSettings, key: str, part: Path
) -> dict[str, Any] | None:
    """What GetObject answered; None only where S3 itself says that there is no such key."""
    from botocore.exceptions import ClientError

    request = {"Bucket": str(settings.s3_bucket), "Key": key}
    with storage_errors(settings, bucket_url(settings, key)):
        try:
            return download(client, request, part, lambda count: None)
        except ClientError as error:
            # A bare 404 may come from any web server or a wrong path: that proves nothing
            if error_code(error) == "NoSuchKey":
                return None
            raise


def _check(part: Path, answer: dict[str, Any], url: str) -> None:
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if answer["Metadata"].get("sha256", digest) != digest:
        raise StorageError(
            f"{url} does not have the sha256 it was uploaded with", "use another checkpoint"
        )


def download(
    client: Any, request: dict[str, str], part: Path, count: Callable[[int], None]
) -> dict[str, Any]:
    """Write one object to ``part``, on disk and checked against its size and md5.

    ``request`` are the arguments of GetObject. ``count`` is told each number of bytes, a
    negative one when a broken body is begun anew. Returns what GetObject answered.

    Raises:
        OSError: the disk does not take it.
        botocore's errors: see ``storage_errors``.
    """
    from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError

    for attempt in range(1, BODY_ATTEMPTS + 1):
        answer: dict[str, Any] = client.get_object(**request)
        try:
            _write_body(answer, part, count)
            return answer
        except (IncompleteReadError, HTTPClientError, FlexibleChecksumError):
            if part.exists():
                count(-part.stat().st_size)
            if attempt == BODY_ATTEMPTS:
                raise
            time.sleep(BODY_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1))  # noqa: S311
    raise AssertionError("unreachable")


def _write_body(answer: dict[str, Any], part: Path, count: Callable[[int], None]) -> None:
    from botocore.exceptions import FlexibleChecksumError, IncompleteReadError

    digest, size, body = hashlib.md5(usedforsecurity=False), 0, answer["Body"]
    # Unbuffered, so that the part's size is what was counted
    with body, open(part, "wb", buffering=0) as file:
        while chunk := body.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            count(len(chunk))
        os.fsync(file.fileno())
    if size != answer["ContentLength"]:
        raise IncompleteReadError(actual_bytes=size, expected_bytes=answer["ContentLength"])
    etag = answer.get("ETag", "").strip('"')
    # With keys of KMS or the customer the ETag looks like an md5 and is none
    keyed = answer.get("SSECustomerAlgorithm") or "kms" in answer.get("ServerSideEncryption", "")
    if PLAIN_MD5.fullmatch(etag) and not keyed and digest.hexdigest() != etag:
        raise FlexibleChecksumError(error_msg="its bytes do not have the md5 of its ETag")
