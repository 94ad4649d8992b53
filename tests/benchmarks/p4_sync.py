"""P4: sync a catalogue with a real S3 server (Ceph's RADOS Gateway on loopback), down and up.

Compares wall and processor time of clipft with aws s3 sync, rclone and a plain boto3 loop.

    python tests/benchmarks/p4_sync.py [--aws PATH] [--rclone PATH] [--tasks small,large,shards]
                                       [--folder DIR] [--json FILE]

The tasks are small, large, shards and many. With the suffix -up they are uploads, and with -line
they use a connection with a round trip of 50 ms that loses 1 % of its packets. The folders of the
shards are removed after each run, because each has 4 GB. Those of the other tasks are removed at
the end, because on ext4 it is slow to create files near a folder from which thousands have just
been deleted.

The disk of a small machine may be slower than all of the tools. With --folder /dev/shm they write
to memory.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks.side_by_side import arguments, write_figures
from tests.storage.rados_gateway import KEY, MISSING, SECRET, RadosGateway, installed
from tests.storage.slow_line import slow_line

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
LOOP_UP = """
import os, sys, boto3
client = boto3.client("s3", endpoint_url=sys.argv[1])
there = {}
pages = client.get_paginator("list_objects_v2").paginate(Bucket="catalogue", Prefix=sys.argv[2])
for page in pages:
    there.update((entry["Key"], entry["Size"]) for entry in page.get("Contents", ()))
for name in sorted(os.listdir(sys.argv[3])):
    path, key = os.path.join(sys.argv[3], name), f"{sys.argv[2]}/{name}"
    if there.get(key) != os.path.getsize(path):
        client.upload_file(path, "catalogue", key)
"""


@dataclass(frozen=True)
class Cost:
    seconds: float
    cpu: float
    peak_mb: float
    server_cpu: float


@dataclass(frozen=True)
class Row:
    """Medians of the rounds. ``times_faster`` and ``cpu_share`` are medians of the ratios of all
    rounds. ``server_cpu_s`` is the server's processor time for one run of clipft."""

    task: str
    peer: str
    ours_s: float
    peer_s: float
    times_faster: float
    spread: str
    ours_cpu_s: float
    peer_cpu_s: float
    cpu_share: float
    server_cpu_s: float
    ours_peak_MB: float
    peer_peak_MB: float


class Tools:
    """The commands that copy ``prefix`` to a folder or, with ``up``, a folder to ``prefix``."""

    def __init__(self, server: RadosGateway, home: Path, given: argparse.Namespace) -> None:
        self.url, self._server, self._given = server.url, server, given
        (home / "tuned").write_text("[default]\ns3 =\n  max_concurrent_requests = 32\n")
        (home / "plain").write_text("[default]\n")
        self._configs = {name: str(home / name) for name in ("tuned", "plain")}

    def names(self) -> list[str]:
        aws = ["aws s3 sync", "aws s3 sync, 32 requests"] if self._given.aws else []
        rclone = ["rclone", "rclone, 32 transfers"] if self._given.rclone else []
        return ["clipft", *aws, *rclone, "boto3 loop"]

    def run(self, name: str, prefix: str, folder: Path, url: str, up: bool) -> Cost:
        config = self._configs["tuned" if "32" in name else "plain"]
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "CLIPFT_"))},
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": config,
        }
        before = self._server.cpu_seconds()
        cost = measured(self._command(name, prefix, folder, url, up), environment)
        return replace(cost, server_cpu=self._server.cpu_seconds() - before)

    def _command(self, name: str, prefix: str, folder: Path, url: str, up: bool) -> list[str]:
        if name == "clipft":
            where = ["--s3-bucket", BUCKET, "--s3-prefix", prefix, "--s3-val-prefix", "none"]
            rest = ["--endpoint-url", url, "--data-dir", str(folder), "--no-pack"]
            more = ["--up"] if up else []
            return [sys.executable, "-m", "clipft", "sync", *where, *rest, *more]
        folder = folder / "train"  # as clipft has it
        if name == "boto3 loop":
            return [sys.executable, "-c", LOOP_UP if up else LOOP, url, prefix, str(folder)]
        if name.startswith("aws"):
            places = [f"s3://{BUCKET}/{prefix}", str(folder)]
            program = [str(self._given.aws), "--endpoint-url", url, "s3", "sync", "--quiet"]
        else:
            places = [f":s3:{BUCKET}/{prefix}", str(folder)]
            server = ["--s3-provider", "Ceph", "--s3-endpoint", url, "--config", os.devnull]
            keys = ["--s3-access-key-id", KEY, "--s3-secret-access-key", SECRET]
            more = ["--transfers", "32", "--checkers", "32"] if "32" in name else []
            program = [str(self._given.rclone), *server, *keys, *more, "copy"]
        return [*program, *(reversed(places) if up else places)]


