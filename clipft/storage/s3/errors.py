"""What boto3 and obstore raise, as one list of kinds and as sentences for people."""

import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from clipft.config.settings import StorageSettings
from clipft.core.errors import StorageError


class Changed(Exception):
    """The object is no longer the one that was listed."""


class Corrupt(Exception):
    """The bytes that came are not those of the object; its text says how."""


PASSING = frozenset({"busy", "unreachable", "dns", "broken"})
"""Kinds that may be gone at the next try."""

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
        "the credentials need s3:ListBucket, s3:GetObject and, to upload, s3:PutObject",
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
        "{url}: the server is overloaded or failing ({detail}), also when asked again for a while",
        "repeat the command later: what has arrived is kept; --s3-retry-timeout sets for how long",
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
    "XAmzContentSHA256Mismatch": "broken",
    "BadDigest": "broken",
    "SlowDown": "busy",
    "Throttling": "busy",
    "NotImplemented": "other",
}
_OF_STATUS = {301: "region", 403: "forbidden", 404: "missing", 412: "changed", 429: "busy"}
_OF_EXCEPTION = {
    "Corrupt": "broken",
    "Changed": "changed",
    "UnauthenticatedError": "credentials",
    "PermissionDeniedError": "forbidden",
    "FileNotFoundError": "missing",
    "PreconditionError": "changed",
    "AlreadyExistsError": "changed",
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


def explained(error: Exception, settings: StorageSettings, url: str) -> StorageError:
    """The sentence for what boto3 or obstore raised about ``url``."""
    message, hint = _KINDS[kind_of(error)]
    facts = {
        "url": url,
        "bucket": settings.s3_bucket,
        "profile": settings.s3_profile or os.environ.get("AWS_PROFILE"),
        "detail": _detail(error),
    }
    return StorageError(message.format(**facts), hint)


@contextmanager
def storage_errors(settings: StorageSettings, url: str) -> Iterator[None]:
    """Whatever boto3 raises about ``url`` becomes a StorageError of its kind."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise explained(error, settings, url) from error


def kind_of(error: Any) -> str:
    """One of ``_KINDS``."""
    code, status = error_code(error), _status(error)
    if code in _OF_CODE:
        return _OF_CODE[code]
    if status:
        return "busy" if status >= 500 else _OF_STATUS.get(status, "other")
    for ancestor in type(error).__mro__:
        kind = _OF_EXCEPTION.get(ancestor.__name__)
        if kind == "unreachable" and _is_dns(error):
            return "dns"
        if kind:
            return kind
    return "disk" if isinstance(error, OSError) else _of_text(str(error))


def error_code(error: Any) -> str:
    """S3's own name of what went wrong, such as ``NoSuchKey``; "" where it gave none."""
    if hasattr(error, "response"):
        return str(error.response.get("Error", {}).get("Code", ""))
    found = re.search(r"<Code>(\w+)</Code>", str(error))
    return found[1] if found else ""


def _status(error: Any) -> int:
    if hasattr(error, "response"):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    found = re.search(r"non-2xx status code: (\d{3})", str(error))
    return int(found[1]) if found else 0


def _of_text(text: str) -> str:
    """Of obstore's errors of transport, which have no types: reqwest's words for them."""
    lowered = text.lower()
    for kind, words in _WORDS:
        if any(word in lowered for word in words):
            return kind
    return "other"


_WORDS = (
    ("dns", ("dns error", "failed to lookup address")),
    ("tls", ("certificate", "invalidcontenttype", "corrupt message", "handshake")),
    ("broken", ("request or response body", "kind: body", "kind: decode")),
    ("unreachable", ("tcp connect error", "kind: connect")),
    ("broken", ("http error", "timedout")),
)


def _detail(error: Exception) -> str:
    """The part of an error's text that is worth a reader: obstore adds its whole state."""
    text = " ".join(str(error).partition("\n\nDebug source")[0].split())
    code, status = error_code(error), _status(error)
    if not hasattr(error, "response") and (code or status):
        return " ".join(filter(None, (str(status or ""), code)))
    return text.rpartition("Error performing ")[2] or type(error).__name__


def _is_dns(error: Any) -> bool:
    cause = str(getattr(error, "kwargs", {}).get("error", ""))
    return "resolve" in cause.lower() or "name or service not known" in cause.lower()


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


T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 15.0
"""Seconds between tries, doubled each time; a random half of it is left out, so that many
machines do not come back at once."""

UNKNOWN_SERVER = 20.0
"""Seconds at most for a server that never answered: probably a wrong name."""

CORRUPT_TRIES = 4
"""A body that is wrong this often is wrong at its source."""

_SAID_AFTER = 5.0


class Stopped(Exception):
    """The work was given up meanwhile."""


class Patience:
    """Shared by the threads of one piece of work.

    ``say`` is told once, when failures last; ``stopping`` ends every pause.
    """

    def __init__(self, settings: StorageSettings, say: Callable[[str], None]) -> None:
        self._settings, self._say = settings, say
        self.stopping = threading.Event()
        self._reached = self._said = self._failing = False

    def anew(self) -> "Patience":
        return Patience(self._settings, self._say)

    def ask(self, request: Callable[[], T], url: str) -> T:
        """What ``request`` returns, asked again while its failure may pass.

        Raises:
            StorageError: it failed for good, or for ``s3_retry_timeout`` seconds.
            OSError: the disk's, as it is.
            Stopped: ``stopping`` was set.
        """
        first, tries = 0.0, 0
        while not self.stopping.is_set():
            try:
                answer = request()
            except Exception as error:
                now, tries = time.monotonic(), tries + 1
                first = first or now
                if not self._worth_a_try(error, now - first, tries):
                    raise self._explained(error, url) from error
                self._tell(error, now - first, url)
                self._failing = True
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (tries - 1))
                self.stopping.wait(pause * random.uniform(0.5, 1))  # noqa: S311
            else:
                self._reached, self._failing = True, False
                return answer
        raise Stopped

    def stop_if_failing(self) -> None:
        """End what is asked again and again at this moment; what goes well goes on."""
        if self._failing:
            self.stopping.set()

    def _worth_a_try(self, error: Exception, seconds: float, tries: int) -> bool:
        kind = kind_of(error)
        if kind not in PASSING or (isinstance(error, Corrupt) and tries >= CORRUPT_TRIES):
            return False
        if kind == "busy":
            self._reached = True
        patience = self._settings.s3_retry_timeout
        return seconds < (patience if self._reached else min(patience, UNKNOWN_SERVER))

    def _explained(self, error: Exception, url: str) -> Exception:
        if isinstance(error, (StorageError, Stopped)) or kind_of(error) == "disk":
            return error
        return explained(error, self._settings, url)

    def _tell(self, error: Exception, seconds: float, url: str) -> None:
        if seconds > _SAID_AFTER and not self._said:
            self._said = True
            why = explained(error, self._settings, url).message
            self._say(f"{why}. Still trying, for up to {self._settings.s3_retry_timeout:.0f} s")
