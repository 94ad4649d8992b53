"""Which shard gets which pairs, and the writing of one: the same pairs give the same bytes."""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from clipft.core.files import read_json
from clipft.data.images import BadImage, decode_image, resize_shorter
from clipft.data.order import derived_seed
from clipft.data.packing.options import PackOptions
from clipft.data.packing.records import PackPair
from clipft.data.packing.worker_pool import Workers
from clipft.data.shards.index import CAPTION_SUFFIX, METADATA_SUFFIX

SPLITS = ("train", "val")
_FORMAT = 3
"""Changes with what the same pairs and options become."""
_LONGEST_KEY = 80
"""Plain ustar headers hold 100 bytes of name: key, number and suffix."""


@dataclass(frozen=True)
class Job:
    """One shard to write: its place below the target, and its pairs by key.
    ``fingerprint`` is equal for equal bytes."""

    split: str
    number: int
    pairs: list[tuple[str, PackPair]]
    fingerprint: str

    @property
    def name(self) -> str:
        return f"{self.split}/{self.number:05d}.tar"


@dataclass(frozen=True)
class Written:
    """One shard that is whole; ``skipped`` are pairs whose picture broke while packing."""

    split: str
    number: int
    pairs: int
    bytes: int
    skipped: list[dict[str, str]]
    fingerprint: str


def plan(pairs: dict[str, list[PackPair]], options: PackOptions) -> list[Job]:
    """Every shard of both splits, its pairs in a shuffled order that follows from the seed."""
    jobs = []
    for which, split in enumerate(SPLITS):
        seed, keys = derived_seed(options.seed, which), _Keys()
        shuffled = sorted(pairs[split], key=lambda pair: _place(pair, seed))
        for number, shard in enumerate(_cut(shuffled, options)):
            keyed = [(keys.of(pair.name), pair) for pair in shard]
            jobs.append(Job(split, number, keyed, _fingerprint(keyed, options)))
    return jobs


def content_of(jobs: Sequence[Job]) -> str:
    """Equal for equal bytes of all shards."""
    lines = "".join(f"{job.name} {job.fingerprint}\n" for job in jobs)
    return hashlib.sha256(lines.encode()).hexdigest()


def write_all(
    building: Path,
    jobs: Sequence[Job],
    options: PackOptions,
    workers: Workers,
    step: Callable[[int], None],
) -> list[Written]:
    """Write the shards that are not there yet; remove those of another content. ``step`` is
    told of so many more pairs."""
    wanted = {job.name for job in jobs}
    for path in [path for split in SPLITS for path in (building / split).glob("*")]:
        if f"{path.parent.name}/{path.name}" not in wanted:
            path.unlink()
    written = []
    running = workers.map(partial(_write, building=building, options=options), jobs)
    for job, shard in zip(jobs, running, strict=True):
        written.append(shard)
        step(len(job.pairs))
    return written


def _place(pair: PackPair, seed: int) -> str:
    """A place in a shuffled order that depends on the pair and the seed alone."""
    text = f"{seed} {pair.photo} {pair.name}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _cut(pairs: Sequence[PackPair], options: PackOptions) -> Iterator[Sequence[PackPair]]:
    if not options.shard_mb:
        for start in range(0, len(pairs), options.shard_pairs):
            yield pairs[start : start + options.shard_pairs]
        return
    start, size = 0, 0
    for at, pair in enumerate(pairs):
        size += _expected_bytes(pair, options)
        if size >= options.shard_mb << 20:
            yield pairs[start : at + 1]
            start, size = at + 1, 0
    if start < len(pairs):
        yield pairs[start:]


def _expected_bytes(pair: PackPair, options: PackOptions) -> int:
    """Of the tar, without making the picture smaller to know."""
    picture = pair.image.size
    if 0 < options.size < pair.shorter:
        picture = round(picture * (options.size / pair.shorter) ** 2)
    members = [picture, len(pair.caption)]
    members += [len(pair.metadata)] if pair.metadata is not None else []
    block = tarfile.BLOCKSIZE
    return sum(block + -(-size // block) * block for size in members)


def _fingerprint(pairs: Sequence[tuple[str, PackPair]], options: PackOptions) -> str:
    quality = options.quality if options.size else 0
    digest = hashlib.sha256(f"{_FORMAT} {options.size} {quality}".encode())
    for key, pair in pairs:
        digest.update(f"{key} {pair.photo} {pair.suffix}".encode())
        for part in (pair.caption, pair.metadata or b""):
            digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


class _Keys:
    """Keys that any reader of WebDataset takes whole: letters, digits, ``_`` and ``-``."""

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._numbers: dict[str, int] = {}

    def of(self, name: str) -> str:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[:_LONGEST_KEY] or "pair"
        key, number = plain, self._numbers.get(plain.casefold(), 1)
        while key.casefold() in self._used:
            number += 1
            key = f"{plain}_{number}"
        self._used.add(key.casefold())
        self._numbers[plain.casefold()] = number
        return key


def _write(job: Job, building: Path, options: PackOptions) -> Written:
    """Write one tar, flushed to the disk, and a note of what it was made of."""
    path, note = building / job.name, building / "made" / f"{job.name}.json"
    made = _made_before(path, note, job.fingerprint)
    if made:
        return made
    path.parent.mkdir(parents=True, exist_ok=True)
    note.parent.mkdir(parents=True, exist_ok=True)
    temporary = building / f"{job.split}-{job.number:05d}"
    with temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            skipped = _add_all(tar, job.pairs, options)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    pairs = len(job.pairs) - len(skipped)
    written = Written(job.split, job.number, pairs, size, skipped, job.fingerprint)
    path.unlink(missing_ok=True)  # an older shard must not pass for what the new note says
    note.write_text(json.dumps(asdict(written)), encoding="utf-8")
    os.replace(temporary, path)  # last: a kill before it costs this shard, never a whole one
    return written


def _made_before(path: Path, note: Path, fingerprint: str) -> Written | None:
    try:
        written = Written(**(read_json(note) or {}))
        whole = written.fingerprint == fingerprint and path.stat().st_size == written.bytes
    except (OSError, TypeError):
        return None
    return written if whole else None


def _add_all(
    tar: tarfile.TarFile, pairs: Sequence[tuple[str, PackPair]], options: PackOptions
) -> list[dict[str, str]]:
    """Returns what was left out, and why."""
    skipped = []
    for key, pair in pairs:
        try:
            data, suffix = _picture(pair, options)
        except BadImage as error:
            skipped.append({"file": pair.where, "reason": str(error)})
            continue
        _add(tar, f"{key}.{suffix}", data)
        _add(tar, f"{key}.{CAPTION_SUFFIX}", pair.caption)
        if pair.metadata is not None:
            _add(tar, f"{key}.{METADATA_SUFFIX}", pair.metadata)
    return skipped


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # no time, no owner: the bytes follow from the content alone
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _picture(pair: PackPair, options: PackOptions) -> tuple[bytes, str]:
    """Its bytes and suffix; with ``size`` a larger one as JPEG with this shorter side."""
    try:
        data = pair.image.read()
    except OSError as error:
        raise BadImage(error.strerror or "cannot be read") from error
    if not 0 < options.size < pair.shorter:
        return data, pair.suffix
    buffer = io.BytesIO()
    smaller = resize_shorter(decode_image(data, options.size), options.size)
    smaller.save(buffer, "JPEG", quality=options.quality)
    return buffer.getvalue(), "jpg"
