import hashlib

import pytest

from clipft.errors import StorageError, UsageError
from clipft.storage.checkpoints import fetch_checkpoint, upload_checkpoint
from tests.storage.conftest import refusing

WEIGHTS = bytes(range(256)) * 400


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "dual_lora_checkpoint.pt"
    path.write_bytes(WEIGHTS)
    return path


def test_up_and_down(bucket, saved, tmp_path):
    url = upload_checkpoint(saved, bucket.settings)
    assert url == f"s3://{bucket.settings.s3_bucket}/checkpoints/{saved.name}"
    target = tmp_path / "new" / "fetched.pt"
    assert fetch_checkpoint(saved.name, target, bucket.settings)
    assert target.read_bytes() == WEIGHTS
    assert [p.name for p in target.parent.iterdir()] == ["fetched.pt"]


def test_in_several_parts(bucket, saved, tmp_path):
    saved.write_bytes(WEIGHTS * 200)  # 20 MB: above the size that goes in one piece
    upload_checkpoint(saved, bucket.settings)
    key = f"checkpoints/{saved.name}"
    found = bucket.client.head_object(Bucket=bucket.settings.s3_bucket, Key=key)
    assert "-" in found["ETag"]
    assert found["Metadata"]["sha256"] == hashlib.sha256(WEIGHTS * 200).hexdigest()
    assert fetch_checkpoint(saved.name, tmp_path / "fetched.pt", bucket.settings)
    assert (tmp_path / "fetched.pt").read_bytes() == WEIGHTS * 200


def test_false_only_for_a_checkpoint_proven_absent(bucket, tmp_path):
    assert fetch_checkpoint("none.pt", tmp_path / "none.pt", bucket.settings) is False
    assert not (tmp_path / "none.pt").exists()
    with pytest.raises(StorageError, match="does not exist"):
        fetch_checkpoint("none.pt", tmp_path / "none.pt", bucket.but(s3_bucket="nowhere-at-all"))


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "AccessDenied"), (404, "NotFound"), (400, "ExpiredToken"), (503, "SlowDown")],
)
def test_what_cannot_be_seen_is_not_absent(bucket, serving, impatient, tmp_path, status, code):
    settings = bucket.but(endpoint_url=serving(refusing(status, code)))
    with pytest.raises(StorageError):
        fetch_checkpoint("some.pt", tmp_path / "some.pt", settings)


def test_other_bytes_than_were_uploaded_leave_the_target_as_it_was(bucket, saved):
    bucket.client.put_object(
        Bucket=bucket.settings.s3_bucket,
        Key=f"checkpoints/{saved.name}",
        Body=b"flipped",
        Metadata={"sha256": hashlib.sha256(WEIGHTS).hexdigest()},
    )
    with pytest.raises(StorageError, match="sha256"):
        fetch_checkpoint(saved.name, saved, bucket.settings)
    assert saved.read_bytes() == WEIGHTS


def test_what_cannot_be_uploaded(bucket, saved, tmp_path):
    with pytest.raises(StorageError, match="cannot read"):
        upload_checkpoint(tmp_path / "absent.pt", bucket.settings)
    with pytest.raises(UsageError, match="no bucket"):
        upload_checkpoint(saved, bucket.but(s3_bucket=None))
    with pytest.raises(StorageError, match="no name"):
        fetch_checkpoint("../up.pt", saved, bucket.settings)
