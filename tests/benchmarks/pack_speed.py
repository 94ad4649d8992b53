"""Measure files per second from a folder of images and captions to shards.

Compares `clipft pack` (hashes, verification, near-duplicates, split by groups, shards) with a plain
loop of Pillow and webdataset.ShardWriter without checks and split. Both use the same files, image
size and JPEG quality. The loop has one process; clipft runs with one process, and then with all.

    python tests/benchmarks/pack_speed.py [--quick] [--photos DIR] [--json FILE]
"""

import io
import itertools
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from side_by_side import Work, arguments, compare, publish

from clipft.core.common import processors
from clipft.data.packing.options import PackOptions
from clipft.data.packing.pack import pack

SIDE, SHARD = 256, 250
OPTIONS = PackOptions()
QUALITY = OPTIONS.quality


def write_files(folder: Path, photos: Path | None, count: int) -> None:
    """Write ``count`` JPEGs with distinct bytes, and captions. The images are the photos, repeated,
    or generated ones of 500 x 500."""
    folder.mkdir(parents=True)
    found = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))] if photos else []
    pictures = found or [_textured(number) for number in range(64)]
    for number, data in zip(range(count), itertools.cycle(pictures), strict=False):
        # Bytes after the end of a JPEG only change its hash
        (folder / f"{number:06d}.jpg").write_bytes(data + number.to_bytes(8, "big"))
        (folder / f"{number:06d}.txt").write_text(f"product number {number}")


def _textured(number: int) -> bytes:
    draw, total = np.random.default_rng(number), np.zeros((500, 500, 3), np.float32)
    for scale in (4, 16, 64):
        noise = Image.fromarray(draw.integers(0, 256, (scale, scale, 3), np.uint8))
        total += np.asarray(noise.resize((500, 500)), np.float32)
    buffer = io.BytesIO()
    Image.fromarray((total / 3).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def ours(files: Path, out: Path, size: int, processes: int, near: int = OPTIONS.near) -> Work:
    options = PackOptions(shard_pairs=SHARD, size=size, processes=processes, near=near)

    def work() -> int:
        shutil.rmtree(out, ignore_errors=True)
        result = pack(files, out, options, lambda done, total: None)
        return result.train_pairs + result.val_pairs

    return work


def plain_loop(files: Path, out: Path, size: int) -> Work:
    """A typical loop: open, decode, resize, save, into a ShardWriter."""
    import webdataset  # not at the top: it imports torch, which packing processes would load too

    def work() -> int:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        count = 0
        with webdataset.ShardWriter(f"{out}/%05d.tar", maxcount=SHARD, verbose=0) as writer:
            for path in sorted(files.glob("*.jpg")):
                data = _smaller(path, size) if size else path.read_bytes()
                caption = path.with_suffix(".txt").read_bytes()
                writer.write({"__key__": path.stem, "jpg": data, "txt": caption})
                count += 1
        return count

    return work


def _smaller(path: Path, size: int) -> bytes:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = size / min(image.size)
    side = (round(image.width * scale), round(image.height * scale))
    buffer = io.BytesIO()
    image.resize(side, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path, help="folder of .jpg files to pack again and again")
    chosen = parser.parse_args()
    pairs, count = (1, 500) if chosen.quick else (3, 2000)
    every, rows = processors(), []
    with tempfile.TemporaryDirectory() as place:
        files, out, loop = Path(place, "files"), Path(place, "ours"), Path(place, "loop")
        write_files(files, chosen.photos, count)
        for size in (SIDE, 0):
            name = f"--size {size}" if size else "as they are"
            for processes in (1, every):
                mine, peer = ours(files, out, size, processes), plain_loop(files, loop, size)
                label = f"{name}, {processes} process{'es' * (processes > 1)}"
                rows.append(compare(label, mine, peer, 0, pairs))
        with_near, without = ours(files, out, 0, 1), ours(files, loop, 0, 1, near=-1)
        label = f"as they are, 1 process, --near {OPTIONS.near} / -1"
        rows.append(compare(label, with_near, without, 0, pairs))
        publish("pack", rows, ("pillow", "webdataset", "numpy"), chosen.json)


if __name__ == "__main__":
    main()
