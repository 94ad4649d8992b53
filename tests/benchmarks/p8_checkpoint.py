"""P8: measure the cost of a checkpoint and its upload every 50 steps, compared with none.

    python tests/benchmarks/p8_checkpoint.py [--quick] [--json FILE]

Trains the tiny model for one epoch, once with a bucket on a RADOS Gateway and once with only the
two saves at the end. Measures the time for which training paused (to copy the state, wait for the
file before it and pass that to the uploader) and the processor time of all threads, because the
total times of two runs on a busy machine differ by more than the effect. Then the size of a
checkpoint of the tiny model, and of the real ViT-B/32 with random weights, is compared with the
bytes of the trained parameters. With ``--sizes``, only this is done.
"""

import argparse
import contextlib
import io
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks.side_by_side import arguments, write_figures
from tests.conftest import write_shard
from tests.storage.rados_gateway import KEY, MISSING, SECRET, RadosGateway, installed

GOAL, MOST_TIMES = 0.005, 3.0


@dataclass(frozen=True)
class Row:
    """``file_over_state`` is the checkpoint's size divided by 4 bytes per trained parameter."""

    run: str
    steps: int
    saves: int
    seconds: float
    stood_still_s: float
    share: float
    cpu_s: float
    file_over_state: float
    goal: str


@dataclass
class Clock:
    """The time spent in timed functions. One that another timed one calls is not counted twice."""

    spent: float = 0.0
    saves: int = 0
    _inside: bool = False

    def timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            self.saves += work.__name__ == "save"
            if self._inside:
                return work(*given, **named)
            start, self._inside = time.perf_counter(), True
            try:
                return work(*given, **named)
            finally:
                self.spent, self._inside = self.spent + time.perf_counter() - start, False

        return run


@contextlib.contextmanager
def watched() -> Iterator[Clock]:
    """Measure how long training waits for saves, and for passing them to the uploader."""
    from clipft.training.checkpointing import Saver

    clock = Clock()
    with contextlib.ExitStack() as timed:
        for name in ("save", "save_if_due", "save_rest", "close"):
            work = clock.timed(getattr(Saver, name))
            timed.enter_context(mock.patch.object(Saver, name, work))
        yield clock


def measure(name: str, data: Path, out: Path, steps: int, more: list[str]) -> Row:
    from clipft.cli.app import run

    args = ["train", "--model", "tiny", "--data-dir", str(data), "--output-dir", str(out)]
    args += ["--epochs", "1", "--effective-batch-size", "8", "--num-workers", "0"]
    args += [
        "--max-train-pairs",
        str(8 * steps),
        "--micro-batch-size",
        "8",
        "--precision",
        "fp32",
        "--stop-on",
        "never",
        "--json",
    ]
    used, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with watched() as clock, contextlib.redirect_stdout(io.StringIO()):
        if code := run([*args, *more]):
            sys.exit(f"train ended with {code}")
    seconds, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    share = clock.spent / seconds
    return Row(
        run=name,
        steps=steps,
        saves=clock.saves,
        seconds=seconds,
        stood_still_s=clock.spent,
        share=share,
        cpu_s=now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime,
        file_over_state=(out / "dual_lora_checkpoint.pt").stat().st_size / (4 * _trained(out)),
        goal="" if "without" in name else f"< {GOAL:.1%}" + ("" if share < GOAL else ", missed"),
    )


@dataclass(frozen=True)
class Size:
    """Bytes of the trained parameters, and of a checkpoint with them and their AdamW state."""

    model: str
    tensors: int
    trained: int
    file: int
    times: float
    met: bool


def size_of(name: str, model: str) -> Size:
    """Measure the checkpoint of a run of ``dual_lora`` after a step."""
    import torch

    from clipft.config.settings import Settings
    from clipft.embedding.load import load_model
    from clipft.runs.checkpoint_format import checkpoint_size
    from clipft.training.step.optimizer import make_adamw, parameter_groups

    settings = Settings(model=model, scenario="dual_lora", device="cpu", precision="fp32")
    trainable = load_model(settings).model
    adamw = make_adamw("adamw", parameter_groups(trainable, settings), torch.device("cpu"))
    for _, parameter in trainable.trainable():
        parameter.grad = torch.zeros_like(parameter)
    adamw.step()
    weights = trainable.trainable_state()
    kept = {"model_state_dict": weights, "optimizer_state_dict": adamw.state_dict()}
    size = checkpoint_size({**kept, "settings": settings.model_dump(mode="json")})
    trained = sum(weight.nbytes for weight in weights.values())
    times = size / trained
    return Size(name, len(weights), trained, size, times, times <= MOST_TIMES)


def write_sizes(file: Path | None) -> None:
    from p1_training import make_model

    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        rows = [size_of("tiny", "tiny"), size_of("ViT-B/32", folder)]
    for row in rows:
        print(row)
    if file:
        write_figures(file.with_name("p8_size.json"), "P8 size", rows, ("torch", "peft"))


def _trained(out: Path) -> int:
    import torch

    content = torch.load(out / "dual_lora_checkpoint.pt", weights_only=True)
    return sum(tensor.numel() for tensor in content["model_state_dict"].values())


def main() -> None:
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sizes", action="store_true", help="measure the size of a file alone")
    given = parser.parse_args()
    write_sizes(given.json)
    if given.sizes:
        return
    if not installed():
        sys.exit(MISSING)
    os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    os.environ |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1"}
    steps = 100 if given.quick else 400
    with tempfile.TemporaryDirectory(prefix="clipft-p8-") as place:
        home = Path(place)
        write_shard(home / "bucket" / "data" / "train" / "00000.tar", range(8 * steps))
        write_shard(home / "bucket" / "data" / "val" / "00000.tar", range(5000, 5064))
        data = home / "bucket" / "data"
        with RadosGateway(home / "node") as server:
            import boto3

            keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
            client = boto3.client("s3", endpoint_url=server.url, region_name="us-east-1", **keys)
            client.create_bucket(Bucket="runs")
            for path in data.rglob("*.tar"):
                client.upload_file(str(path), "runs", f"data/{path.relative_to(data)}")
            bucket = ["--s3-bucket", "runs", "--endpoint-url", server.url]
            bucket += ["--enable-s3-checkpoints", "--checkpoint-every", "50"]
            rows = []
            for turn in (1, 2):
                out = home / str(turn)
                none = ["--checkpoint-every", "0"]
                rows.append(measure("without", data, out / "none", steps, none))
                rows.append(measure("saved and uploaded", data, out / "s3", steps, bucket))
    for row in rows:
        print(row)
    if given.json:
        write_figures(given.json, "P8 checkpoint", rows[2:], ("torch", "obstore"))


if __name__ == "__main__":
    main()
