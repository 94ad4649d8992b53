"""Packs pairs into WebDataset shards, split for training and validation.

The steps are: list the source, download images that are given by URL, scan every image and caption,
split the pairs, plan the shards, write them to a hidden folder, and move them into place. The same
input gives the same bytes for any number of processes. A shard gets its final name only when it is
complete, and if an interrupted pack is run again, it keeps its complete shards.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from clipft.core.common import counted
from clipft.core.errors import DataError, UsageError, sentences
from clipft.core.files import did_you_mean_path
from clipft.core.part import Part
from clipft.data.duplicates import (
    PerceptualHash,
    group_leaders,
    links_of,
    near_duplicates,
    validation_rows,
)
from clipft.data.packing.download import download_images
from clipft.data.packing.fields import check_fields
from clipft.data.packing.options import PackOptions
from clipft.data.packing.records import Listing, PackPair, Scan, count_reasons
from clipft.data.packing.scan import scan
from clipft.data.packing.sources import FOREIGN_LINK, list_pairs
from clipft.data.packing.target import Target
from clipft.data.packing.worker_pool import Workers
from clipft.data.packing.writer import content_of, plan, write_all
from clipft.data.shards.contents import Contents, contents_of, how_to_pack
from clipft.data.shards.metadata import parse_metadata
from clipft.data.shards.names import SPLITS
from clipft.data.shards.tar import ByteRange

# If shared captions would put more than this share of the pairs into one group, they do not count
_MOST_CHAINED = 0.5


@dataclass(frozen=True)
class PackResult:
    """The result of ``pack``. With --part, the counts are those of the part's own shards.

    ``captions`` counts those of all pairs, ``skipped`` pairs by reason, and ``not_read`` holds the
    files of other types. The ``shared_...`` fields count validation pairs whose image,
    near-duplicate image or caption is also in the training pairs, and ``test_shared_...`` test
    pairs. If clipft made the split, no images are shared, and shared captions are counted only if
    pairs have several. ``notes`` say how the source was read.
    """

    out: Path
    train_pairs: int
    val_pairs: int
    test_pairs: int
    captions: int
    shards: int
    bytes: int
    skipped: dict[str, int]
    shared_photos: int
    shared_near_photos: int
    shared_captions: int
    test_shared_photos: int
    test_shared_near_photos: int
    test_shared_captions: int
    not_read: Contents
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        endings = dict(self.not_read.endings)
        return {**asdict(self), "out": str(self.out), "not_read": endings}


@dataclass
class _Progress:
    """Counts steps. Downloading, reading and writing an image are one step each."""

    report: Callable[[int, int], None]
    done: int = 0
    total: int = 0

    def step(self, more: int) -> None:
        self.done += more
        self.report(self.done, self.total)


def pack(
    source: Path, out: Path, options: PackOptions, report: Callable[[int, int], None]
) -> PackResult:
    """Write shards to ``out``/train, ``out``/val and perhaps ``out``/test.

    ``report`` receives (done, total) steps.

    Raises:
        DataError: There is no such folder or table, it holds no pair, or a shard in it is
            incomplete.
        UsageError: ``out`` holds other files, or an earlier pack without ``overwrite``; the source
            mixes raw files and shards, or lacks a column.
        StorageError: The disk is full, or refuses to write. Earlier shards in ``out`` stay.
    """
    if not source.exists():
        hint = sentences(did_you_mean_path(source), "name the folder of raw files, or a table")
        raise DataError(f"{source} does not exist", hint)
    target, progress = Target(out, options.part), _Progress(report)
    target.check(source, options.overwrite)
    with target.explain_disk_errors(), Workers(options.processes) as workers:
        target.begin()
        images = target.shared / "pictures"
        listing = list_pairs(source, out, options, images)
        check_fields(options, partial(_metadata_of, listing))
        _download(listing, images, options.part, progress)

        # Scan: the number of shards is not known yet, so the total is an upper bound until then
        progress.total += 2 * len(listing.candidates)
        found = scan(listing, options, workers, progress.step, target.shared)
        listing.candidates.clear()
        skipped = found.skipped
        splits = _assign(found, options)
        pairs: dict[str, list[PackPair]] = {split: [] for split in SPLITS}
        for pair, split in zip(found.pairs, splits, strict=True):
            pairs[split].append(pair)
        if not pairs["train"]:
            raise _nothing_to_train_on(source, found, splits)
        listing.notes += _notes(found.pairs, options)

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
    shared = _shared_with_training(found, splits, options)
    counts = Counter[str]()
    for shard in written:
        counts[shard.split] += shard.pairs
    return PackResult(
        out=out,
        train_pairs=counts["train"],
        val_pairs=counts["val"],
        test_pairs=counts["test"],
        captions=sum(shard.captions for shard in written),
        shards=len(written),
        bytes=sum(shard.bytes for shard in written),
        skipped=count_reasons(skipped),
        shared_photos=shared["val"].images,
        shared_near_photos=shared["val"].near,
        shared_captions=shared["val"].captions,
        test_shared_photos=shared["test"].images,
        test_shared_near_photos=shared["test"].near,
        test_shared_captions=shared["test"].captions,
        not_read=listing.others,
        notes=listing.notes,
    )


def _metadata_of(listing: Listing) -> Iterator[dict[str, Any]]:
    for candidate in listing.candidates:
        metadata = candidate.metadata
        with suppress(OSError):  # the pair is skipped later, with this error as the reason
            data = metadata.read() if isinstance(metadata, ByteRange) else metadata
            yield parse_metadata(data or b"")


def _notes(pairs: Sequence[PackPair], options: PackOptions) -> Iterator[str]:
    """Say how many pairs have no value in the group field and in the label field.

    Raises:
        UsageError: No pair has a value.
    """
    groups, labels = ([pair.group for pair in pairs], [pair.label for pair in pairs])
    for option, field, values, kind, what in (
        ("--group-field", options.group_field, groups, "product", "each is a group of its own"),
        ("--label-field", options.label_field, labels, "label", "they are split by their captions"),
    ):
        missing = values.count("")
        if field and missing == len(pairs):
            raise UsageError(
                f"{option}: the field {field!r} is empty in every pair",
                f"name a field that is the same in all pairs of a {kind}",
            )
        if field and missing:
            yield f"{counted(missing, 'pair')} without {field}: {what}."


def _nothing_to_train_on(source: Path, found: Scan, splits: Sequence[str]) -> DataError:
    """Build the error for a source without training pairs. It says what the source has instead."""
    reasons = count_reasons(found.skipped)
    if splits:
        counts = " and ".join(f"{n:,} in {split}" for split, n in sorted(Counter(splits).items()))
        return DataError(
            f"no training pairs in {source}: it has {counts}",
            "add a train/ folder beside them, or name the folder or table with the pairs itself",
        )
    why = ", ".join(f"{count:,} x {reason}" for reason, count in reasons.items())
    message = f"no pair of image and caption in {source}" + (f": {why}" if why else "")
    if not source.is_dir():
        return DataError(message, "each row needs an image that can be found, and a caption")
    contents = contents_of(source)
    hint = how_to_pack(source, contents)
    if any("is not UTF-8 text" in reason for reason in reasons):
        hint = "name the encoding of the files with --encoding, such as --encoding cp1252"
    if FOREIGN_LINK in reasons:
        hint = "add --follow-links to read what the links point to"
    return DataError(f"{message}; found {contents}", hint)


def _download(listing: Listing, images: Path, part: Part, progress: _Progress) -> None:
    """Replace the URL in each candidate by its image; skip the pairs whose download failed.

    Each part starts at a different URL, so when it reaches those of the other parts, they have
    downloaded most of them.
    """
    urls = list(dict.fromkeys(c.image for c in listing.candidates if isinstance(c.image, str)))
    progress.total += len(urls)
    results, first = {}, len(urls) * (part.number - 1) // part.of
    for url, result in download_images(images, urls[first:] + urls[:first]):
        results[url] = result
        progress.step(1)
    kept = []
    for candidate in listing.candidates if urls else ():
        image = candidate.image
        downloaded = results[image] if isinstance(image, str) else image
        if isinstance(downloaded, str):
            listing.skip(candidate.where, downloaded)
        else:
            kept.append(replace(candidate, image=downloaded))
    listing.candidates = kept if urls else listing.candidates


def _assign(found: Scan, options: PackOptions) -> list[str]:
    """Return the split of each pair: as the source gives it, or drawn at random.

    Pairs with the same image, caption or group, or with near-duplicate images, stay together. Pairs
    with a label may share captions across splits, and each label is divided in proportion. If the
    source has validation or test pairs, none are drawn for that split.
    """
    splits = [pair.split or "train" for pair in found.pairs]
    shares = {"val": options.val_share, "test": options.test_share}
    drawn = {split: share for split, share in shares.items() if share and split not in splits}
    rows = [row for row, split in enumerate(splits) if split == "train"]
    total, same = len(rows), _related(found, rows, options) if drawn else []
    # The validation pairs are drawn first, so that they are the same with and without a test set
    for split, share in drawn.items():
        if rows:
            among = [[values[row] for row in rows] for values in same]
            labels = [found.pairs[row].label for row in rows]
            chosen = validation_rows(among, share * total / len(rows), options.seed, labels)
            for place in chosen:
                splits[rows[place]] = split
            rows = [row for row in rows if splits[row] == "train"]
    return splits


def _related(found: Scan, rows: Sequence[int], options: PackOptions) -> list[dict[int, object]]:
    """Return one dict for each way in which the pairs in ``rows`` can belong together. It maps each
    row to a value, and rows with equal values belong together."""
    pairs = [found.pairs[row] for row in rows]
    same: list[Sequence[object]] = [[pair.image_hash for pair in pairs]]
    captions = _by_captions(pairs)
    # Each split has every label, so it also has the label's name or description as a caption
    same.append([f"\0{row}" if p.label else captions[row] for row, p in enumerate(pairs)])
    # A pair without the field is a group of its own
    same.append([pair.group or f"\0{row}" for row, pair in enumerate(pairs)])
    if options.near >= 0:
        kinds, links = _link_hashes([found.hashes[row] for row in rows], options.near)
        leaders = group_leaders(len(kinds), links=links)
        same.append([leaders[kind] for kind in kinds])
    return [dict(zip(rows, values, strict=True)) for values in same]


def _by_captions(pairs: Sequence[PackPair]) -> Sequence[object]:
    """Return a value for each pair. Pairs that share a caption have equal values.

    If pairs have several captions, some that fit many images ("a man") may chain most of the pairs
    together, and no pairs would be left to draw. Then only equal sets of captions count.
    """
    leaders = group_leaders(len(pairs), links=links_of(pair.caption_keys for pair in pairs))
    several = any(len(pair.caption_keys) > 1 for pair in pairs)
    if several and max(Counter(leaders).values()) > _MOST_CHAINED * len(pairs):
        return [frozenset(pair.caption_keys) for pair in pairs]
    return leaders


def _link_hashes(
    hashes: Sequence[PerceptualHash | None], near: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the number of each image's hash, and all pairs of numbers that are near-duplicates.

    Equal hashes share one number, so a placeholder image of a thousand products is compared only
    once.
    """
    numbers: dict[PerceptualHash, int] = {}
    kinds = [numbers.setdefault(hashed, len(numbers)) for hashed in hashes if hashed]
    return kinds, near_duplicates(list(numbers), near)


