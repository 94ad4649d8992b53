"""``clipft pack``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from clipft.cli.console import Output, end
from clipft.cli.options import plain_command
from clipft.core.common import counted
from clipft.data.packing.options import PackOptions, Part

if TYPE_CHECKING:
    from clipft.data.packing.pack import PackResult

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SRC", help="Folder of pictures and .txt files or of .tar shards, or a table"
    ),
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
ShardMb = Annotated[
    int,
    typer.Option(
        "--shard-mb",
        min=0,
        metavar="N",
        help="MiB in a shard, about, whatever the number of pairs; 0: --shard-pairs",
        rich_help_panel=_PANEL,
    ),
]
Near = Annotated[
    int,
    typer.Option(
        "--near",
        min=-1,
        max=8,
        metavar="BITS",
        help="Near-identical photos, whose 64-bit hashes differ in at most so many bits, stand "
        "on one side; -1: not looked for",
        rich_help_panel=_PANEL,
    ),
]
PartOf = Annotated[
    str,
    typer.Option(
        "--part",
        metavar="I/N",
        help="Write the I-th of N parts of the shards: N machines share the work",
        rich_help_panel=_PANEL,
    ),
]
Processes = Annotated[
    int,
    typer.Option(
        "--processes",
        min=0,
        metavar="N",
        help="Processes that share the work; 0: one per processor",
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
        "--check",
        help="Decode every picture, not only its header; --near does it anyway",
        rich_help_panel=_PANEL,
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
        "--quality",
        min=1,
        max=100,
        metavar="N",
        help="Of the JPEGs, with --size",
        rich_help_panel=_PANEL,
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
        help="The table's column of paths or URLs; none: guessed",
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
    near: Near = PackOptions.near,
    group_field: GroupField = PackOptions.group_field,
    size: Size = PackOptions.size,
    quality: Quality = PackOptions.quality,
    shard_pairs: ShardPairs = PackOptions.shard_pairs,
    shard_mb: ShardMb = PackOptions.shard_mb,
    image_column: ImageColumn = PackOptions.image_column,
    caption_column: CaptionColumn = PackOptions.caption_column,
    check: Check = PackOptions.check,
    overwrite: Overwrite = PackOptions.overwrite,
    seed: Seed = PackOptions.seed,
    part: PartOf = "",
    processes: Processes = PackOptions.processes,
) -> None:
    """Make shards (WebDataset) from files, a table or shards.

    chair.jpg, chair.txt and, where there is one, chair.json are a pair, in a folder or in
    .tar shards; so is a row of a CSV, TSV, JSONL or Parquet table with a caption and a path
    or URL of a picture. With train/ and val/ in SRC the split is theirs; otherwise no photo,
    no near-identical photo and no caption is put on both sides. A pack that was stopped goes
    on when it is run again.

    Examples:

        clipft pack ./photos ./catalogue
        clipft pack ./products.csv ./catalogue --size 256 --group-field product_id
        clipft pack ./old-shards ./catalogue --shard-mb 256 --val-share 0.05
        clipft pack ./photos ./catalogue --part 2/4
    """
    from clipft.data.packing.pack import pack as make_shards

    options = PackOptions(
        shard_pairs=shard_pairs,
        shard_mb=shard_mb,
        val_share=val_share,
        seed=seed,
        near=near,
        check=check,
        overwrite=overwrite,
        size=size,
        quality=quality,
        group_field=group_field,
        image_column=image_column,
        caption_column=caption_column,
        part=Part.parse(part),
        processes=processes,
    )
    try:
        with out.progress(f"Packing {source}") as report:
            result = make_shards(source, target, options, report)
    except KeyboardInterrupt:
        out.note("Stopped: the same command goes on from here.")
        raise
    _remarks(result, options, out)
    out.result(result.to_dict(), _table(result))
    if options.part.of > 1:
        out.note(f"Part {part}: train when all {options.part.of} are in one folder.")
    else:
        end(out, {"shards": target}, ("inspect", target))


def _remarks(result: "PackResult", options: PackOptions, out: Output) -> None:
    if result.skipped:
        count, file = sum(result.skipped.values()), f"skipped{options.part.suffix}.jsonl"
        out.note(f"note: left out {counted(count, 'pair')}, see {result.out / file}.")
    shared = {
        "the photo": result.shared_photos,
        "a photo like that": result.shared_near_photos,
        "the caption": result.shared_captions,
    }
    for what, count in shared.items():
        if count:
            out.note(f"warning: training also has {what} of {counted(count, 'validation pair')}.")
    if not result.val_pairs and options.part.of == 1:
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
