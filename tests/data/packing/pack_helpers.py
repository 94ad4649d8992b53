"""What the tests of packing share."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from clipft.data.packing.options import PackOptions
from clipft.data.packing.pack import PackResult, pack
from clipft.data.shards.dataset import open_pairs


def pattern(number: int, side: int = 16) -> Image.Image:
    """A picture that looks like no other number's."""
    draw = np.random.default_rng(number)
    blocks = Image.fromarray(draw.integers(0, 256, (5, 5, 3), np.uint8))
    return blocks.resize((side, side), Image.Resampling.BICUBIC)


def picture(path: Path, number: int, caption: str | None = "a chair", metadata: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pattern(number).save(path, "PNG")
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    if metadata:
        path.with_suffix(".json").write_text(metadata)


def packed(source: Path, out: Path, **options: object) -> PackResult:
    """In this process, unless ``processes`` says otherwise."""
    chosen = PackOptions(**{"processes": 1, **options})
    return pack(source, out, chosen, lambda done, total: None)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*.tar"))
    }


def pairs_of(folder: Path) -> set[tuple[bytes, bytes]]:
    dataset = open_pairs(folder)
    return {(dataset[i].image, dataset[i].caption) for i in range(len(dataset))}


def metadata_of(folder: Path) -> dict[str, dict[str, object]]:
    """By caption."""
    dataset = open_pairs(folder)
    return {dataset[n].caption.decode(): dataset.metadata(n) for n in range(len(dataset))}
