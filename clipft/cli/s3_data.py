"""Pairs in a bucket: fetched to ``data_dir`` and packed if they are raw files, or streamed."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from clipft.cli.console import Output
from clipft.config.sections.data import StorageSettings
from clipft.config.settings import Settings
from clipft.config.sources import LoadedSettings, cached_bucket, parse_s3_url, settings_of_data
from clipft.core.cache import mark_used
from clipft.core.common import counted
from clipft.core.errors import StorageError
from clipft.core.files import read_json, write_json

if TYPE_CHECKING:
    from clipft.data.shards.stream import ShardSource
    from clipft.distributed.collectives import Processes
    from clipft.storage.sync.sync import BucketListing, SyncOptions, SyncResult

RAW = ".clipft-raw"
"""Folder in ``data_dir`` for raw files, from which the shards beside it are packed."""

_PACKED = ".clipft-packed.json"

LOCATION_SETTINGS = (
    "endpoint_url",
    "s3_region",
    "s3_profile",
    "s3_anonymous",
    "s3_addressing",
    "s3_requests",
    "s3_retry_timeout",
)
"""The settings that a command needs besides ``data_dir`` to read ``s3://bucket/prefix``."""


def bring_named_data(loaded: LoadedSettings, out: Output) -> None:
    """Fetch the pairs if ``--data-dir`` is an ``s3://`` location.

    The settings then name a folder of the cache as ``data_dir``, which is filled here.
    """
    if in_bucket(loaded.values):
        bring_data(loaded.values, out)


def in_bucket(settings: StorageSettings) -> bool:
    """Return True if ``--data-dir`` was an ``s3://`` location, and so names a cache folder now."""
    bucket = settings.s3_bucket
    return bool(bucket) and settings.data_dir.is_relative_to(cached_bucket(bucket or ""))


def local_data(place: Path, settings: Settings, out: Output) -> Path:
    """Return ``place``, or for an ``s3://`` location the cache folder it was fetched to."""
    url = parse_s3_url(place)
    if url is None:
        return place
    settings = settings.model_copy(update=settings_of_data(url))
    bring_data(settings, out)
    return settings.data_dir


def local_source(place: Path, settings: Settings, out: Output) -> Path:
    """Return ``place``, or for an ``s3://`` or ``hf://`` location of files to pack, the folder that
    they were fetched to. A table in a bucket is fetched with everything beside it, as it may name
    images there.

    Raises:
        StorageError: nothing is there, the bucket cannot be read, or the disk cannot be written.
        ModelError: the hub has no such data set, or cannot be reached.
    """
    from clipft.cli.progress import transfer_progress
    from clipft.data.shards.names import TABLE_SUFFIXES
    from clipft.storage.hub import download_dataset, parse_hub_url
    from clipft.storage.sync.sync import WHOLE, SyncOptions, download, list_prefix

    if dataset := parse_hub_url(place):
        out.note(f"Downloading {dataset}.")
        return download_dataset(dataset)
    url = parse_s3_url(place)
    if url is None:
        return place
    is_table = url.prefix.rpartition(".")[2].lower() in TABLE_SUFFIXES
    table = url.prefix.rpartition("/")[2] if is_table else ""
    prefix = url.prefix.removesuffix(table).strip("/")
    target = cached_bucket(url.bucket) / ".clipft-sources" / prefix
    found = list_prefix(settings.model_copy(update={"s3_bucket": url.bucket}), prefix, out.note)
    if not found.objects[WHOLE]:
        raise StorageError(f"there is nothing under {url}", "check the bucket and the prefix")
    out.note(f"Syncing {found.bucket.url(found.prefixes[WHOLE])} to {target}.")
    with transfer_progress(out) as report:
        # What an earlier sync brought and the bucket no longer has must not be packed
        result = download(found, target, report, SyncOptions(delete=True), [WHOLE])
    for note in result.notes:
        out.note(f"note: {note}.")
    return target / table


def bring_data(
    settings: StorageSettings, out: Output, options: "SyncOptions | None" = None
) -> "SyncResult":
    """Sync the bucket's pairs to ``data_dir``, and pack raw files if the settings want it.

    Raises:
        StorageError: the bucket cannot be read, or the disk cannot be written.
        DataError: the raw files are not pairs that can be packed.
    """
    from clipft.cli.progress import transfer_progress
    from clipft.data.images.formats import IMAGE_SUFFIXES
    from clipft.storage.sync.sync import SyncOptions, download, list_bucket

    mark_used(cached_bucket(settings.s3_bucket or ""))  # it may not lie there
    options = options or SyncOptions()
    found = list_bucket(settings, options.filter, out.note)
    names = [o.path.lower() for side in found.objects.values() for o in side]
    suffixes = {name.rpartition(".")[2] for name in names}
    # Images and no shard on either side: files as a shop keeps them
    is_raw = "tar" not in suffixes and bool(suffixes & set(IMAGE_SUFFIXES))
    packs = settings.pack and is_raw
    target = settings.data_dir / RAW if packs else settings.data_dir
    out.note(f"Syncing {found.bucket.url(found.prefixes['train'])} to {target}.")
    with transfer_progress(out) as report:
        result = download(found, target, report, options)
    for note in result.notes:
        out.note(f"note: {note}.")
    if packs and not options.dry_run:
        _pack_once(found, settings.data_dir, out)
    return result


def _pack_once(found: "BucketListing", data_dir: Path, out: Output) -> None:
    """Pack the raw files that were synced, unless exactly these objects are packed already."""
    from clipft.data.packing.options import PackOptions
    from clipft.data.packing.pack import pack
    from clipft.data.shards.names import tars_in

    digest = hashlib.sha256()
    for side, objects in found.objects.items():
        for wanted in objects:
            digest.update(f"{side}\0{wanted.path}\0{wanted.etag}\0".encode())
    content, mark = {"content": digest.hexdigest()}, data_dir / _PACKED
    if read_json(mark) == content and tars_in(data_dir / "train"):
        return
    source = data_dir / RAW
    with out.progress(f"Packing {source}") as report:
        result = pack(source, data_dir, PackOptions(overwrite=True), report)
    write_json(mark, content)
    out.note(
        f"Packed {result.train_pairs:,} training and {result.val_pairs:,} validation pairs into "
        f"{counted(result.shards, 'shard')} in {data_dir}; the raw files stay in {data_dir / RAW}."
    )


def open_stream(settings: Settings, out: Output, processes: "Processes") -> "ShardSource":
    """Open the training shards in the bucket, to be read as they are needed.

    The validation pairs are synced all the same, once on each machine: they are read by
    number, which a stream cannot do.
    """
    from clipft.cli.progress import transfer_progress
    from clipft.distributed.rank_zero import on_each_machine
    from clipft.storage.s3.remote_shards import open_remote_shards
    from clipft.storage.sync.sync import download, list_bucket

    source = open_remote_shards(settings, out.note)
    out.note(f"Streaming {source.place}; only the validation pairs are synced.")

    def sync_validation() -> None:
        found = list_bucket(settings, note=out.note)
        with transfer_progress(out) as report:
            download(found, settings.data_dir, report, sides=("val",))

    on_each_machine(processes, sync_validation)
    return source
