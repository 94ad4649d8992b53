"""The real catalogues that benchmarks train on, packed and divided into train, val and test.

Where photos belong to products, the products are divided into three folds. Each fold is the test
split of one packed folder, so that all photos are tested once, by models that saw no photo of
their products. A set that comes with a test split of its own, like the groceries, keeps it.
"""

import csv
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

FOLDS = 3
GROUP = "product_id"
CAPTION = "{name}, {color}"

Rows = list[dict[str, str]]


def clipft(*arguments: object) -> None:
    command = [sys.executable, "-m", "clipft", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def packed(source: Path, place: Path, *options: str) -> list[Path]:
    """Pack a catalogue into folders of ``place``, unless that is done: one for each fold, or a
    single one. ``options`` are more options of ``clipft pack``."""
    if (source / "train" / "metadata.csv").exists():
        return [pack_own_split(source, place, options)]
    table = source / "products.csv"
    caption = ("--caption", CAPTION) if table.exists() else ()
    rows = rows_of_table(table) if table.exists() else rows_of_files(source)
    return [pack_fold(rows, place, fold, (*caption, *options)) for fold in range(FOLDS)]


def rows_of_table(table: Path) -> Rows:
    rows = read(table)
    return [row | {"image": str((table.parent / row["image"]).resolve())} for row in rows]


def rows_of_files(source: Path) -> Rows:
    """Photos with a .txt and a .json each. Those with the same caption, or the same name and type,
    are one product."""
    rows, product_of = Rows(), dict[object, str]()
    for text in sorted(source.glob("*/*.txt")):
        about, caption = json.loads(text.with_suffix(".json").read_text("utf-8")), text.read_text()
        keys = (caption, (about["name"], about["type"]))
        known = sorted({product_of[key] for key in keys if key in product_of}) or [text.stem]
        for key, product in product_of.items():  # what was two products so far is one
            if product in known:
                product_of[key] = known[0]
        product_of |= dict.fromkeys(keys, known[0])
        rows.append({"image": str(text.with_suffix(".jpg").resolve()), "caption": caption})
    return [row | {GROUP: product_of[row["caption"]]} for row in rows]


def pack_fold(rows: Rows, place: Path, fold: int, options: tuple[str, ...]) -> Path:
    """Pack with the products of a fold as test pairs, and one in nine for validation."""
    data = place / f"data-{fold}"
    if data.exists():
        return data
    products = sorted({row[GROUP] for row in rows})
    order = np.random.default_rng(1).permutation(len(products))
    split = {
        products[number]: "test"
        if at % FOLDS == fold
        else "val"
        if at % (3 * FOLDS) == fold + 1
        else "train"
        for at, number in enumerate(order)
    }
    table = place / f"data-{fold}.csv"
    write(table, [row | {"split": split[row[GROUP]]} for row in rows])
    clipft("pack", table, data, "--group-field", GROUP, *options)
    return data


def pack_own_split(source: Path, place: Path, options: tuple[str, ...]) -> Path:
    """Pack photos with labels: those of ``val`` are the test split, and every fifth training photo
    of a label is for validation. Left to itself, ``pack`` keeps the photos of a label in one
    split, because they share their caption."""
    raw, data = place / "raw", place / "data"
    if data.exists():
        return data
    seen, splits = Counter[str](), dict[str, Rows]()
    for folder in ("train", "val"):
        for row in read(source / folder / "metadata.csv"):
            seen[row["label"]] += 1
            held_out = "val" if seen[row["label"]] % 5 == 0 else "train"
            split = "test" if folder == "val" else held_out
            splits.setdefault(split, []).append(row)
            (raw / split).mkdir(parents=True, exist_ok=True)
            shutil.copy(source / folder / row["file_name"], raw / split / row["file_name"])
    for split, rows in splits.items():
        write(raw / split / "metadata.csv", rows)
    clipft("pack", raw, data, *options)
    return data


def read(table: Path) -> Rows:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(table: Path, rows: Rows) -> None:
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
