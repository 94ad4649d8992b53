"""Make faulty catalogues, and read what a command left."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from clipft.cli.app import run
from clipft.data.demo.catalogue import render_pair
from tests.conftest import add, jpeg
from tests.tiny_run import TINY

Member = tuple[str, bytes]


def write_tar(path: Path, members: Iterable[Member | tarfile.TarInfo], form: int = 2) -> None:
    """Write a tar in ``form``, one of ``tarfile``; a bare ``TarInfo`` is a member without
    content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                add(tar, *member)


def good(numbers: Iterable[int]) -> list[Member]:
    """Members of rendered products without any fault."""
    members = []
    for number in numbers:
        pair = render_pair(7, number)
        members += [(f"{number:05d}.jpg", jpeg(pair)), (f"{number:05d}.txt", pair.caption.encode())]
    return members


def catalogue(folder: Path, train: Iterable[Member | tarfile.TarInfo], val: int = 4) -> Path:
    write_tar(folder / "train" / "00000.tar", train)
    write_tar(folder / "val" / "00000.tar", good(range(1000, 1000 + val)))
    return folder


def train(folder: Path, *more: str) -> int:
    args = [*TINY, "--data-dir", str(folder), "--output-dir", str(folder / "out"), *more]
    return run(["train", *args])


def one_error(capsys) -> tuple[str, str]:
    """The texts after ``error: `` and ``hint: ``, each of which must occur once."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in " ".join(lines)
    said = [
        [line.removeprefix(mark) for line in lines if line.startswith(mark)]
        for mark in ("error: ", "hint: ")
    ]
    assert len(said[0]) == len(said[1]) == 1, lines
    return said[0][0], said[1][0]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def skipped(folder: Path) -> dict[tuple[str, str], str]:
    """The skipped pairs that the run of ``train`` lists: (shard, key) -> reason, none twice."""
    listed = lines(folder / "out" / "dual_lora" / "skipped.jsonl")
    reasons = {(line["shard"], line["key"]): line["reason"] for line in listed}
    assert len(reasons) == len(listed)
    return reasons


def trained_pairs(folder: Path) -> int:
    metrics = lines(folder / "out" / "dual_lora" / "metrics.jsonl")
    return sum(line["pairs"] for line in metrics if line["kind"] == "step")


def files(folder: Path) -> dict[str, bytes]:
    """All files in a folder except indexes and locks."""
    kept = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def encoded(image: Image.Image, kind: str, **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()
