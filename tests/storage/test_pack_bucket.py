"""``clipft pack s3://...``, and the test pairs of a catalogue in a bucket."""

import pytest

from clipft.cli.app import run
from clipft.config.sections.data import StorageSettings
from clipft.core.errors import UsageError
from clipft.storage.s3.keys import folder_prefixes
from clipft.storage.sync.sync import SyncOptions, download, list_bucket
from clipft.storage.sync.upload import upload
from tests.data.packing.pack_helpers import pairs_of
from tests.data.packing.test_sources import png


@pytest.fixture
def pack(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPFT_CACHE", str(tmp_path / "cache"))

    def packing(place: str, *more: str) -> int:
        url = f"s3://{bucket.settings.s3_bucket}/{place}".rstrip("/")
        where = ("--endpoint-url", bucket.settings.endpoint_url, "--processes", "1")
        return run(["pack", url, str(tmp_path / "out"), *where, *more])

    return packing


def raw(numbers) -> dict[str, bytes]:
    return {f"p{n}.png": png(n) for n in numbers} | {f"p{n}.txt": b"a %d" % n for n in numbers}


@pytest.mark.parametrize("prefix", ["raw", "deep/raw", ""])
def test_raw_files_in_a_bucket_are_packed(bucket, pack, tmp_path, prefix):
    below = f"{prefix}/" if prefix else ""
    for split, numbers in (("train", range(6)), ("val", range(6, 8)), ("test", range(8, 10))):
        bucket.put({f"{below}{split}/{name}": body for name, body in raw(numbers).items()})
    bucket.put({"rawer/p9.png": b"not ours"} if prefix else {})
    assert pack(prefix) == 0
    assert pairs_of(tmp_path / "out" / "test") == {(png(n), b"a %d" % n) for n in (8, 9)}
    assert len(pairs_of(tmp_path / "out" / "train")) == 6


def test_a_table_in_a_bucket_is_packed_with_the_images_beside_it(bucket, pack, tmp_path):
    bucket.put({f"shop/images/p{n}.png": png(n) for n in range(4)})
    rows = "".join(f"images/p{n}.png,thing {n}\n" for n in range(4))
    bucket.put({"shop/products.csv": b"image,caption\n" + rows.encode()})
    assert pack("shop/products.csv", "--val-share", "0") == 0
    assert len(pairs_of(tmp_path / "out" / "train")) == 4


def test_what_is_gone_from_the_bucket_is_not_packed_again(bucket, pack, tmp_path):
    bucket.put({f"raw/{name}": body for name, body in raw(range(4)).items()})
    assert pack("raw", "--val-share", "0") == 0
    for key in ("raw/p3.png", "raw/p3.txt"):
        bucket.client.delete_object(Bucket=bucket.settings.s3_bucket, Key=key)
    assert pack("raw", "--val-share", "0", "--overwrite") == 0
    assert len(pairs_of(tmp_path / "out" / "train")) == 3


def test_places_that_cannot_be_packed_are_refused(bucket, pack, tmp_path, capsys):
    assert pack("nothing") == 4
    assert "there is nothing under s3://" in capsys.readouterr().err
    assert run(["pack", str(tmp_path), "s3://bucket/out"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "pack writes to a folder" in said and "`clipft sync --up`" in said
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert pack("nothing") == 2  # before anything is transferred


def test_test_pairs_are_synced_both_ways(bucket, tmp_path):
    settings = bucket.settings
    for side in ("train", "val", "test"):
        path = settings.data_dir / side / "0.tar"
        path.parent.mkdir(parents=True)
        path.write_bytes(side.encode())
    upload(settings, lambda progress: None, SyncOptions())
    target = tmp_path / "there"
    download(list_bucket(settings), target, lambda progress: None)
    assert (target / "test" / "0.tar").read_bytes() == b"test"


def test_without_test_pairs_no_folder_is_made(bucket, tmp_path):
    bucket.put({"data/train/0.tar": b"x", "data/val/0.tar": b"y"})
    download(list_bucket(bucket.settings), tmp_path / "there", lambda progress: None)
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["train", "val"]


def test_a_test_prefix_inside_the_training_prefix_is_refused():
    settings = StorageSettings(s3_prefix="data", s3_val_prefix="val")
    with pytest.raises(UsageError, match="--s3-prefix 'data' and --s3-test-prefix 'data/test'"):
        folder_prefixes(settings)
