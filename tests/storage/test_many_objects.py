"""Sync 50,000 objects, killing the process three times."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.storage.faulty_proxy import faulty_proxy

COUNT = 50_000


def body(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest() * 16


def key(number: int) -> str:
    return f"data/train/{number // 1000:02d}/{number:05d}.bin"


def command(bucket, url: str) -> list[str]:
    return [
        *(sys.executable, "-m", "clipft", "sync", "--s3-bucket", bucket.settings.s3_bucket),
        *("--endpoint-url", url, "--data-dir", str(bucket.settings.data_dir), "--no-pack"),
    ]


@pytest.mark.slow
def test_50000_objects_arrive_intact_despite_three_kills(real_bucket):
    """Every byte is right, no whole file is fetched twice, and no part file remains."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: real_bucket.put({key(n): body(n)}), range(COUNT)))
    folder = Path(real_bucket.settings.data_dir)
    asked: list[str] = []

    def count(method: str, path: str) -> None:
        if method == "GET" and ".bin" in path:
            asked.append(path.partition("data/train/")[2].partition("?")[0])

    draw, twice = random.Random(7), Counter[str]()
    with faulty_proxy(real_bucket.settings.endpoint_url, count) as url:
        for kill in (True, True, True, False):
            whole = {p.relative_to(folder / "train").as_posix() for p in folder.rglob("*.bin")}
            asked.clear()
            process = subprocess.Popen(command(real_bucket, url))
            stop_at = draw.randrange(2000, 12_000)
            while kill and len(asked) < stop_at:
                assert process.poll() is None
                time.sleep(0.02)
            if kill:
                os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == (-signal.SIGKILL if kill else 0)
            twice.update(name for name in asked if name in whole)
    assert not twice
    for number in range(COUNT):
        assert (folder / key(number).removeprefix("data/")).read_bytes() == body(number)
    assert not list(folder.rglob(".clipft-part*"))
