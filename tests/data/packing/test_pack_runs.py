"""Packing in several processes, in parts on several machines, and after an interruption."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from PIL import Image

from clipft.core.errors import DataError, UsageError
from clipft.core.part import Part
from clipft.data.packing import scan
from clipft.data.packing.options import PackOptions
from clipft.data.packing.pack import pack
from tests.data.packing.pack_helpers import (
    digests,
    metadata_of,
    packed,
    pairs_of,
    pattern,
    write_pair,
)


def interrupt_after(source, out, shards, **options):
    """Interrupt packing, as Ctrl-C does, when ``shards`` shards are written."""
    images = len(list(source.rglob("*.txt")))

    def report(done, total):
        if done > images and sum(1 for _ in out.rglob("*.tar")) >= shards:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, out, PackOptions(**{"processes": 1, **options}), report)


def test_an_interrupted_pack_continues_and_ends_with_the_same_bytes(raw, tmp_path):
    packed(raw, tmp_path / "whole", shard_pairs=7)
    interrupt_after(raw, tmp_path / "out", 3, shard_pairs=7)
    assert not digests(tmp_path / "out" / "train")
    kept = {p.name: p.stat().st_ino for p in (tmp_path / "out").rglob("*.tar")}
    assert len(kept) == 3
    packed(raw, tmp_path / "out", shard_pairs=7)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    now = {p.name: p.stat().st_ino for p in (tmp_path / "out" / "train").glob("*.tar")}
    assert kept.items() <= now.items()
    left = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert left == [".clipft-pack.json", "train", "val"]


def test_pairs_that_changed_since_the_interruption_are_packed_again(raw, tmp_path):
    interrupt_after(raw, tmp_path / "out", 9, shard_pairs=7)
    for path in raw.rglob("*.txt"):
        path.write_text(f"{path.read_text()} in oak")
    packed(raw, tmp_path / "out", shard_pairs=7)
    packed(raw, tmp_path / "fresh", shard_pairs=7)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_a_pack_that_was_interrupted_while_moving_shards_continues(raw, tmp_path, monkeypatch):
    out = tmp_path / "out"
    packed(raw, out, shard_pairs=7)
    moves, replace = [], os.replace

    def interrupt(old, new):
        if new.parent == out / "train":
            moves.append(new)
        if len(moves) == 3:
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupt)
        packed(raw, out, shard_pairs=9, overwrite=True)
    assert not (out / ".clipft-pack.json").exists()  # a mixture of old and new has no mark
    packed(raw, out, shard_pairs=9)
    packed(raw, tmp_path / "fresh", shard_pairs=9)
    assert digests(out) == digests(tmp_path / "fresh")


def test_the_bytes_do_not_depend_on_the_number_of_processes(raw, tmp_path):
    for processes in (1, 2):
        packed(raw, tmp_path / str(processes), shard_pairs=7, size=8, processes=processes)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def start(source, out, *more):
    command = [sys.executable, "-m", "clipft", "pack", str(source), str(out), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)


def wait_for(condition, what):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.002)


def is_running(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
    """Return a folder with 40 images that take long to pack, and the undisturbed pack of them."""
    folder = tmp_path_factory.mktemp("heavy")
    for i in range(40):
        write_pair(folder / "raw" / f"{i}.png", i, f"thing {i}")
        pattern(i, 600).save(folder / "raw" / f"{i}.png", compress_level=1)
    packed(folder / "raw", folder / "whole", size=64, shard_pairs=2)
    return folder


OPTIONS = ("--size", "64", "--shard-pairs", "2", "--processes", "2")


def stop_in_the_middle(source, folder):
    """Return a process that is stopped with some of its 20 shards written, and its folder."""
    for attempt in range(10):
        out = folder / f"out{attempt}"
        running = start(source, out, *OPTIONS)
        wait_for(lambda out=out: len(list(out.rglob("*.tar"))) >= 2, "no shard was written")
        os.killpg(running.pid, signal.SIGSTOP)  # or it may finish before it is killed
        if len(list(out.rglob("*.tar"))) < 15:
            return running, out
        os.killpg(running.pid, signal.SIGKILL)  # on a busy machine it may be nearly done
        running.communicate()
    raise AssertionError("it always finished before it could be stopped")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_pack_leaves_no_process_and_continues(heavy, tmp_path, how):
    running, out = stop_in_the_middle(heavy / "raw", tmp_path)
    children = psutil.Process(running.pid).children(recursive=True)
    assert len(children) >= 2
    if how == signal.SIGKILL:
        running.kill()
    else:
        os.killpg(running.pid, how)  # as a terminal does
    os.killpg(running.pid, signal.SIGCONT)
    errors = running.communicate(timeout=120)[1].decode()
    assert "Traceback" not in errors
    assert running.returncode == (-9 if how == signal.SIGKILL else 130), errors
    wait_for(lambda: not any(is_running(child) for child in children), "a process is still running")
    assert not (out / "train").exists()
    kept = {p.name: p.stat().st_ino for p in out.rglob("train/*.tar")}
    packed(heavy / "raw", out, size=64, shard_pairs=2)
    assert digests(out) == digests(heavy / "whole")
    now = {p.name: p.stat().st_ino for p in (out / "train").glob("*.tar")}
    assert kept.items() <= now.items()


def test_a_killed_worker_is_an_error_with_a_hint(raw, tmp_path):
    def report(done, total):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()

    with pytest.raises(DataError, match="worker process") as caught:
        pack(raw, tmp_path / "out", PackOptions(processes=2, shard_pairs=2), report)
    assert "--processes" in caught.value.hint


@pytest.mark.parametrize("together", [True, False])
def test_parts_together_are_the_whole_pack_byte_for_byte(raw, tmp_path, together):
    packed(raw, tmp_path / "whole", shard_pairs=7)
    joined, pairs = tmp_path / "joined", 0
    for number in (3, 1, 2):
        out = joined if together else tmp_path / f"part{number}"
        result = packed(raw, out, shard_pairs=7, part=Part(number, 3))
        pairs += result.train_pairs + result.val_pairs
        if not together:
            shutil.copytree(out, joined, dirs_exist_ok=True)
    assert pairs == 60
    assert digests(joined) == digests(tmp_path / "whole")
    sizes = {}
    for path in (joined / "train").glob("sizes-*-of-3.json"):
        sizes |= json.loads(path.read_text())
    assert sizes == json.loads((tmp_path / "whole" / "train" / "sizes.json").read_text())


HOLDS = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep(60)
"""


