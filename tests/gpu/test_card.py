"""What only a GPU can show: its memory, its precisions, its kernels, its streams, its neighbors.

What must hold on every device is in ``test_device.py``.
"""

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from clipft.data.order import Position
from clipft.distributed.collectives import ALONE
from clipft.embedding.transfer import Transfer
from clipft.training.loop import fit
from tests.e2e.test_train import metrics
from tests.faults.outside import steps, wait_until
from tests.models.checkpoints import clip_tokenizer
from tests.training.process_helpers import results
from tests.training.step.sharded_runs import Run, figures

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
    with memory_left(3072):  # the context and the graphs of a step take more
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


def losses(data_dir: Path, **given: Any) -> list[float]:
    """Of four steps on the GPU, without dropout."""
    four = {"device": "cuda", "max_train_pairs": 40, "lora_dropout": 0, "stop_on": "never"}
    done = Run.of({**four, "data_dir": str(data_dir), **given}, ALONE).train()
    return done[::2]


@pytest.mark.parametrize("scenario", ["dual_lora", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_as_single_does(scenario, precision, catalogue):
    exact = losses(catalogue, scenario=scenario, precision="fp32")
    ours = losses(catalogue, scenario=scenario, precision=precision)
    assert len(ours) == 4 and ours == pytest.approx(exact, rel=0.02)


def test_compiled_towers_train_as_plain_ones_do(catalogue):
    plain = losses(catalogue, scenario="dual_lora", precision="fp32")
    torch._dynamo.utils.counters.clear()
    compiled = losses(catalogue, scenario="dual_lora", precision="fp32", compile=True)
    assert compiled == pytest.approx(plain, rel=1e-3)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 16


class Kernels(TorchDispatchMode):
    """Collects the attention operators that run, and the shapes that each is given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = dict[str, set[tuple[int, int]]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "_scaled_dot_product" in name and "backward" not in name:
            self.shapes.setdefault(name, set()).add((len(args[1]), args[1].shape[2]))
        return func(*args, **(kwargs or {}))


def test_attention_does_not_plan_each_shape_anew(catalogue):
    with Kernels() as kernels:
        losses(catalogue, scenario="dual_lora", precision="bf16", max_train_pairs=96, epochs=3)
    assert any("flash" in name for name in kernels.shapes)
    assert not [name for name in kernels.shapes if "cudnn" in name]
    assert len(set().union(*kernels.shapes.values())) <= 16


def test_a_step_waits_for_the_device_once(catalogue):
    given = {"device": "cuda", "precision": "bf16", "scenario": "dual_lora", "graph_memory": 1}
    data = {"data_dir": str(catalogue), "max_train_pairs": 80, "epochs": 1}
    prepared = Run.of({**given, **data}, ALONE)
    accumulate = prepared.setup.make_accumulation(prepared.state.optimizer, lambda note: None)
    steps = fit(prepared.state, prepared.setup.step_batches(Position()), accumulate)
    next(steps)  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            later = list(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in said if "synchronizing" in str(w.message)]
    assert len(later) == 3 and len(waits) <= len(later)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_pinned_loader_delivers_what_the_plain_one_does(workers, catalogue):
    """Batches whose memory is used again while copies from it may still be under way."""
    given = {"data_dir": str(catalogue), "max_train_pairs": 96, "epochs": 3}
    shared = {"num_workers": workers, "augment_on": "worker", "precision": "fp32"}

    def pixels(device: str) -> Iterator[torch.Tensor]:
        setup = Run.of({**given, **shared, "device": device}, ALONE).setup
        transfer = Transfer(torch.device(device))
        for step in setup.step_batches(Position()):
            for batch in step.micro_batches:
                assert batch.pixel_values.is_pinned() == (device == "cuda")
                yield transfer.take(batch.pixel_values)

    ours, expected = list(pixels("cuda")), list(pixels("cpu"))
    assert len(ours) == len(expected) > 40
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
IN_TWO = """
    from pathlib import Path
    from tests.training.step.sharded_runs import figures
    result = figures(json.loads({given!r}), processes, Path({left!r}))["told"]
"""


@two_gpus
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_two_gpus_train_as_one_does(sharded, precision, catalogue, tmp_path):
    """With NCCL, and with FSDP2 where weights are sharded."""
    given = {
        **{"scenario": "full", "device": "cuda", "precision": precision},
        **{"data_dir": str(catalogue), "max_train_pairs": 40, "stop_on": "never"},
    }
    alone = figures(given, ALONE, tmp_path / "alone.pt")["told"]
    body = IN_TWO.format(
        given=json.dumps({**given, "shard_weights": sharded}), left=str(tmp_path / "two.pt")
    )
    close = {"rel": 1e-4} if precision == "fp32" else {"rel": 0.05}
    for told in results(body, device="cuda"):
        assert told == pytest.approx(alone, **close)
