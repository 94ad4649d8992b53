import io
import json
import os
import signal
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from clipft.data.demo.catalogue import RenderedPair, render_pair

os.environ["HF_HUB_OFFLINE"] = "1"
# Each test and each program that it starts has one thread, and as many tests run at once as there
# are cores. With more threads than cores, spinning threads would turn seconds into minutes.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell makes its background jobs ignore Ctrl-C, and child processes inherit this. But the
# programs that the tests interrupt must receive it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # below nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Start programs in their own processes, and end the remaining ones after the test."""
    from tests.faults.outside import Programs

    started = Programs(tmp_path_factory.mktemp("programs"))
    yield started
    started.close()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def jpeg(pair: RenderedPair) -> bytes:
    buffer = io.BytesIO()
    pair.image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shard(path: Path, numbers: Iterable[int], bad: Iterable[int] = ()) -> None:
    """Write a shard of rendered products; those numbered in ``bad`` have a broken image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            pair = render_pair(7, number)
            image = jpeg(pair)
            add(tar, f"{number:05d}.jpg", image[:200] if number in set(bad) else image)
            add(tar, f"{number:05d}.txt", pair.caption.encode())
            add(tar, f"{number:05d}.json", json.dumps(pair.metadata).encode())


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory) -> Path:
    """Make a read-only catalogue of 96 training pairs in 2 shards and 40 validation pairs."""
    folder = tmp_path_factory.mktemp("catalogue")
    write_shard(folder / "train" / "00000.tar", range(60))
    write_shard(folder / "train" / "00001.tar", range(60, 96))
    write_shard(folder / "val" / "00000.tar", range(1000, 1040))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPFT_CACHE", str(tmp_path / "cache"))
