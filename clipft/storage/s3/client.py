"""Open a bucket: boto3 finds credentials, region and address, and obstore is given them."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from clipft.config.sections.data import StorageSettings
from clipft.core.common import Note
from clipft.core.errors import UsageError
from clipft.storage.s3.bucket import Bucket
from clipft.storage.s3.errors import explained
from clipft.storage.s3.listing import ListingReader
from clipft.storage.s3.retry import Retry

if TYPE_CHECKING:
    from obstore.store import S3Credential, S3Store

CONNECT_SECONDS = 10
SILENT_SECONDS = 30
"""How long to wait for an answer, and for each further byte of it."""

_SMALL_SECONDS, _RANGE_SECONDS = 60, 240
"""Limits for a whole request of up to 1 MiB, and of a range of 8 MiB. With 16 requests in flight
a connection of 2 Mbit/s still meets them. One that only drips does not, and the request is
repeated on another connection."""

_CREDENTIALS_LIFETIME = timedelta(minutes=9)
"""obstore renews credentials 5 minutes before they end, boto3 10 minutes before: with this
lifetime obstore asks boto3 again after 4 minutes, and never holds stale ones."""


def open_bucket(settings: StorageSettings, note: Note = lambda message: None) -> Bucket:
    """Open the bucket of ``settings``. ``note`` is called when requests keep failing.

    Raises:
        UsageError: no bucket is set, or the endpoint is not a URL.
        StorageError: the profile does not exist, or there are no credentials.
    """
    if not settings.s3_bucket:
        raise UsageError(
            "no bucket is set", "name it with --s3-bucket, or as --data-dir s3://bucket/prefix"
        )
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import Session

    retry, url = Retry(settings, note), f"s3://{settings.s3_bucket}/"
    addressing = settings.s3_addressing
    if addressing == "auto" and settings.endpoint_url:
        addressing = "path"  # few servers other than AWS have a host name for each bucket
    try:
        core = Session(profile=settings.s3_profile)
        session = boto3.Session(botocore_session=core, region_name=settings.s3_region)
        client = _client(session, settings, addressing, None)
        region = _region(client, settings, retry, url)
        if region != client.meta.region_name:
            client = _client(session, settings, addressing, region)
        small = _store(core, client, settings, addressing, _SMALL_SECONDS)
        large = _store(core, client, settings, addressing, _RANGE_SECONDS)
    except (BotoCoreError, ClientError) as error:
        raise explained(error, settings, url) from error
    return Bucket(settings, settings.s3_bucket, client, retry, ListingReader(client), small, large)


def _client(session: Any, settings: StorageSettings, addressing: str, region: str | None) -> Any:
    from botocore import UNSIGNED
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},  # ``Retry`` does it
        connect_timeout=CONNECT_SECONDS,
        read_timeout=SILENT_SECONDS,
        max_pool_connections=settings.s3_requests + 2,
        s3={"addressing_style": addressing},
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
            f"--endpoint-url {settings.endpoint_url!r} is not the URL of a server",
            "write it with its scheme, such as http://localhost:9000",
        ) from error


def _region(client: Any, settings: StorageSettings, retry: Retry, url: str) -> str:
    """The region of the bucket. On AWS each region has an address of its own, and obstore does
    not follow the redirect to it, so the bucket is asked where it is."""
    from botocore.exceptions import ClientError

    configured = str(client.meta.region_name or "us-east-1")
    if "amazonaws.com" not in client.meta.endpoint_url or settings.s3_region:
        return configured

    def ask() -> str:
        try:
            answer = client.head_bucket(Bucket=settings.s3_bucket)
        except ClientError as error:  # a redirect or a refusal names the region too
            answer = error.response
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        return str(headers.get("x-amz-bucket-region") or configured)

    return retry(ask, url)


def _store(
    core: Any, client: Any, settings: StorageSettings, addressing: str, seconds: int
) -> "S3Store":
    """obstore's view of the bucket, with a limit of ``seconds`` for each request."""
    from botocore.exceptions import NoCredentialsError
    from obstore.store import S3Store

    credentials: Any = None if settings.s3_anonymous else core.get_credentials()
    if credentials is None and not settings.s3_anonymous:
        raise NoCredentialsError

    def current_credentials() -> "S3Credential":
        now = credentials.get_frozen_credentials()  # botocore renews them if they are due
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_LIFETIME,
        }

    # As boto3 chooses: a bucket with dots in its name has no certificate for its own host
    dotted = "." in str(settings.s3_bucket)
    virtual = addressing == "virtual" or (addressing == "auto" and not dotted)
    endpoint = urlsplit(client.meta.endpoint_url)
    host = f"{settings.s3_bucket}.{endpoint.netloc}" if virtual else endpoint.netloc
    options: Any = {
        "allow_http": endpoint.scheme == "http",
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=SILENT_SECONDS),
        "timeout": timedelta(seconds=seconds),
    }
    if bundle := core.get_config_variable("ca_bundle"):
        with open(bundle, "rb") as file:
            options["root_certificate"] = file.read()
    return S3Store(
        settings.s3_bucket,
        aws_endpoint_url_s3=f"{endpoint.scheme}://{host}{endpoint.path.rstrip('/')}",
        region=client.meta.region_name or "us-east-1",
        virtual_hosted_style_request=virtual,
        skip_signature=settings.s3_anonymous,
        client_options=options,
        retry_config={"max_retries": 0},
        credential_provider=current_credentials if credentials else None,
    )
