"""Pairs that lie in a bucket: brought to ``data_dir``, shown on the way, packed if raw."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from clipft.cli.console import Output
from clipft.config.settings import Settings, StorageSettings
from clipft.config.sources import LoadedSettings, cached_bucket, parse_s3_url, settings_of_data
from clipft.core.common import counted
from clipft.core.files import read_json, write_json

if TYPE_CHECKING:
    from clipft.data.shards.stream import ShardSource
    from clipft.storage.sync.sync import Found, SyncOptions, SyncProgress, SyncResult

RAW = ".clipft-raw"
"""Folder in ``data_dir`` for raw files, which are packed into shards beside it."""

_PACKED = ".clipft-packed.json"

LOCATION_SETTINGS = (
    "endpoint_url",
    "s3_region",
    "s3_profile",
    "s3_anonymous",
    "s3_addressing",
    "s3_requests",
    "s3_patience",
)
"""What a command needs besides ``data_dir`` to take ``s3://bucket/prefix`` for it."""


def bring_named_data(loaded: LoadedSettings, out: Output) -> None:
    """Where ``--data-dir`` names a bucket: bring its pairs to the folder that stands for it."""
    settings = loaded.values
    if settings.s3_bucket and settings.data_dir.is_relative_to(cached_bucket(settings.s3_bucket)):
        bring_data(settings, out)


def local_data(place: Path, settings: Settings, out: Output) -> Path:
    """A folder as it is; ``s3://bucket/prefix`` brought to the folder that stands for it."""
    url = parse_s3_url(place)
    if url is None:
        return place
    settings = settings.model_copy(update=settings_of_data(url))
    bring_data(settings, out)
    return settings.data_dir


def bring_data(
    settings: StorageSettings, out: Output, options: "SyncOptions | None" = None
) -> "SyncResult":
    """Sync, say what deserves it, and pack raw files if the settings want it.

    Raises:
        StorageError: as ``storage.sync.bring``.
        DataError, UsageError: as ``data.pack.pack``.
    """
    from clipft.storage.sync.sync import SyncOptions, bring, look

    options = options or SyncOptions()
    found = look(settings, options.filter, out.note)
    packs = settings.pack and _is_raw(found)
    target = settings.data_dir / RAW if packs else settings.data_dir
    out.note(f"Syncing {found.bucket.url(found.prefixes['train'])} to {target}.")
    with transfer_progress(out) as report:
        result = bring(found, target, report, options)
    for note in result.notes:
        out.note(f"note: {note}.")
    if packs and not options.dry_run:
        _pack_once(found, settings.data_dir, out)
    return result


def stream_source(settings: Settings, out: Output) -> "ShardSource":
    """The training shards, read from the bucket as they are needed."""
    from clipft.storage.s3.remote_shards import open_remote_shards

    source = open_remote_shards(settings, out.note)
    out.note(f"Streaming {source.place}; only the validation pairs are synced.")
    return source


def bring_validation(settings: Settings, out: Output) -> None:
    """Sync the validation pairs alone: they are read by number."""
    from clipft.storage.sync.sync import bring_side, look

    found = look(settings, say=out.note)
    with transfer_progress(out) as report:
        bring_side(found, "val", settings.data_dir, report)


def _is_raw(found: "Found") -> bool:
    """Pictures, and no shard on either side."""
    from clipft.data.shards.index import IMAGE_SUFFIXES

    names = [name.lower() for side in found.objects for name in found.names(side)]
    suffixes = {name.rpartition(".")[2] for name in names}
    return "tar" not in suffixes and bool(suffixes & set(IMAGE_SUFFIXES))


def _pack_once(found: "Found", data_dir: Path, out: Output) -> None:
    """Pack what was synced, unless that was done for exactly these objects."""
    from clipft.data.packing.options import PackOptions
    from clipft.data.packing.pack import pack

    content, mark = _content(found), data_dir / _PACKED
    if read_json(mark) == {"content": content} and any(data_dir.glob("train/*.tar")):
        return
    # Without validation files of its own, pack makes the split
    source = data_dir / RAW if found.objects["val"] else data_dir / RAW / "train"
    with out.progress(f"Packing {source}") as report:
        result = pack(source, data_dir, PackOptions(overwrite=True), report)
    write_json(mark, {"content": content})
    out.note(
        f"Packed {result.train_pairs:,} training and {result.val_pairs:,} validation pairs into "
        f"{counted(result.shards, 'shard')} in {data_dir}; the raw files stay in {data_dir / RAW}."
    )


def _content(found: "Found") -> str:
    digest = hashlib.sha256()
    for side, objects in found.objects.items():
        for wanted in objects:
            digest.update(f"{side}\0{wanted.path}\0{wanted.etag}\0".encode())
    return digest.hexdigest()


@contextmanager
def transfer_progress(out: Output) -> Iterator[Callable[["SyncProgress"], None]]:
    """A bar on a terminal, a line every few seconds elsewhere."""
    from clipft.cli.progress import bar, lines

    shown = bar(out.err) if out.err.is_interactive else lines(out.note)
    with shown as report:
        yield report
