"""The checksums that S3 states, and what is verified by them."""

import base64
import hashlib
import sys
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipft.core.errors import StorageError
from clipft.storage.s3.checksums import (
    ALGORITHMS,
    Checksum,
    RunningEtag,
    checksum_in,
    etag_of,
    has_checksum,
)
from clipft.storage.sync import incoming
from tests.storage.test_sync import files, parts, quiet, sync

CHECK = b"123456789"
KNOWN = {
    "CRC32": "cbf43926",
    "CRC32C": "e3069283",
    "CRC64NVME": "ae8b14860a799888",
    "SHA1": "f7c3bc1d808e04732adf679965ccc34ca7ae3441",
    "SHA256": "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225",
}
"""Of ``CHECK``, as the catalogues of CRCs and FIPS 180 give them."""
NEEDS_AWSCRT = {"CRC32C", "CRC64NVME"}
OPAQUE = "0123456789abcdef0123456789abcdef-3"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_algorithm_gives_its_published_check_value(algorithm):
    assert set(KNOWN) == set(ALGORITHMS)
    if algorithm in NEEDS_AWSCRT:
        pytest.importorskip("awscrt")
    known = Checksum(algorithm, bytes.fromhex(KNOWN[algorithm]))
    assert has_checksum(BytesIO(CHECK), known) is True
    assert has_checksum(BytesIO(CHECK + b"0"), known) is False


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_checksum_is_that_which_boto3_uploads(algorithm, bucket):
    if algorithm in NEEDS_AWSCRT:
        pytest.importorskip("awscrt")
    body, where = b"y" * 3_000_001, {"Bucket": bucket.settings.s3_bucket, "Key": "a"}
    bucket.client.put_object(**where, Body=body, ChecksumAlgorithm=algorithm)
    found = checksum_in(bucket.client.head_object(**where, ChecksumMode="ENABLED"))
    assert found and found.algorithm == algorithm
    assert has_checksum(BytesIO(body), found) is True


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"ChecksumCRC32C": "yZRlqg==", "ChecksumType": "COMPOSITE"},
        {"ChecksumCRC32C": "yZRlqg==-5"},
        {"ChecksumCRC32C": "?"},
    ],
)
def test_what_is_no_checksum_of_the_whole_object_is_not_taken_for_one(head):
    assert checksum_in(head) is None


@given(st.binary(max_size=200), st.integers(0, 40), st.lists(st.integers(1, 50)))
def test_a_running_etag_is_that_of_the_whole_however_the_bytes_arrive(body, part, cuts):
    running, left = RunningEtag(part if len(body) > part else 0), body
    for cut in cuts:
        running.update(memoryview(left[:cut]))
        left = left[cut:]
    running.update(left)
    assert running.etag() == etag_of(BytesIO(body), len(body), part or max(1, len(body)))


class Server:
    """Answers with one object, as its ``listed`` fields and the ``headers`` of a HEAD have it."""

    def __init__(self, sent, etag, listed="", headers=()):
        self.sent, self.etag, self.listed, self.headers = sent, etag, listed, dict(headers)
        self.heads = 0

    def __call__(self, handler):
        listing = "list-type" in handler.path
        body = self.listing(handler.path) if listing else self.sent
        asked = handler.headers.get("x-amz-checksum-mode") == "ENABLED"
        self.heads += handler.command == "HEAD"
        start, _, end = handler.headers.get("Range", "").removeprefix("bytes=").partition("-")
        handler.send_response(206 if end else 200)
        handler.send_header("ETag", f'"{self.etag}"')
        for name, value in self.headers.items() if asked else ():
            handler.send_header(name, value)
        if end:
            handler.send_header("Content-Range", f"bytes {start}-{end}/{len(self.sent)}")
            body = body[int(start) : int(end) + 1]
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)

    def listing(self, path):
        if "train" not in path:
            return b"<ListBucketResult/>"
        return (
            f"<ListBucketResult><Contents><Key>data/train/a.tar</Key><Size>{len(self.sent)}</Size>"
            f'<ETag>"{self.etag}"</ETag>{self.listed}</Contents></ListBucketResult>'
        ).encode()


@pytest.fixture
def at(bucket, serving):
    """The settings that reach a server, which is started."""
    return lambda server: bucket.but(endpoint_url=serving(lambda handler: server(handler)))


