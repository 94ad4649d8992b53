"""Checkpoints in a bucket: saves, their manifest and the background uploads."""

import io
import json
import threading
import time

import pytest

from clipft.core.errors import StorageError
from clipft.storage.s3.checkpoints import CheckpointStore, Manifest, Run
from clipft.storage.s3.client import open_bucket
from clipft.storage.s3.uploader import Uploader
from tests.storage.conftest import refusing
from tests.storage.faulty_proxy import (
    Times,
    corrupts,
    fails,
    faulty_proxy,
    spoils_uploads,
    untouched,
)

NAME = "dual_lora_checkpoint"
FILE = f"{NAME}.pt"
WEIGHTS = bytes(range(256)) * 400
RUN = Run("one", 1000.0)


@pytest.fixture(params=["moto", "gateway"])
def place(request):
    return request.getfixturevalue("bucket" if request.param == "moto" else "real_bucket")


def store_of(bucket, **changed) -> CheckpointStore:
    return CheckpointStore(open_bucket(bucket.but(**changed)), "checkpoints", NAME)


def save(store, step, body=WEIGHTS, run=RUN, keep=3, **others) -> bool:
    files = {FILE: io.BytesIO(body), **{name: io.BytesIO(b) for name, b in others.items()}}
    return store.upload(step, files, run, keep)


def fetch(store, folder, say=lambda note: None):
    return store.fetch(store.manifest(), lambda name: folder / name, say)


def keys(bucket) -> list[str]:
    answer = bucket.client.list_objects_v2(Bucket=bucket.settings.s3_bucket)
    return [entry["Key"] for entry in answer.get("Contents", ())]


def test_an_uploaded_save_is_fetched_unchanged(place, tmp_path):
    store = store_of(place)
    assert save(store, 5, **{"metrics.jsonl": b"{}\n"})
    found = fetch(store, tmp_path / "new")
    assert found.step == 5 and store.manifest().run == RUN
    arrived = {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()}
    assert arrived == {FILE: WEIGHTS, "metrics.jsonl": b"{}\n"}


def test_a_large_file_is_transferred_in_several_parts(place, tmp_path):
    store, large = store_of(place), WEIGHTS * 400  # 41 MB: parts of 16 MiB, ranges of 8
    save(store, 1, large)
    assert "-" in store.manifest().saves[0].files[FILE].etag
    fetch(store, tmp_path)
    assert (tmp_path / FILE).read_bytes() == large


def test_only_the_newest_saves_are_kept_and_unchanged_files_are_sent_once(place):
    store = store_of(place)
    for step in range(5):
        assert save(store, step, b"%d" % step, keep=2, **{"best.pt": b"best"})
    assert [entry.step for entry in store.manifest().saves] == [4, 3]
    assert len(keys(place)) == 1 + 2 + 1  # the manifest, two checkpoints, one best


def test_an_older_save_does_not_replace_a_newer_one_of_its_run(place, tmp_path):
    store = store_of(place)
    save(store, 7, b"seven")
    assert save(store, 6, b"six") is False
    assert fetch(store, tmp_path).step == 7
    assert save(store, 7, b"seven again") is True


def test_a_run_cannot_replace_the_saves_of_one_that_started_later(place, tmp_path):
    store, later = store_of(place), Run("two", 2000.0)
    save(store, 900, b"old")
    save(store, 1, b"new", run=later)
    with pytest.raises(StorageError, match="started later"):
        save(store, 901, b"older")
    assert fetch(store, tmp_path).step == 1
    assert store.manifest().earlier.step == 900


def test_of_several_simultaneous_saves_the_newest_is_kept(place, tmp_path):
    """All read the manifest before any of them writes it, so its condition must decide."""
    stores = [store_of(place) for _ in range(6)]
    threads = [
        threading.Thread(target=save, args=(store, step, b"%d" % step))
        for step, store in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetch(stores[0], tmp_path).step == 5
    assert (tmp_path / FILE).read_bytes() == b"5"


def test_a_save_notices_a_manifest_that_changes_during_its_upload(place, tmp_path):
    store, rival = store_of(place), store_of(place)
    save(store, 1)

    class Overtaken(io.BytesIO):
        """A file during whose upload another writer saves a newer step."""

        overtaken = False

        def seek(self, *place: int) -> int:
            if not self.overtaken:
                self.overtaken = True
                save(rival, 9, b"nine")
            return super().seek(*place)

    assert store.upload(2, {FILE: Overtaken(WEIGHTS)}, RUN, 3) is False
    assert fetch(store, tmp_path).step == 9


@pytest.mark.parametrize("damage", ["altered", "gone"])
def test_the_previous_checkpoint_replaces_a_damaged_one(place, tmp_path, damage):
    store, said = store_of(place), []
    save(store, 1, b"one")
    save(store, 2, b"two")
    key, name = store.manifest().saves[0].files[FILE].key, place.settings.s3_bucket
    if damage == "gone":
        place.client.delete_object(Bucket=name, Key=key)
    else:
        place.client.put_object(Bucket=name, Key=key, Body=b"TWO")
    assert fetch(store, tmp_path, said.append).step == 1
    assert (tmp_path / FILE).read_bytes() == b"one"
    assert "step 2" in said[0] and "damaged" in said[0]


def test_an_error_is_raised_and_local_files_are_kept_if_no_save_is_whole(place, tmp_path):
    store = store_of(place)
    save(store, 1, b"one")
    key = store.manifest().saves[0].files[FILE].key
    place.client.delete_object(Bucket=place.settings.s3_bucket, Key=key)
    (tmp_path / FILE).write_bytes(b"mine")
    with pytest.raises(StorageError, match="no intact checkpoint"):
        fetch(store, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == b"mine"


def test_manifest_is_none_only_if_the_server_says_that_it_does_not_exist(place):
    assert store_of(place).manifest() is None
    with pytest.raises(StorageError, match="does not exist"):
        store_of(place, s3_bucket="nowhere-at-all").manifest()


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "AccessDenied"), (404, "NotFound"), (400, "ExpiredToken"), (503, "SlowDown")],
)
def test_a_manifest_that_cannot_be_read_is_not_considered_absent(bucket, serving, status, code):
    with pytest.raises(StorageError):
        store_of(bucket, endpoint_url=serving(refusing(status, code))).manifest()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version": 1}', '{"version": 99, "run": {}, "saves": []}']
)
def test_a_broken_manifest_is_an_error(bucket, text):
    bucket.put({f"checkpoints/{NAME}.json": text.encode()})
    with pytest.raises(StorageError, match="not a list of checkpoints"):
        store_of(bucket).manifest()


