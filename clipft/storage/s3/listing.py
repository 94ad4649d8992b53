"""List a bucket with HTTP requests that botocore signs and sends.

A boto3 client would first load the description of the S3 service, and it parses long listings
slowly. Each of these took longer than syncing a few files.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import unquote
from xml.etree import ElementTree


class Entry(NamedTuple):
    """One object of a listing: ``size`` in bytes, ``modified`` in ISO format, and the algorithm of
    the server's checksum of the whole object, or ""."""

    key: str
    size: int
    etag: str
    modified: str
    checksum: str


class Listing:
    """Requests pages of the listing of the bucket at ``url``. ``sign`` adds a signature to a
    request, and ``http`` sends it (a ``botocore.httpsession.URLLib3Session``)."""

    def __init__(self, url: str, sign: Callable[[Any], None], http: Any) -> None:
        self._url, self._sign, self._http = url, sign, http

    def page(self, prefix: str, size: int, token: str | None) -> tuple[list[Entry], str | None]:
        """Up to ``size`` entries under ``prefix``, and the token of the next page (None after the
        last page).

        Raises:
            ClientError: the server refuses. Other exceptions of botocore: it cannot be reached.
            ValueError: the answer is not XML.
        """
        from botocore.awsrequest import AWSRequest
        from botocore.exceptions import ClientError

        query = {"list-type": "2", "prefix": prefix, "encoding-type": "url", "max-keys": str(size)}
        if token is not None:
            query["continuation-token"] = token
        request = AWSRequest("GET", self._url, params=query)
        self._sign(request)
        answer = self._http.send(request.prepare())
        if answer.status_code == 200:
            return _parsed(answer.content)
        code = re.search(rb"<Code>(\w+)</Code>", answer.content)
        facts = {"HTTPStatusCode": answer.status_code}
        error = {"Code": code[1].decode() if code else str(answer.status_code)}
        raise ClientError({"Error": error, "ResponseMetadata": facts}, "ListObjectsV2")


def _parsed(body: bytes) -> tuple[list[Entry], str | None]:
    try:
        root = ElementTree.fromstring(body)  # noqa: S314 (as botocore does)
    except ElementTree.ParseError as error:
        raise ValueError(f"the listing is not XML: {error}") from error
    namespace = root.tag.rpartition("ListBucketResult")[0]
    encoded = root.findtext(f"{namespace}EncodingType") == "url"
    entries = []
    for content in root.iterfind(f"{namespace}Contents"):
        found = {child.tag[len(namespace) :]: child.text or "" for child in content}
        key = found["Key"]
        if encoded and ("%" in key or "+" in key):
            key = unquote(key.replace("+", " "))
        modified = found.get("LastModified", "")
        # The other type, COMPOSITE, is a checksum of the checksums of the parts
        whole = found.get("ChecksumType") == "FULL_OBJECT"
        checksum = found.get("ChecksumAlgorithm", "") if whole else ""
        entries.append(Entry(key, int(found["Size"]), found["ETag"], modified, checksum))
    if root.findtext(f"{namespace}IsTruncated") != "true":
        return entries, None
    return entries, root.findtext(f"{namespace}NextContinuationToken")
