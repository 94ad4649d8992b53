"""``clipft search`` and ``clipft embed``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from clipft.cli.console import Output, end
from clipft.cli.options import command
from clipft.cli.s3_data import LOCATION_SETTINGS, local_data
from clipft.config.fields import File, Section, Share, setting
from clipft.config.sources import LoadedSettings
from clipft.core.common import counted
from clipft.core.errors import DataError, UsageError, sentences
from clipft.core.files import check_writable, did_you_mean_path
from clipft.core.part import ALL

if TYPE_CHECKING:
    from rich.table import Table

    from clipft.data.shards.dataset import RawPair
    from clipft.runs.load import OpenedModel
    from clipft.search.index import Hit
    from clipft.search.tables.embed import EmbedResult

_LARGEST_QUERY = 256 << 20
"""Bytes read of an image to search with: a wrong file must not fill the memory."""

_OVERRIDES = ("num_workers", "precision", "device", "caption", "caption_lines")
"""Settings that these commands may set; the others come from the checkpoint."""


class SearchOptions(Section):
    title = "Search"
    image: File | None = setting(None, "Search with this image instead of words.", metavar="FILE")
    top: int = setting(12, "Number of images to show.", metavar="K", ge=1)
    html: File | None = setting(
        None, "Also write a page with the images that were found.", metavar="FILE"
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
        help="Folder of images or of shards; train/ and val/ are searched as well.",
    ),
]
Query = Annotated[
    str | None,
    typer.Argument(metavar="QUERY", help="Description of the image to find.", show_default=False),
]


@command(*_OVERRIDES, *LOCATION_SETTINGS, options=SearchOptions)
def search(
    place: Model,
    data: Data,
    loaded: LoadedSettings,
    options: SearchOptions,
    out: Output,
    query: Query = None,
) -> None:
    """Find images by words or by another image.

    Works with any CLIP model. All images are embedded once and cached; later searches embed only
    images that changed. The score is the cosine similarity of the query and the image.

    Examples:

        clipft search ./checkpoints/dual_lora ./catalogue "light oak chair"
        clipft search tiny ./photos "a red lamp" --top 24 --html found.html
        clipft search ./my-clip ./catalogue --image photo.jpg --json
    """
    if (query is None or not query.strip()) == (options.image is None):
        raise UsageError(
            "a search needs either words or --image, and not both",
            'for example: clipft search tiny ./photos "a red lamp"',
        )
    if options.html:
        check_writable(options.html)
    from clipft.cli.preflight import check_place, import_libraries
    from clipft.cli.s3_checkpoints import local_model
    from clipft.data.captions.metadata import check_fields
    from clipft.data.captions.template import CaptionTemplate, clean_text
    from clipft.search.images import JoinedParts, open_images

    image = _read(options.image) if options.image else None
    parts = open_images(local_data(data, loaded.values, out))
    if loaded.origins["caption"] != "default":
        check_fields(CaptionTemplate.parse(loaded.values.caption), JoinedParts(parts))
    place = local_model(place, loaded.values, out)
    check_place(place, loaded, _OVERRIDES)
    import_libraries()
    from clipft.data.loader import LoaderOptions
    from clipft.embedding.embed import embed_texts
    from clipft.runs.load import open_model
    from clipft.search.index import open_index
    from clipft.search.vectors import embed_image

    opened = open_model(place, loaded, _OVERRIDES)
    if image is None:
        vector = embed_texts(opened.loaded, [clean_text(query or "")])[0]
    else:
        vector = embed_image(opened, image, str(options.image))
    how = LoaderOptions.from_settings(opened.settings, opened.loaded.precision.device)
    with out.progress(f"Searching {counted(sum(part.count for part in parts), 'image')}") as report:
        index = open_index(opened, parts, how, report)
        scores = index.scores(vector)
    hits = index.best(scores, options.top)
    captions = [_caption(opened, hit.pair) for hit in hits]
    # The page may be sent to others, so the title does not contain the path
    title = f"Like {options.image.name}" if options.image else str(query)
    unusable = int((scores != scores).sum())  # the score of an image that cannot be used is NaN
    counts = {"pictures": len(index.images), "unusable": unusable, "embedded_now": index.embedded}
    found = [
        {
            "rank": rank,
            "score": hit.score,
            "key": hit.pair.key,
            "source": hit.pair.shard,
            "caption": caption,
        }
        for rank, (hit, caption) in enumerate(zip(hits, captions, strict=True), 1)
    ]
    out.result({"query": title, **counts, "found": found}, _table(title, hits, captions))
    if unusable:
        out.note(f"note: skipped {counted(unusable, 'image')} that cannot be used.")
    if options.html:
        _write_page(options.html, title, len(index.images), hits, captions, image)
        end(out, {"page": options.html})


def _read(image: Path) -> bytes:
    from clipft.data.shards.tar import ByteRange

    try:
        return ByteRange(str(image)).read(_LARGEST_QUERY)
    except OSError as error:
        raise DataError(
            f"cannot read {image}: {error.strerror or error}",
            sentences(did_you_mean_path(image), "name an image file"),
        ) from error


def _caption(opened: "OpenedModel", pair: "RawPair") -> str:
    """The pair's caption under the model's template; empty if it has none."""
    from clipft.data.captions.template import BadCaption, CaptionTemplate

    settings = opened.settings
    template = CaptionTemplate.of(settings)
    try:
        return template.captions(pair.caption, pair.metadata)[0]
    except BadCaption:
        return ""


def _table(title: str, hits: "list[Hit]", captions: list[str]) -> "Table":
    from clipft.cli.plain_table import rows_table

    rows = [
        [str(rank), f"{hit.score:.3f}", hit.pair.key, caption]
        for rank, (hit, caption) in enumerate(zip(hits, captions, strict=True), 1)
    ]
    return rows_table(title, ["score", "image", "caption"], rows, texts={1, 2})


def _write_page(
    path: Path,
    title: str,
    searched: int,
    hits: "list[Hit]",
    captions: list[str],
    query_image: bytes | None,
) -> None:
    from clipft.data.images.decode import decode_image
    from clipft.report.html import thumbnail, write_page
    from clipft.search.page import SHEET_SIDE, SheetImage, contact_sheet

    def small(data: bytes) -> bytes:
        return thumbnail(decode_image(data, at_least=SHEET_SIDE), SHEET_SIDE)

    shown = [
        SheetImage(hit.pair.key, hit.pair.shard, hit.score, caption, small(hit.pair.image))
        for hit, caption in zip(hits, captions, strict=True)
    ]
    remark = f"The best {len(hits)} of {counted(searched, 'image')}, by cosine similarity."
    asked = small(query_image) if query_image else None
    write_page(path, contact_sheet(title, [remark], shown, asked))


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
        "was not trained with --matryoshka gets much worse.",
        metavar="N",
        ge=0,
    )
    index: Literal["faiss"] | None = setting(
        None, "Also write an exact FAISS index of each table.", metavar="faiss"
    )
    overwrite: bool = setting(False, "Replace the embeddings of another model or other options.")
    part: Share = setting(
        ALL,
        "Embed only the I-th of N parts of the data, to share the work among N processes. DATA and "
        "OUT must be the same folders for all of them.",
        metavar="I/N",
    )
    push: str | None = setting(
        None,
        "Upload the result to this data set repository of the Hugging Face Hub. A new repository "
        "is private.",
        metavar="REPO",
    )


EmbeddedData = Annotated[
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
    data: EmbeddedData,
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
        clipft embed ./my-clip ./catalogue ./embeddings --push me/embeddings
        clipft embed ./my-clip ./catalogue ./embeddings --part 2/4
    """
    from clipft.search.tables.folder import OWN_FILES, TABLES, EmbeddingsFolder
    from clipft.search.tables.requirements import check_installed

    check_installed(faiss=options.index is not None)
    EmbeddingsFolder(target).check()
    from clipft.cli.preflight import check_place, import_libraries
    from clipft.cli.s3_checkpoints import local_model
    from clipft.data.captions.metadata import check_fields
    from clipft.data.captions.template import CaptionTemplate
    from clipft.search.images import JoinedParts, open_images

    folder = local_data(data, loaded.values, out)
    open_images(folder)  # refuses a folder without images, before torch is imported
    place = local_model(place, loaded.values, out)
    check_place(place, loaded, _OVERRIDES)
    import_libraries()
    from clipft.runs.load import open_model
    from clipft.search.tables.embed import FILES_PER_PART, EmbedChoices, embed_dataset
    from clipft.storage.hub import make_repository, push

    parts = open_images(folder, FILES_PER_PART)
    if loaded.origins["caption"] != "default":
        check_fields(CaptionTemplate.parse(loaded.values.caption), JoinedParts(parts))
    opened = open_model(place, loaded, _OVERRIDES)
    # Made before the work, so that a missing permission shows first
    repository = make_repository(options.push, "dataset") if options.push else None
    asked = tuple(name for name in TABLES if getattr(options, name)) or TABLES
    choices = EmbedChoices(
        asked,
        options.dtype,
        options.dim,
        options.index is not None,
        options.overwrite,
        options.part,
    )
    try:
        result = embed_dataset(opened, parts, target, choices, out.progress)
    except KeyboardInterrupt:
        out.note("Stopped. Run the same command again to continue.")
        raise
    page = push(target, repository, "dataset", OWN_FILES) if repository and result.joined else None
    if result.skipped:
        images = counted(sum(result.skipped.values()), "image")
        out.note(f"note: skipped {images}, see {target / 'skipped.jsonl'}.")
    out.result({**result.to_dict(), "pushed_to": page}, _embedded_table(result, page))
    if result.left:
        out.note(
            f"This is part {options.part}. The tables will be complete when the other parts have "
            f"written the {counted(result.left, 'file')} that are missing."
        )
    elif not result.joined:
        out.note(f"This is part {options.part}. Another part has completed the tables.")
    end(out, {name: target / name for name in result.rows})


def _embedded_table(result: "EmbedResult", page: str | None) -> "Table":
    from clipft.cli.plain_table import rows_table

    rows = [
        [name, f"{result.rows[name]:,}" if result.joined else "", f"{count:,} embedded now"]
        for name, count in result.embedded_now.items()
    ]
    rows.append(["vectors", f"{result.dim} x {result.dtype}", f"of {result.model}"])
    if result.joined:
        rows.append(["size", f"{result.bytes / 2**20:.1f} MiB", ""])
    rows += [[f"skipped: {why}", f"{count:,}", ""] for why, count in result.skipped.items()]
    if page:
        rows.append(["pushed to", page, ""])
    return rows_table(f"Embeddings in {result.out}", ["", ""], rows, texts={0, 1})
