"""What only a GPU can show: running out of its memory, and a kill in bf16 with 8-bit AdamW."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from tests.e2e.test_train import metrics
from tests.faults.outside import steps, wait_until
from tests.models.checkpoints import clip_tokenizer

pytestmark = pytest.mark.gpu

HOLDER = """
import sys, torch
free = torch.cuda.mem_get_info()[0] - int(sys.argv[1])
held = torch.empty(free, dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def memory_left(mib: int) -> Iterator[None]:
    """Let another process hold all memory of the GPU except for ``mib`` MiB."""
    command = [sys.executable, "-c", HOLDER, str(mib << 20)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        yield
        holder.communicate()


@pytest.fixture(scope="module")
def vit_b32(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit-b32")
    torch.manual_seed(0)
    CLIPModel(CLIPConfig()).save_pretrained(folder)
    clip_tokenizer().save_pretrained(str(folder))
    CLIPImageProcessor().save_pretrained(str(folder))
    return folder


def clipft(*args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "clipft", *args], capture_output=True, text=True)


def test_running_out_of_memory_changes_no_losses(vit_b32, catalogue, tmp_path):
    def train(out: Path, *more: str) -> list[float]:
        done = clipft(
            *("train", "--model", str(vit_b32), "--data-dir", str(catalogue)),
            *("--output-dir", str(out), "--effective-batch-size", "96", "--epochs", "2"),
            *("--num-workers", "0", "--device", "cuda", "--precision", "fp32"),
            *("--lora-dropout", "0", "--stop-on", "never", *more),
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
        return [line["loss"] for line in metrics(out / "dual_lora") if line["kind"] == "step"]

    said = list[str]()
    roomy = train(tmp_path / "roomy")
    with memory_left(4096):
        cramped = train(tmp_path / "cramped", "--micro-batch-size", "96", "--graph-memory", "70")
    assert "warning: memory ran out in step 1" in said[1]
    assert cramped == pytest.approx(roomy, rel=1e-4)


def test_the_finder_stays_within_what_is_left(vit_b32):
    given = ("--model", str(vit_b32), "--device", "cuda", "--precision", "fp32", "--json")
    with memory_left(4096):
        done = clipft("find-batch-size", *given, "--effective-batch-size", "4096")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 1 <= found["micro_batch_size"] <= found["largest"] < 4096
    assert not all(probe["fits"] for probe in found["probes"])


def test_a_kill_under_bf16_with_8_bit_states(programs, catalogue, tmp_path):
    def command(out: Path) -> list[str]:
        return [
            *("train", "--model", "tiny", "--scenario", "full", "--epochs", "4"),
            *("--data-dir", str(catalogue), "--output-dir", str(out)),
            *("--effective-batch-size", "32", "--micro-batch-size", "16", "--num-workers", "2"),
            *("--device", "cuda", "--precision", "bf16", "--optimizer", "adamw8bit"),
            *("--stop-on", "never", "--checkpoint-every", "1", "--resume-from-checkpoint"),
        ]

    env = {"CLIPFT_CACHE": str(tmp_path / "cache"), **os.environ}
    assert programs.run(*command(tmp_path / "whole"), env=env).wait() == 0
    for done in (2, 5, 9):
        run = programs.start(*command(tmp_path / "killed"), env=env)
        wait_until(lambda: steps(tmp_path / "killed", "full") >= done, run)  # noqa: B023
        run.signal(signal.SIGKILL)
        run.wait()
    assert programs.run(*command(tmp_path / "killed"), env=env).wait() == 0
    whole, killed = (
        [line["loss"] for line in metrics(tmp_path / name / "full") if line["kind"] == "step"]
        for name in ("whole", "killed")
    )
    assert len(whole) == 12
    assert killed == pytest.approx(whole, rel=1e-3)
