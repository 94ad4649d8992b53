"""Read the listings of a bucket faster than botocore does.

botocore's parser takes most of the time of a listing of many thousand keys. ``ListingReader``
takes the XML away from it and reads only the fields that clipft needs.
"""

import threading
from typing import Any, NamedTuple
from urllib.parse import unquote
from xml.etree import ElementTree

_EMPTY = b"<ListBucketResult></ListBucketResult>"


class Entry(NamedTuple):
    """One object as listed: ``size`` in bytes, ``modified`` in ISO format, and whether the server
    has a checksum of the whole object."""

    key: str
    size: int
    etag: str
    modified: str
    has_checksum: bool


class ListingReader:
    """Captures the answers to ``list_objects_v2`` of one boto3 client.

    The body is kept per thread, so threads that share the client each read their own page.
    """

    def __init__(self, client: Any) -> None:
        self._held = threading.local()
        client.meta.events.register("before-parse.s3.ListObjectsV2", self._capture)

    def _capture(self, response_dict: dict[str, Any], **others: Any) -> None:
        if response_dict["status_code"] == 200:  # botocore still parses errors
            self._held.body = response_dict["body"]
            response_dict["body"] = _EMPTY

    def last_page(self) -> tuple[list[Entry], str | None]:
        """The entries that this thread's last ``list_objects_v2`` brought, and the token of the
        next page (None after the last page).

        Raises:
            ValueError: the body is not XML.
        """
        try:
            root = ElementTree.fromstring(self._held.body)  # noqa: S314 (as botocore does)
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
            has_checksum = found.get("ChecksumType") == "FULL_OBJECT"
            entries.append(Entry(key, int(found["Size"]), found["ETag"], modified, has_checksum))
        if root.findtext(f"{namespace}IsTruncated") != "true":
            return entries, None
        return entries, root.findtext(f"{namespace}NextContinuationToken")
