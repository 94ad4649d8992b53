"""Open a bucket. botocore finds the credentials, region and address, and obstore uses them."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from clipft.config.sections.data import StorageSettings
from clipft.core.common import Note
from clipft.core.errors import UsageError
from clipft.storage.s3.bucket import Bucket
from clipft.storage.s3.errors import explained
from clipft.storage.s3.listing import Listing
from clipft.storage.s3.retry import Retry

if TYPE_CHECKING:
    from obstore.store import S3Credential, S3Store

CONNECT_SECONDS = 10
SILENT_SECONDS = 30
"""How many seconds to wait for an answer, and for each further byte of it."""

_SMALL_SECONDS, _RANGE_SECONDS = 60, 960
"""Time limits in seconds for a whole request of up to 1 MiB, and for a range of 32 MiB. With 16
requests in flight, a connection of 5 Mbit/s meets them. If a connection is much slower, a new one
fetches the missing bytes."""

_CREDENTIALS_LIFETIME = timedelta(minutes=9)
"""obstore renews credentials 5 minutes before they expire, and boto3 10 minutes before. With this
lifetime, obstore asks boto3 again after 4 minutes, so its credentials never expire."""


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
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import Session

    retry, url = Retry(settings, note), f"s3://{settings.s3_bucket}/"
    addressing = settings.s3_addressing
    if addressing == "auto" and settings.endpoint_url:
        addressing = "path"  # most servers other than AWS have no host name for each bucket
    try:
        core = Session(profile=settings.s3_profile)
        if settings.s3_region:
            core.set_config_variable("region", settings.s3_region)
        if settings.endpoint_url:
            region = str(core.get_config_variable("region") or "us-east-1")
            client = _once(lambda: _client(core, settings, addressing, None))
            place = _Place(core, settings, addressing, _checked(settings.endpoint_url), region)
        else:
            found = _client(core, settings, addressing, None)
            region = _region(found, settings, retry, url)
            if region != found.meta.region_name:
                found = _client(core, settings, addressing, region)
            client = _once(lambda: found)
            place = _Place(core, settings, addressing, found.meta.endpoint_url, region)
        listing = place.listing()
        small, large = place.store(_SMALL_SECONDS), place.store(_RANGE_SECONDS)
    except (BotoCoreError, ClientError) as error:
        raise explained(error, settings, url) from error
    return Bucket(settings, settings.s3_bucket, retry, client, listing, small, large)


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    """Return a thread-safe function that calls ``make`` once and always returns its result."""
    lock, made = threading.Lock(), list[Any]()

    def get() -> Any:
        with lock:
            if not made:
                made.append(make())
        return made[0]

    return get


def _checked(endpoint_url: str) -> str:
    from botocore.utils import is_valid_endpoint_url

    if not is_valid_endpoint_url(endpoint_url) or "://" not in endpoint_url:
        raise UsageError(
            f"--endpoint-url {endpoint_url!r} is not the URL of a server",
            "write it with its scheme, such as http://localhost:9000",
        )
    return endpoint_url


def _client(core: Any, settings: StorageSettings, addressing: str, region: str | None) -> Any:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},  # ``Retry`` repeats requests
        connect_timeout=CONNECT_SECONDS,
        read_timeout=SILENT_SECONDS,
        max_pool_connections=settings.s3_requests + 2,
        s3={"addressing_style": addressing},
        signature_version=UNSIGNED if settings.s3_anonymous else None,
        # Many servers other than AWS refuse the trailing checksums that boto3 adds
        request_checksum_calculation="when_required" if settings.endpoint_url else None,
    )
    session = boto3.Session(botocore_session=core)
    return session.client(
        "s3", endpoint_url=settings.endpoint_url, config=config, region_name=region
    )


def _region(client: Any, settings: StorageSettings, retry: Retry, url: str) -> str:
    """Request the region of the bucket. On AWS each region has its own address, and obstore does
    not follow a redirect to it."""
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


@dataclass(frozen=True)
class _Place:
    """Where the bucket is, and a botocore session that has the credentials for it."""

    core: Any
    settings: StorageSettings
    addressing: str
    endpoint: str
    region: str

    @property
    def virtual(self) -> bool:
        """Whether the bucket has its own host name."""
        # As in boto3: no certificate fits the host name of a bucket with dots in its name
        dotted = "." in str(self.settings.s3_bucket)
        return self.addressing == "virtual" or (self.addressing == "auto" and not dotted)

    @property
    def url(self) -> str:
        """The endpoint, with the host of the bucket if it has one."""
        endpoint = urlsplit(self.endpoint)
        host = f"{self.settings.s3_bucket}.{endpoint.netloc}" if self.virtual else endpoint.netloc
        return f"{endpoint.scheme}://{host}{endpoint.path.rstrip('/')}"

    def credentials(self) -> Any:
        """botocore's credentials, which renew themselves; None for anonymous requests."""
        from botocore.exceptions import NoCredentialsError

        found = None if self.settings.s3_anonymous else self.core.get_credentials()
        if found is None and not self.settings.s3_anonymous:
            raise NoCredentialsError
        return found

    def listing(self) -> Listing:
        from botocore.auth import S3SigV4Auth
        from botocore.httpsession import URLLib3Session
        from botocore.utils import get_environ_proxies

        credentials = self.credentials()

        def sign(request: Any) -> None:
            if credentials is not None:
                now = credentials.get_frozen_credentials()
                S3SigV4Auth(now, "s3", self.region).add_auth(request)

        http = URLLib3Session(
            verify=self.core.get_config_variable("ca_bundle") or True,
            proxies=get_environ_proxies(self.url),
            timeout=(CONNECT_SECONDS, SILENT_SECONDS),
        )
        return Listing(
            self.url + ("/" if self.virtual else f"/{self.settings.s3_bucket}"), sign, http
        )

    def store(self, seconds: int) -> "S3Store":
        """obstore's view of the bucket, with a limit of ``seconds`` for each request."""
        from obstore.store import S3Store

        credentials = self.credentials()

        def current_credentials() -> "S3Credential":
            now = credentials.get_frozen_credentials()  # botocore renews them if necessary
            return {
                "access_key_id": now.access_key,
                "secret_access_key": now.secret_key,
                "token": now.token,
                "expires_at": datetime.now(UTC) + _CREDENTIALS_LIFETIME,
            }

        options: Any = {
            "allow_http": self.url.startswith("http:"),
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            "read_timeout": timedelta(seconds=SILENT_SECONDS),
            "timeout": timedelta(seconds=seconds),
        }
        if bundle := self.core.get_config_variable("ca_bundle"):
            with open(bundle, "rb") as file:
                options["root_certificate"] = file.read()
        return S3Store(
            str(self.settings.s3_bucket),
            aws_endpoint_url_s3=self.url,
            region=self.region,
            virtual_hosted_style_request=self.virtual,
            skip_signature=self.settings.s3_anonymous,
            # As boto3 does: TLS protects the bytes on the way, and the ETag is compared afterwards
            unsigned_payload=self.url.startswith("https:"),
            client_options=options,
            retry_config={"max_retries": 0},
            credential_provider=current_credentials if credentials else None,
        )
