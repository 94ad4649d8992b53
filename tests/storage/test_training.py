"""Whole runs with pairs and checkpoints in a bucket, some on a machine that is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clipft.cli.app import run
from clipft.data.demo.catalogue import render_pair
from tests import warm
from tests.conftest import jpeg, write_shard
from tests.e2e.test_train import assert_same_run
from tests.faults.helpers import one_error
from tests.storage.faulty_proxy import Times, fails, faulty_proxy

SMALL = [
    *("--model", "tiny", "--epochs", "3", "--effective-batch-size", "16"),
    *("--micro-batch-size", "16", "--num-workers", "0", "--precision", "fp32"),
    *("--stop-on", "never", "--checkpoint-every", "2", "--enable-s3-checkpoints"),
]


def raw(numbers) -> dict[str, bytes]:
    """Rendered products as raw files, such as 00001.jpg and 00001.txt."""
    files = {}
    for number in numbers:
        pair = render_pair(7, number)
        files |= {f"{number:05d}.jpg": jpeg(pair), f"{number:05d}.txt": pair.caption.encode()}
    return files


def put_raw(bucket) -> None:
    for side, numbers in (("train", range(80)), ("val", range(1000, 1016))):
        bucket.put({f"data/{side}/{name}": body for name, body in raw(numbers).items()})


def command(bucket, home: Path, *more: str) -> list[str]:
    return [
        *("train", "--s3-bucket", bucket.settings.s3_bucket, "--s3-retry-timeout", "20"),
        *("--endpoint-url", bucket.settings.endpoint_url, *SMALL),
        *("--data-dir", str(home / "data"), "--output-dir", str(home / "runs"), *more),
    ]


def manifest(bucket) -> dict:
    key = "checkpoints/dual_lora_checkpoint.json"
    answer = bucket.client.get_object(Bucket=bucket.settings.s3_bucket, Key=key)
    return json.loads(answer["Body"].read())


def killed_in_mid_run(bucket, home: Path) -> None:
    """Start a run; once a few saves are in S3, kill its process and delete its folder."""
    victim = warm.Popen(
        [sys.executable, "-m", "clipft", *command(bucket, home)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while True:
        assert victim.poll() is None and time.monotonic() < end
        try:
            if manifest(bucket)["saves"][0]["step"] >= 4:
                break
        except bucket.client.exceptions.NoSuchKey:
            time.sleep(0.05)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    shutil.rmtree(home)


def test_a_run_resumes_on_a_new_machine(real_bucket, tmp_path, capsys):
    put_raw(real_bucket)
    undisturbed, lost, new = tmp_path / "undisturbed", tmp_path / "lost", tmp_path / "new"
    # It needs its own prefix, or the two runs would replace each other's checkpoints
    assert run(command(real_bucket, undisturbed, "--s3-checkpoint-prefix", "undisturbed")) == 0
    assert "Packed 80 training and 16 validation pairs" in capsys.readouterr().err
    killed_in_mid_run(real_bucket, lost)
    assert manifest(real_bucket)["saves"][0]["step"] < 15

    assert run(command(real_bucket, new, "--resume-from-checkpoint")) == 0
    assert "Fetched the checkpoint of step" in capsys.readouterr().err
    assert_same_run(undisturbed / "runs", new / "runs")
    found = manifest(real_bucket)
    assert found["saves"][0]["step"] == 15 and len(found["saves"]) == 3
    assert set(found["saves"][0]["files"]) >= {"dual_lora_checkpoint.pt", "metrics.jsonl"}


@pytest.mark.slow
def test_resume_needs_nothing_but_the_bucket(real_bucket, tmp_path, capsys, monkeypatch):
    put_raw(real_bucket)
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    assert run(command(real_bucket, whole, "--s3-checkpoint-prefix", "whole")) == 0
    killed_in_mid_run(real_bucket, lost)
    monkeypatch.chdir(tmp_path)
    place = f"s3://{real_bucket.settings.s3_bucket}/checkpoints"
    where = ["--endpoint-url", real_bucket.settings.endpoint_url]
    assert run(["resume", place, *where]) == 0
    assert_same_run(whole / "runs", tmp_path / "checkpoints")

    # Resume a run that has nothing left to train, then evaluate it from the bucket
    whole_place = f"s3://{real_bucket.settings.s3_bucket}/whole"
    again = ["--output-dir", "again", "--data-dir", str(whole / "data")]
    assert run(["resume", whole_place, *where, *again]) == 0
    assert "nothing left to train" in capsys.readouterr().err
    assert_same_run(whole / "runs", tmp_path / "again")
    data = f"s3://{real_bucket.settings.s3_bucket}/data"
    judged = ["evaluate", f"{whole_place}/dual_lora_checkpoint", "--data-dir", data, "--json"]
    assert run([*judged, *where]) == 0
    assert json.loads(capsys.readouterr().out)["scenario"] == "dual_lora"


def test_no_checkpoint_in_s3_starts_at_epoch_0(real_bucket, tmp_path, capsys):
    put_raw(real_bucket)
    assert run(command(real_bucket, tmp_path, "--resume-from-checkpoint", "--epochs", "1")) == 0
    said = capsys.readouterr().err
    assert "no checkpoint found in S3" in said and "starting at epoch 0" in said


def test_a_run_does_not_start_from_scratch_if_the_bucket_is_unreadable(
    real_bucket, tmp_path, capsys
):
    put_raw(real_bucket)
    hidden = Times(10**6, fails(403, "AccessDenied"), contains="checkpoint.json")
    with faulty_proxy(real_bucket.settings.endpoint_url, hidden) as url:
        more = ("--resume-from-checkpoint", "--endpoint-url", url)
        assert run(command(real_bucket, tmp_path, *more)) == 4
    assert "forbidden" in one_error(capsys)[0]
    assert not (tmp_path / "runs" / "dual_lora_checkpoint.pt").exists()


@pytest.mark.slow
def test_failing_uploads_do_not_stop_training(real_bucket, tmp_path, capsys):
    put_raw(real_bucket)
    refused = Times(10**6, fails(503, "SlowDown"), "PUT")
    with faulty_proxy(real_bucket.settings.endpoint_url, refused) as url:
        more = ("--endpoint-url", url, "--s3-retry-timeout", "0.3", "--epochs", "1")
        assert run(command(real_bucket, tmp_path, *more)) == 4
    said = capsys.readouterr().err
    assert said.count("warning: a checkpoint was not uploaded") == 1
    assert "error: the last checkpoint is not in the bucket" in said and "hint:" in said
    runs = tmp_path / "runs"
    assert torch.load(runs / "dual_lora_checkpoint.pt", weights_only=True)["finished"]
    assert (runs / "dual_lora" / "result.json").exists()

    # The server works again: the finished run's checkpoint is uploaded
    again = command(real_bucket, tmp_path, "--resume-from-checkpoint", "--epochs", "1")
    assert run(again) == 0
    assert manifest(real_bucket)["saves"][0]["step"] == 5


def test_a_signal_ends_the_wait_for_a_hanging_last_upload(real_bucket, tmp_path):
    """The result is shown, the local file is kept, and `clipft resume` uploads it."""
    put_raw(real_bucket)
    assert (
        run(["sync", *command(real_bucket, tmp_path)[1:7], "--data-dir", str(tmp_path / "data")])
        == 0
    )

    def hangs(exchange) -> None:
        time.sleep(60)
        exchange.reset()

    hanging = Times(10**6, hangs, "PUT")
    with faulty_proxy(real_bucket.settings.endpoint_url, hanging) as url:
        args = command(real_bucket, tmp_path, "--endpoint-url", url, "--epochs", "1")
        process = warm.Popen(
            [sys.executable, "-m", "clipft", *args], stderr=subprocess.PIPE, text=True
        )
        while "Waiting for the last checkpoint" not in (line := process.stderr.readline()):
            assert line, "the run ended too early"
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        _, said = process.communicate(timeout=120)
        assert process.returncode == 75, said
        assert time.monotonic() - began < 25
    assert "error: stopped by SIGTERM while its checkpoint was uploaded" in said
    assert "Traceback" not in said
    again = command(real_bucket, tmp_path, "--resume-from-checkpoint", "--epochs", "1")
    assert run(again) == 0
    assert manifest(real_bucket)["saves"][0]["step"] == 5


@pytest.mark.slow
def test_streaming_from_the_bucket_trains_the_same_weights(real_bucket, tmp_path, capsys):
    """Train with --stream, and compare with a run on a local copy."""
    for which in range(3):
        write_shard(tmp_path / f"{which:05d}.tar", range(which * 30, which * 30 + 30))
    write_shard(tmp_path / "val.tar", range(1000, 1016))
    shards = {f"data/train/{n:05d}.tar": (tmp_path / f"{n:05d}.tar").read_bytes() for n in range(3)}
    sizes = {f"{n:05d}.tar": 30 for n in range(3)}
    real_bucket.put(shards | {"data/val/00000.tar": (tmp_path / "val.tar").read_bytes()})
    stream = ("--stream", "--shuffle-buffer", "40", "--epochs", "2")
    assert run(command(real_bucket, tmp_path / "no-sizes", *stream)) == 3
    assert "sizes.json" in one_error(capsys)[0]

    real_bucket.put({"data/train/sizes.json": json.dumps(sizes).encode()})
    far, near = tmp_path / "far", tmp_path / "near"
    assert run(command(real_bucket, far, *stream)) == 0
    assert not (far / "data" / "train").exists() and (far / "data" / "val").exists()
    synced = ["sync", "--s3-bucket", real_bucket.settings.s3_bucket, "--data-dir"]
    synced += [str(near / "data"), "--endpoint-url", real_bucket.settings.endpoint_url]
    assert run(synced) == 0
    local = [*SMALL[:-1], *stream, "--data-dir", str(near / "data")]
    assert run(["train", *local, "--output-dir", str(near / "runs")]) == 0
    assert_same_run(far / "runs", near / "runs")


@pytest.mark.slow
def test_a_run_on_raw_photos_resumes_on_a_new_machine(real_bucket, tmp_path):
    """Uses raw photos of furniture; skipped where there are none."""
    photos = Path(__file__).parents[3] / "shared" / "data" / "furniture"
    if not photos.is_dir():
        pytest.skip(f"no photos in {photos}")
    for path in photos.rglob("*"):
        if path.suffix in {".jpg", ".txt"}:
            key = f"data/{path.relative_to(photos).as_posix()}"
            real_bucket.put({key: path.read_bytes()})
    undisturbed, lost, new = tmp_path / "undisturbed", tmp_path / "lost", tmp_path / "new"
    assert run(command(real_bucket, undisturbed, "--s3-checkpoint-prefix", "undisturbed")) == 0
    killed_in_mid_run(real_bucket, lost)
    assert run(command(real_bucket, new, "--resume-from-checkpoint")) == 0
    assert_same_run(undisturbed / "runs", new / "runs")
