"""One bucket: boto3 for its session and small calls, obstore to move bytes.

obstore (Rust) moved small objects at a third of boto3's time and a quarter of its processor
time. Its own retries are off: ``Patience`` asks again, with credentials that are fresh then.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from clipft.errors import UsageError
from clipft.settings import StorageSettings
from clipft.storage.checksums import PART_BYTES, BinaryFile
from clipft.storage.failures import Changed, error_code, storage_errors
from clipft.storage.keys import Places, Refused, RefusedKey, RemoteObject
from clipft.storage.listing import Entry, Pages
from clipft.storage.patience import Patience

if TYPE_CHECKING:
    from obstore.store import S3Store

CONNECT_SECONDS = 10
SILENT_SECONDS = 30
"""Without an answer, and without a further byte of it."""

PIECE = 8 << 20
"""Bytes of one request at most: a larger object comes in as many ranges."""

_SMALL = 1 << 20
_SMALL_SECONDS, _PIECE_SECONDS = 60, 240
"""For a whole request of up to 1 MiB, and of a piece. With 16 in flight a line of 2 Mbit/s
still keeps them; one that drips does not, and is asked again on another connection."""

_CREDENTIALS_LIVE = timedelta(minutes=9)
"""obstore renews them when 5 minutes are left, boto3 10 before they end: never stale."""


def quiet(note: str) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class Bucket:
    """Safe to share between threads."""

    settings: StorageSettings
    client: Any
    patience: Patience
    _pages: Pages
    _small: "S3Store"
    _large: "S3Store"

    @property
    def name(self) -> str:
        return str(self.settings.s3_bucket)

    def url(self, key: str = "") -> str:
        """``s3://bucket/key``, for people."""
        return bucket_url(self.settings, key)

    def apart(self) -> "Bucket":
        """The same bucket for another piece of work, that can be stopped by itself."""
        return replace(self, patience=self.patience.anew())

    def list(self, prefix: str) -> tuple[list[RemoteObject], list[Refused]]:
        """What lies under ``prefix`` and has a place in a folder, and what has none.

        Raises:
            StorageError: the bucket cannot be listed.
        """
        objects: list[RemoteObject] = []
        refused: list[Refused] = []
        places = Places(prefix)
        for entry in self._entries(prefix):
            key, size = entry.key, entry.size
            if key.endswith("/") and size == 0:  # a folder, as consoles mark one
                continue
            try:
                objects.append(RemoteObject(key, places.take(key), size, entry.etag))
            except RefusedKey as refusal:
                refused.append(Refused(key, str(refusal)))
        return objects, refused

    def _entries(self, prefix: str) -> Iterator[Entry]:
        request = {"Prefix": prefix, "EncodingType": "url"}
        while True:
            self.call("list_objects_v2", prefix, **request)
            page = self._pages.last()
            yield from page.entries
            if page.following is None:
                return
            request["ContinuationToken"] = page.following

    def times(self, prefix: str, ending: str) -> dict[str, float]:
        """When the objects right under ``prefix`` with this ending were written, in Unix
        seconds."""
        return {
            entry.key: entry.modified
            for entry in self._entries(prefix)
            if entry.key.endswith(ending) and "/" not in entry.key.removeprefix(prefix)
        }

    def call(self, operation: str, about: str, **request: Any) -> dict[str, Any]:
        """What one of boto3's operations answers about a key or prefix."""

        def ask() -> dict[str, Any]:
            answer: dict[str, Any] = getattr(self.client, operation)(Bucket=self.name, **request)
            return answer

        return self.patience.ask(ask, self.url(about))

    def get(self, wanted: RemoteObject, start: int, end: int) -> memoryview:
        """Bytes ``start`` to ``end`` of exactly the version that was listed.

        Raises:
            StorageError: they do not come, or are of another version by now.
            Stopped: the bucket's ``patience`` was told to stop.
        """
        return self.patience.ask(lambda: self.get_once(wanted, start, end), self.url(wanted.key))

    def get_once(self, wanted: RemoteObject, start: int, end: int) -> memoryview:
        """The same without asking again: whatever obstore raises."""
        import obstore

        options: Any = {"if_match": wanted.etag}
        if (start, end) != (0, wanted.size):
            options["range"] = (start, end)
        store = self._small if end - start <= _SMALL else self._large
        answer = obstore.get(store, wanted.key, options=options)
        if (answer.meta["size"], answer.meta["e_tag"]) != (wanted.size, wanted.etag):
            raise Changed
        body = memoryview(answer.bytes())
        if len(body) != end - start:
            raise Changed
        return body

    def read(self, key: str) -> tuple[bytes, str] | None:
        """A small object and its ETag; None only where S3 itself says that there is none."""
        from botocore.exceptions import ClientError

        def ask() -> tuple[bytes, str] | None:
            try:
                answer = self.client.get_object(Bucket=self.name, Key=key)
            except ClientError as error:
                # A bare 404 may come from any web server or a wrong path: that proves nothing
                if error_code(error) == "NoSuchKey":
                    return None
                raise
            return answer["Body"].read(), answer["ETag"]

        return self.patience.ask(ask, self.url(key))

    def put_once(self, key: str, file: BinaryFile, size: int) -> str:
        """Upload what ``file`` holds; the ETag that the server gives it. Not asked again."""
        import obstore

        file.seek(0)
        large = size > PART_BYTES
        answer = obstore.put(
            self._large,
            key,
            file if large else file.read(),
            use_multipart=large,
            chunk_size=PART_BYTES,
            max_concurrency=4,
        )
        return str(answer["e_tag"])


