"""Where things are: the bucket's client, its errors as sentences, its keys as paths."""

import errno
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.errors import ClipftError, StorageError, UsageError
from clipft.settings import StorageSettings

THREADS = 8
"""Objects in flight at a time."""

ATTEMPTS = 10
"""Tries of one request, with growing pauses (botocore's standard mode)."""

CONNECT_TIMEOUT = 10
READ_TIMEOUT = 60
"""Seconds without an answer, and without a further byte of it."""

OWN_PREFIX = ".clipft-"
"""Names that clipft keeps for itself in a target folder."""

PLAIN_MD5 = re.compile(r"[0-9a-f]{32}")
"""The ETag of an object that was put in one piece."""

_MAX_NAME_BYTES = 255


class RefusedKey(Exception):
    """A key that has no safe place in the target; its text is the reason."""


@dataclass(frozen=True)
class Refused:
    key: str
    reason: str


@dataclass(frozen=True)
class RemoteObject:
    """One object of the bucket and its place in a target folder. ``size`` in bytes."""

    key: str
    path: Path
    size: int
    etag: str

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders it lies in, the innermost first, without the target itself."""
        return tuple(self.path.parents)[:-1]


def open_client(settings: StorageSettings) -> Any:
    """A boto3 S3 client for the bucket of ``settings``; safe to share between threads.

    Raises:
        UsageError: no bucket is set, or the endpoint is not a URL.
        StorageError: the profile does not exist.
    """
    if not settings.s3_bucket:
        raise UsageError("no bucket is set", "name it with --s3-bucket")
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        max_pool_connections=THREADS + 2,
        s3={"addressing_style": "path" if settings.endpoint_url else "auto"},
        # Many servers other than AWS refuse the trailing checksums that boto3 adds
        request_checksum_calculation="when_required" if settings.endpoint_url else None,
    )
    with storage_errors(settings, bucket_url(settings)):
        session = boto3.Session(profile_name=settings.s3_profile, region_name=settings.s3_region)
        try:
            return session.client("s3", endpoint_url=settings.endpoint_url, config=config)
        except ValueError as error:
            raise UsageError(
                f"--endpoint-url {settings.endpoint_url!r} is not a URL of a server",
                "write it with its scheme, such as http://localhost:9000",
            ) from error


def bucket_url(settings: StorageSettings, key: str = "") -> str:
    """``s3://bucket/key``, for people."""
    return f"s3://{settings.s3_bucket}/{key}"


def local_path(relative: str) -> Path:
    """The path under a target folder for a key without its prefix.

    Raises:
        RefusedKey: the key could leave the target or is no file name everywhere.
    """
    parts = relative.split("/")
    for part in parts:
        if reason := _fault(part):
            raise RefusedKey(reason)
    path = Path(*parts)
    if path.is_absolute() or path.drive:  # Windows: C:name
        raise RefusedKey("names a drive")
    return path


def _fault(part: str) -> str | None:
    """Why a part of a key cannot be a file name, if so."""
    if part in {"", ".", ".."}:
        return f"has a part {part!r}"
    if "\\" in part:
        return "has a backslash"
    if any(unicodedata.category(letter) == "Cc" for letter in part):
        return "has a control character"
    if spelling(part).startswith(OWN_PREFIX):
        return f"begins with {OWN_PREFIX}, which clipft keeps for itself"
    try:
        size = len(part.encode("utf-8"))
    except UnicodeEncodeError:
        return "is not valid Unicode"
    return f"has a part of over {_MAX_NAME_BYTES} bytes" if size > _MAX_NAME_BYTES else None