@pytest.fixture
def reads(monkeypatch):
    """The images that were read to be compared, in pieces of a few of them."""
    found, read = [], scan._read

    def counted(candidate, options):
        found.append(candidate.where)
        return read(candidate, options)

    monkeypatch.setattr(scan, "_read", counted)
    monkeypatch.setattr(scan, "_CHUNK", 4)
    return found


@pytest.mark.parametrize("near", [-1, 4])
def test_parts_at_the_same_time_read_each_image_once(near, raw, tmp_path, reads):
    (raw / "broken.png").write_bytes(b"nothing")
    (raw / "broken.txt").write_text("a broken chair")
    write_pair(raw / "described.png", 98, "described", '{"name": "\\udc80", "price": 3}')
    options = {"shard_pairs": 7, "near": near, "group_field": "name"}
    whole = packed(raw, tmp_path / "whole", **options)
    images, out = sorted(reads), tmp_path / "out"
    reads.clear()
    with ThreadPoolExecutor(3) as threads:
        parts = [threads.submit(packed, raw, out, **options, part=Part(n, 3)) for n in (1, 2, 3)]
        results = [part.result(60) for part in parts]
    assert sorted(reads) == images
    assert digests(out) == digests(tmp_path / "whole")
    assert all(result.skipped == whole.skipped for result in results)
    assert not list(out.glob(".clipft-part-*"))


def test_a_later_part_reads_nothing_that_an_earlier_one_has_read(raw, tmp_path, reads):
    out = tmp_path / "out"
    packed(raw, out, shard_pairs=7, part=Part(2, 2))
    assert len(reads) == 60
    reads.clear()
    (shown,) = {path.parent for path in out.rglob("scan-*.json")}
    damaged = min(shown.glob("scan-*.json"))
    damaged.write_text("[")
    packed(raw, out, shard_pairs=7, part=Part(1, 2))
    assert 0 < len(reads) <= 8
    packed(raw, tmp_path / "whole", shard_pairs=7)
    assert digests(out) == digests(tmp_path / "whole")


def test_what_parts_share_stays_while_one_of_them_is_at_work(raw, tmp_path):
    out, again = tmp_path / "out", {"shard_pairs": 7, "overwrite": True}
    for number in (1, 2):
        packed(raw, out, shard_pairs=7, part=Part(number, 2))
    shared = out / ".clipft-part-pack-shared"
    assert not shared.exists()

    def report(done, total):
        if done > 60 and not finished:  # it writes
            finished.append(packed(raw, out, **again, part=Part(1, 2)))
            assert shared.exists()

    finished = []
    pack(raw, out, PackOptions(processes=1, **again, part=Part(2, 2)), report)
    assert finished and not list(out.glob(".clipft-part-*"))
    packed(raw, tmp_path / "whole", shard_pairs=7)
    assert digests(out) == digests(tmp_path / "whole")


