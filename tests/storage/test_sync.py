"""``clipft sync`` from a bucket to a local folder."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clipft.cli.app import run
from clipft.core.errors import StorageError, UsageError
from clipft.storage.s3.client import open_bucket
from clipft.storage.s3.keys import Filter, RefusedKey, local_path
from clipft.storage.sync.folder import JOURNAL
from clipft.storage.sync.sync import SyncResult, download, list_bucket
from tests.storage.conftest import refusing

PAIRS = {
    "data/train/00000.tar": b"a" * 3000,
    "data/train/deep/er/00001.tar": b"b" * 5,
    "data/train/empty.txt": b"",
    "data/training/other.tar": b"not ours",
    "data/val/00000.tar": b"v" * 10,
}


def quiet(progress) -> None:
    pass


def sync(settings, report) -> SyncResult:
    """Sync as the command does."""
    return download(list_bucket(settings), settings.data_dir, report)


def files(folder: Path) -> dict[str, bytes]:
    """The content of the files under ``folder``, without clipft's own bookkeeping."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name[:8] != ".clipft-")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def expected() -> dict[str, bytes]:
    kept = {key: body for key, body in PAIRS.items() if "training" not in key}
    return {key.removeprefix("data/"): body for key, body in kept.items()}


def parts(folder: Path) -> list[Path]:
    return list(folder.rglob(".clipft-part-*"))


@pytest.fixture
def filled(bucket):
    bucket.put(PAIRS)
    return bucket


def test_a_first_sync_fetches_both_folders_and_nothing_else(filled):
    seen = []
    result = sync(filled.settings, seen.append)
    assert files(filled.settings.data_dir) == expected()
    assert (result.objects, result.transferred, result.skipped, result.bytes) == (4, 4, 0, 3015)
    assert (seen[-1].files_done, seen[-1].bytes_done) == (4, 3015)
    assert parts(filled.settings.data_dir) == []


def test_a_second_sync_does_nothing(filled):
    sync(filled.settings, quiet)
    before = (filled.settings.data_dir / "train/00000.tar").stat()
    result = sync(filled.settings, quiet)
    assert (result.transferred, result.skipped, result.bytes) == (0, 4, 0)
    assert (filled.settings.data_dir / "train/00000.tar").stat() == before


def test_a_changed_object_is_fetched_again(filled):
    sync(filled.settings, quiet)
    filled.put({"data/train/00000.tar": b"A" * 3000})
    assert sync(filled.settings, quiet).transferred == 1
    assert (filled.settings.data_dir / "train/00000.tar").read_bytes() == b"A" * 3000


@pytest.mark.parametrize("damage", [b"a" * 100, b"x" * 3000, None])
def test_a_damaged_local_file_is_fetched_again(filled, damage):
    sync(filled.settings, quiet)
    path = filled.settings.data_dir / "train/00000.tar"
    path.unlink() if damage is None else path.write_bytes(damage)
    assert sync(filled.settings, quiet).transferred == 1
    assert files(filled.settings.data_dir) == expected()


@pytest.mark.parametrize("journal", [None, "{", '{"objects": 3}', "[]"])
def test_without_a_usable_journal_files_are_recognized_by_md5(filled, journal):
    sync(filled.settings, quiet)
    path = filled.settings.data_dir / "train" / JOURNAL
    path.unlink() if journal is None else path.write_text(journal)
    assert sync(filled.settings, quiet).transferred == 0


def journal(settings) -> list[dict]:
    text = (settings.data_dir / "train" / JOURNAL).read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("damage", [False, True], ids=["intact", "damaged"])
def test_after_the_machine_started_again_files_are_verified_before_they_are_trusted(
    filled, monkeypatch, damage
):
    """A power cut may lose bytes that a sync left to the system to write."""
    sync(filled.settings, quiet)
    path = filled.settings.data_dir / "train" / "00000.tar"
    changed = path.stat().st_mtime_ns
    if damage:
        path.write_bytes(bytes(3000))
        os.utime(path, ns=(changed, changed))
        assert sync(filled.settings, quiet).transferred == 0, "the journal still counts"
    monkeypatch.setattr("clipft.storage.sync.folder.current_boot", lambda: "the next boot")
    assert sync(filled.settings, quiet).transferred == damage
    assert files(filled.settings.data_dir) == expected()


