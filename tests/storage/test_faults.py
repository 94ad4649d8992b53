"""Failures of the network and the server during a sync, made by a proxy before a real server."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipft.cli.app import run
from clipft.storage.s3 import client as opening
from clipft.storage.sync import incoming
from tests import warm
from tests.faults.helpers import one_error
from tests.storage.faulty_proxy import (
    Times,
    breaks_off,
    corrupts,
    drips,
    fails,
    faulty_proxy,
    shortens,
    stalls,
)

OBJECTS = {f"data/train/{n:02d}.tar": bytes([n]) * 20_000 for n in range(12)}
OBJECTS |= {"data/val/00.tar": b"v" * 100}
LARGE = {"data/train/large.tar": os.urandom(5 << 20), "data/val/00.tar": b"v"}
"""Three ranges of ``short_ranges``."""


@pytest.fixture
def filled(real_bucket):
    real_bucket.put(OBJECTS)
    return real_bucket


@pytest.fixture
def short_ranges(monkeypatch):
    monkeypatch.setattr(incoming, "RANGE", 2 << 20)


def flags(bucket, url: str, patience: float) -> list[str]:
    return [
        *("sync", "--s3-bucket", bucket.settings.s3_bucket, "--endpoint-url", url),
        *(
            "--data-dir",
            str(bucket.settings.data_dir),
            "--s3-retry-timeout",
            str(patience),
            "--json",
        ),
    ]


def files(bucket) -> dict[str, bytes]:
    folder = bucket.settings.data_dir
    found = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".clipft-sync"))
    return {f"data/{p.relative_to(folder).as_posix()}": p.read_bytes() for p in found}


TEMPORARY = {
    "503": (fails(503, "SlowDown"), 3),
    "500": (fails(500, "InternalError"), 3),
    "reset in the body": (breaks_off, 3),
    "corrupt body": (corrupts, 2),
}


@pytest.mark.parametrize("name", TEMPORARY)
def test_a_temporary_failure_is_retried(filled, capsys, name):
    fault, times = TEMPORARY[name]
    spoilt = Times(times, fault, contains="05.tar")
    with faulty_proxy(filled.settings.endpoint_url, spoilt) as url:
        assert run(flags(filled, url, 30)) == 0
    assert files(filled) == OBJECTS
    assert len(spoilt.seen) == times + 1


def test_a_listing_that_fails_is_retried(filled, capsys):
    with faulty_proxy(
        filled.settings.endpoint_url, Times(2, fails(503, "SlowDown"), contains="list-type")
    ) as url:
        assert run(flags(filled, url, 30)) == 0
    assert files(filled) == OBJECTS


LASTING = {
    "503": (fails(503, "SlowDown"), "overloaded or failing (503 SlowDown)"),
    "500": (fails(500, "InternalError"), "overloaded or failing (500 InternalError)"),
    "reset in the body": (breaks_off, "did not arrive intact"),
    "corrupt body": (corrupts, "did not arrive intact"),
    "shorter object": (shortens, "changed while it was being read"),
    "forbidden": (fails(403, "AccessDenied"), "05.tar is forbidden"),
    "gone": (fails(404, "NoSuchKey"), "05.tar does not exist"),
}


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_failure_exits_with_4_and_the_next_sync_continues(filled, capsys, name):
    fault, says = LASTING[name]
    with faulty_proxy(filled.settings.endpoint_url, Times(10**6, fault, contains="05.tar")) as url:
        assert run(flags(filled, url, 1)) == 4
    error, hint = one_error(capsys)
    assert says in error and hint
    assert "data/train/05.tar" not in files(filled)
    arrived = files(filled)
    assert all(OBJECTS[key] == body for key, body in arrived.items())
    assert run(flags(filled, filled.settings.endpoint_url, 30)) == 0
    assert json.loads(capsys.readouterr().out)["transferred"] == len(OBJECTS) - len(arrived)
    assert files(filled) == OBJECTS


@pytest.mark.parametrize("fault", [stalls(60), drips(0.02)], ids=["stalled", "dripping"])
def test_a_body_that_arrives_too_slowly_is_requested_again(filled, capsys, monkeypatch, fault):
    """The limits are lowered: 2 s of silence, 3 s for a whole small object, not 30 and 60."""
    monkeypatch.setattr(opening, "SILENT_SECONDS", 2)
    monkeypatch.setattr(opening, "_SMALL_SECONDS", 3)
    spoilt = Times(1, fault, contains="05.tar")
    start = time.monotonic()
    with faulty_proxy(filled.settings.endpoint_url, spoilt) as url:
        assert run(flags(filled, url, 30)) == 0
    assert files(filled) == OBJECTS and len(spoilt.seen) == 2
    assert time.monotonic() - start < 15


def test_only_the_failed_range_of_a_large_object_is_retried(real_bucket, capsys, short_ranges):
    real_bucket.put(LARGE)
    spoilt = Times(2, breaks_off, contains="large.tar")
    with faulty_proxy(real_bucket.settings.endpoint_url, spoilt) as url:
        assert run(flags(real_bucket, url, 30)) == 0
    assert files(real_bucket) == LARGE
    assert len(spoilt.seen) == 3 + 2


def test_a_range_that_breaks_off_goes_on_where_it_broke_off(real_bucket, capsys, short_ranges):
    real_bucket.put(LARGE)
    asked = []

    def note_and_break_first(exchange):
        asked.append(exchange.handler.headers["Range"])
        stalls(0.5)(exchange) if len(asked) == 1 else exchange.send()

    seen = Times(10**6, note_and_break_first, contains="large.tar")
    with faulty_proxy(real_bucket.settings.endpoint_url, seen) as url:
        assert run([*flags(real_bucket, url, 30), "--s3-requests", "1"]) == 0
    assert files(real_bucket) == LARGE
    first, again = (int(text.removeprefix("bytes=").partition("-")[0]) for text in asked[:2])
    assert first == 0 < again < 2 << 20 and asked[0].endswith("-2097151")
    assert asked[1].endswith("-2097151")


def test_ranges_that_arrive_out_of_order_are_verified_once_all_are_there(
    real_bucket, capsys, short_ranges
):
    real_bucket.put(LARGE)

    def first_is_last(exchange):
        if "bytes=0-" in exchange.handler.headers["Range"]:
            time.sleep(1)
        exchange.send()

    slow = Times(10**6, first_is_last, contains="large.tar")
    with faulty_proxy(real_bucket.settings.endpoint_url, slow) as url:
        assert run(flags(real_bucket, url, 30)) == 0
    assert files(real_bucket) == LARGE and len(slow.seen) == 3


def test_a_corrupt_range_of_a_large_object_is_never_accepted(real_bucket, capsys, short_ranges):
    real_bucket.put(LARGE)
    with faulty_proxy(
        real_bucket.settings.endpoint_url, Times(1, corrupts, contains="large.tar")
    ) as url:
        assert run(flags(real_bucket, url, 30)) == 4
        assert "did not arrive intact" in one_error(capsys)[0]
        assert "data/train/large.tar" not in files(real_bucket)
        assert run(flags(real_bucket, url, 30)) == 0
    assert files(real_bucket) == LARGE


def test_a_large_object_resumes_with_the_ranges_that_are_missing(real_bucket, capsys, short_ranges):
    real_bucket.put(LARGE)
    gone = Times(10**6, fails(403, "AccessDenied"), contains="large.tar")
    gone._left = -1

    def third_fails(method: str, path: str):
        fault = gone(method, path)
        return fails(403, "AccessDenied") if len(gone.seen) == 3 and "large" in path else fault

    with faulty_proxy(real_bucket.settings.endpoint_url, third_fails) as url:
        assert run([*flags(real_bucket, url, 30), "--s3-requests", "1"]) == 4
        capsys.readouterr()
        assert run([*flags(real_bucket, url, 30), "--s3-requests", "1"]) == 0
    assert len(gone.seen) == 4, "the second sync must fetch only the range that was refused"
    assert files(real_bucket) == LARGE


def test_an_object_replaced_between_its_ranges_is_not_mixed(real_bucket, capsys, short_ranges):
    real_bucket.put(LARGE)
    other = os.urandom(5 << 20)
    replaced = []

    def replace_then_pass(method: str, path: str):
        if "large.tar" in path and len(replaced) < 2:
            replaced.append(path)
            if len(replaced) == 2:
                real_bucket.put({"data/train/large.tar": other})
        return None

    with faulty_proxy(real_bucket.settings.endpoint_url, replace_then_pass) as url:
        assert run([*flags(real_bucket, url, 30), "--s3-requests", "1"]) == 4
        assert "changed while it was being read" in one_error(capsys)[0]
        assert run(flags(real_bucket, url, 30)) == 0
    assert files(real_bucket)["data/train/large.tar"] == other


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://no-such-host.invalid:80", "name cannot be resolved"),
        ("http://127.0.0.1:9", "cannot be reached"),
    ],
)
def test_an_unreachable_server_is_an_error(real_bucket, capsys, url, says):
    assert run(flags(real_bucket, url, 1)) == 4
    error, hint = one_error(capsys)
    assert says in error and "--endpoint-url" in hint


def test_https_to_a_server_without_tls_is_an_error(real_bucket, capsys):
    url = real_bucket.settings.endpoint_url.replace("http:", "https:")
    assert run(flags(real_bucket, url, 1)) == 4
    assert "TLS" in one_error(capsys)[0]


def test_wrong_missing_and_anonymous_credentials(filled, capsys, monkeypatch):
    url = filled.settings.endpoint_url
    assert run([*flags(filled, url, 1), "--s3-anonymous"]) == 4
    assert "forbidden" in one_error(capsys)[0]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert run(flags(filled, url, 1)) == 4
    assert "secret is wrong" in one_error(capsys)[0]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert run(flags(filled, url, 1)) == 4
    assert "no usable AWS credentials" in one_error(capsys)[0]


def test_a_public_bucket_needs_no_credentials(filled, capsys, monkeypatch):
    name = filled.settings.s3_bucket
    filled.client.put_bucket_acl(Bucket=name, ACL="public-read")
    for key in OBJECTS:
        filled.client.put_object_acl(Bucket=name, Key=key, ACL="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert run([*flags(filled, filled.settings.endpoint_url, 1), "--s3-anonymous"]) == 0
    assert files(filled) == OBJECTS


@pytest.mark.parametrize("moment", [0.1, 0.4])
def test_a_killed_sync_leaves_no_partial_file_and_the_next_fetches_only_the_rest(
    real_bucket, capsys, moment
):
    many = {f"data/train/{n:04d}.jpg": os.urandom(2000) for n in range(300)}
    real_bucket.put(many | {"data/val/0.jpg": b"v"})
    first = Times(10**9, lambda exchange: (time.sleep(0.02), exchange.send()), contains=".jpg")
    with faulty_proxy(real_bucket.settings.endpoint_url, first) as url:
        command = [sys.executable, "-m", "clipft", *flags(real_bucket, url, 30), "--no-pack"]
        victim = warm.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(first.seen) < 20:
            assert victim.poll() is None
            time.sleep(0.01)
        time.sleep(moment)
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
    arrived = {k: v for k, v in files(real_bucket).items() if ".clipft-part" not in k}
    assert 0 < len(arrived) < len(many)
    assert all(many.get(key, b"v") == body for key, body in arrived.items())
    assert run([*flags(real_bucket, real_bucket.settings.endpoint_url, 30), "--no-pack"]) == 0
    assert json.loads(capsys.readouterr().out)["transferred"] == 301 - len(arrived)
    assert files(real_bucket) == many | {"data/val/0.jpg": b"v"}
    assert not list(Path(real_bucket.settings.data_dir).rglob(".clipft-part*"))


def test_a_multipart_object_is_verified_by_the_md5_of_its_parts(real_bucket, capsys):
    """Other tools choose part sizes that clipft does not try, so it asks the server."""
    name, key, body = real_bucket.settings.s3_bucket, "data/train/parts.tar", os.urandom(15_000_000)
    upload = real_bucket.client.create_multipart_upload(Bucket=name, Key=key)["UploadId"]
    parts = []
    for number, start in enumerate(range(0, len(body), 7_000_000), 1):
        part = {"Body": body[start : start + 7_000_000], "PartNumber": number}
        answer = real_bucket.client.upload_part(Bucket=name, Key=key, UploadId=upload, **part)
        parts.append({"ETag": answer["ETag"], "PartNumber": number})
    real_bucket.client.complete_multipart_upload(
        Bucket=name, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
    )
    assert run(flags(real_bucket, real_bucket.settings.endpoint_url, 5)) == 0
    assert files(real_bucket)[key] == body


@pytest.mark.slow
def test_an_object_of_6_gib_is_fetched_in_ranges(real_bucket, capsys, tmp_path):
    size, name, key = 6 << 30, real_bucket.settings.s3_bucket, "data/train/huge.tar"
    sparse = tmp_path / "sparse"
    with open(sparse, "wb") as file:
        file.truncate(size)
        file.seek(size - 5)
        file.write(b"end..")
    real_bucket.client.upload_file(str(sparse), name, key)
    assert run(flags(real_bucket, real_bucket.settings.endpoint_url, 60)) == 0
    arrived = real_bucket.settings.data_dir / "train" / "huge.tar"
    assert arrived.stat().st_size == size
    with open(arrived, "rb") as file:
        file.seek(size - 5)
        assert file.read() == b"end.."