def test_a_part_waits_for_what_another_one_is_reading(raw, tmp_path, reads, monkeypatch):
    """The other one is killed in the middle, so this one reads it."""
    out, claim, held = tmp_path / "out", scan._claim, []

    @contextlib.contextmanager
    def beside_another(lock):
        if not held:
            lock.parent.mkdir(parents=True, exist_ok=True)
            other = subprocess.Popen([sys.executable, "-c", HOLDS, lock], stdout=subprocess.PIPE)
            other.stdout.readline()
            held.append(other)
        with claim(lock) as claimed:
            yield claimed

    waits = []

    def wait(seconds):
        waits.append(len(reads))
        held[0].kill()
        held[0].communicate()

    monkeypatch.setattr(scan, "_claim", beside_another)
    monkeypatch.setattr(scan.time, "sleep", wait)
    packed(raw, out, shard_pairs=7, part=Part(1, 2))
    assert waits and waits[0] < 60, "all others are read before it waits"
    assert len(set(reads)) == len(reads) == 60


def test_parts_of_different_packs_are_refused(raw, tmp_path):
    out, first = tmp_path / "out", {"shard_pairs": 7, "part": Part(1, 2)}
    packed(raw, out, **first)
    with pytest.raises(UsageError, match="holds an earlier pack"):
        packed(raw, out, **first)
    with pytest.raises(UsageError, match="other pairs or options"):
        packed(raw, out, shard_pairs=8, part=Part(2, 2))
    with pytest.raises(UsageError, match="not made in 3 parts"):
        packed(raw, out, shard_pairs=7, part=Part(2, 3))
    before = digests(out)
    write_pair(raw / "new.png", 99, "new")
    with pytest.raises(UsageError, match="other pairs or options"):
        packed(raw, out, shard_pairs=7, part=Part(2, 2))
    assert digests(out) == before
    packed(raw, out, **first, overwrite=True)
    packed(raw, out, shard_pairs=7, part=Part(2, 2))
    packed(raw, tmp_path / "whole", shard_pairs=7)
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2", "1/2/3"])
def test_a_part_that_is_not_i_of_n_is_refused(text):
    with pytest.raises(UsageError, match="not I/N"):
        Part.parse(text)


def write_near_duplicates(folder, count):
    """Write each image twice, the second time in another size and quality."""
    folder.mkdir(parents=True)
    for i in range(count):
        for name, side, quality in ((f"{i}", 500, 95), (f"{i} again", (1200, 333)[i % 2], 80)):
            coarse = pattern(i, 5).resize((side, side), Image.Resampling.BICUBIC)
            coarse.save(folder / f"{name}.jpg", quality=quality)
            (folder / f"{name}.txt").write_text(name.replace(" ", "-"))


@pytest.mark.parametrize("near", [4, -1])
def test_near_duplicate_images_stay_in_one_split(tmp_path, near):
    write_near_duplicates(tmp_path / "raw", 30)
    packed(tmp_path / "raw", tmp_path / "out", near=near, val_share=0.3)
    train, val = (
        {caption.split("-")[0] for caption in metadata_of(tmp_path / "out" / split)}
        for split in ("train", "val")
    )
    assert bool(train & val) == (near < 0)
    assert len(pairs_of(tmp_path / "out" / "val")) == 18


def test_near_duplicates_across_the_split_of_the_source_are_counted(tmp_path):
    write_near_duplicates(tmp_path / "raw" / "train", 5)
    (tmp_path / "raw" / "val").mkdir()
    for name in ("0 again.jpg", "1 again.jpg", "2.jpg"):
        for suffix in (name.rpartition(".")[2], "txt"):
            stem = name.rpartition(".")[0]
            source = tmp_path / "raw" / "train" / f"{stem}.{suffix}"
            shutil.move(source, tmp_path / "raw" / "val" / source.name)
    shutil.copy(tmp_path / "raw" / "train" / "3.jpg", tmp_path / "raw" / "val" / "same.jpg")
    (tmp_path / "raw" / "val" / "same.txt").write_text("same")
    result = packed(tmp_path / "raw", tmp_path / "out")
    assert (result.shared_photos, result.shared_near_photos) == (1, 3)
    result = packed(tmp_path / "raw", tmp_path / "blind", near=-1)
    assert (result.shared_photos, result.shared_near_photos) == (1, 0)


def test_shard_mb_sets_the_size_of_the_shards(tmp_path):
    for i in range(24):
        write_pair(tmp_path / "raw" / f"{i}.png", i, f"thing {i}")
        pattern(i, 600).save(tmp_path / "raw" / f"{i}.bmp")
        (tmp_path / "raw" / f"{i}.png").unlink()
    result = packed(tmp_path / "raw", tmp_path / "out", shard_mb=4, shard_pairs=2, val_share=0)
    sizes = [p.stat().st_size / 2**20 for p in sorted((tmp_path / "out").rglob("*.tar"))]
    assert result.shards == len(sizes) == 6
    assert all(4 <= size < 5.1 for size in sizes[:-1])
    packed(tmp_path / "raw", tmp_path / "small", shard_mb=1, size=60, val_share=0)
    assert len(list((tmp_path / "small").rglob("*.tar"))) == 1
