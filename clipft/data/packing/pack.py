"""Packs pairs into WebDataset shards, split for training and validation.

The steps: list the source, download what it names by URL, scan every image and caption, split the
pairs, plan the shards, write them to a hidden folder, and move that into place. The same input
gives the same bytes, whatever the number of processes. A shard gets its final name only when it is
complete, and a pack that was interrupted keeps its complete shards when it is run again.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clipft.core.errors import DataError
from clipft.data.duplicates import (
    PerceptualHash,
    group_leaders,
    links_of,
    near_duplicates,
    validation_rows,
)
from clipft.data.packing.download import download_images
from clipft.data.packing.options import PackOptions
from clipft.data.packing.records import Listing, PackPair, Scan
from clipft.data.packing.scan import scan
from clipft.data.packing.sources import list_pairs
from clipft.data.packing.target import Target
from clipft.data.packing.worker_pool import Workers
from clipft.data.packing.writer import SPLITS, content_of, plan, write_all


@dataclass(frozen=True)
class PackResult:
    """What was packed; with --part, the counts of that part's own shards.

    ``captions`` counts those of all pairs, ``skipped`` pairs by reason. The ``shared_...`` fields
    count validation pairs whose image, near-duplicate image or caption is also in the training
    pairs. They are zero if clipft made the split.
    """

    out: Path
    train_pairs: int
    val_pairs: int
    captions: int
    shards: int
    bytes: int
    skipped: dict[str, int]
    shared_photos: int
    shared_near_photos: int
    shared_captions: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}


@dataclass
class _Progress:
    """Counts steps: each image is one when it is downloaded, when it is read and when it is
    written."""

    report: Callable[[int, int], None]
    done: int = 0
    total: int = 0

    def step(self, more: int) -> None:
        self.done += more
        self.report(self.done, self.total)


def pack(
    source: Path, out: Path, options: PackOptions, report: Callable[[int, int], None]
) -> PackResult:
    """Write shards to ``out``/train and ``out``/val; ``report`` receives (done, total) steps.

    Raises:
        DataError: There is no such folder or table, it holds no pair, or a shard in it is
            incomplete.
        UsageError: ``out`` holds other files, or an earlier pack without ``overwrite``; the source
            mixes raw files and shards, or lacks a column.
        StorageError: The disk is full, or refuses to write. Earlier shards in ``out`` stay.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist", "name the folder of raw files, or a table")
    target, progress = Target(out, options.part), _Progress(report)
    target.check(source, options.overwrite)
    with target.explain_disk_errors(), Workers(options.processes) as workers:
        # List: a source with train/ and val/ folders keeps its split, any other is listed as ""
        has_split = all((source / split).is_dir() for split in SPLITS)
        places = {split: source / split for split in SPLITS} if has_split else {"": source}
        images = target.building / "pictures"
        listings = {name: list_pairs(at, out, options, images) for name, at in places.items()}
        _download(list(listings.values()), images, progress)

        # Scan: the number of shards is not known yet, so the total is an upper bound until then
        progress.total += 2 * sum(len(listing.candidates) for listing in listings.values())
        found = {}
        for name in places:  # pop, so that the candidates of a large source are freed
            found[name] = scan(listings.pop(name), options, workers, progress.step)
        skipped = [entry for side in found.values() for entry in side.skipped]
        if has_split:
            pairs = {split: found[split].pairs for split in SPLITS}
        else:
            pairs = _split(found[""], options)
        if not pairs["train"]:
            reasons = ", ".join(f"{count} x {why}" for why, count in _count(skipped).items())
            raise DataError(
                f"no pair of image and caption in {source}" + (f": {reasons}" if reasons else ""),
                "each image needs a .txt of the same name beside it, or a row of a table",
            )

        # Plan: every part plans all shards, and writes its own
        jobs = plan(pairs, options)
        content = content_of(jobs)
        target.check_others(content)
        own = [job for job in jobs if options.part.has(job.number)]
        progress.total = progress.done + sum(len(job.pairs) for job in own)

        # Write, and move into place
        written = write_all(target.building, own, options, workers, progress.step)
        skipped += [entry for shard in written for entry in shard.skipped]
        target.publish(content, written, skipped)
    shared_images, shared_near, shared_captions = _count_shared(found, options)
    return PackResult(
        out=out,
        train_pairs=sum(shard.pairs for shard in written if shard.split == "train"),
        val_pairs=sum(shard.pairs for shard in written if shard.split == "val"),
        captions=sum(shard.captions for shard in written),
        shards=len(written),
        bytes=sum(shard.bytes for shard in written),
        skipped=_count(skipped),
        shared_photos=shared_images,
        shared_near_photos=shared_near,
        shared_captions=shared_captions,
    )


