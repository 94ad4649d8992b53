"""Raw pairs -> WebDataset shards, split for training and validation.

The same input gives the same bytes; a shard bears its final name only when it is whole. A
pack that was killed goes on where it was: whole shards of the same content are kept.
"""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from clipft.data.images import BadImage, decode_image, resize_shorter
from clipft.data.order import derived_seed
from clipft.data.pack_options import PackOptions
from clipft.data.pack_sources import RawPair, Scan, scan
from clipft.data.shard_index import CAPTION_SUFFIX, METADATA_SUFFIX
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


@dataclass(frozen=True)
class _Job:
    """One shard to write: its place below the target, and its pairs by key."""

    split: str
    number: int
    pairs: list[tuple[str, RawPair]]

    @property
    def name(self) -> str:
        return f"{self.split}/{self.number:05d}.tar"

    def fingerprint(self, options: PackOptions) -> str:
        """Equal for equal bytes of the shard."""
        digest = hashlib.sha256(f"2 {options.size} {options.quality}".encode())
        for key, pair in self.pairs:
            digest.update(f"{key} {pair.photo} {pair.image.suffix.lower()}".encode())
            for part in (pair.caption, pair.metadata or b""):
                digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Written:
    """One shard that is whole; ``skipped`` are pairs whose picture broke while packing."""

    split: str
    pairs: int
    bytes: int
    skipped: list[dict[str, str]]
    fingerprint: str


