"""Turn errors of boto3 and obstore into one sentence and one hint for the user.

The two libraries report the same failure in different ways: by S3's error code, by HTTP status,
by the class of the exception, or only in its text. ``kind_of`` maps all of them to the kinds
in ``_KINDS``.
"""

import os
import re
from typing import Any

from clipft.config.sections.data import StorageSettings
from clipft.core.errors import StorageError, did_you_mean, sentences


class Changed(Exception):
    """The object is no longer the version that was listed."""


class Corrupt(Exception):
    """The bytes that arrived are not those of the object; the text says how that was noticed."""


class Stopped(Exception):
    """The request is not repeated, because the caller has given up."""


TEMPORARY = frozenset({"busy", "unreachable", "dns", "broken"})
"""Kinds of failure for which another attempt may succeed."""

_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile: --s3-profile"
_KINDS = {
    "credentials": ("found no usable AWS credentials for {url}", _CREDENTIALS),
    "profile": ("the AWS configuration has no profile {profile}", "check --s3-profile"),
    "key": ("the access key or its secret is wrong for {url}", _CREDENTIALS),
    "expired": (
        "the session token for {url} has expired or is invalid",
        "sign in again (for example with `aws sso login`), then repeat the command",
    ),
    "forbidden": (
        "access to {url} is forbidden (403)",
        "the credentials need s3:ListBucket, s3:GetObject and, for uploads, s3:PutObject",
    ),
    "bucket": ("bucket {bucket} does not exist (404)", "check --s3-bucket and --endpoint-url"),
    "missing": (
        "{url} does not exist (404)",
        "it may have just been deleted: repeat the command, or check --endpoint-url",
    ),
    "region": (
        "bucket {bucket} is in another region",
        "set its region with --s3-region, or check --endpoint-url",
    ),
    "clock": (
        "the server refuses {url} because the clock of this machine is too far off",
        "set the clock, then repeat the command",
    ),
    "changed": (
        "{url} changed while it was being read",
        "repeat the command to read the new version",
    ),
    "busy": (
        "{url}: the server is overloaded or failing ({detail})",
        "repeat the command later: what has arrived is kept; to retry for longer, raise "
        "--s3-retry-timeout",
    ),
    "dns": (
        "the server's name cannot be resolved: {detail}",
        "check --endpoint-url and the network",
    ),
    "tls": (
        "cannot make a trusted TLS connection: {detail}",
        "check --endpoint-url and AWS_CA_BUNDLE",
    ),
    "unreachable": (
        "the server cannot be reached: {detail}",
        "check --endpoint-url and the network, then repeat the command",
    ),
    "broken": (
        "{url} did not arrive intact: {detail}",
        "repeat the command: files that arrived intact are kept",
    ),
    "invalid": ("cannot request {url}: {detail}", "check --s3-bucket and the prefixes"),
    "other": ("{url}: {detail}", "check the storage settings with `clipft settings`"),
}
"""The message and the hint for each kind."""

_KIND_OF_CODE = {
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
_KIND_OF_STATUS = {301: "region", 403: "forbidden", 404: "missing", 412: "changed", 429: "busy"}
_KIND_OF_EXCEPTION = {
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
"""By the name of the class, because importing the libraries here would slow every command."""

_KIND_OF_TEXT = (
    ("dns", ("dns error", "failed to lookup address")),
    ("tls", ("certificate", "invalidcontenttype", "corrupt message", "handshake")),
    ("broken", ("request or response body", "kind: body", "kind: decode")),
    ("unreachable", ("tcp connect error", "kind: connect")),
    ("broken", ("http error", "timedout")),
)
"""Texts of reqwest, obstore's HTTP library, because obstore's transport errors have no types. The
first match counts."""


def kind_of(error: Any) -> str:
    """The key in ``_KINDS`` for an exception, or "disk" for an error of the local file system."""
    code, status = code_and_status(error)
    if code in _KIND_OF_CODE:
        return _KIND_OF_CODE[code]
    if status:
        return "busy" if status >= 500 else _KIND_OF_STATUS.get(status, "other")
    for ancestor in type(error).__mro__:
        kind = _KIND_OF_EXCEPTION.get(ancestor.__name__)
        if kind == "unreachable":
            # botocore raises the same class for an unknown name and for a server that is down
            cause = str(getattr(error, "kwargs", {}).get("error", "")).lower()
            unknown = "resolve" in cause or "name or service not known" in cause
            return "dns" if unknown else kind
        if kind:
            return kind
    if isinstance(error, OSError):
        return "disk"
    text = str(error).lower()
    return next((kind for kind, words in _KIND_OF_TEXT if any(w in text for w in words)), "other")


def code_and_status(error: Any) -> tuple[str, int]:
    """Return S3's code for the failure, such as ``NoSuchKey``, and the HTTP status.

    They are "" and 0 if the server did not send them.
    """
    if hasattr(error, "response"):  # botocore
        code = error.response.get("Error", {}).get("Code", "")
        return str(code), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    status = re.search(r"non-2xx status code: (\d{3})", str(error))
    return code[1] if code else "", int(status[1]) if status else 0


def explained(error: Exception, settings: StorageSettings, url: str) -> StorageError:
    """Return the error for the user for an exception of boto3 or obstore about ``url``."""
    # obstore appends a dump of its state, and repeats the whole answer to a failed request
    detail = " ".join(str(error).partition("\n\nDebug source")[0].split())
    code, status = code_and_status(error)
    if not hasattr(error, "response") and (code or status):
        detail = " ".join(filter(None, (str(status or ""), code)))
    else:
        detail = detail.rpartition("Error performing ")[2] or type(error).__name__
    kind = kind_of(error)
    message, hint = _KINDS[kind]
    facts = {
        "url": url,
        "bucket": settings.s3_bucket,
        "profile": settings.s3_profile or os.environ.get("AWS_PROFILE"),
        "detail": detail,
    }
    if kind == "profile":
        from botocore.session import Session

        hint = sentences(did_you_mean(str(facts["profile"]), Session().available_profiles), hint)
    return StorageError(message.format(**facts), hint)
