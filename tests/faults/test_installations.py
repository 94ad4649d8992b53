"""Libraries and drivers that do not fit together: ``train`` and ``doctor`` say so in one line."""

import json
import os
import subprocess
import sys

import pytest

from tests.faults.outside import ROOT


def clipft(*args: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, **environ}
    return subprocess.run(
        [sys.executable, "-m", "clipft", *args], cwd=ROOT, env=env, capture_output=True, text=True
    )


def test_a_torchvision_for_another_torch(catalogue, tmp_path):
    """A torchvision for CUDA raises this error beside a torch for the CPU."""
    stub = tmp_path / "torchvision"
    stub.mkdir()
    (stub / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    where = ["--data-dir", str(catalogue), "--output-dir", str(tmp_path / "out")]
    train = clipft("train", "--model", "tiny", *where, PYTHONPATH=str(tmp_path))
    assert train.returncode == 10, train.stderr
    error, hint = train.stderr.strip().splitlines()[-2:]
    assert error == "error: a library cannot be loaded: operator torchvision::nms does not exist"
    assert hint.startswith("hint: `clipft doctor` shows which one")
    assert "Traceback" not in train.stderr


@pytest.fixture
def old_driver(tmp_path) -> dict[str, str]:
    """A GPU with a driver that PyTorch cannot use: nvidia-smi works, CUDA does not start."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'NVIDIA A100-SXM4-40GB, 418.39'\n")
    tool.chmod(0o755)
    return {"PATH": f"{tool.parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_a_driver_that_is_too_old(catalogue, tmp_path, old_driver):
    where = ["--data-dir", str(catalogue), "--output-dir", str(tmp_path / "out")]
    train = clipft("train", "--model", "tiny", "--device", "cuda", *where, **old_driver)
    assert train.returncode == 2, train.stderr
    error, hint = train.stderr.strip().splitlines()[-2:]
    assert error.startswith("error: --device cuda: PyTorch ") and "finds no such device" in error
    assert "`clipft doctor` says why" in hint

    for device, status in (("auto", "warning"), ("cuda", "error")):
        said = clipft("doctor", "--model", "tiny", "--device", device, "--json", **old_driver)
        checks = {check["name"]: check for check in json.loads(said.stdout)["checks"]}
        assert checks["device"]["status"] == status
        told = checks["device"]["found"] + checks["device"]["hint"]
        assert "NVIDIA A100-SXM4-40GB, driver 418.39" in told, told
        assert "pytorch.org" in told
