"""A worker that decodes images dies or hangs: the pair is named and the state saved. A small
/dev/shm does no harm."""

import json
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from clipft.runs.checkpoint import load_checkpoint
from tests import warm
from tests.faults.helpers import encoded, good, write_tar
from tests.faults.outside import Program, steps, wait_until

ARGS = [
    *("--model", "tiny", "--epochs", "40", "--effective-batch-size", "4", "--device", "cpu"),
    *("--micro-batch-size", "4", "--num-workers", "1", "--precision", "fp32"),
    *("--stop-on", "never", "--checkpoint-every", "0"),
]


@pytest.fixture(scope="module")
def slow_images(tmp_path_factory) -> Path:
    """Images that take a while to decode, so that a worker is always busy with one."""
    folder = tmp_path_factory.mktemp("slow")
    large = encoded(Image.linear_gradient("L").resize((2500, 2500)).convert("RGB"), "PNG")
    members = [(name, large if name.endswith("jpg") else data) for name, data in good(range(24))]
    write_tar(folder / "train" / "00000.tar", members)
    write_tar(folder / "val" / "00000.tar", good(range(100, 104)))
    return folder


def worker(run: Program) -> psutil.Process:
    """Return the process that decodes, not one of multiprocessing's own helpers."""
    children = psutil.Process(run.pid).children()
    (found,) = [child for child in children if "resource_tracker" not in "".join(child.cmdline())]
    return found


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_the_pair_is_named_and_the_state_saved(programs, slow_images, tmp_path, harm):
    where = ["--data-dir", str(slow_images), "--output-dir", str(tmp_path)]
    run = programs.start("train", *ARGS, "--worker-timeout", "5", *where)
    wait_until(lambda: steps(tmp_path) >= 1, run)
    worker(run).send_signal(harm)
    began = time.monotonic()
    assert run.wait(40) == 3
    assert time.monotonic() - began < 20
    error, hint = run.error()
    assert error.startswith("a data worker died or hung: ")
    assert re.search(r"in progress: 000\d\d in 00000.tar", error), error
    assert "clipft resume" in hint
    saved = load_checkpoint(tmp_path / "dual_lora_checkpoint.pt")
    assert saved["step"] == steps(tmp_path) >= 1
    assert not psutil.Process().children() or not psutil.pid_exists(run.pid)


SMALL_SHM = """
import ctypes, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
for mount in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size=256k", "none", "/dev/shm"]):
    if libc.unshare(0x20000) or subprocess.run(["mount", *mount], capture_output=True).returncode:
        sys.exit("cannot mount")
from clipft.cli.app import run
sys.exit(run(sys.argv[1:]))
"""
"""In a mount namespace (CLONE_NEWNS) of its own."""


@pytest.mark.slow
def test_a_small_shared_memory_file_system_is_enough(catalogue, tmp_path):
    """As in a container, only smaller: images of 48 training pairs take more than 256 KiB."""
    train = ["train", "--num-workers", "2", "--epochs", "2", "--json", "--model", "tiny"]
    train += ["--device", "cpu", "--precision", "fp32", "--data-dir", str(catalogue)]
    train += ["--output-dir", str(tmp_path)]
    train += ["--effective-batch-size", "48", "--micro-batch-size", "48"]
    run = warm.run([sys.executable, "-c", SMALL_SHM, *train], capture_output=True, text=True)
    if "cannot mount" in run.stderr:
        pytest.skip("only root on Linux may mount a file system")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)
    assert "bus error" not in run.stderr.lower()
