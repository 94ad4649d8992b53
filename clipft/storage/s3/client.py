"""Opening a bucket: boto3 finds credentials, region and address, obstore is told of them."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from clipft.config.settings import StorageSettings
from clipft.core.errors import UsageError
from clipft.storage.s3.bucket import Bucket, Pages, bucket_url, quiet
from clipft.storage.s3.errors import Patience, storage_errors

if TYPE_CHECKING:
    from obstore.store import S3Credential, S3Store

CONNECT_SECONDS = 10
SILENT_SECONDS = 30
"""Without an answer, and without a further byte of it."""

_SMALL_SECONDS, _PIECE_SECONDS = 60, 240
"""For a whole request of up to 1 MiB, and of a piece. With 16 in flight a line of 2 Mbit/s
still keeps them; one that drips does not, and is asked again on another connection."""

_CREDENTIALS_LIVE = timedelta(minutes=9)
"""obstore renews them when 5 minutes are left, boto3 10 before they end: never stale."""


def open_bucket(settings: StorageSettings, say: Callable[[str], None] = quiet) -> Bucket:
    """The bucket of ``settings``; ``say`` is told when failures last.

    Raises:
        UsageError: no bucket is set, or the endpoint is not a URL.
        StorageError: the profile does not exist, or there are no credentials.
    """
    if not settings.s3_bucket:
        raise UsageError(
            "no bucket is set", "name it with --s3-bucket, or as --data-dir s3://bucket/prefix"
        )
    import boto3
    from botocore.session import Session

    patience = Patience(settings, say)
    with storage_errors(settings, bucket_url(settings)):
        core = Session(profile=settings.s3_profile)
        session = boto3.Session(botocore_session=core, region_name=settings.s3_region)
        client = _client(session, settings, None)
        region = _region(client, settings, patience)
        if region != client.meta.region_name:
            client = _client(session, settings, region)
        stores = [
            _store(core, client, settings, seconds) for seconds in (_SMALL_SECONDS, _PIECE_SECONDS)
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


def _store(core: Any, client: Any, settings: StorageSettings, seconds: int) -> "S3Store":
    from botocore.exceptions import NoCredentialsError
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
    bundle = core.get_config_variable("ca_bundle")
    if bundle:
        with open(bundle, "rb") as file:
            options["root_certificate"] = file.read()
    credentials = None if settings.s3_anonymous else core.get_credentials()
    if credentials is None and not settings.s3_anonymous:
        raise NoCredentialsError
    return S3Store(
        settings.s3_bucket,
        aws_endpoint_url_s3=f"{endpoint.scheme}://{host}{endpoint.path.rstrip('/')}",
        region=client.meta.region_name or "us-east-1",
        virtual_hosted_style_request=virtual,
        skip_signature=settings.s3_anonymous,
        client_options=options,
        retry_config={"max_retries": 0},
        credential_provider=_Credentials(credentials) if credentials else None,
    )


def _is_virtual(client: Any, settings: StorageSettings) -> bool:
    """As boto3 would: a bucket with dots has no certificate of its own."""
    style = _addressing(settings)
    return style == "virtual" or (style == "auto" and "." not in str(settings.s3_bucket))


class _Credentials:
    """Those of botocore, which renews them, for obstore."""

    def __init__(self, credentials: Any) -> None:
        self._credentials = credentials

    def __call__(self) -> "S3Credential":
        now = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_LIVE,
        }
