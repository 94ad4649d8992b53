"""``clipft embed``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from clipft.cli.console import Output, end
from clipft.cli.options import command
from clipft.cli.s3_data import LOCATION_SETTINGS, local_data
from clipft.config.fields import Section, setting
from clipft.config.sources import LoadedSettings
from clipft.core.common import counted

if TYPE_CHECKING:
    from clipft.search.tables.embed import EmbedResult

_OVERRIDES = ("num_workers", "precision", "device", "caption", "caption_lines")
"""Settings that may be set here; the others come from the checkpoint."""


class EmbedOptions(Section):
    title = "Embeddings"
    images: bool = setting(False, "Embed the images only.")
    texts: bool = setting(False, "Embed the captions only.")
    dtype: Literal["float32", "float16"] = setting(
        "float32",
        "Type of the vectors. float16 takes half the space and may change the order of images "
        "that are almost equally similar.",
        metavar="TYPE",
    )
    dim: int = setting(
        0,
        "Keep the first N dimensions of each vector, at unit length. 0: all of them. A model that "
        "was not trained with --matryoshka loses much by it.",
        metavar="N",
        ge=0,
    )
    index: Literal["faiss"] | None = setting(
        None, "Also write an exact FAISS index of each table.", metavar="faiss"
    )
    overwrite: bool = setting(False, "Replace the embeddings of another model or other options.")
    push: str | None = setting(
        None,
        "Upload the result to this data set repository of the Hugging Face Hub. A new repository "
        "is private.",
        metavar="REPO",
    )


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Run folder (its best epoch), checkpoint, exported folder, or any model that "
        "--model accepts.",
    ),
]
Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="Folder of images or of shards; train/, val/ and test/ are embedded as well.",
    ),
]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the embeddings.")]


@command(*_OVERRIDES, *LOCATION_SETTINGS, options=EmbedOptions)
def embed(
    place: Model,
    data: Data,
    target: Target,
    loaded: LoadedSettings,
    options: EmbedOptions,
    out: Output,
) -> None:
    """Write the embeddings of a data set as Parquet files.

    Works with any CLIP model. OUT/images has a row for each image and OUT/texts one for each
    caption: key, split, caption, the fields of the metadata, and the vector, which has unit length.
    LanceDB, Polars, DuckDB and datasets open these files as they are.

    Run the same command again to continue after an interruption, or after the data have changed:
    only new and changed images and captions are embedded.

    Examples:

        clipft embed ./checkpoints/dual_lora ./catalogue ./embeddings
        clipft embed tiny ./photos ./embeddings --images --dtype float16
        clipft embed ./my-clip ./catalogue ./embeddings --index faiss
        clipft embed ./my-clip s3://bucket/prefix ./embeddings --push me/my-embeddings
    """
    from clipft.search.tables.folder import OWN_FILES, TABLES, EmbeddingsFolder
    from clipft.search.tables.requirements import check_installed

    check_installed(faiss=options.index is not None)
    EmbeddingsFolder(target).check()
    from clipft.cli.s3_checkpoints import local_model
    from clipft.data.captions.metadata import check_fields
    from clipft.data.captions.template import CaptionTemplate
    from clipft.runs.load import open_model
    from clipft.search.images import open_images
    from clipft.search.tables.embed import FILES_PER_PART, EmbedChoices, embed_dataset
    from clipft.search.vectors import JoinedParts
    from clipft.storage.hub import make_repository, push

    parts = open_images(local_data(data, loaded.values, out), FILES_PER_PART)
    if loaded.origins["caption"] != "default":
        check_fields(CaptionTemplate.parse(loaded.values.caption), JoinedParts(parts))
    opened = open_model(local_model(place, loaded.values, out), loaded, _OVERRIDES)
    # Made before the work, so that a missing permission shows first
    repository = make_repository(options.push, "dataset") if options.push else None
    asked = tuple(name for name in TABLES if getattr(options, name)) or TABLES
    choices = EmbedChoices(
        asked, options.dtype, options.dim, options.index is not None, options.overwrite
    )
    try:
        result = embed_dataset(opened, parts, target, choices, out.progress)
    except KeyboardInterrupt:
        out.note("Stopped. Run the same command again to continue.")
        raise
    page = push(target, repository, "dataset", OWN_FILES) if repository else None
    if result.skipped:
        images = counted(sum(result.skipped.values()), "image")
        out.note(f"note: skipped {images}, see {target / 'skipped.jsonl'}.")
    out.result({**result.to_dict(), "pushed_to": page}, _table(result, page))
    end(out, {name: target / name for name in result.rows})


def _table(result: "EmbedResult", page: str | None) -> Table:
    title = Text(f"Embeddings in {result.out}")
    table = Table(title=title, title_justify="left", show_header=False)
    for name, rows in result.rows.items():
        now = result.embedded_now[name]
        table.add_row(name, f"{rows:,}", f"{now:,} embedded now")
    table.add_row("vectors", f"{result.dim} x {result.dtype}", f"of {result.model}")
    table.add_row("size", f"{result.bytes / 2**20:.1f} MiB", "")
    for reason, count in result.skipped.items():
        table.add_row(Text(f"skipped: {reason}"), f"{count:,}", "")
    if page:
        table.add_row("pushed to", page, "")
    return table
