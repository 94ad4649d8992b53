"""``clipft sync``."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.filesize import decimal

from clipft.cli.console import Output, end
from clipft.cli.options import command
from clipft.cli.s3_data import bring_data
from clipft.config.fields import Section, setting
from clipft.config.sections.data import StorageSettings
from clipft.config.sources import LoadedSettings, parse_s3_url
from clipft.core.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from clipft.storage.sync.sync import SyncResult

_LISTED = 20
"""Rows shown of a list that may be long."""


class SyncCommandOptions(Section):
    title = "Sync"
    up: bool = setting(False, "Upload --data-dir to the bucket instead of downloading.")
    include: tuple[str, ...] = setting(
        (),
        "Transfer only paths that match, relative to train/ or val/. * also matches /. May be "
        "repeated.",
        metavar="GLOB",
    )
    exclude: tuple[str, ...] = setting(
        (), "Skip paths that match. May be repeated.", metavar="GLOB"
    )
    delete: bool = setting(
        False,
        "Delete files that the source does not have: in train/ and val/, or with --up under the "
        "two prefixes.",
    )
    dry_run: bool = setting(False, "Show what would be done, and change nothing.")


@command(StorageSettings, options=SyncCommandOptions)
def sync(loaded: LoadedSettings, options: SyncCommandOptions, out: Output) -> None:
    """Download the pairs from a bucket, or upload them.

    The local folder is --data-dir. Files that are already present are not transferred again.
    Every object is verified (size, ETag, MD5) and appears only when it is complete, so an
    interrupted sync can be repeated and continues where it stopped. Raw files are packed into
    shards unless --no-pack is given.

    Examples:

        clipft sync --s3-bucket catalogue --data-dir ./catalogue
        clipft sync --s3-bucket catalogue --endpoint-url http://localhost:9000
        clipft sync --s3-bucket catalogue --exclude '*.json' --dry-run
        clipft sync --up --s3-bucket catalogue --data-dir ./catalogue
    """
    from clipft.cli.progress import transfer_progress
    from clipft.storage.s3.keys import Filter
    from clipft.storage.sync.sync import SyncOptions
    from clipft.storage.sync.upload import upload

    settings = loaded.values
    wanted = SyncOptions(Filter(options.include, options.exclude), options.delete, options.dry_run)
    if not options.up:
        result = bring_data(settings, out, wanted)
    elif parse_s3_url(settings.data_dir):
        raise UsageError("--up needs a local folder to upload", "name the folder with --data-dir")
    else:
        with transfer_progress(out) as report:
            result = upload(settings, report, wanted, out.note)
    out.result(asdict(result), *_tables(result, "sent" if options.up else "fetched"))
    if not options.dry_run and not options.up and settings.data_dir.is_dir():
        end(out, {"pairs": settings.data_dir}, ("inspect", settings.data_dir))


def _tables(result: "SyncResult", verb: str) -> "Iterator[Table]":
    from clipft.cli.plain_table import rows_table

    # Keys may hold any character: escaped, they cannot write to the terminal
    if result.planned:
        would = [[ascii(line)[1:-1]] for line in result.planned[:_LISTED]]
        if len(result.planned) > _LISTED:
            would.append([f"... {len(result.planned):,} in total; --json lists all of them"])
        yield rows_table("Dry run", [], would)
    counts = {
        "objects": result.objects,
        verb: result.transferred,
        "skipped": result.skipped,
        "deleted": result.deleted,
        "refused": len(result.refused),
    }
    rows = [[label, f"{count:,}"] for label, count in counts.items()]
    rows += [["size", decimal(result.bytes)], ["seconds", f"{result.seconds:.1f}"]]
    yield rows_table("Sync", [""], rows)
    if result.refused:
        refused = [[ascii(r.key), r.reason] for r in result.refused[:_LISTED]]
        if len(result.refused) > _LISTED:
            refused.append(["...", f"{len(result.refused):,} in total; --json lists all of them"])
        yield rows_table("Refused", ["refused because it"], refused, texts={0})
