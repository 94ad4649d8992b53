"""P4: download a catalogue from a real S3 server (Ceph's RADOS Gateway on loopback).

Compares wall and processor time of clipft with aws s3 sync, rclone and a plain boto3 loop.

    python tests/benchmarks/p4_sync.py [--aws PATH] [--tasks small,large,many] [--json FILE]

Each tool writes to its own folders, and nothing is deleted before the end: on ext4, creating files
is slow next to a folder where thousands have just been deleted.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks.side_by_side import arguments, write_figures
from tests.storage.rados_gateway import KEY, MISSING, SECRET, RadosGateway, installed

BUCKET = "catalogue"
LOOP = """
import os, sys, boto3
client = boto3.client("s3", endpoint_url=sys.argv[1])
pages = client.get_paginator("list_objects_v2").paginate(Bucket="catalogue", Prefix=sys.argv[2])
for page in pages:
    for entry in page["Contents"]:
        path = os.path.join(sys.argv[3], entry["Key"].rpartition("/")[2])
        if not os.path.exists(path) or os.path.getsize(path) != entry["Size"]:
            os.makedirs(sys.argv[3], exist_ok=True)
            client.download_file("catalogue", entry["Key"], path)
"""


@dataclass(frozen=True)
class Cost:
    seconds: float
    cpu: float
    peak_mb: float


@dataclass(frozen=True)
class Row:
    """Medians of the rounds; ``times_faster`` and ``cpu_share`` are medians of each round's
    ratio."""

    task: str
    peer: str
    ours_s: float
    peer_s: float
    times_faster: float
    spread: str
    ours_cpu_s: float
    peer_cpu_s: float
    cpu_share: float
    ours_peak_MB: float
    peer_peak_MB: float


class Tools:
    """The commands that download ``prefix`` to a folder."""

    def __init__(self, url: str, home: Path, aws: str | None) -> None:
        self._url, self._aws = url, aws
        (home / "tuned").write_text("[default]\ns3 =\n  max_concurrent_requests = 32\n")
        (home / "plain").write_text("[default]\n")
        self._configs = {name: str(home / name) for name in ("tuned", "plain")}

    def names(self) -> list[str]:
        aws = ["aws s3 sync", "aws s3 sync, 32 requests"] if self._aws else []
        rclone = ["rclone", "rclone, 32 transfers"] if shutil.which("rclone") else []
        return ["clipft", *aws, *rclone, "boto3 loop"]

    def run(self, name: str, prefix: str, folder: Path) -> Cost:
        config = self._configs["tuned" if "32" in name else "plain"]
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "CLIPFT_"))},
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": config,
        }
        return measured(self._command(name, prefix, folder), environment)

    def _command(self, name: str, prefix: str, folder: Path) -> list[str]:
        if name == "clipft":
            where = ["--s3-bucket", BUCKET, "--s3-prefix", prefix, "--s3-val-prefix", "none"]
            rest = ["--endpoint-url", self._url, "--data-dir", str(folder), "--no-pack"]
            return [sys.executable, "-m", "clipft", "sync", *where, *rest]
        if name.startswith("aws"):
            place = [f"s3://{BUCKET}/{prefix}", str(folder)]
            return [str(self._aws), "--endpoint-url", self._url, "s3", "sync", "--quiet", *place]
        if name.startswith("rclone"):
            server = ["--s3-provider", "Ceph", "--s3-endpoint", self._url, "--config", os.devnull]
            keys = ["--s3-access-key-id", KEY, "--s3-secret-access-key", SECRET]
            more = ["--transfers", "32", "--checkers", "32"] if "32" in name else []
            return ["rclone", *server, *keys, *more, "copy", f":s3:{BUCKET}/{prefix}", str(folder)]
        return [sys.executable, "-c", LOOP, self._url, prefix, str(folder)]


def measured(command: list[str], environment: dict[str, str]) -> Cost:
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {said.decode(errors='replace')[-1000:]}")
    return Cost(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1000)


def filled(url: str, prefix: str, count: int, size: int) -> None:
    """Run in a process of its own, because a child's peak memory is never below its parent's."""
    process = multiprocessing.get_context("spawn").Process(
        target=fill, args=(url, prefix, count, size)
    )
    process.start()
    process.join()
    if process.exitcode:
        sys.exit("the server was not filled")


def fill(url: str, prefix: str, count: int, size: int) -> None:
    import boto3

    keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)
    client.create_bucket(Bucket=BUCKET)
    body = os.urandom(size)

    def put(number: int) -> None:
        own = number.to_bytes(8, "big") + body[8:]
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{number:06d}.bin", Body=own)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(count)))


def rows(task: str, costs: dict[str, list[Cost]]) -> list[Row]:
    ours = costs["clipft"]
    return [_row(task, name, ours, theirs) for name, theirs in costs.items() if name != "clipft"]


def _row(task: str, name: str, ours: list[Cost], theirs: list[Cost]) -> Row:
    pairs = list(zip(ours, theirs, strict=True))
    faster = sorted(b.seconds / a.seconds for a, b in pairs)
    middle = statistics.median
    return Row(
        task=task,
        peer=name,
        ours_s=middle(c.seconds for c in ours),
        peer_s=middle(c.seconds for c in theirs),
        times_faster=middle(faster),
        spread=f"{faster[0]:.2f}..{faster[-1]:.2f}",
        ours_cpu_s=middle(c.cpu for c in ours),
        peer_cpu_s=middle(c.cpu for c in theirs),
        cpu_share=middle(a.cpu / b.cpu for a, b in pairs),
        ours_peak_MB=max(c.peak_mb for c in ours),
        peer_peak_MB=max(c.peak_mb for c in theirs),
    )


def compare(tools: Tools, task: str, prefix: str, home: Path, rounds: int) -> list[Row]:
    """Measure a fresh sync and one with nothing to do, with each tool in turn."""
    fresh: dict[str, list[Cost]] = {name: [] for name in tools.names()}
    again: dict[str, list[Cost]] = {name: [] for name in tools.names()}
    for number in range(rounds):
        for name in tools.names():
            folder = home / f"{prefix}-{number}-{name.replace(' ', '-')}"
            fresh[name].append(tools.run(name, prefix, folder))
            again[name].append(tools.run(name, prefix, folder))
    return rows(task, fresh) + rows(f"{task}, nothing to do", again)


def main() -> None:
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--aws", default=shutil.which("aws"), help="the aws command")
    parser.add_argument("--tasks", default="small,large,many", help="of these three")
    given = parser.parse_args()
    if not installed():
        sys.exit(MISSING)
    small, many, rounds = (300, 1000, 1) if given.quick else (5000, 50_000, 3)
    found: list[Row] = []
    with ExitStack() as held:
        home = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="clipft-p4-")))
        url = held.enter_context(RadosGateway(home / "node")).url
        tools = Tools(url, home, given.aws)
        tasks = {
            "small": (f"{small:,} x 20 KB", small, 20_000, tools, rounds),
            "large": ("6 x 50 MB", 2 if given.quick else 6, 50_000_000, tools, rounds),
            "many": (f"{many:,} x 1 KB", many, 1000, Few(tools), 1),
        }
        for name in given.tasks.split(","):
            task, count, size, used, times = tasks[name]
            filled(url, name, count, size)
            found += compare(used, task, name, home, times)
    for row in found:
        print(
            f"{row.task:28} {row.peer:26} {row.ours_s:7.2f} {row.peer_s:7.2f} "
            f"{row.times_faster:6.2f}x {row.spread:>13} cpu {row.ours_cpu_s:6.2f} "
            f"{row.peer_cpu_s:6.2f} {row.cpu_share:5.2f} MB {row.ours_peak_MB:.0f} "
            f"{row.peer_peak_MB:.0f}"
        )
    if given.json:
        write_figures(given.json, "P4 sync", found, ("obstore", "boto3"))


class Few(Tools):
    """Run only clipft and aws, to measure peak memory."""

    def __init__(self, tools: Tools) -> None:
        self.__dict__.update(tools.__dict__)

    def names(self) -> list[str]:
        return [name for name in super().names() if name in {"clipft", "aws s3 sync"}]


if __name__ == "__main__":
    main()
