"""A folder of raw files -> WebDataset shards.

``chair.jpg`` with ``chair.txt`` (and ``chair.json`` where there is one) is a pair. The same
input gives the same bytes; a shard bears its final name only when it is whole.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from clipft.data.captions import BadCaption, clean_caption
from clipft.data.images import BadImage, decode_image
from clipft.data.order import derived_seed
from clipft.data.pack_options import PackOptions
from clipft.data.shard_index import CAPTION_SUFFIX, IMAGE_SUFFIXES, METADATA_SUFFIX
from clipft.data.split import validation_rows
from clipft.errors import DataError, StorageError, UsageError

SPLITS = ("train", "val")
_MARK = ".clipft-pack.json"
_BUILDING = ".clipft-part-pack"


@dataclass(frozen=True)
class PackResult:
    """Counts; ``skipped`` by reason; pairs of val that also stand in train, by what they
    share (only where the split was the source's own)."""

    out: Path
    train_pairs: int
    val_pairs: int
    shards: int
    bytes: int
    skipped: dict[str, int]
    shared_photos: int
    shared_captions: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}


@dataclass
class _RawPair:
    """Paths of one pair, and what identifies its photo and its words."""

    image: Path
    caption: Path
    metadata: Path | None
    photo: str = ""
    words: str = ""


@dataclass
class _Scan:
    pairs: list[_RawPair] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def skip(self, path: Path, reason: str) -> None:
        self.skipped.append({"file": str(path), "reason": reason})


def pack(
    source: Path, out: Path, options: PackOptions, report: Callable[[int, int], None]
) -> PackResult:
    """Make shards in ``out``/train and ``out``/val; ``report`` is told (done, total) pairs.

    Raises:
        DataError: no such folder, or no pair in it.
        UsageError: ``out`` holds something else, or a former pack without ``overwrite``.
        StorageError: the disk does not take it; ``out`` is as it was.
    """
    if not source.is_dir():
        raise DataError(f"no folder {source}", "name the folder with the raw files")
    _check_target(out, options)
    own_split = all((source / split).is_dir() for split in SPLITS)
    if own_split:
        scans = {split: _scan(source / split, options) for split in SPLITS}
    else:
        scans = _split(_scan(source, options), options)
    _check_found(source, scans)
    with _built_aside(out) as building:
        written = _write_splits(building, scans, options, report)
    train, val = (scans[split].pairs for split in SPLITS)
    photos, words = {pair.photo for pair in train}, {pair.words for pair in train}
    return PackResult(
        out=out,
        train_pairs=len(train),
        val_pairs=len(val),
        shards=len(written),
        bytes=sum(written),
        skipped=_counted(scans),
        shared_photos=sum(pair.photo in photos for pair in val),
        shared_captions=sum(pair.words in words for pair in val),
    )


def _check_target(out: Path, options: PackOptions) -> None:
    if not out.exists():
        return
    if out.is_dir() and not any(p for p in out.iterdir() if p.name != _BUILDING):
        return
    if not (out / _MARK).is_file():
        raise UsageError(f"{out} is not empty", "name a new or empty folder for the shards")
    if not options.overwrite:
        raise UsageError(f"{out} holds a former pack", "add --overwrite, or name a new folder")


def _scan(folder: Path, options: PackOptions) -> _Scan:
    """All pairs under a folder, in the order of their paths."""
    scan, stems = _Scan(), dict[Path, dict[str, Path]]()
    for path in _files(folder, scan):
        suffix = path.suffix.removeprefix(".").lower()
        kind = "image" if suffix in IMAGE_SUFFIXES else suffix
        if kind not in {"image", CAPTION_SUFFIX, METADATA_SUFFIX}:
            continue
        members = stems.setdefault(path.with_suffix(""), {})
        if kind in members:
            scan.skip(path, f"a second {kind} of one name")
        else:
            members[kind] = path
    for members in stems.values():
        _add_pair(scan, members, options)
    return scan


def _files(folder: Path, scan: _Scan) -> Iterator[Path]:
    """Regular files, sorted; links are followed only to places inside the folder."""
    root = folder.resolve()
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(place) / name
            if name.startswith("."):
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                scan.skip(path, "a link out of the folder")
            elif not path.exists() or not stat.S_ISREG(path.stat().st_mode):
                scan.skip(path, "not a regular file")
            else:
                yield path