def stated(algorithm, body):
    running = ALGORITHMS[algorithm]()
    running.update(body)
    value = base64.b64encode(running.digest()).decode()
    return {f"x-amz-checksum-{algorithm.lower()}": value, "x-amz-checksum-type": "FULL_OBJECT"}


@pytest.fixture(autouse=True)
def short_ranges(monkeypatch):
    monkeypatch.setattr(incoming, "RANGE", 1 << 20)


WHOLE = "<ChecksumAlgorithm>CRC32</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType>"
SIZES = pytest.mark.parametrize("size", [100_000, 3 << 20], ids=["small", "in ranges"])


@SIZES
def test_an_object_in_parts_is_verified_by_its_checksum(at, bucket, size):
    body = b"x" * size
    server = Server(body, OPAQUE, WHOLE, stated("CRC32", body))
    sync(at(server), quiet)
    assert files(bucket.settings.data_dir) == {"train/a.tar": body}
    assert server.heads == 1


@SIZES
def test_other_bytes_than_those_of_the_checksum_are_refused(at, bucket, size):
    body = b"x" * size
    server = Server(b"y" + body[1:], OPAQUE, WHOLE, stated("CRC32", body))
    with pytest.raises(StorageError, match="bytes do not have the CRC32 that"):
        sync(at(server), quiet)
    assert files(bucket.settings.data_dir) == {} and not parts(bucket.settings.data_dir)


@SIZES
def test_an_encrypted_object_is_verified_by_its_checksum(at, bucket, size):
    """Its ETag looks like an md5, but is not that of its bytes."""
    body, etag = b"x" * size, hashlib.md5(b"another").hexdigest()
    headers = {"x-amz-server-side-encryption": "aws:kms", **stated("CRC32", body)}
    settings = at(Server(body, etag, WHOLE, headers))
    sync(settings, quiet)
    assert files(settings.data_dir) == {"train/a.tar": body}
    damaged = at(Server(b"y" + body[1:], etag, WHOLE, headers))
    (settings.data_dir / "train" / "a.tar").unlink()
    with pytest.raises(StorageError, match="the CRC32 that the server states"):
        sync(damaged, quiet)


def test_a_crc_is_preferred_to_the_md5_of_a_large_object(at, bucket):
    body = b"x" * (3 << 20)
    etag = hashlib.md5(body).hexdigest()
    server = Server(body, etag, WHOLE, stated("CRC32", b"another"))
    with pytest.raises(StorageError, match="the CRC32 that the server states"):
        sync(at(server), quiet)
    server = Server(body, etag, WHOLE, stated("CRC32", body))
    sync(at(server), quiet)
    assert files(bucket.settings.data_dir) == {"train/a.tar": body} and server.heads == 1


def test_an_md5_costs_no_further_request(at, bucket):
    body = b"x" * 1000
    server = Server(body, hashlib.md5(body).hexdigest(), WHOLE, stated("CRC32", body))
    sync(at(server), quiet)
    assert server.heads == 0


def test_a_checksum_of_parts_is_left_to_their_md5(at, bucket):
    body = b"x" * 1000
    etag = hashlib.md5(hashlib.md5(body).digest()).hexdigest() + "-1"
    listed = WHOLE.replace("FULL_OBJECT", "COMPOSITE")
    server = Server(body, etag, listed, {"x-amz-checksum-crc32": "AAAAAA==-1"})
    sync(at(server), quiet)
    assert files(bucket.settings.data_dir) == {"train/a.tar": body} and server.heads == 0


def test_a_checksum_that_cannot_be_computed_is_said(at, bucket, monkeypatch):
    pytest.importorskip("awscrt")
    body = b"x" * 1000
    server = Server(body, OPAQUE, WHOLE, stated("CRC64NVME", body))
    settings = at(server)
    assert "CRC64NVME" not in str(sync(settings, quiet).notes)
    (settings.data_dir / "train" / "a.tar").unlink()
    monkeypatch.setitem(sys.modules, "awscrt.checksums", None)
    monkeypatch.delattr("awscrt.checksums")
    assert "1 object could be verified only by size and version: computing the CRC64NVME" in str(
        sync(settings, quiet).notes
    )