class Few(Tools):
    """Run only some of the tools."""

    def __init__(self, tools: Tools, names: tuple[str, ...]) -> None:
        self.__dict__.update(tools.__dict__)
        self._few = names

    def names(self) -> list[str]:
        return [name for name in super().names() if name in self._few]


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
    return Cost(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1000, 0.0)


def in_own_process(work: Callable[..., None], *given: Any) -> None:
    """Run ``work`` in a new process, because this process must stay small: a child's peak memory is
    never below that of its parent."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=given)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{work.__name__} failed")


def fill(url: str, prefix: str, count: int, size: int) -> None:
    client = client_of(url)
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
        server_cpu_s=middle(c.server_cpu for c in ours),
        ours_peak_MB=max(c.peak_mb for c in ours),
        peer_peak_MB=max(c.peak_mb for c in theirs),
    )


@dataclass(frozen=True)
class Task:
    """``count`` objects of ``size`` bytes, measured in ``rounds``. With ``keep``, the folders of
    all runs are only removed at the end."""

    name: str
    count: int
    size: int
    tools: Tools
    rounds: int
    keep: bool = True


def compare_down(task: Task, prefix: str, home: Path, url: str, line: bool) -> list[Row]:
    """Measure a fresh sync and one with nothing to do, with each tool in turn."""
    fresh: dict[str, list[Cost]] = {name: [] for name in task.tools.names()}
    again: dict[str, list[Cost]] = {name: [] for name in task.tools.names()}
    for number in range(task.rounds):
        for name in task.tools.names():
            folder = home / f"{prefix}-{number}-{name.replace(' ', '-')}"
            fresh[name].append(task.tools.run(name, prefix, folder, url, up=False))
            if not line:
                again[name].append(task.tools.run(name, prefix, folder, url, up=False))
            if not task.keep:
                shutil.rmtree(folder)
    return rows(task.name, fresh) + (rows(f"{task.name}, nothing to do", again) if not line else [])


def compare_up(task: Task, source: Path, server: RadosGateway, url: str, line: bool) -> list[Row]:
    """Measure an upload to an empty prefix and one with nothing to do, with each tool in turn."""
    fresh: dict[str, list[Cost]] = {name: [] for name in task.tools.names()}
    again: dict[str, list[Cost]] = {name: [] for name in task.tools.names()}
    for _ in range(task.rounds):
        for name in task.tools.names():
            fresh[name].append(task.tools.run(name, "up", source, url, up=True))
            if not line:
                again[name].append(task.tools.run(name, "up", source, url, up=True))
            in_own_process(empty, server.url, "up/", task.count)
            for own in (source / "train").glob(".clipft*"):  # the others would send it too
                own.unlink()
            server.collect_garbage()
    return rows(task.name, fresh) + (rows(f"{task.name}, nothing to do", again) if not line else [])


def measure(given: argparse.Namespace, name: str, home: Path, held: ExitStack) -> list[Row]:
    """Measure all rows of a task, with a server that stores nothing else."""
    kind, _, way = name.partition("-")
    up, line = "up" in way, "line" in way
    with RadosGateway(home / "node") as server:
        tools = Tools(server, home, given)
        quick = given.quick
        few = Few(tools, ("clipft", "aws s3 sync", "rclone", "boto3 loop"))
        by_line = Few(tools, ("clipft", "aws s3 sync", "rclone", "rclone, 32 transfers"))
        memory = Few(tools, ("clipft", "aws s3 sync"))
        tasks = {
            "small": Task(
                f"{300 if quick else 5000:,} x 20 KB",
                300 if quick else 5000,
                20_000,
                few if up else tools,
                3,
            ),
            "large": Task("6 x 50 MB", 2 if quick else 6, 50_000_000, tools, 5),
            "shards": Task("40 x 100 MB", 2 if quick else 40, 100_000_000, few, 3, keep=False),
            "many": Task(f"{50_000:,} x 1 KB", 1000 if quick else 50_000, 1000, memory, 1),
        }
        task = tasks[kind]
        url = server.url
        if line:
            task = replace(task, count=2 if quick else 16, size=5_000_000, tools=by_line)
            task = replace(task, name="16 x 5 MB, 50 ms and 1 % loss")
            url = held.enter_context(slow_line(server.url, 0.05, 0.01))
        task = replace(task, name=f"{task.name}, up" if up else task.name)
        if quick:
            task = replace(task, rounds=1)
        if not up:
            in_own_process(fill, server.url, kind, task.count, task.size)
            return compare_down(task, kind, home, url, line)
        source = home / "source"
        in_own_process(write_source, source / "train", task.count, task.size, server.url)
        try:
            return compare_up(task, source, server, url, line)
        finally:
            shutil.rmtree(source)


def write_source(folder: Path, count: int, size: int, url: str) -> None:
    client_of(url).create_bucket(Bucket=BUCKET)
    folder.mkdir(parents=True)
    body = os.urandom(size)
    for number in range(count):
        (folder / f"{number:06d}.bin").write_bytes(number.to_bytes(8, "big") + body[8:])


def client_of(url: str) -> Any:
    import boto3

    keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
    return boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)


def empty(url: str, prefix: str, count: int) -> None:
    """Check that all objects were uploaded, and remove them."""
    client, found = client_of(url), 0
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    for page in pages:
        keys = [{"Key": entry["Key"]} for entry in page.get("Contents", ())]
        found += len(keys)
        client.delete_objects(Bucket=BUCKET, Delete={"Objects": keys, "Quiet": True})
    assert found == count, f"{found} of {count} objects were uploaded"


def main() -> None:
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--aws", default=shutil.which("aws"), help="the aws command")
    parser.add_argument("--rclone", default=shutil.which("rclone"), help="the rclone command")
    parser.add_argument("--tasks", default="small,large,shards", help="of those named above")
    parser.add_argument("--folder", help="where the tools write (default: the temporary folder)")
    given = parser.parse_args()
    if not installed():
        sys.exit(MISSING)
    found: list[Row] = []
    for name in given.tasks.split(","):
        with ExitStack() as held:
            made = tempfile.TemporaryDirectory(prefix="clipft-p4-", dir=given.folder)
            found += measure(given, name, Path(held.enter_context(made)), held)
    for row in found:
        print(
            f"{row.task:30} {row.peer:26} {row.ours_s:7.2f} {row.peer_s:7.2f} "
            f"{row.times_faster:6.2f}x {row.spread:>13} cpu {row.ours_cpu_s:6.2f} "
            f"{row.peer_cpu_s:6.2f} {row.cpu_share:5.2f} server {row.server_cpu_s:5.2f} "
            f"MB {row.ours_peak_MB:.0f} {row.peer_peak_MB:.0f}"
        )
    if given.json:
        write_figures(given.json, "P4 sync", found, ("obstore", "boto3"))


if __name__ == "__main__":
    main()
