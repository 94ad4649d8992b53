"""Checks under real conditions: broken libraries, folders, limits, models, buckets."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clipft.cli.app import run
from clipft.config.settings import Settings
from clipft.core.errors import ModelError
from clipft.doctor import libraries, machine, reach
from clipft.doctor.examination import CHECKS, examine, run_check
from clipft.models.source import model_source
from tests import warm

TINY = Settings(model="tiny", device="cpu")


def but(**changed) -> Settings:
    return TINY.model_copy(update=changed)


def test_a_machine_that_can_train_is_ready(catalogue, tmp_path, capsys):
    out = tmp_path / "runs"
    flags = ["--data-dir", str(catalogue), "--output-dir", str(out), "--device", "cpu"]
    assert run(["doctor", "--model", "tiny", *flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ready"]
    assert [check["name"] for check in said["checks"]] == list(CHECKS)
    assert not [check for check in said["checks"] if check["status"] == "error"]
    assert not out.exists()


def test_each_finding_that_is_not_ok_has_a_hint(tmp_path):
    settings = but(data_dir=tmp_path / "none", model="nobody/nothing", s3_bucket="x")
    settings = settings.model_copy(update={"endpoint_url": "http://127.0.0.1:9", "wandb": "online"})
    findings = examine(settings, lambda done, of: None).values()
    assert all(f.hint for f in findings if f.status != "ok")
    assert {f.status for f in findings} >= {"ok", "error"}


def test_an_error_sets_the_exit_code_and_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    flags = ["--model", "tiny", "--output-dir", str(tmp_path / "file" / "runs")]
    assert run(["doctor", *flags]) == 10
    said = capsys.readouterr()
    assert "error: 1 check failed, first output folder" in said.err
    assert "--output-dir" in said.err


@pytest.mark.slow
def test_a_torchvision_that_does_not_fit_is_found_and_the_other_checks_still_run(tmp_path):
    """The error of a CPU-only torch beside a torchvision for CUDA."""
    fake = tmp_path / "torchvision"
    fake.mkdir()
    (fake / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    done = subprocess.run(
        [sys.executable, "-m", "clipft", "doctor", "--model", "tiny", "--device", "cpu", "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 10
    assert "torchvision::nms does not exist" in checks["libraries fit"]["found"]
    assert "pip install" in checks["libraries fit"]["hint"]
    assert checks["memory"]["status"] == "ok"
    assert "Traceback" not in done.stderr


def test_a_library_of_a_wrong_version_is_found(tmp_path, monkeypatch):
    """Another version comes before the real one on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    info = tmp_path / "peft-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n")
    found = run_check("packages", TINY)
    assert found.status == "error"
    assert "peft 0.1.0 is not" in found.found


@pytest.mark.parametrize(
    ("torch", "torchvision", "same"),
    [("13.2", 13020, True), (None, None, True), (None, 13020, False), ("12.8", 13020, False)],
)
def test_cuda_versions_are_compared_across_notations(torch, torchvision, same):
    assert (libraries.cuda_major(torch) == libraries.cuda_major(torchvision)) is same


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder that nobody can write to")
def test_a_read_only_folder_is_an_error_for_the_output_and_a_warning_for_the_cache(monkeypatch):
    assert machine.output_folder(but(output_dir=Path("/sys/runs"))).status == "error"
    monkeypatch.setenv("CLIPFT_CACHE", "/sys/cache")
    assert machine.cache(TINY).status == "warning"


def test_checking_a_folder_leaves_nothing_behind(tmp_path):
    deep = tmp_path / "a" / "b"
    found = machine.output_folder(but(output_dir=deep))
    assert found.status in {"ok", "warning"}
    assert "will be created" in found.found
    assert not list(tmp_path.iterdir())


def test_a_low_limit_of_open_files_is_found():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        assert machine.descriptors(TINY).status == "warning"
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        found = machine.descriptors(TINY)
        assert found.status == "error"
        assert "ulimit -n" in found.hint
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_memory_limit_of_the_process_is_respected():
    code = (
        "import resource, torch; from clipft.doctor import machine; "
        "from clipft.config.settings import Settings; import psutil; "
        "used = psutil.Process().memory_info().vms; "
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2); "
        "print(machine.memory(Settings()).status)"
    )
    done = warm.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "warning", done.stderr


def test_the_memory_that_workers_share_is_named_and_a_container_has_enough(monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=64 << 20)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    found = machine.shared_memory(but(num_workers=1, micro_batch_size=64))
    assert found.status == "ok"
    # A step of 1,024 is 16 chunks of 64; one more is decoded, and one joined
    chunks = 64 * 3 * 224**2 * 18 / 2**20
    assert f"{chunks:,.0f} MiB for decoded images, none of it in /dev/shm (64 MiB" in found.found
    assert machine.shared_memory(but(num_workers=0)).found.startswith("not needed")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    found = machine.shared_memory(but(processes=2))
    assert found.status == "warning"
    assert "NCCL" in found.hint


def test_workers_that_would_fill_the_memory_are_found(monkeypatch):
    monkeypatch.setattr("clipft.core.memory.usable_memory", lambda device: 512 << 20)
    found = machine.shared_memory(but(num_workers=1, micro_batch_size=64))
    assert found.status == "warning"
    assert "--num-workers" in found.hint


def test_a_broken_model_folder_is_found(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        reach.model(but(model=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    found = run_check("model", but(model=str(tmp_path)))
    assert found.status == "error"
    assert found.hint


def test_a_truncated_model_is_found(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_source("tiny"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert run_check("model", but(model=str(folder))).status == "error"


def test_an_unreachable_hub_is_found():
    found = reach.model(but(model="nobody/nothing"))
    assert found.status == "error"
    assert "not in the cache" in found.found


def test_wandb_without_key_or_server_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert reach.tracking(but(wandb="disabled")).status == "ok"
    assert reach.tracking(but(wandb="offline")).status == "ok"
    found = reach.reachable("http://127.0.0.1:9")
    assert found.status == "warning"
    assert "offline" in found.hint


@pytest.mark.gpu
def test_a_gpu_is_described():
    found = libraries.device(Settings(model="tiny"))
    assert "GiB free" in found.found and "driver" in found.found
    assert libraries.eight_bit(Settings(model="tiny")).status == "ok"