def test_a_later_sync_makes_the_records_lasting(filled, monkeypatch):
    sync(filled.settings, quiet)
    assert {len(line["state"]) for line in journal(filled.settings)} == {4}
    monkeypatch.setattr("clipft.storage.sync.folder._WRITTEN_AFTER", 0.0)
    sync(filled.settings, quiet)
    assert [len(line["state"]) for line in journal(filled.settings)[-3:]] == [3, 3, 3]
    monkeypatch.setattr("clipft.storage.sync.folder.current_boot", lambda: "the next boot")
    path = filled.settings.data_dir / "train" / "00000.tar"
    changed = path.stat().st_mtime_ns
    path.write_bytes(bytes(3000))
    os.utime(path, ns=(changed, changed))
    assert sync(filled.settings, quiet).transferred == 0


def test_without_a_number_of_the_boot_the_records_last_and_the_files_are_flushed(
    filled, monkeypatch
):
    flushed = []
    monkeypatch.setattr("clipft.storage.sync.folder.current_boot", lambda: None)
    monkeypatch.setattr(
        "clipft.storage.sync.folder.flush_files", lambda folder, names: flushed.extend(names)
    )
    sync(filled.settings, quiet)
    assert {len(line["state"]) for line in journal(filled.settings)} == {3}
    assert set(flushed) == {name.partition("/")[2] for name in expected()}


def test_a_listing_of_several_pages_is_complete(bucket):
    names = [f"data/train/{n:03}" for n in range(30)]
    bucket.put(dict.fromkeys(names, b"x"))
    listed = open_bucket(bucket.settings).entries("data/train/", page_size=7)
    assert [entry.key for entry in listed] == names


def test_stale_parts_are_removed_and_surplus_files_are_reported(filled):
    sync(filled.settings, quiet)
    stale = filled.settings.data_dir / "train" / ".clipft-part-1"
    stale.write_bytes(b"half")
    filled.client.delete_object(Bucket=filled.settings.s3_bucket, Key="data/train/empty.txt")
    notes = sync(filled.settings, quiet).notes
    assert not stale.exists()
    assert len(notes) == 1 and "empty.txt" in notes[0]


HOSTILE = [
    "../out", "a/../../out", "/abs", "a//b", "a\\b", "a/./b", "..", ".", "a/", "x" * 256,
    "é" * 128, "nul\0", "line\nfeed", "del\x7f", "c1\x85", "\ud800", ".clipft-sync.json",
    ".CLIPFT-part-1", "a/.clipft-x", "",
]  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE)
def test_a_hostile_key_is_refused(key):
    with pytest.raises(RefusedKey):
        local_path(key)


@given(st.one_of(st.text(), st.text("./\\a\0")))
@example("a/../..")
def test_every_key_stays_inside_the_target_or_is_refused(key):
    root = Path("/target")
    try:
        path = Path(os.path.normpath(root / local_path(key)))
    except RefusedKey:
        return
    assert path != root and path.is_relative_to(root)
    assert path.relative_to(root).as_posix() == key


def test_refused_keys_are_reported_and_all_others_arrive(bucket, tmp_path):
    bad = ["../../out", "a\\b", "x//y", "file/inside", "SAME", "sized/"]
    good = ["file", "same"]
    bucket.put({f"data/train/{name}": name.encode() for name in [*bad, *good]})
    bucket.put({"data/train/": b"", "data/train/marker/": b""})
    result = sync(bucket.settings, quiet)
    # "SAME" is listed before "same", and the first of the two is kept
    refused = {refusal.key.removeprefix("data/train/") for refusal in result.refused}
    assert refused == {*bad, "same"} - {"SAME"}
    assert set(files(bucket.settings.data_dir / "train")) == {"file", "SAME"}
    assert not list(tmp_path.rglob("out"))