def _download(listings: Sequence[Listing], images: Path, progress: _Progress) -> None:
    """Replace the URL in each candidate by its image; skip the pairs whose image is not there."""
    every = [candidate for listing in listings for candidate in listing.candidates]
    urls = dict.fromkeys(c.image for c in every if isinstance(c.image, str))
    progress.total += len(urls)
    results = {}
    for url, result in download_images(images, urls):
        results[url] = result
        progress.step(1)
    for listing in listings:
        kept = []
        for candidate in listing.candidates:
            image = candidate.image
            result = results[image] if isinstance(image, str) else image
            if isinstance(result, str):
                listing.skip(candidate.where, result)
            else:
                kept.append(replace(candidate, image=result))
        listing.candidates = kept


def _split(found: Scan, options: PackOptions) -> dict[str, list[PackPair]]:
    """Choose validation pairs, so that pairs with the same image, caption or group, or with
    near-duplicate images, stay together."""
    pairs = found.pairs
    shared_captions = links_of(pair.caption_keys for pair in pairs)
    same: list[Sequence[object]] = [[pair.image_hash for pair in pairs]]
    same.append(group_leaders(len(pairs), links=shared_captions))
    # A pair without the field is a group of its own
    same.append([pair.group or f"\0{row}" for row, pair in enumerate(pairs)])
    if options.near >= 0:
        kinds, links = _link_hashes(found.hashes, options.near)
        leaders = group_leaders(len(kinds), links=links)
        same.append([leaders[kind] for kind in kinds])
    chosen = validation_rows(same, options.val_share, options.seed)
    return {
        "train": [pair for row, pair in enumerate(pairs) if row not in chosen],
        "val": [pair for row, pair in enumerate(pairs) if row in chosen],
    }


def _link_hashes(
    hashes: Sequence[PerceptualHash | None], near: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the number of each image's hash, and all pairs of numbers that are near-duplicates.

    Equal hashes share one number, so a placeholder that stands for a thousand products is compared
    only once.
    """
    numbers: dict[PerceptualHash, int] = {}
    kinds = [numbers.setdefault(hashed, len(numbers)) for hashed in hashes if hashed]
    return kinds, near_duplicates(list(numbers), near)


def _count_shared(found: dict[str, Scan], options: PackOptions) -> tuple[int, int, int]:
    """Count the validation pairs whose image, near-duplicate image (but not the same one) and
    caption are in the training pairs too. All are zero if clipft made the split."""
    if "" in found:
        return 0, 0, 0
    train, val = (found[split].pairs for split in SPLITS)
    images = {pair.image_hash for pair in train}
    captions = {key for pair in train for key in pair.caption_keys}
    near = 0
    if options.near >= 0:
        kinds, links = _link_hashes([*found["train"].hashes, *found["val"].hashes], options.near)
        theirs = set(kinds[: len(train)])
        # Equal hashes count as near too, hence also the training pairs' own numbers
        reach = theirs.union(*({a, b} for a, b in links if a in theirs or b in theirs))
        near = sum(
            kind in reach and pair.image_hash not in images
            for kind, pair in zip(kinds[len(train) :], val, strict=True)
        )
    shared_images = sum(pair.image_hash in images for pair in val)
    shared_captions = sum(not captions.isdisjoint(pair.caption_keys) for pair in val)
    return shared_images, near, shared_captions


def _count(skipped: Sequence[dict[str, str]]) -> dict[str, int]:
    """Count by reason, without what differs from image to image, as in "truncated (7 bytes not
    processed)"."""
    return dict(Counter(entry["reason"].partition(" (")[0] for entry in skipped))
