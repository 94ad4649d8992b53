"""``clipft pack``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipft.cli.console import Output, end
from clipft.cli.options import command
from clipft.cli.s3_data import LOCATION_SETTINGS, local_source
from clipft.config.sources import LoadedSettings, parse_s3_url
from clipft.core.common import counted
from clipft.core.errors import UsageError
from clipft.core.text import is_unicode
from clipft.data.packing.options import PackOptions

if TYPE_CHECKING:
    from rich.table import Table

    from clipft.data.packing.pack import PackResult

_SHARED = {
    "same image": "photos",
    "near-duplicate image": "near_photos",
    "same caption": "captions",
}
"""Endings of the fields of a ``PackResult`` that count pairs which are in training as well."""


@command(*LOCATION_SETTINGS, options=PackOptions)
def pack(
    loaded: LoadedSettings,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="Folder of images and .txt files or of .tar shards, or a table; or "
            "s3://bucket/prefix, or hf://datasets/ORG/NAME.",
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards.")],
    options: PackOptions,
    out: Output,
) -> None:
    """Pack files, a table or shards into WebDataset shards.

    A pair is an image with a caption: chair.jpg and chair.txt, optionally with metadata in
    chair.json. Each line of the .txt is a caption of the image. The files may be in folders or in
    .tar shards. A table (CSV, TSV, JSONL, Parquet) has one pair in each row, with the caption or a
    list of captions, and the path or URL of the image. A folder may also have the layout of data
    sets of the Hugging Face Hub, COCO or Flickr30k, or that of save_to_disk of datasets.

    If SRC has folders for training, validation (val, validation, valid, dev) or test, the pairs
    keep that split. Otherwise clipft splits them so that no image, near-duplicate image or caption
    is on both sides. Run the same command again to continue after an interruption.

    Examples:

        clipft pack ./photos ./catalogue
        clipft pack ./products.csv ./catalogue --size 256 --group-field product_id
        clipft pack ./old-shards ./catalogue --shard-mb 256 --val-share 0.05
        clipft pack ./photos ./catalogue --test-share 0.1
        clipft pack s3://bucket/raw ./catalogue
        clipft pack hf://datasets/me/furniture ./catalogue
        clipft pack ./photos ./catalogue --part 2/4
    """
    if not is_unicode(target):
        raise UsageError(
            f"OUT {target}: the name is not UTF-8",
            "name another folder: training could not write such a name to its settings file",
        )
    from clipft.data.packing.pack import pack as write_shards
    from clipft.data.packing.target import Target
    from clipft.storage.hub import parse_hub_url

    if url := parse_s3_url(target):
        raise UsageError(
            f"pack writes to a folder, and {url} is in a bucket",
            "pack to a folder, then upload it with `clipft sync --up`",
        )
    Target(target, options.part).check(source, options.overwrite)  # before a long transfer
    given, source = source, local_source(source, loaded.values, out)
    if parse_hub_url(given):  # the hub's cache consists of links
        options = options.model_copy(update={"follow_links": True})
    try:
        with out.progress(f"Packing {source}") as report:
            result = write_shards(source, target, options, report)
    except KeyboardInterrupt:
        out.note("Stopped. Run the same command again to continue.")
        raise
    if result.skipped:
        count, file = sum(result.skipped.values()), f"skipped{options.part.suffix}.jsonl"
        out.note(f"note: skipped {counted(count, 'pair')}, see {result.out / file}.")
    for note in result.notes:
        out.note(f"note: {note}")
    for split, start in (("validation", "shared"), ("test", "test_shared")):
        for what, field in _SHARED.items():
            if count := getattr(result, f"{start}_{field}"):
                pairs = counted(count, f"{split} pair")
                out.note(f"warning: {pairs} also in the training pairs ({what}).")
    if result.not_read.endings:
        out.note(f"note: not read: {result.not_read}.")
    if not result.val_pairs and options.part.of == 1:
        out.note("warning: there are no validation pairs: add images, or raise --val-share.")

    out.result(result.to_dict(), _table(result))
    if options.part.of > 1:
        out.note(
            f"This is part {options.part}. Train when all {options.part.of} parts are in one "
            "folder."
        )
    else:
        end(out, {"shards": target}, ("inspect", target))


def _table(result: "PackResult") -> "Table":
    from clipft.cli.plain_table import rows_table

    counts = {"training pairs": result.train_pairs, "validation pairs": result.val_pairs}
    if result.test_pairs:
        counts["test pairs"] = result.test_pairs
    if result.captions != sum(counts.values()):
        counts["captions"] = result.captions
    counts["shards"] = result.shards
    rows = [[label, f"{count:,}"] for label, count in counts.items()]
    rows.append(["size", f"{result.bytes / 2**20:.1f} MiB"])
    rows += [[f"skipped: {reason}", f"{count:,}"] for reason, count in result.skipped.items()]
    return rows_table(f"Shards in {result.out}", [""], rows)