def test_links_in_the_target_are_not_followed(bucket, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"mine")
    train = bucket.settings.data_dir / "train"
    train.mkdir(parents=True)
    (train / "link").symlink_to(outside)
    (train / "single").symlink_to(outside / "kept")
    (train / "folder").mkdir()
    bucket.put({f"data/train/{n}": b"THEM" for n in ("link/kept", "single", "folder")})
    result = sync(bucket.settings, quiet)
    assert {r.key for r in result.refused} == {"data/train/link/kept", "data/train/folder"}
    assert files(outside) == {"kept": b"mine"}
    assert (train / "single").read_bytes() == b"THEM" and not (train / "single").is_symlink()


def test_an_empty_train_prefix_is_an_error_and_an_empty_val_prefix_a_note(bucket):
    with pytest.raises(StorageError, match=rf"{bucket.settings.s3_bucket}.*'data/train'"):
        sync(bucket.settings, quiet)
    bucket.put({"data/train/a": b"a"})
    assert "data/val" in sync(bucket.settings, quiet).notes[0]


def test_a_misspelled_prefix_is_answered_with_what_is_there(bucket):
    bucket.put({"shop/2024/train/a": b"a", "shop/2025/train/a": b"a", "other/b": b"b"})
    for wrong, hint in (
        ("shop/2024/trian", "did you mean shop/2024/train? the bucket has shop/2024/train/"),
        ("shopp/2024/train", "did you mean shop? the bucket has other/, shop/"),
    ):
        with pytest.raises(StorageError) as caught:
            sync(bucket.but(s3_prefix=wrong), quiet)
        assert hint in caught.value.hint


def test_patterns_that_leave_nothing_are_named(bucket):
    bucket.put({"data/train/a.tar": b"a", "data/train/b.tar": b"b"})
    found = list_bucket(bucket.settings, Filter(include=("*.tarr",)))
    with pytest.raises(
        StorageError, match=r"none of the 2 objects under .* matches --include"
    ) as caught:
        download(found, Path("nowhere"), lambda progress: None)
    assert "'*.tar'" in caught.value.hint


def test_settings_that_cannot_work_are_refused(bucket):
    with pytest.raises(UsageError) as caught:
        sync(bucket.but(s3_bucket=None), quiet)
    assert "--s3-bucket" in caught.value.hint
    with pytest.raises(UsageError, match="overlap"):
        sync(bucket.but(s3_prefix="data"), quiet)
    with pytest.raises(UsageError, match="not the URL"):
        sync(bucket.but(endpoint_url="localhost"), quiet)


def test_a_missing_bucket_is_an_error(bucket):
    with pytest.raises(StorageError, match="nowhere-at-all does not exist"):
        sync(bucket.but(s3_bucket="nowhere-at-all"), quiet)


def test_missing_credentials_and_an_unknown_profile_are_errors(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="no usable AWS credentials"):
        sync(bucket.settings, quiet)
    with pytest.raises(StorageError, match="no profile absent"):
        sync(bucket.but(s3_profile="absent"), quiet)


def test_a_misspelled_profile_is_answered_with_the_nearest(bucket, tmp_path, monkeypatch):
    (tmp_path / "config").write_text("[profile catalogue]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(StorageError, match="no profile catalog") as caught:
        sync(bucket.but(s3_profile="catalog"), quiet)
    assert "did you mean catalogue?" in caught.value.hint


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (403, "InvalidAccessKeyId", "key or its secret is wrong"),
        (403, "SignatureDoesNotMatch", "key or its secret is wrong"),
        (403, "AccessDenied", "forbidden"),
        (403, "RequestTimeTooSkewed", "clock"),
        (400, "ExpiredToken", "expired"),
        (400, "AuthorizationHeaderMalformed", "another region"),
        (301, "PermanentRedirect", "another region"),
        (404, "NoSuchBucket", "does not exist"),
        (503, "SlowDown", "overloaded"),
        (500, "InternalError", "overloaded"),
    ],
)
def test_each_server_error_has_its_own_message(bucket, serving, status, code, says):
    with pytest.raises(StorageError, match=says) as caught:
        sync(bucket.but(endpoint_url=serving(refusing(status, code))), quiet)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:1", "cannot be reached"),
        ("http://no.invalid:1", "name cannot be resolved"),
    ],
)
def test_an_unreachable_server_is_an_error(bucket, url, says):
    with pytest.raises(StorageError, match=says):
        sync(bucket.but(endpoint_url=url), quiet)


