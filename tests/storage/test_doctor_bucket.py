"""``clipft doctor`` checks a bucket and distinguishes the same problems as ``clipft sync``."""

import pytest

from clipft.config.settings import Settings
from clipft.doctor import Finding
from clipft.doctor.examination import run_check


def check(storage, **more) -> Finding:
    return run_check("bucket", Settings(**{**storage.model_dump(), **more}))


def test_an_empty_bucket_gives_a_warning_and_one_with_pairs_is_ok(bucket):
    assert check(bucket.settings).status == "warning"
    bucket.put({"data/train/00000.tar": b"x"})
    assert check(bucket.settings).status == "ok"


def test_doctor_tries_an_upload_and_removes_it_again(bucket):
    bucket.put({"data/train/00000.tar": b"x"})
    found = check(bucket.settings, enable_s3_checkpoints=True)
    assert "uploaded" in found.found
    listed = bucket.client.list_objects_v2(Bucket=bucket.settings.s3_bucket)["Contents"]
    assert [entry["Key"] for entry in listed] == ["data/train/00000.tar"]


def test_checkpoint_uploads_without_a_bucket_are_an_error():
    assert check(Settings(enable_s3_checkpoints=True)).status == "error"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"s3_bucket": "no-such-bucket"}, "does not exist"),
        ({"endpoint_url": "http://127.0.0.1:9"}, "cannot be reached"),
        ({"endpoint_url": "http://nowhere.invalid"}, "name cannot be resolved"),
        ({"s3_profile": "nobody"}, "no profile nobody"),
    ],
)
def test_problems_are_distinguished(bucket, changed, said):
    found = check(bucket.settings, **changed)
    assert found.status == "error"
    assert said in found.found
    assert found.hint


def test_missing_credentials_are_reported(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no usable AWS credentials" in check(bucket.settings).found
