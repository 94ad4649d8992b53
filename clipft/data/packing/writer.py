"""Divides pairs into shards and writes them. The same pairs give the same bytes."""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from clipft.core.files import read_json
from clipft.data.images.decode import decode_image, resize_shorter
from clipft.data.images.formats import BadImage
from clipft.data.order import derived_seed
from clipft.data.packing.options import PackOptions
from clipft.data.packing.records import PackPair
from clipft.data.packing.worker_pool import Workers
from clipft.data.shards.names import CAPTION_SUFFIX, METADATA_SUFFIX, SPLITS

# Increase this number when the same pairs and options give different bytes than before
_FORMAT = 3
# A name in a plain ustar header has at most 100 bytes: the key, a number and a suffix
_LONGEST_KEY = 80


@dataclass(frozen=True)
class Job:
    """A shard to write: its number within its split, and its pairs with their keys.
    Equal fingerprints mean equal bytes."""

    split: str
    number: int
    pairs: list[tuple[str, PackPair]]
    fingerprint: str

    @property
    def name(self) -> str:
        return f"{self.split}/{self.number:05d}.tar"


@dataclass(frozen=True)
class Written:
    """A complete shard: its number of pairs, captions and bytes, and the pairs that were skipped
    because their image turned out to be broken. The files in ``made`` hold these fields as JSON."""

    split: str
    number: int
    pairs: int
    captions: int
    bytes: int
    skipped: list[dict[str, str]]
    fingerprint: str


def plan(pairs: dict[str, list[PackPair]], options: PackOptions) -> list[Job]:
    """Divide the pairs of each split into shards, in a random order that depends on the seed."""
    jobs = []
    for which, split in enumerate(SPLITS):
        seed = derived_seed(options.seed, which)
        shuffled = sorted(pairs[split], key=partial(_place, seed=seed))
        keys = _unique_keys(pair.name for pair in shuffled)
        for number, shard in enumerate(_divide(shuffled, options)):
            keyed = [(next(keys), pair) for pair in shard]
            jobs.append(Job(split, number, keyed, _fingerprint(keyed, options)))
    return jobs


def content_of(jobs: Sequence[Job]) -> str:
    """Return a hash of the names and fingerprints of all shards."""
    lines = "".join(f"{job.name} {job.fingerprint}\n" for job in jobs)
    return hashlib.sha256(lines.encode()).hexdigest()


def write_all(
    building: Path,
    jobs: Sequence[Job],
    options: PackOptions,
    workers: Workers,
    step: Callable[[int], None],
) -> list[Written]:
    """Write the shards that are not in ``building`` yet, and remove those of an earlier plan.

    ``step`` receives the number of pairs in each shard that is done.

    Raises:
        DataError: A worker process was killed.
        OSError: The disk is full, or refuses to write.
    """
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
    """Return a sort key for a random order. It depends only on the pair and the seed, so that new
    pairs do not change the order of the others."""
    text = f"{seed} {pair.image_hash} {pair.name}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _unique_keys(names: Iterable[str]) -> Iterator[str]:
    """Yield a unique key for each name. Keys have only letters, digits, ``_`` and ``-``, and no two
    differ only in case, so that any WebDataset reader accepts them."""
    used: set[str] = set()
    numbers: dict[str, int] = {}  # the last number tried; otherwise equal names take quadratic time
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[:_LONGEST_KEY] or "pair"
        key, number = plain, numbers.get(plain.casefold(), 1)
        while key.casefold() in used:
            number += 1
            key = f"{plain}_{number}"
        used.add(key.casefold())
        numbers[plain.casefold()] = number
        yield key


def _divide(pairs: Sequence[PackPair], options: PackOptions) -> Iterator[Sequence[PackPair]]:
    """Yield the pairs of each shard, by their number or by the expected size of the tar."""
    if not options.shard_mb:
        for start in range(0, len(pairs), options.shard_pairs):
            yield pairs[start : start + options.shard_pairs]
        return
    start, total, block = 0, 0, tarfile.BLOCKSIZE
    for at, pair in enumerate(pairs):
        image = pair.image.size
        if 0 < options.size < pair.shorter_side:
            # An estimate from the number of pixels; the exact size is known only after resizing
            image = round(image * (options.size / pair.shorter_side) ** 2)
        members = [image, len(pair.caption)]
        members += [len(pair.metadata)] if pair.metadata is not None else []
        total += sum(block + -(-size // block) * block for size in members)  # a header for each
        if total >= options.shard_mb << 20:
            yield pairs[start : at + 1]
            start, total = at + 1, 0
    if start < len(pairs):
        yield pairs[start:]


def _fingerprint(pairs: Sequence[tuple[str, PackPair]], options: PackOptions) -> str:
    quality = options.quality if options.size else 0  # without --size, quality has no effect
    digest = hashlib.sha256(f"{_FORMAT} {options.size} {quality}".encode())
    for key, pair in pairs:
        digest.update(f"{key} {pair.image_hash} {pair.suffix}".encode())
        for part in (pair.caption, pair.metadata or b""):
            digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _write(job: Job, building: Path, options: PackOptions) -> Written:
    """Write a shard and a note with its fields, unless an earlier run has written them."""
    path, note = building / job.name, building / "made" / f"{job.name}.json"
    try:
        made = Written(**(read_json(note) or {}))
        if made.fingerprint == job.fingerprint and path.stat().st_size == made.bytes:
            return made
    except (OSError, TypeError):  # no shard; no note, or one that was cut off
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    note.parent.mkdir(parents=True, exist_ok=True)
    temporary = building / f"{job.split}-{job.number:05d}"
    with temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            captions, skipped = _add_pairs(tar, job.pairs, options)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    pairs = len(job.pairs) - len(skipped)
    written = Written(job.split, job.number, pairs, captions, size, skipped, job.fingerprint)
    path.unlink(missing_ok=True)  # an older shard must not be taken for the one in the new note
    note.write_text(json.dumps(asdict(written)), encoding="utf-8")
    os.replace(temporary, path)  # last, so that a kill costs at most this shard
    return written


def _add_pairs(
    tar: tarfile.TarFile, pairs: Sequence[tuple[str, PackPair]], options: PackOptions
) -> tuple[int, list[dict[str, str]]]:
    """Add the members of each pair. Return the number of captions, and the skipped pairs with the
    reasons."""
    captions, skipped = 0, list[dict[str, str]]()
    for key, pair in pairs:
        try:
            data, suffix = _encode_image(pair, options)
        except BadImage as error:
            skipped.append({"file": pair.where, "reason": str(error)})
            continue
        captions += len(pair.caption_keys)
        members = [(suffix, data), (CAPTION_SUFFIX, pair.caption)]
        if pair.metadata is not None:
            members.append((METADATA_SUFFIX, pair.metadata))
        for kind, content in members:
            # TarInfo has no time and no owner, so the bytes depend only on the content
            info = tarfile.TarInfo(f"{key}.{kind}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return captions, skipped


def _encode_image(pair: PackPair, options: PackOptions) -> tuple[bytes, str]:
    """Return the bytes and the suffix of an image: unchanged, or as a smaller JPEG with --size.

    Raises:
        BadImage: The image can no longer be read, or cannot be decoded.
    """
    try:
        data = pair.image.read()
    except OSError as error:
        raise BadImage(error.strerror or "cannot be read") from error
    if not 0 < options.size < pair.shorter_side:
        return data, pair.suffix
    buffer = io.BytesIO()
    smaller = resize_shorter(decode_image(data, options.size), options.size)
    smaller.save(buffer, "JPEG", quality=options.quality)
    return buffer.getvalue(), "jpg"