def _add_pair(scan: _Scan, members: dict[str, Path], options: PackOptions) -> None:
    image, caption = members.get("image"), members.get(CAPTION_SUFFIX)
    if image is None or caption is None:
        present = image or caption
        if present:
            scan.skip(present, "no caption" if image else "no image")
        return
    try:
        words = clean_caption(caption.read_bytes())
        _check_image(image, options.check)
    except (BadCaption, BadImage) as error:
        scan.skip(image, str(error))
        return
    with image.open("rb") as file:
        photo = hashlib.file_digest(file, "sha256").hexdigest()
    pair = _RawPair(image, caption, members.get(METADATA_SUFFIX), photo, words.casefold())
    scan.pairs.append(pair)


def _check_image(path: Path, in_full: bool) -> None:
    if in_full:
        decode_image(path.read_bytes())
        return
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:  # Pillow's plug-ins raise whatever they like
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadImage(reason or type(error).__name__) from error


def _split(scan: _Scan, options: PackOptions) -> dict[str, _Scan]:
    pairs = scan.pairs
    chosen = validation_rows(
        [pair.photo for pair in pairs],
        [pair.words for pair in pairs],
        options.val_share,
        options.seed,
    )
    train = [pair for row, pair in enumerate(pairs) if row not in chosen]
    val = [pair for row, pair in enumerate(pairs) if row in chosen]
    return {"train": _Scan(train, scan.skipped), "val": _Scan(val)}


def _check_found(source: Path, scans: dict[str, _Scan]) -> None:
    if scans["train"].pairs:
        return
    reasons = _counted(scans)
    listed = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
    raise DataError(
        f"no pair of image and caption in {source}" + (f": {listed}" if listed else ""),
        "each picture needs a .txt of the same name beside it",
    )


def _counted(scans: dict[str, _Scan]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for scan in scans.values():
        for entry in scan.skipped:
            counts[entry["reason"]] = counts.get(entry["reason"], 0) + 1
    return counts


@contextmanager
def _built_aside(out: Path) -> Iterator[Path]:
    """A folder inside ``out`` whose content takes the former one's place when all is whole."""
    building = out / _BUILDING
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        yield building
        for name in (*SPLITS, "skipped.jsonl", _MARK):
            old, new = out / name, building / name
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            if new.exists():
                os.replace(new, old)
    except OSError as error:
        raise StorageError(
            f"cannot write {error.filename or out}: {error.strerror}",
            "make room or name another folder",
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_splits(
    building: Path,
    scans: dict[str, _Scan],
    options: PackOptions,
    report: Callable[[int, int], None],
) -> list[int]:
    """Bytes of each shard written."""
    total = sum(len(scan.pairs) for scan in scans.values())
    done, sizes = 0, []
    for part, split in enumerate(SPLITS):
        pairs = sorted(
            scans[split].pairs, key=lambda p: _place(p, derived_seed(options.seed, part))
        )
        keys = _Keys()
        for start in range(0, len(pairs), options.shard_pairs):
            path = building / split / f"{start // options.shard_pairs:05d}.tar"
            chunk = pairs[start : start + options.shard_pairs]
            sizes.append(_write_shard(path, chunk, keys))
            done += len(chunk)
            report(done, total)
    skipped = [entry for scan in scans.values() for entry in scan.skipped]
    if skipped:
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped)
        (building / "skipped.jsonl").write_text("".join(lines), encoding="utf-8")
    (building / _MARK).write_text(json.dumps({"format": 1, "pairs": total}), encoding="utf-8")
    return sizes


def _place(pair: _RawPair, seed: int) -> str:
    """A place in a shuffled order that depends on the pair and the seed alone."""
    return hashlib.sha256(f"{seed} {pair.photo} {pair.image.name}".encode()).hexdigest()


class _Keys:
    """Keys that any reader of WebDataset takes whole: letters, digits, ``_`` and ``-``."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def of(self, pair: _RawPair) -> str:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", pair.image.stem).strip("_") or "pair"
        key, number = plain, 1
        while key.casefold() in self._used:
            number += 1
            key = f"{plain}_{number}"
        self._used.add(key.casefold())
        return key


def _write_shard(path: Path, pairs: list[_RawPair], keys: _Keys) -> int:
    """Write one tar, flushed to the disk; returns its bytes."""
    from webdataset import TarWriter

    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0, user="clipft", group="clipft") as tar:
            for pair in pairs:
                tar.write(_sample(keys.of(pair), pair))
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _sample(key: str, pair: _RawPair) -> dict[str, Any]:
    suffix = pair.image.suffix.removeprefix(".").lower()
    sample: dict[str, Any] = {
        "__key__": key,
        "jpg" if suffix == "jpeg" else suffix: pair.image.read_bytes(),
        CAPTION_SUFFIX: pair.caption.read_bytes(),
    }
    if pair.metadata:
        sample[METADATA_SUFFIX] = pair.metadata.read_bytes()
    return sample