def bucket_url(settings: StorageSettings, key: str = "") -> str:
    """``s3://bucket/key``, for people."""
    return f"s3://{settings.s3_bucket}/{key}"


def open_bucket(settings: StorageSettings, say: Callable[[str], None] = quiet) -> Bucket:
    """The bucket of ``settings``; ``say`` is told when failures last.

    Raises:
        UsageError: no bucket is set, or the endpoint is not a URL.
        StorageError: the profile does not exist, or there are no credentials.
    """
    if not settings.s3_bucket:
        raise UsageError("no bucket is set", "name it with --s3-bucket, or as s3://bucket/prefix")
    import boto3

    patience = Patience(settings, say)
    with storage_errors(settings, bucket_url(settings)):
        session = boto3.Session(profile_name=settings.s3_profile, region_name=settings.s3_region)
        client = _client(session, settings, None)
        region = _region(client, settings, patience)
        if region != client.meta.region_name:
            client = _client(session, settings, region)
        stores = [
            _store(session, client, settings, seconds)
            for seconds in (_SMALL_SECONDS, _PIECE_SECONDS)
        ]
    return Bucket(settings, client, patience, Pages(client), *stores)


def _client(session: Any, settings: StorageSettings, region: str | None) -> Any:
    from botocore import UNSIGNED
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=SILENT_SECONDS,
        max_pool_connections=settings.s3_requests + 2,
        s3={"addressing_style": _addressing(settings)},
        signature_version=UNSIGNED if settings.s3_anonymous else None,
        # Many servers other than AWS refuse the trailing checksums that boto3 adds
        request_checksum_calculation="when_required" if settings.endpoint_url else None,
    )
    try:
        return session.client(
            "s3", endpoint_url=settings.endpoint_url, config=config, region_name=region
        )
    except ValueError as error:
        raise UsageError(
            f"--endpoint-url {settings.endpoint_url!r} is not a URL of a server",
            "write it with its scheme, such as http://localhost:9000",
        ) from error


def _addressing(settings: StorageSettings) -> str:
    if settings.s3_addressing != "auto":
        return settings.s3_addressing
    return "path" if settings.endpoint_url else "auto"


def _region(client: Any, settings: StorageSettings, patience: Patience) -> str:
    """Where the bucket is: AWS answers for each region at its own address, and obstore
    follows no redirect."""
    from botocore.exceptions import ClientError

    own = str(client.meta.region_name or "us-east-1")
    if "amazonaws.com" not in client.meta.endpoint_url or settings.s3_region:
        return own

    def ask() -> str:
        try:
            answer = client.head_bucket(Bucket=settings.s3_bucket)
        except ClientError as error:
            answer = error.response
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        return str(headers.get("x-amz-bucket-region") or own)

    return patience.ask(ask, bucket_url(settings))


def _store(session: Any, client: Any, settings: StorageSettings, seconds: int) -> "S3Store":
    from botocore.exceptions import NoCredentialsError
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    virtual = _is_virtual(client, settings)
    endpoint = urlsplit(client.meta.endpoint_url)
    host = f"{settings.s3_bucket}.{endpoint.netloc}" if virtual else endpoint.netloc
    options: Any = {
        "allow_http": endpoint.scheme == "http",
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=SILENT_SECONDS),
        "timeout": timedelta(seconds=seconds),
    }
    bundle = session._session.get_config_variable("ca_bundle")
    if bundle:
        with open(bundle, "rb") as file:
            options["root_certificate"] = file.read()
    provider = None
    if not settings.s3_anonymous:
        if session.get_credentials() is None:
            raise NoCredentialsError
        provider = Boto3CredentialProvider(session, ttl=_CREDENTIALS_LIVE)
    return S3Store(
        settings.s3_bucket,
        aws_endpoint_url_s3=f"{endpoint.scheme}://{host}{endpoint.path.rstrip('/')}",
        region=client.meta.region_name or "us-east-1",
        virtual_hosted_style_request=virtual,
        skip_signature=settings.s3_anonymous,
        client_options=options,
        retry_config={"max_retries": 0},
        credential_provider=provider,
    )


def _is_virtual(client: Any, settings: StorageSettings) -> bool:
    """As boto3 would: a bucket with dots has no certificate of its own."""
    style = _addressing(settings)
    return style == "virtual" or (style == "auto" and "." not in str(settings.s3_bucket))
