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

Source = Annotated[
    Path,
    typer.Argument(metavar="SRC", help="Folder of pictures and .txt files, or a table of them"),
]
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
Size = Annotated[
    int,
    typer.Option(
        "--size",
        min=0,
        metavar="PX",
        help="Store pictures as JPEG with this shorter side; 0: as they are",
        rich_help_panel=_PANEL,
    ),
]
Quality = Annotated[
    int,
    typer.Option(
        "--quality", min=1, max=100, metavar="N", help="JPEG's, with --size", rich_help_panel=_PANEL
    ),
]
GroupField = Annotated[
    str,
    typer.Option(
        "--group-field",
        metavar="NAME",
        help="Field of the metadata, a product id say, that the split keeps on one side",
        rich_help_panel=_PANEL,
    ),
]
ImageColumn = Annotated[
    str,
    typer.Option(
        "--image-column",
        metavar="NAME",
        help="The table's column of paths; none: guessed",
        rich_help_panel=_PANEL,
    ),
]
CaptionColumn = Annotated[
    str,
    typer.Option(
        "--caption-column",
        metavar="NAME",
        help="The table's column of captions; none: guessed",
        rich_help_panel=_PANEL,
    ),
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
    size: Size = PackOptions.size,
    quality: Quality = PackOptions.quality,
    group_field: GroupField = PackOptions.group_field,
    image_column: ImageColumn = PackOptions.image_column,
    caption_column: CaptionColumn = PackOptions.caption_column,
) -> None:
    """Make WebDataset shards from a folder of raw files or a table.

    chair.jpg, chair.txt and, where there is one, chair.json are a pair; so is a row of a
    CSV, TSV or JSONL table with a path and a caption. With train/ and val/ in SRC the split
    is theirs; otherwise no photo and no caption is put on both sides. A pack that was
    stopped goes on when it is run again.

    Examples:

        clipft pack ./photos ./catalogue
        clipft pack ./photos ./catalogue --val-share 0.05 --overwrite
        clipft pack ./products.csv ./catalogue --size 256 --group-field product_id
    """
    from clipft.data.pack import pack as make_shards

    options = PackOptions(
        shard_pairs=shard_pairs,
        val_share=val_share,
        seed=seed,
        check=check,
        overwrite=overwrite,
        size=size,
        quality=quality,
        group_field=group_field,
        image_column=image_column,
        caption_column=caption_column,
    )
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
