"""``clipft train --plan`` when the pairs are in a bucket."""

import json

import pytest

from clipft.cli.app import run
from tests.storage.test_training import command, put_raw


def test_plan_counts_missing_pairs_without_fetching_them(bucket, tmp_path, capsys):
    put_raw(bucket)
    args = command(bucket, tmp_path, "--plan", "--json")
    assert run(args) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["to_fetch"]["objects"] == 2 * 96
    assert said["forecast"] is None
    assert not (tmp_path / "data").exists() and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_plan_measures_pairs_that_are_already_fetched(bucket, tmp_path, capsys):
    put_raw(bucket)
    where = command(bucket, tmp_path)[1:7]
    assert run(["sync", *where[:6], "--data-dir", str(tmp_path / "data")]) == 0
    capsys.readouterr()
    assert run(command(bucket, tmp_path, "--plan", "--json")) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["forecast"]["plan"]["train_pairs"] == 80
    assert said["uploads_to"].startswith("s3://")
    assert not (tmp_path / "runs").exists()
    listed = bucket.client.list_objects_v2(Bucket=bucket.settings.s3_bucket, Prefix="checkpoints")
    assert listed["KeyCount"] == 0