class _Shared(NamedTuple):
    """How many pairs have an image, a near-duplicate image (but not an identical one) or a caption
    that is also in the training pairs."""

    images: int = 0
    near: int = 0
    captions: int = 0


def _shared_with_training(
    found: Scan, splits: Sequence[str], options: PackOptions
) -> dict[str, _Shared]:
    """Count for each split the images and captions that are also in the training pairs."""
    shared = dict.fromkeys(SPLITS, _Shared())
    given = any(pair.split for pair in found.pairs)
    if given or any(len(pair.caption_keys) > 1 for pair in found.pairs):
        near = options.near if given else -1  # a drawn split keeps near-duplicates together
        shared |= {split: _count_shared(found, splits, split, near) for split in SPLITS[1:]}
    return shared


def _count_shared(found: Scan, splits: Sequence[str], split: str, near: int) -> _Shared:
    """Count the pairs of ``split`` whose images or captions are also in the training pairs."""
    train, own = (
        [row for row, name in enumerate(splits) if name == wanted] for wanted in ("train", split)
    )
    pairs = [found.pairs[row] for row in own]
    images = {found.pairs[row].image_hash for row in train}
    captions = {key for row in train for key in found.pairs[row].caption_keys}
    alike = 0
    if near >= 0 and own:
        kinds, links = _link_hashes([found.hashes[row] for row in [*train, *own]], near)
        theirs = set(kinds[: len(train)])
        # Equal hashes count as near too, so the training pairs' own numbers are included
        reach = theirs.union(*({a, b} for a, b in links if a in theirs or b in theirs))
        alike = sum(
            kind in reach and pair.image_hash not in images
            for kind, pair in zip(kinds[len(train) :], pairs, strict=True)
        )
    return _Shared(
        images=sum(pair.image_hash in images for pair in pairs),
        near=alike,
        captions=sum(not captions.isdisjoint(pair.caption_keys) for pair in pairs),
    )