def test_a_manifest_cannot_name_files_outside_the_run_folder(bucket):
    store = store_of(bucket)
    save(store, 1)
    text = store.manifest().to_json().replace(FILE.encode(), b"../../out.pt")
    bucket.put({store.manifest_key: text})
    with pytest.raises(StorageError, match="not a list of checkpoints"):
        store.manifest()
    assert json.loads(Manifest(RUN, ()).to_json())["saves"] == []


class Saving:
    """An uploader behind a proxy, and files to hand to it."""

    def __init__(self, bucket, url, folder, patience=0.3):
        self.folder, self.said = folder, []
        self.store = store_of(bucket, endpoint_url=url, s3_retry_timeout=patience)
        self.uploader = Uploader(self.store, RUN, 3, self.said.append)

    def saved(self, step):
        (self.folder / FILE).unlink(missing_ok=True)
        (self.folder / FILE).write_bytes(b"%d" % step)
        self.uploader.saved(step, {FILE: self.folder / FILE})


def test_uploads_run_in_the_background_and_close_waits_for_the_last(real_bucket, tmp_path):
    slow = Times(99, lambda exchange: (time.sleep(0.3), exchange.send()), "PUT", ".pt")
    with faulty_proxy(real_bucket.settings.endpoint_url, slow) as url:
        saving = Saving(real_bucket, url, tmp_path)
        start = time.monotonic()
        for step in range(6):
            saving.saved(step)
        assert time.monotonic() - start < 0.2
        assert saving.uploader.close() is None
    assert store_of(real_bucket).manifest().saves[0].step == 5
    assert len(slow.seen) < 6  # newer saves replaced those that waited


def test_a_server_that_recovers_gets_the_last_save_after_a_single_warning(real_bucket, tmp_path):
    refused = Times(10**6, fails(503, "SlowDown"), "PUT", ".pt")
    with faulty_proxy(real_bucket.settings.endpoint_url, refused) as url:
        saving = Saving(real_bucket, url, tmp_path)
        for step in range(3):
            saving.saved(step)
            time.sleep(0.8)
        assert len([note for note in saving.said if "warning" in note]) == 1
        refused._left = 0
        assert saving.uploader.close() is None
    assert store_of(real_bucket).manifest().saves[0].step == 2


def test_close_reports_that_the_last_save_was_never_accepted(real_bucket, tmp_path):
    refused = Times(10**6, fails(503, "SlowDown"), "PUT")
    with faulty_proxy(real_bucket.settings.endpoint_url, refused) as url:
        saving = Saving(real_bucket, url, tmp_path)
        saving.saved(1)
        error = saving.uploader.close()
    assert "not in the bucket" in error.message and "resume" in error.hint
    assert store_of(real_bucket).manifest() is None


def test_a_file_that_arrives_corrupt_is_not_listed_in_the_manifest(real_bucket):
    with faulty_proxy(real_bucket.settings.endpoint_url, untouched, spoils_uploads) as url:
        store = store_of(real_bucket, endpoint_url=url)
        with pytest.raises(StorageError, match="did not arrive intact"):
            save(store, 1)
    assert store.manifest() is None


def test_a_corrupt_answer_counts_as_damage_and_the_next_fetch_succeeds(real_bucket, tmp_path):
    save(store_of(real_bucket), 1)
    spoilt = Times(1, corrupts, "GET", "-dual")
    with faulty_proxy(real_bucket.settings.endpoint_url, spoilt) as url:
        with pytest.raises(StorageError, match="no intact checkpoint"):
            fetch(store_of(real_bucket, endpoint_url=url), tmp_path)
        assert fetch(store_of(real_bucket, endpoint_url=url), tmp_path).step == 1