def spelling(name: str) -> str:
    """One form for all names that some file system takes for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def folder_prefixes(settings: StorageSettings) -> tuple[str, str]:
    """Of train and val, as folders: ``data/train`` must not bring ``data/training/``."""
    given = (settings.s3_prefix, settings.s3_val_prefix)
    train, val = (f"{prefix.strip('/')}/".lstrip("/") for prefix in given)
    if train.startswith(val) or val.startswith(train):
        raise UsageError(
            f"--s3-prefix {given[0]!r} and --s3-val-prefix {given[1]!r} overlap: a model would "
            "be validated on its training pairs",
            "give each its own folder in the bucket",
        )
    return train, val


def list_objects(
    client: Any, settings: StorageSettings, prefix: str
) -> tuple[list[RemoteObject], list[Refused]]:
    """What lies under ``prefix`` and has a place in a folder, and what has none.

    Raises:
        StorageError: the bucket cannot be listed.
    """
    objects: list[RemoteObject] = []
    refused: list[Refused] = []
    taken: dict[str, str] = {}
    pages = client.get_paginator("list_objects_v2")
    with storage_errors(settings, bucket_url(settings, prefix)):
        for page in pages.paginate(Bucket=settings.s3_bucket, Prefix=prefix):
            for entry in page.get("Contents", ()):
                key, size = entry["Key"], entry["Size"]
                if key.endswith("/") and size == 0:  # a folder, as consoles mark one
                    continue
                try:
                    path = local_path(key.removeprefix(prefix))
                    _take(path, taken)
                except RefusedKey as refusal:
                    refused.append(Refused(key, str(refusal)))
                else:
                    objects.append(RemoteObject(key, path, size, entry["ETag"]))
    return objects, refused


def _take(path: Path, taken: dict[str, str]) -> None:
    """Reserve ``path`` in ``taken``, as every file system would."""
    name = spelling(path.as_posix())
    folders = [spelling(parent.as_posix()) for parent in path.parents if parent != Path()]
    if taken.get(name):
        raise RefusedKey(f"is another key's {taken[name]} (upper and lower case are alike)")
    if any(taken.get(folder) == "file" for folder in folders):
        raise RefusedKey("lies in a folder that is another key's file")
    taken[name] = "file"
    taken.update(dict.fromkeys(folders, "folder"))


_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile: --s3-profile"
_KINDS = {
    "credentials": ("no usable AWS credentials for {url}", _CREDENTIALS),
    "profile": ("the AWS configuration has no profile {profile}", "check --s3-profile"),
    "key": ("the access key or its secret is wrong for {url}", _CREDENTIALS),
    "expired": (
        "the session token for {url} is expired or invalid",
        "sign in again (such as `aws sso login`), then repeat the command",
    ),
    "forbidden": (
        "access to {url} is forbidden (403)",
        "the credentials need s3:ListBucket, s3:GetObject and, for checkpoints, s3:PutObject",
    ),
    "bucket": ("bucket {bucket} does not exist (404)", "check --s3-bucket and --endpoint-url"),
    "missing": (
        "{url} is not there (404)",
        "it may have been deleted meanwhile: repeat the command, or check --endpoint-url",
    ),
    "region": (
        "bucket {bucket} is in another region",
        "name it with --s3-region, or check --endpoint-url",
    ),
    "clock": ("this machine's clock is too far off for {url}", "set the clock, then repeat"),
    "changed": ("{url} was changed while it was read", "repeat the command to get the new one"),
    "busy": (
        "{url}: the server is overloaded or failing ({detail}), also after {attempts} tries",
        "repeat the command later: what has arrived is kept",
    ),
    "dns": ("the server's name is unknown: {detail}", "check --endpoint-url and the network"),
    "tls": ("no trusted TLS connection: {detail}", "check --endpoint-url and AWS_CA_BUNDLE"),
    "unreachable": (
        "the server cannot be reached: {detail}",
        "check --endpoint-url and the network, then repeat the command",
    ),
    "broken": (
        "{url} did not arrive whole: {detail}",
        "repeat the command: what has arrived whole is kept",
    ),
    "invalid": ("{url} cannot be asked for: {detail}", "check --s3-bucket and the prefixes"),
    "other": ("{url}: {detail}", "check the storage settings with `clipft settings`"),
}
_OF_CODE = {
    "InvalidAccessKeyId": "key",
    "SignatureDoesNotMatch": "key",
    "ExpiredToken": "expired",
    "ExpiredTokenException": "expired",
    "InvalidToken": "expired",
    "TokenRefreshRequired": "expired",
    "NoSuchBucket": "bucket",
    "AuthorizationHeaderMalformed": "region",
    "PermanentRedirect": "region",
    "IllegalLocationConstraintException": "region",
    "RequestTimeTooSkewed": "clock",
    "RequestTimeout": "busy",
    "SlowDown": "busy",
    "Throttling": "busy",
}
_OF_STATUS = {301: "region", 403: "forbidden", 404: "missing", 412: "changed", 429: "busy"}
_OF_EXCEPTION = {
    "NoCredentialsError": "credentials",
    "PartialCredentialsError": "credentials",
    "CredentialRetrievalError": "credentials",
    "ProfileNotFound": "profile",
    "TokenRetrievalError": "expired",
    "SSOTokenLoadError": "expired",
    "UnauthorizedSSOTokenError": "expired",
    "LoginRefreshRequired": "expired",
    "SSLError": "tls",
    "EndpointConnectionError": "unreachable",
    "ConnectTimeoutError": "unreachable",
    "ProxyConnectionError": "unreachable",
    "ConnectionClosedError": "broken",
    "ReadTimeoutError": "broken",
    "IncompleteReadError": "broken",
    "ResponseStreamingError": "broken",
    "FlexibleChecksumError": "broken",
    "ParamValidationError": "invalid",
    "InvalidRegionError": "region",
}


@contextmanager
def storage_errors(settings: StorageSettings, url: str) -> Iterator[None]:
    """Whatever boto3 raises about ``url`` becomes a StorageError of its kind."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise _explained(error, settings, url) from error


