"""``s3://bucket/prefix``, wherever a command takes a path."""

import re
from dataclasses import dataclass

from clipft.core.errors import UsageError

SCHEME = "s3://"


@dataclass(frozen=True)
class S3Url:
    """``prefix`` without slashes at its ends; "" is the whole bucket."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.prefix}"

    def below(self, name: str) -> str:
        """The prefix of what lies in it under ``name``."""
        return f"{self.prefix}/{name}".lstrip("/")


def parse_s3_url(text: object) -> S3Url | None:
    """None: it is no such URL. A path object has lost one of the slashes.

    Raises:
        UsageError: it names no bucket.
    """
    found = re.fullmatch(r"s3:/+([^/]*)(.*)", str(text), re.DOTALL | re.IGNORECASE)
    if not found:
        return None
    if not found[1]:
        raise UsageError(f"{text} names no bucket", "write it like s3://bucket/prefix")
    return S3Url(found[1], found[2].strip("/"))
