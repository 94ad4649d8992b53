"""``clipft pack``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from clipft.cli.console import Output
from clipft.cli.options import plain_command
from clipft.data.pack_options import PackOptions

if TYPE_CHECKING:
    from clipft.data.pack import PackResult

Source = Annotated[Path, typer.Argument(metavar="SRC", help="Folder of pictures and .txt files")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards")]
_PANEL = "Packing"
ValShare = Annotated[
    float,
    typer.Option(
        "--val-share",
        min=0.0,
        max=0.9,
        metavar="X",
        help="Share for validation where SRC has no train/ and val/",
        rich_help_panel=_PANEL,
    ),
]
ShardPairs = Annotated[
    int,
    typer.Option(
        "--shard-pairs",
        min=1,
        metavar="N",
        help="Pairs in a shard",
        rich_help_panel=_PANEL,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="N",
        help="Decides split and order",
        rich_help_panel=_PANEL,
    ),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check", help="Decode every picture, not only its header", rich_help_panel=_PANEL
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a former pack", rich_help_panel=_PANEL)
]


@plain_command
def pack(
    source: Source,
    target: Out,
    out: Output,
    val_share: ValShare = PackOptions.val_share,
    shard_pairs: ShardPairs = PackOptions.shard_pairs,
    seed: Seed = PackOptions.seed,
    check: Check = False,
    overwrite: Overwrite = False,
) -> None:
    """Make WebDataset shards from a folder of raw files.

    chair.jpg, chair.txt and, where there is one, chair.json are a pair. With train/ and val/
    in SRC the split is theirs; otherwise no photo and no caption is put on both sides.

    Examples:

        clipft pack ./photos ./catalogue
        clipft pack ./photos ./catalogue --val-share 0.05 --overwrite
    """
    from clipft.data.pack import pack as make_shards

    options = PackOptions(shard_pairs, val_share, seed, check, overwrite)
    with out.progress(f"Packing {source}") as report:
        result = make_shards(source, target, options, report)
    _remarks(result, out)
    out.result(result.to_dict(), _table(result))
    out.note(f"Next: clipft train --data-dir {target}")


def _remarks(result: "PackResult", out: Output) -> None:
    if result.skipped:
        out.note(f"note: {sum(result.skipped.values())} files skipped, see skipped.jsonl.")
    for count, what in ((result.shared_photos, "photo"), (result.shared_captions, "caption")):
        if count:
            out.note(f"warning: {count} validation pairs share their {what} with training.")
    if not result.val_pairs:
        out.note("warning: nothing to validate on: add pictures, or raise --val-share.")


def _table(result: "PackResult") -> Table:
    table = Table(title=f"Shards in {result.out}", title_justify="left", show_header=False)
    table.add_row("training pairs", f"{result.train_pairs:,}")
    table.add_row("validation pairs", f"{result.val_pairs:,}")
    table.add_row("shards", f"{result.shards:,}")
    table.add_row("size", f"{result.bytes / 2**20:.1f} MiB")
    for reason, count in result.skipped.items():
        table.add_row(f"skipped: {reason}", f"{count:,}")
    return table
