"""``clipft sync``."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from clipft.cli.console import Output, end
from clipft.cli.options import settings_command
from clipft.cli.s3_data import bring_data
from clipft.config.settings import StorageSettings
from clipft.config.sources import LoadedSettings
from clipft.core.errors import UsageError

if TYPE_CHECKING:
    from clipft.storage.sync.sync import SyncOptions, SyncResult

_SHOWN = 20
_PANEL = "Sync"

Up = Annotated[
    bool, typer.Option("--up", help="Send --data-dir to the bucket", rich_help_panel=_PANEL)
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="GLOB",
        help="Only paths below train/ and val/ that match; * stands for / too; repeatable",
        rich_help_panel=_PANEL,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="GLOB",
        help="Leave out paths that match; repeatable",
        rich_help_panel=_PANEL,
    ),
]
Delete = Annotated[
    bool,
    typer.Option(
        "--delete",
        help="Delete what the source lacks, in the two folders, or with --up under the prefixes",
        rich_help_panel=_PANEL,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Show what would be done, and change nothing", rich_help_panel=_PANEL
    ),
]


@settings_command(StorageSettings)
def sync(
    loaded: LoadedSettings,
    out: Output,
    up: Up = False,
    include: Include = None,
    exclude: Exclude = None,
    delete: Delete = False,
    dry_run: DryRun = False,
) -> None:
    """Bring the pairs from a bucket to --data-dir, or send them.

    What is there already is not fetched again. Each object is checked (size, ETag, md5) and
    appears whole or not at all, so a sync that was cut off goes on where it was. Raw files are
    packed into shards; --no-pack leaves them.

    Examples:

        clipft sync --s3-bucket catalogue --data-dir ./catalogue
        clipft sync --s3-bucket catalogue --endpoint-url http://localhost:9000
        clipft sync --s3-bucket catalogue --exclude '*.json' --dry-run
        clipft sync --up --s3-bucket catalogue --data-dir ./catalogue
    """
    from clipft.storage.s3.keys import Filter
    from clipft.storage.sync.sync import SyncOptions

    settings = loaded.values
    chosen = Filter(tuple(include or ()), tuple(exclude or ()))
    options = SyncOptions(chosen, delete, dry_run)
    result = _send(settings, options, out) if up else bring_data(settings, out, options)
    out.result(result.to_dict(), *_tables(result, "sent" if up else "fetched"))
    if not dry_run and not up:
        end(out, {"pairs": settings.data_dir}, ("inspect", settings.data_dir))


def _send(settings: StorageSettings, options: "SyncOptions", out: Output) -> "SyncResult":
    from clipft.config.sources import parse_s3_url
    from clipft.storage.sync.upload import send

    if parse_s3_url(settings.data_dir):
        raise UsageError("--up sends a folder", "name the folder with --data-dir")
    from clipft.cli.progress import transfer_progress

    with transfer_progress(out) as report:
        return send(settings, report, options, out.note)


def _tables(result: "SyncResult", verb: str) -> Iterator[Table]:
    if result.planned:
        planned = Table("would", title="Dry run", title_justify="left", show_header=False)
        for line in result.planned[:_SHOWN]:
            planned.add_row(escape(ascii(line)[1:-1]))
        if len(result.planned) > _SHOWN:
            planned.add_row(f"... {len(result.planned):,} in all; --json lists them")
        yield planned
    table = Table(title="Sync", title_justify="left")
    for heading in ("objects", verb, "skipped", "deleted", "refused", "size", "seconds"):
        table.add_column(heading, justify="right")
    counts = (result.objects, result.transferred, result.skipped, result.deleted)
    refused = len(result.refused)
    size, seconds = decimal(result.bytes), f"{result.seconds:.1f}"
    table.add_row(*(f"{count:,}" for count in (*counts, refused)), size, seconds)
    yield table
    if result.refused:
        yield _refused(result)


def _refused(result: "SyncResult") -> Table:
    refused = Table("key", "refused because it", title="Refused", title_justify="left")
    for refusal in result.refused[:_SHOWN]:
        refused.add_row(escape(ascii(refusal.key)), escape(refusal.reason))
    if len(result.refused) > _SHOWN:
        refused.add_row("...", f"{len(result.refused):,} in all; --json lists them")
    return refused