def pack(
    source: Path, out: Path, options: PackOptions, report: Callable[[int, int], None]
) -> PackResult:
    """Make shards in ``out``/train and ``out``/val; ``report`` is told (done, total) pairs.

    Raises:
        DataError: no such folder or table, or no pair in it.
        UsageError: ``out`` holds something else, or a former pack without ``overwrite``.
        StorageError: the disk does not take it; ``out``'s former shards are as they were.
    """
    if not source.exists():
        raise DataError(f"no folder {source}", "name the folder with the raw files, or a table")
    _check_target(out, options)
    with ThreadPoolExecutor(options.threads or os.cpu_count()) as threads:
        if all((source / split).is_dir() for split in SPLITS):
            scans = {split: scan(source / split, options, threads) for split in SPLITS}
        else:
            scans = _split(scan(source, options, threads), options)
        _check_found(source, scans)
        with _built_aside(out) as building:
            written = _write_all(building, _jobs(scans, options), options, threads, report)
            skipped = [entry for found in scans.values() for entry in found.skipped]
            skipped += [entry for shard in written for entry in shard.skipped]
            _write_marks(building, sum(shard.pairs for shard in written), skipped)
    train, val = (scans[split].pairs for split in SPLITS)
    photos, words = {pair.photo for pair in train}, {pair.words for pair in train}
    return PackResult(
        out=out,
        train_pairs=sum(shard.pairs for shard in written if shard.split == "train"),
        val_pairs=sum(shard.pairs for shard in written if shard.split == "val"),
        shards=len(written),
        bytes=sum(shard.bytes for shard in written),
        skipped=_counted(skipped),
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


def _split(found: Scan, options: PackOptions) -> dict[str, Scan]:
    pairs = found.pairs
    same = [[pair.photo for pair in pairs], [pair.words for pair in pairs]]
    # A pair without the field is a group of its own
    same.append([pair.group or f"\0{row}" for row, pair in enumerate(pairs)])
    chosen = validation_rows(same, options.val_share, options.seed)
    train = [pair for row, pair in enumerate(pairs) if row not in chosen]
    val = [pair for row, pair in enumerate(pairs) if row in chosen]
    return {"train": Scan(train, found.skipped), "val": Scan(val)}


def _check_found(source: Path, scans: dict[str, Scan]) -> None:
    if scans["train"].pairs:
        return
    reasons = _counted([entry for found in scans.values() for entry in found.skipped])
    listed = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
    raise DataError(
        f"no pair of image and caption in {source}" + (f": {listed}" if listed else ""),
        "each picture needs a .txt of the same name beside it, or a row of a table",
    )


def _counted(skipped: list[dict[str, str]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in skipped:
        counts[entry["reason"]] = counts.get(entry["reason"], 0) + 1
    return counts


@contextmanager
def _built_aside(out: Path) -> Iterator[Path]:
    """A folder inside ``out`` whose content takes the former one's place when all is whole.

    It stays when the packing breaks off: the next try takes its whole shards.
    """
    building = out / _BUILDING
    try:
        building.mkdir(parents=True, exist_ok=True)
        yield building
        for name in (*SPLITS, "skipped.jsonl", _MARK):
            old, new = out / name, building / name
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            if new.exists():
                os.replace(new, old)
    except OSError as error:
        raise StorageError(
            f"cannot write {error.filename or out}: {error.strerror}",
            "make room and run it again: whole shards are kept; or name another folder",
        ) from error
    shutil.rmtree(building, ignore_errors=True)


def _jobs(scans: dict[str, Scan], options: PackOptions) -> list[_Job]:
    """Every shard, its pairs in a shuffled order that follows from the seed."""
    jobs = []
    for part, split in enumerate(SPLITS):
        seed, keys = derived_seed(options.seed, part), _Keys()
        pairs = sorted(scans[split].pairs, key=lambda pair: _place(pair, seed))
        keyed = [(keys.of(pair), pair) for pair in pairs]
        for number, start in enumerate(range(0, len(keyed), options.shard_pairs)):
            jobs.append(_Job(split, number, keyed[start : start + options.shard_pairs]))
    return jobs


def _write_all(
    building: Path,
    jobs: list[_Job],
    options: PackOptions,
    threads: Executor,
    report: Callable[[int, int], None],
) -> list[_Written]:
    """Write the shards that are not there yet; remove those of another content."""
    wanted = {job.name for job in jobs}
    for path in [path for split in SPLITS for path in (building / split).glob("*")]:
        if f"{path.parent.name}/{path.name}" not in wanted:
            path.unlink()
    total, done, written = sum(len(job.pairs) for job in jobs), 0, []
    running = threads.map(lambda job: _write_shard(building, job, options), jobs)
    for job, shard in zip(jobs, running, strict=True):
        written.append(shard)
        done += len(job.pairs)
        report(done, total)
    return written


def _write_marks(building: Path, pairs: int, skipped: list[dict[str, str]]) -> None:
    (building / "skipped.jsonl").unlink(missing_ok=True)
    if skipped:
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped)
        (building / "skipped.jsonl").write_text("".join(lines), encoding="utf-8")
    (building / _MARK).write_text(json.dumps({"format": 1, "pairs": pairs}), encoding="utf-8")


def _place(pair: RawPair, seed: int) -> str:
    """A place in a shuffled order that depends on the pair and the seed alone."""
    return hashlib.sha256(f"{seed} {pair.photo} {pair.image.name}".encode()).hexdigest()


class _Keys:
    """Keys that any reader of WebDataset takes whole: letters, digits, ``_`` and ``-``."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def of(self, pair: RawPair) -> str:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", pair.image.stem).strip("_") or "pair"
        key, number = plain, 1
        while key.casefold() in self._used:
            number += 1
            key = f"{plain}_{number}"
        self._used.add(key.casefold())
        return key


def _write_shard(building: Path, job: _Job, options: PackOptions) -> _Written:
    """Write one tar, flushed to the disk, and a note of what it was made of."""
    from webdataset import TarWriter

    path, fingerprint = building / job.name, job.fingerprint(options)
    note = building / "made" / job.name
    made = _made_before(path, note, fingerprint)
    if made:
        return made
    skipped = []
    path.parent.mkdir(exist_ok=True)
    note.parent.mkdir(parents=True, exist_ok=True)
    temporary = building / f"{job.split}-{job.number:05d}"
    with temporary.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0, user="clipft", group="clipft") as tar:
            for key, pair in job.pairs:
                try:
                    tar.write(_sample(key, pair, options))
                except BadImage as error:
                    skipped.append({"file": str(pair.image), "reason": str(error)})
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    os.replace(temporary, path)
    written = _Written(job.split, len(job.pairs) - len(skipped), size, skipped, fingerprint)
    note.write_text(json.dumps(asdict(written)), encoding="utf-8")
    return written


def _made_before(path: Path, note: Path, fingerprint: str) -> _Written | None:
    try:
        written = _Written(**json.loads(note.read_text(encoding="utf-8")))
        whole = written.fingerprint == fingerprint and path.stat().st_size == written.bytes
    except (OSError, ValueError, TypeError):
        return None
    return written if whole else None


def _sample(key: str, pair: RawPair, options: PackOptions) -> dict[str, Any]:
    suffix = pair.image.suffix.removeprefix(".").lower()
    try:
        data = pair.image.read_bytes()
    except OSError as error:
        raise BadImage(error.strerror or "cannot be read") from error
    if options.size:
        data, suffix = _smaller(data, suffix, options)
    sample: dict[str, Any] = {
        "__key__": key,
        "jpg" if suffix == "jpeg" else suffix: data,
        CAPTION_SUFFIX: pair.caption,
    }
    if pair.metadata is not None:
        sample[METADATA_SUFFIX] = pair.metadata
    return sample


def _smaller(data: bytes, suffix: str, options: PackOptions) -> tuple[bytes, str]:
    """Shorter side to ``size`` as JPEG; a picture that is no larger stays as it is."""
    image = decode_image(data, options.size)
    with Image.open(io.BytesIO(data)) as header:
        if min(header.size) <= options.size:
            return data, suffix
    buffer = io.BytesIO()
    resized = resize_shorter(image, options.size)
    resized.save(buffer, "JPEG", quality=options.quality)
    return buffer.getvalue(), "jpg"