def test_a_server_without_tls_is_an_error(bucket):
    with pytest.raises(StorageError, match="TLS"):
        sync(bucket.but(endpoint_url=bucket.settings.endpoint_url.replace("http", "https")), quiet)


BODY = b"z" * 100_000
LISTING = """<ListBucketResult><Contents><Key>{prefix}a.tar</Key><Size>{size}</Size>
<ETag>"{etag}"</ETag></Contents><IsTruncated>false</IsTruncated></ListBucketResult>"""


def one_object(body: bytes, etag: str, length: int = len(BODY)):
    """A server with one object, which answers ``body`` and declares ``length`` bytes."""

    def answer(handler) -> None:
        listing = "list-type" in handler.path
        prefix = "data/val/" if "val" in handler.path else "data/train/"
        text = LISTING.format(prefix=prefix, size=len(BODY), etag=etag).encode()
        handler.send_response(200)
        handler.send_header("ETag", f'"{etag}"')
        handler.send_header("Content-Length", str(len(text) if listing else length))
        handler.end_headers()
        handler.wfile.write(text if listing else body)

    return answer


MD5 = hashlib.md5(BODY).hexdigest()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (one_object(BODY[:40_000], MD5), "did not arrive intact"),
        (one_object(b"y" + BODY[1:], MD5), "did not arrive intact"),
        (one_object(BODY[:10], "multi-2", length=10), "changed"),
    ],
    ids=["cut", "corrupt", "other size"],
)
def test_a_body_with_other_bytes_than_the_object_is_never_kept(bucket, serving, answer, says):
    with pytest.raises(StorageError, match=says):
        sync(bucket.but(endpoint_url=serving(answer)), quiet)
    assert files(bucket.settings.data_dir) == {}
    assert parts(bucket.settings.data_dir) == []


def test_an_object_changed_since_the_listing_is_not_accepted(bucket, serving):
    listed = one_object(BODY, MD5)

    def answer(handler) -> None:
        assert "list-type" in handler.path or handler.headers["If-Match"] == f'"{MD5}"'
        (listed if "list-type" in handler.path else refusing(412, "PreconditionFailed"))(handler)

    with pytest.raises(StorageError, match="changed"):
        sync(bucket.but(endpoint_url=serving(answer)), quiet)
    assert files(bucket.settings.data_dir) == {}


def test_a_stopped_sync_leaves_no_parts_and_the_next_continues(filled):
    def stop(progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sync(filled.settings, stop)
    assert parts(filled.settings.data_dir) == []
    sync(filled.settings, quiet)
    assert files(filled.settings.data_dir) == expected()


def test_an_unwritable_target_and_a_full_disk_are_errors(filled, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        sync(filled.but(data_dir=tmp_path / "file"), quiet)
    full = SimpleNamespace(free=3014)
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    with pytest.raises(StorageError, match="needs 3,015 bytes and has 3,014 free"):
        sync(filled.settings, quiet)


def flags(bucket) -> list[str]:
    kept = bucket.settings
    where = ["--endpoint-url", kept.endpoint_url, "--data_dir", str(kept.data_dir)]
    return ["sync", "--s3_bucket", kept.s3_bucket, *where]


def test_the_command_prints_one_json_object(filled, capsys):
    assert run([*flags(filled), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["objects"], result["transferred"], result["refused"]) == (4, 4, [])


def test_the_command_shows_a_table_and_the_refused_keys(filled, capsys):
    filled.put({"data/train/[red]\\b": b"x"})
    assert run(flags(filled)) == 0
    shown = capsys.readouterr()
    assert "[red]" in shown.out and "backslash" in shown.out and "Next:" in shown.err


def test_the_command_exits_with_4_for_an_empty_prefix(bucket, capsys):
    assert run(flags(bucket)) == 4
    assert "hint: check --s3-prefix" in capsys.readouterr().err


def test_the_command_module_does_not_import_boto3():
    code = "import sys, clipft.cli.commands.sync; sys.exit('boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