def _explained(error: Any, settings: StorageSettings, url: str) -> StorageError:
    message, hint = _KINDS[_kind(error)]
    facts = {
        "url": url,
        "bucket": settings.s3_bucket,
        "profile": settings.s3_profile or os.environ.get("AWS_PROFILE"),
        "detail": str(error),
        "attempts": ATTEMPTS,
    }
    return StorageError(message.format(**facts), hint)


def _kind(error: Any) -> str:
    if hasattr(error, "response"):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        by_status = "busy" if status >= 500 else _OF_STATUS.get(status, "other")
        return _OF_CODE.get(error_code(error), by_status)
    for ancestor in type(error).__mro__:
        kind = _OF_EXCEPTION.get(ancestor.__name__)
        if kind == "unreachable" and _is_dns(error):
            return "dns"
        if kind:
            return kind
    return "other"


def error_code(error: Any) -> str:
    """S3's own name of what went wrong, such as ``NoSuchKey``."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _is_dns(error: Any) -> bool:
    cause = str(getattr(error, "kwargs", {}).get("error", ""))
    return "resolve" in cause.lower() or "name or service not known" in cause.lower()


def disk_error(error: OSError, path: Path, wanted: int) -> ClipftError:
    """The sentence for a failed write of ``wanted`` bytes at ``path``."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return StorageError(
            f"no space left for {path}: {wanted:,} bytes wanted",
            "make room or set another --data-dir; what has arrived whole is kept",
        )
    reason = error.strerror or str(error)
    return StorageError(f"cannot write to {path}: {reason}", "check the folder and its rights")


def check_space(folder: Path, wanted: int) -> None:
    """Refuse ahead of the first byte what cannot fit. ``wanted`` is in bytes.

    Raises:
        StorageError: naming the bytes wanted and free.
    """
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise StorageError(
            f"no space left for {folder}: {wanted:,} bytes wanted, {free:,} free",
            "make room or set another --data-dir",
        )
