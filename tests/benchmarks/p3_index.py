"""Measure the index: the time until the first batch, and the memory of a worker process.

Uses shards of 1,000 small images each. ``new`` means that neither the index nor the token table
exists, and ``again`` that both do. Cold means that the shards are first dropped from the page
cache.

    python tests/benchmarks/p3_index.py [--quick] [--json FILE]
"""

import io
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any

from PIL import Image
from side_by_side import arguments, write_figures

from clipft.data.captions.table import caption_table
from clipft.data.captions.template import DEFAULT_TEMPLATE
from clipft.data.captions.tokenizer import CaptionEncoder
from clipft.data.decoding import Preprocessing
from clipft.data.loader import LoaderOptions, training_batches
from clipft.data.order import EpochPlan, Position
from clipft.data.shards.folders import open_pairs
from clipft.models.pretrained import load_inputs

IN_SHARD, BATCH = 1000, 64


@dataclass(frozen=True)
class Figures:
    """Times in seconds. ``worker_mib`` is the unshared memory of a worker process after 20
    batches."""

    pairs: int
    shard_mib: float
    index_bytes_a_pair: float
    open_new_cold: float
    open_new_warm: float
    open_again: float
    table_new: float
    first_batch_again: float
    worker_mib: float


def write_shards(folder: Path, pairs: int) -> None:
    buffer = io.BytesIO()
    Image.effect_mandelbrot((96, 96), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(buffer, "JPEG")
    picture = buffer.getvalue()
    folder.mkdir(parents=True)
    for start in range(0, pairs, IN_SHARD):
        with tarfile.open(folder / f"{start // IN_SHARD:05d}.tar", "w") as tar:
            for number in range(start, start + IN_SHARD):
                caption = f"a product of many, number {number}, in oak and brass".encode()
                for suffix, data in (("jpg", picture), ("txt", caption)):
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def drop_from_cache(folder: Path) -> None:
    os.sync()
    for path in folder.glob("*.tar"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def seconds(work: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    value = work()
    return time.perf_counter() - started, value


def private_mib(process: int) -> float:
    """Return the memory that the process does not share with others."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def batches(folder: Path, encoder: CaptionEncoder, workers: int) -> Iterator[Any]:
    pairs = open_pairs(folder)
    captions = caption_table(pairs, DEFAULT_TEMPLATE, encoder, 1, lambda: None)
    plan = EpochPlan(len(pairs), BATCH, BATCH, 1)
    preprocessing = Preprocessing(captions, 224, "simple", 1)
    options = LoaderOptions(workers)
    return training_batches(pairs, preprocessing, plan, Position(), 1, options)


def worker_memory(folder: Path, encoder: CaptionEncoder) -> float:
    steps = batches(folder, encoder, workers=1)
    next(steps)
    (worker,) = active_children()
    for _ in range(min(20, len(open_pairs(folder)) // BATCH - 1)):
        next(steps)
    return private_mib(worker.pid or 0)


def measure(pairs: int, root: Path, encoder: CaptionEncoder) -> Figures:
    folder = root / "train"
    write_shards(folder, pairs)
    stored = sum(path.stat().st_size for path in folder.glob("*.tar"))
    drop_from_cache(folder)
    cold, _ = seconds(lambda: open_pairs(folder))
    indexes = list(folder.glob(".*index"))
    size = sum(index.stat().st_size for index in indexes)
    for index in indexes:
        index.unlink()
    warm, opened = seconds(lambda: open_pairs(folder))
    again, _ = seconds(lambda: open_pairs(folder))
    table, _ = seconds(lambda: caption_table(opened, DEFAULT_TEMPLATE, encoder, 1, lambda: None))
    first, _ = seconds(lambda: next(batches(folder, encoder, workers=0)))
    memory = worker_memory(folder, encoder)
    shutil.rmtree(folder)
    return Figures(pairs, stored / 2**20, size / pairs, cold, warm, again, table, first, memory)


def main() -> None:
    options = arguments(__doc__).parse_args()
    sizes = (1_000, 5_000) if options.quick else (5_000, 50_000)
    model, rows = load_inputs("tiny"), []
    with tempfile.TemporaryDirectory() as place:
        os.environ["CLIPFT_CACHE"] = f"{place}/cache"
        for pairs in sizes:
            rows.append(measure(pairs, Path(place), CaptionEncoder(model.tokenizer, 77)))
            print(rows[-1], flush=True)
    if options.json:
        write_figures(options.json, "P3 index", rows, ("torch", "numpy", "tokenizers"))


if __name__ == "__main__":
    main()
