"""Helpers of the packing tests: sources to pack, and what a pack wrote."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipft.data.packing.options import PackOptions
from clipft.data.packing.pack import PackResult, pack
from clipft.data.shards.folders import open_pairs


def pattern(number: int, side: int = 16) -> Image.Image:
    """Return an image that looks different for each number."""
    draw = np.random.default_rng(number)
    blocks = Image.fromarray(draw.integers(0, 256, (5, 5, 3), np.uint8))
    return blocks.resize((side, side), Image.Resampling.BICUBIC)


def write_pair(
    path: Path, number: int, caption: str | None = "a chair", metadata: str = ""
) -> None:
    """Write an image, and beside it its caption and metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pattern(number).save(path, "PNG")
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    if metadata:
        path.with_suffix(".json").write_text(metadata)


def packed(source: Path, out: Path, **options: object) -> PackResult:
    """Pack in this process, unless ``processes`` says otherwise."""
    chosen = PackOptions(**{"processes": 1, **options})
    return pack(source, out, chosen, lambda done, total: None)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each shard below ``folder``, by its path."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*.tar"))
    }


def pairs_of(folder: Path) -> set[tuple[bytes, bytes]]:
    """Return image and caption of every pair in the shards of ``folder``."""
    dataset = open_pairs(folder)
    return {(dataset[i].image, dataset[i].caption) for i in range(len(dataset))}


def metadata_of(folder: Path) -> dict[str, dict[str, object]]:
    """Return the metadata of every pair in the shards of ``folder``, by its caption."""
    dataset = open_pairs(folder)
    return {dataset[n].caption.decode(): dataset.metadata(n) for n in range(len(dataset))}


def write_table(table: Path, rows: list[dict[str, object]]) -> None:
    table.parent.mkdir(parents=True, exist_ok=True)
    if table.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), table)
        return
    with table.open("w", newline="") as file:
        if table.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            delimiter = {".csv": ",", ".tsv": "\t"}[table.suffix]
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
