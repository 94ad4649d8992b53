"""Pairs -> WebDataset shards, split for training and validation.

The same input gives the same bytes, whatever the number of processes; a shard bears its final
name only when it is whole. A pack that was killed goes on where it was: whole shards of the
same content are kept.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clipft.core.errors import DataError
from clipft.data.duplicates import PerceptualHash, group_leaders, near_duplicates, validation_rows
from clipft.data.packing.download import Pictures
from clipft.data.packing.options import PackOptions
from clipft.data.packing.records import Listing, PackPair, Scan
from clipft.data.packing.scan import scan
from clipft.data.packing.sources import list_pairs
from clipft.data.packing.target import Target
from clipft.data.packing.worker_pool import Workers
from clipft.data.packing.writer import SPLITS, content_of, plan, write_all


@dataclass(frozen=True)
class PackResult:
    """Counts, of a part those of its own shards; ``skipped`` by reason; pairs of val that
    also stand in train, by what they share (only where the split was the source's own)."""

    out: Path
    train_pairs: int
    val_pairs: int
    shards: int
    bytes: int
    skipped: dict[str, int]
    shared_photos: int
    shared_near_photos: int
    shared_captions: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}


def pack(
    source: Path, out: Path, options: PackOptions, report: Callable[[int, int], None]
) -> PackResult:
    """Make shards in ``out``/train and ``out``/val; ``report`` is told (done, total) steps:
    each picture counts when it was fetched, read and written.

    Raises:
        DataError: no such folder or table, no pair in it, or a shard in it is not whole.
        UsageError: ``out`` holds something else, or a former pack without ``overwrite``; the
            source is mixed, or lacks a column.
        StorageError: the disk does not take it; ``out``'s former shards are as they were.
    """
    if not source.exists():
        raise DataError(f"no folder {source}", "name the folder with the raw files, or a table")
    target, progress = Target(out, options.part), _Progress(report)
    target.check(source, options.overwrite)
    with target.guarded(), Workers(options.processes) as workers:
        pictures = Pictures(target.building / "pictures")
        listings = _list(source, out, options, pictures)
        _fetch(listings, pictures, progress)
        progress.total += 2 * sum(len(listing.candidates) for listing in listings.values())
        found = {
            name: scan(listings.pop(name), options, workers, progress.step)
            for name in list(listings)
        }
        skipped = [entry for side in found.values() for entry in side.skipped]
        pairs = _split(found[""], options) if "" in found else _pairs(found)
        _check_found(source, pairs["train"], skipped)
        jobs = plan(pairs, options)
        content = content_of(jobs)
        target.check_others(content)
        own = [job for job in jobs if options.part.has(job.number)]
        progress.total = progress.done + sum(len(job.pairs) for job in own)
        written = write_all(target.building, own, options, workers, progress.step)
        skipped += [entry for shard in written for entry in shard.skipped]
        target.publish(content, written, skipped)
    return PackResult(
        out=out,
        train_pairs=sum(shard.pairs for shard in written if shard.split == "train"),
        val_pairs=sum(shard.pairs for shard in written if shard.split == "val"),
        shards=len(written),
        bytes=sum(shard.bytes for shard in written),
        skipped=_counted(skipped),
        **_shared(found, options),
    )


class _Progress:
    def __init__(self, report: Callable[[int, int], None]) -> None:
        self.done, self.total, self._report = 0, 0, report

    def step(self, more: int) -> None:
        self.done += more
        self._report(self.done, self.total)


def _list(source: Path, out: Path, options: PackOptions, pictures: Pictures) -> dict[str, Listing]:
    """By split; by "" where the source has none of its own."""
    own = all((source / split).is_dir() for split in SPLITS)
    places = {split: source / split for split in SPLITS} if own else {"": source}
    return {name: list_pairs(place, out, options, pictures) for name, place in places.items()}


def _fetch(listings: dict[str, Listing], pictures: Pictures, progress: _Progress) -> None:
    """Put the picture in each URL's place; those that are not to be had are skipped."""
    every = [candidate for listing in listings.values() for candidate in listing.candidates]
    urls = dict.fromkeys(c.image for c in every if isinstance(c.image, str))
    progress.total += len(urls)
    had = {}
    for url, picture in pictures.fetch(urls):
        had[url] = picture
        progress.step(1)
    for listing in listings.values():
        kept = []
        for candidate in listing.candidates:
            image = candidate.image
            picture = had[image] if isinstance(image, str) else image
            if isinstance(picture, str):
                listing.skip(candidate.where, picture)
            else:
                kept.append(replace(candidate, image=picture))
        listing.candidates = kept


def _pairs(found: dict[str, Scan]) -> dict[str, list[PackPair]]:
    return {split: found[split].pairs for split in SPLITS}


def _split(found: Scan, options: PackOptions) -> dict[str, list[PackPair]]:
    pairs = found.pairs
    same: list[Sequence[object]] = [[p.photo for p in pairs], [p.words for p in pairs]]
    # A pair without the field is a group of its own
    same.append([pair.group or f"\0{row}" for row, pair in enumerate(pairs)])
    if options.near >= 0:
        kinds, links = _alike(found.hashes, options.near)
        leaders = group_leaders(len(kinds), links=links)
        same.append([leaders[kind] for kind in kinds])
    chosen = validation_rows(same, options.val_share, options.seed)
    train = [pair for row, pair in enumerate(pairs) if row not in chosen]
    val = [pair for row, pair in enumerate(pairs) if row in chosen]
    return {"train": train, "val": val}


def _alike(
    hashes: Sequence[PerceptualHash | None], near: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """Number the distinct hashes and find those that are near. Equal hashes share one number:
    a placeholder that stands for a thousand products is compared once."""
    numbers: dict[PerceptualHash, int] = {}
    kinds = [numbers.setdefault(hashed, len(numbers)) for hashed in hashes if hashed]
    return kinds, near_duplicates(list(numbers), near)


def _shared(found: dict[str, Scan], options: PackOptions) -> dict[str, int]:
    """What pairs of val share with train; nothing where the split was made here."""
    if "" in found:
        return {"shared_photos": 0, "shared_near_photos": 0, "shared_captions": 0}
    train, val = (found[split].pairs for split in SPLITS)
    photos, words = {pair.photo for pair in train}, {pair.words for pair in train}
    near = 0
    if options.near >= 0:
        kinds, links = _alike([*found["train"].hashes, *found["val"].hashes], options.near)
        theirs = set(kinds[: len(train)])
        reach = theirs.union(*({a, b} for a, b in links if a in theirs or b in theirs))
        near = sum(
            kind in reach and pair.photo not in photos
            for kind, pair in zip(kinds[len(train) :], val, strict=True)
        )
    return {
        "shared_photos": sum(pair.photo in photos for pair in val),
        "shared_near_photos": near,
        "shared_captions": sum(pair.words in words for pair in val),
    }


def _check_found(
    source: Path, train: Sequence[PackPair], skipped: Sequence[dict[str, str]]
) -> None:
    if train:
        return
    listed = ", ".join(f"{count} x {reason}" for reason, count in _counted(skipped).items())
    raise DataError(
        f"no pair of image and caption in {source}" + (f": {listed}" if listed else ""),
        "each picture needs a .txt of the same name beside it, or a row of a table",
    )


def _counted(skipped: Sequence[dict[str, str]]) -> dict[str, int]:
    """By reason, without what is the single picture's: "truncated (7 bytes not processed)"."""
    return dict(Counter(entry["reason"].partition(" (")[0] for entry in skipped))
