"""Compare a long run that is killed again and again with one that is left alone.

    python tests/soak/run.py [--steps 2000] [--kill-every 100] [--folder DIR]

Both train the tiny model on rendered pairs, some of them broken. They must end with the same
weights and metrics, without a missing or repeated line. The memory, descriptors, threads and shared
memory of all their processes are sampled twice a second (soak.json, soak.svg). The exit
code is 1 if anything differs or grows.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.conftest import write_shard
from tests.e2e.test_train import assert_same_run, metrics

ROOT = Path(__file__).parents[2]
PAIRS, BATCH = 320, 16
BAD = range(7, PAIRS, 40)
"""2.5% of the pairs, which is below --max-bad."""
GROWTH = 1.05
"""How much higher the median of the last quarter may be than that of the second."""


@dataclass(frozen=True)
class Sample:
    """Sums over all processes of the run, ``seconds`` after its start, when ``step`` was done."""

    seconds: float
    step: int
    memory_mib: float
    descriptors: int
    threads: int
    shared_mib: float


@dataclass
class Soaked:
    kills: int = 0
    samples: list[Sample] = field(default_factory=list)


def sample(process: psutil.Process, began: float, step: int) -> Sample | None:
    with suppress(psutil.Error):
        everyone = [process, *process.children(recursive=True)]
        return Sample(
            round(time.monotonic() - began, 1),
            step,
            round(sum(p.memory_full_info().pss for p in everyone) / 2**20, 1),
            sum(p.num_fds() for p in everyone),
            sum(p.num_threads() for p in everyone),
            round(psutil.disk_usage("/dev/shm").used / 2**20, 1),
        )
    return None


def done_steps(out: Path) -> int:
    path = out / "dual_lora" / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.exists() else 0


def soak(folder: Path, steps: int, kill_every: int, draw: random.Random) -> Soaked:
    """Train to the end, killing the run about every ``kill_every`` steps (0: never)."""
    soaked, began = Soaked(), time.monotonic()
    epochs = steps // (PAIRS // BATCH)
    args = ["train", "--model", "tiny", "--epochs", str(epochs), "--device", "cpu"]
    args += ["--effective-batch-size", str(BATCH), "--micro-batch-size", str(BATCH)]
    args += ["--precision", "fp32", "--num-workers", "1", "--stop-on", "never", "--max-bad", "0.05"]
    args += ["--checkpoint-every", "10", "--resume-from-checkpoint"]
    args += ["--data-dir", str(folder / "data"), "--output-dir", str(folder / "runs")]
    while True:
        process = start(args, folder)
        at, limit = done_steps(folder / "runs"), draw.uniform(0.8, 1.2) * kill_every
        while process.poll() is None:
            step = done_steps(folder / "runs")
            if seen := sample(psutil.Process(process.pid), began, step):
                soaked.samples.append(seen)
            if kill_every and step - at >= limit:
                process.send_signal(signal.SIGKILL)
                soaked.kills += 1
            time.sleep(0.5)
        if process.wait() == 0:
            return soaked
        assert process.returncode == -signal.SIGKILL, (folder / "said").read_text()[-2000:]


def start(args: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CLIPFT_CACHE": str(folder / "cache")}
    with (folder / "said").open("wb") as said:
        command = [sys.executable, "-m", "clipft", *args]
        return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=said, stderr=said)


def no_gap_no_repeat(out: Path, steps: int) -> None:
    lines = metrics(out / "dual_lora")
    assert [x["step"] for x in lines if x["kind"] == "step"] == list(range(1, steps + 1))
    epochs = [x["epoch"] for x in lines if x["kind"] == "epoch"]
    assert epochs == list(range(len(epochs)))


def growth(samples: list[Sample], name: str) -> float:
    """Return the median of the last quarter over that of the second; the first warms up."""
    values = [float(getattr(seen, name)) for seen in samples]
    quarter = len(values) // 4
    early = statistics.median(values[quarter : 2 * quarter])
    return statistics.median(values[-quarter:]) / early if early else 1.0


FIGURES = ("memory_mib", "descriptors", "threads", "shared_mib")


def plot(calm: list[Sample], killed: list[Sample]) -> str:
    """Draw each figure of both runs over the steps."""
    width, height, gap = 720, 90, 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {gap + 4 * (height + gap)}"'
        ' font-family="sans-serif" font-size="12" role="img" aria-label="Memory, descriptors, '
        'threads and shared memory over the steps of a killed and of an undisturbed run">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        '<text x="8" y="20" fill="#1f5fa8">killed every ~100 steps</text>',
        '<text x="170" y="20" fill="#b4510e">left alone</text>',
    ]
    last = max(seen.step for seen in [*calm, *killed]) or 1
    for row, name in enumerate(FIGURES):
        top = gap + row * (height + gap)
        most = max(getattr(seen, name) for seen in [*calm, *killed]) or 1
        parts.append(f'<text x="8" y="{top - 6}">{name}, up to {most:g}</text>')
        parts.append(f'<path d="M8 {top + height}H{width - 8}" stroke="#999"/>')
        for samples, colour in ((killed, "#1f5fa8"), (calm, "#b4510e")):
            dots = "".join(
                f"M{8 + (width - 16) * seen.step / last:.1f} "
                f"{top + height * (1 - getattr(seen, name) / most):.1f}h1.6"
                for seen in samples
            )
            parts.append(f'<path d="{dots}" stroke="{colour}" stroke-width="1.6" fill="none"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kill-every", type=int, default=100)
    parser.add_argument(
        "--folder", type=Path, help="where soak.json and soak.svg go [default: tests/soak]"
    )
    given = parser.parse_args()
    seed = random.randrange(2**32)
    with tempfile.TemporaryDirectory() as name:
        both: dict[str, Soaked] = {}
        for run, every in (("calm", 0), ("killed", given.kill_every)):
            folder = Path(name) / run
            write_shard(folder / "data" / "train" / "00000.tar", range(PAIRS), bad=BAD)
            write_shard(folder / "data" / "val" / "00000.tar", range(1000, 1032))
            both[run] = soak(folder, given.steps, every, random.Random(seed))
            no_gap_no_repeat(folder / "runs", given.steps)
        assert_same_run(Path(name) / "calm" / "runs", Path(name) / "killed" / "runs")
    calm, killed = both["calm"], both["killed"]
    grown = {name: round(growth(calm.samples, name), 4) for name in FIGURES}
    result = {"seed": seed, "steps": given.steps, "kills": killed.kills, "growth": grown}
    print(json.dumps(result))
    folder = given.folder or Path(__file__).parent
    samples = {run: [asdict(seen) for seen in soaked.samples] for run, soaked in both.items()}
    (folder / "soak.json").write_text(json.dumps(result | samples) + "\n")
    (folder / "soak.svg").write_text(plot(calm.samples, killed.samples))
    sys.exit(1 if max(grown.values()) > GROWTH else 0)


if __name__ == "__main__":
    main()
