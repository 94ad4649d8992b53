"""The options of ``clipft sync``: --up, globs, --delete, --dry-run, raw files and s3:// URLs."""

import errno
import hashlib
import json
import os
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipft.cli.app import run
from clipft.config.sources import S3Url, load_settings, parse_s3_url
from clipft.core.errors import UsageError
from clipft.data.shards.folders import open_pairs
from clipft.storage.s3.checksums import etag_of, matches
from clipft.storage.s3.client import open_bucket
from clipft.storage.sync import upload
from clipft.storage.sync.folder import Folder
from tests.faults.helpers import one_error
from tests.storage.test_sync import PAIRS, files
from tests.storage.test_training import put_raw


@pytest.fixture(params=["moto", "gateway"])
def filled(request):
    bucket = request.getfixturevalue("bucket" if request.param == "moto" else "real_bucket")
    bucket.put(PAIRS)
    return bucket


def sync(bucket, capsys, *more: str) -> dict:
    kept = bucket.settings
    where = ["--s3-bucket", kept.s3_bucket, "--endpoint-url", kept.endpoint_url]
    assert run(["sync", *where, "--data-dir", str(kept.data_dir), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def stored(bucket) -> dict[str, bytes]:
    name = bucket.settings.s3_bucket
    found = bucket.client.list_objects_v2(Bucket=name).get("Contents", ())
    get = bucket.client.get_object
    return {e["Key"]: get(Bucket=name, Key=e["Key"])["Body"].read() for e in found}


def test_up_sends_new_and_changed_files(filled, capsys):
    folder = filled.settings.data_dir
    sync(filled, capsys)
    (folder / "train" / "00000.tar").write_bytes(b"A" * 3000)
    (folder / "train" / "new é.tar").write_bytes(b"new")
    (folder / "val" / ".00000.tar.clipft-index").write_bytes(b"not a user's")
    result = sync(filled, capsys, "--up")
    assert (result["transferred"], result["skipped"], result["deleted"]) == (2, 3, 0)
    changed = {"data/train/00000.tar": b"A" * 3000, "data/train/new é.tar": b"new"}
    assert stored(filled) == PAIRS | changed
    assert sync(filled, capsys, "--up")["transferred"] == 0


def test_up_reads_a_file_again_only_if_it_has_changed(filled, capsys, monkeypatch):
    read = []

    def matches_and_notes(file, size, etag):
        read.append(Path(file.name).name)
        return matches(file, size, etag)

    train = filled.settings.data_dir / "train"
    train.mkdir(parents=True)
    (train / "00000.tar").write_bytes(PAIRS["data/train/00000.tar"])
    (train / "new.tar").write_bytes(b"new")
    (train / "linked.tar").symlink_to("new.tar")
    monkeypatch.setattr(upload, "matches", matches_and_notes)
    assert sync(filled, capsys, "--up")["transferred"] == 2  # the first one is there already
    assert read == ["00000.tar"]

    os.utime(train / "00000.tar")
    (train / "new.tar").write_bytes(b"now")
    read.clear()
    assert sync(filled, capsys, "--up")["transferred"] == 2
    assert sorted(read) == ["00000.tar", "linked.tar", "new.tar"]

    read.clear()
    assert sync(filled, capsys, "--up")["transferred"] == 0
    assert read == ["linked.tar"]  # only the files themselves are in the journal
    assert stored(filled)["data/train/linked.tar"] == b"now"


def test_a_folder_that_cannot_be_written_to_is_uploaded(filled, capsys, monkeypatch):
    (filled.settings.data_dir / "train").mkdir(parents=True)
    (filled.settings.data_dir / "train" / "new.tar").write_bytes(b"new")

    def refuse(folder, records):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Folder, "_append", refuse)
    assert [sync(filled, capsys, "--up")["transferred"] for _ in range(2)] == [1, 0]


def test_a_multipart_upload_is_recognized_later(filled, capsys):
    large = os.urandom(17 << 20)
    path = filled.settings.data_dir / "train" / "large.tar"
    path.parent.mkdir(parents=True)
    path.write_bytes(large)
    assert sync(filled, capsys, "--up")["transferred"] == 1
    assert stored(filled)["data/train/large.tar"] == large
    assert sync(filled, capsys, "--up")["transferred"] == 0


def test_up_recognizes_what_another_tool_uploaded_in_parts(filled, capsys):
    body = os.urandom(9 << 20)
    path = filled.settings.data_dir / "train" / "large.tar"
    path.parent.mkdir(parents=True)
    path.write_bytes(body)
    filled.client.upload_file(str(path), filled.settings.s3_bucket, "data/train/large.tar")
    assert sync(filled, capsys, "--up")["transferred"] == 0
    path.write_bytes(body[::-1])
    assert sync(filled, capsys, "--up")["transferred"] == 1
    assert stored(filled)["data/train/large.tar"] == body[::-1]


def test_up_with_delete_stays_under_the_prefixes_and_never_empties_a_side(filled, capsys):
    folder = filled.settings.data_dir / "train"
    folder.mkdir(parents=True)
    (folder / "00000.tar").write_bytes(PAIRS["data/train/00000.tar"])
    assert sync(filled, capsys, "--up", "--delete", "--dry-run")["deleted"] == 2
    assert stored(filled) == PAIRS
    assert sync(filled, capsys, "--up", "--delete")["deleted"] == 2
    left = {"data/train/00000.tar", "data/training/other.tar", "data/val/00000.tar"}
    assert set(stored(filled)) == left


def test_up_with_nothing_to_send_is_an_error(filled, capsys):
    kept = filled.settings
    where = ["--s3-bucket", kept.s3_bucket, "--endpoint-url", kept.endpoint_url]
    assert run(["sync", "--up", *where, "--data-dir", str(kept.data_dir), "--delete"]) == 4
    assert "nothing to send" in one_error(capsys)[0]
    assert stored(filled) == PAIRS


def test_include_and_exclude_globs_select_objects(filled, capsys):
    assert sync(filled, capsys, "--exclude", "deep/*", "--exclude", "*.txt")["objects"] == 2
    assert set(files(filled.settings.data_dir)) == {"train/00000.tar", "val/00000.tar"}
    assert sync(filled, capsys, "--include", "deep/*", "--include", "0*")["transferred"] == 1


def test_delete_removes_files_only_when_asked_and_only_inside_the_folders(filled, capsys):
    folder = filled.settings.data_dir
    sync(filled, capsys)
    (folder / "own.txt").write_text("beside the two folders")
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_text("mine")
    (folder / "train" / "link").symlink_to(outside)
    (folder / "train" / "stray" / "x").mkdir(parents=True)
    (folder / "train" / "stray" / "x" / "old.jpg").write_bytes(b"o")
    (folder / "train" / ".00000.tar.clipft-index").write_bytes(b"i")
    assert sync(filled, capsys)["deleted"] == 0
    planned = sync(filled, capsys, "--delete", "--dry-run")
    assert planned["planned"] == [f"delete {folder / 'train/stray/x/old.jpg'}"]
    assert sync(filled, capsys, "--delete", "--exclude", "stray/*")["deleted"] == 0
    assert sync(filled, capsys, "--delete")["deleted"] == 1
    assert not (folder / "train" / "stray").exists()
    assert (outside / "kept").read_text() == "mine" and (folder / "own.txt").exists()
    assert (folder / "train" / ".00000.tar.clipft-index").exists()


def test_dry_run_changes_nothing(filled, capsys):
    result = sync(filled, capsys, "--dry-run")
    assert result["transferred"] == 4 and len(result["planned"]) == 4
    assert not filled.settings.data_dir.exists()
    sync(filled, capsys)
    assert sync(filled, capsys, "--dry-run")["planned"] == []


def test_raw_files_are_packed_again_only_when_they_change(real_bucket, capsys):
    put_raw(real_bucket)
    folder = real_bucket.settings.data_dir
    sync(real_bucket, capsys)
    assert len(open_pairs(folder / "train")) == 80 and len(open_pairs(folder / "val")) == 16
    before = (folder / "train" / "00000.tar").stat()
    assert sync(real_bucket, capsys)["transferred"] == 0
    assert (folder / "train" / "00000.tar").stat() == before
    real_bucket.put({"data/train/00003.txt": b"another caption"})
    assert sync(real_bucket, capsys)["transferred"] == 1
    assert len(open_pairs(folder / "train")) == 80
    assert b"another caption" in (folder / "train" / "00000.tar").read_bytes()


def test_no_pack_keeps_raw_files(real_bucket, capsys):
    put_raw(real_bucket)
    sync(real_bucket, capsys, "--no-pack")
    assert len(list((real_bucket.settings.data_dir / "train").glob("*.jpg"))) == 80


@pytest.mark.parametrize(
    ("text", "bucket", "prefix"),
    [("s3://b/p/q/", "b", "p/q"), ("s3:/b", "b", ""), ("s3://b/a b", "b", "a b")],
)
def test_an_s3_url_is_parsed_into_bucket_and_prefix(text, bucket, prefix):
    assert parse_s3_url(text) == parse_s3_url(Path(text)) == S3Url(bucket, prefix)
    assert parse_s3_url("./s3") is None
    with pytest.raises(UsageError, match="no bucket"):
        parse_s3_url("s3://")


def test_an_s3_url_as_data_dir_sets_bucket_and_prefix():
    loaded = load_settings({"data_dir": "s3://b/some/data"}, environ={})
    values = loaded.values
    assert (values.s3_bucket, values.s3_prefix) == ("b", "some/data/train")
    assert values.data_dir.parts[-4:] == ("s3", "b", "some", "data")
    with pytest.raises(UsageError, match="not in bucket"):
        load_settings({"data_dir": "s3://b/x", "s3_bucket": "c"}, environ={})


def test_keys_with_special_characters_are_listed_exactly(filled):
    """The listing bypasses botocore's parser, so its own decoding must handle every name."""
    keys = [f"k/{name}" for name in ("a b", "a+b", "100%", "%41", "é<&>", "日本", "q?x=1#y", "'\"")]
    filled.put(dict.fromkeys(keys, b"x"))
    objects, refused = open_bucket(filled.settings).list("k/")
    assert sorted(o.key for o in objects) == sorted(keys) and not refused
    assert {(o.size, o.etag) for o in objects} == {(1, f'"{hashlib.md5(b"x").hexdigest()}"')}
    for wanted in objects:
        assert bytes(open_bucket(filled.settings).get(wanted, 0, 1)) == b"x"


@given(st.binary(min_size=1, max_size=400), st.integers(1, 100))
def test_a_multipart_etag_detects_changed_bytes(body, part):
    etag = etag_of(BytesIO(body), len(body), part)
    assert matches(BytesIO(body), len(body), etag, lambda: part) is True
    other = bytes([body[0] ^ 1]) + body[1:]
    assert matches(BytesIO(other), len(body), etag, lambda: part) is False
