"""``clipft search``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from clipft.cli.console import Output, end
from clipft.cli.options import settings_command
from clipft.cli.s3_data import LOCATION_SETTINGS, local_data
from clipft.config.sources import LoadedSettings
from clipft.core.common import counted
from clipft.core.errors import DataError, UsageError
from clipft.core.files import check_writable

if TYPE_CHECKING:
    from torch import Tensor

    from clipft.data.shards.dataset import RawPair
    from clipft.runs.load import OpenedModel
    from clipft.search.index import Hit, ImageIndex

_PANEL = "Search"
_MOST_BYTES = 256 << 20
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Run folder (its best epoch), checkpoint, exported folder, or any model that "
        "--model takes",
    ),
]
Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA", help="Folder of shards, with train/ and val/ in it or not, or of pictures"
    ),
]
Query = Annotated[
    str | None,
    typer.Argument(metavar="QUERY", help="What the picture shows", show_default=False),
]
Image = Annotated[
    Path | None,
    typer.Option(
        "--image",
        dir_okay=False,
        metavar="FILE",
        help="Search with a picture instead of words [default: none]",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Top = Annotated[
    int,
    typer.Option("--top", min=1, metavar="K", help="Pictures to show", rich_help_panel=_PANEL),
]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        dir_okay=False,
        metavar="FILE",
        help="Also a page with the pictures [default: none]",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
_ANEW = ("num_workers", "precision", "device", "caption")


@settings_command(*_ANEW, *LOCATION_SETTINGS)
def search(
    loaded: LoadedSettings,
    out: Output,
    place: Model,
    data: Data,
    query: Query = None,
    image: Image = None,
    top: Top = 12,
    html: Html = None,
) -> None:
    """Find pictures by words or by another picture.

    With any CLIP. All pictures are embedded once and kept in the cache folder; what changes is
    embedded anew. The score is the cosine between query and picture.

    Examples:

        clipft search ./checkpoints/dual_lora ./catalogue "light oak chair"
        clipft search tiny ./photos "a red lamp" --top 24 --html found.html
        clipft search ./my-clip ./catalogue --image photo.jpg --json
    """
    if (query is None or not query.strip()) == (image is None):
        raise UsageError(
            "a search needs words or --image, and not both",
            'as in: clipft search tiny ./photos "a red lamp"',
        )
    if html:
        check_writable(html)
    from clipft.cli.s3_checkpoints import local_model
    from clipft.data.loader import LoaderOptions
    from clipft.runs.load import open_model
    from clipft.search.images import open_images
    from clipft.search.index import open_index

    asked = _read(image) if image else None
    parts = open_images(local_data(data, loaded.values, out))
    opened = open_model(local_model(place, loaded.values, out), loaded, _ANEW)
    vector = _embedded(opened, query, image, asked)
    options = LoaderOptions.from_settings(opened.settings, opened.loaded.precision.device)
    with out.progress(
        f"Searching {counted(sum(part.count for part in parts), 'picture')}"
    ) as report:
        index = open_index(opened, parts, options, report)
        scores = index.scores(vector)
    hits = index.best(scores, top)
    captions = [_caption(opened, hit.pair) for hit in hits]
    title = f"Like {image.name}" if image else str(query)  # a page may be mailed: no path
    counts = _counts(index, scores)
    out.result(_result(title, counts, hits, captions), _table(title, hits, captions))
    if counts["unusable"]:
        out.note(f"note: left out {counted(counts['unusable'], 'picture')} that cannot be used.")
    if html:
        _write_sheet(html, title, counts, hits, captions, asked)
        end(out, {"page": html})


def _read(image: Path) -> bytes:
    from clipft.data.shards.tar import ByteRange

    try:
        return ByteRange(str(image)).read(_MOST_BYTES)
    except OSError as error:
        raise DataError(
            f"cannot read {image}: {error.strerror or error}", "name a picture's file"
        ) from error


def _embedded(
    opened: "OpenedModel", query: str | None, image: Path | None, asked: bytes | None
) -> "Tensor":
    from clipft.data.captions.template import clean_text
    from clipft.embedding.embed import embed_texts
    from clipft.search.index import embed_image

    if asked is not None:
        return embed_image(opened, asked, str(image))
    return embed_texts(opened.loaded, [clean_text(query or "")])[0]


def _caption(opened: "OpenedModel", pair: "RawPair") -> str:
    from clipft.data.captions.template import BadCaption, CaptionTemplate

    template = CaptionTemplate.parse(opened.settings.caption)
    try:
        return template.captions(pair.caption, pair.metadata)[0]
    except BadCaption:
        return ""


def _counts(index: "ImageIndex", scores: Any) -> dict[str, int]:
    unusable = int((scores != scores).sum())
    return {"pictures": len(index.images), "unusable": unusable, "embedded_now": index.embedded}


def _result(
    title: str, counts: dict[str, int], hits: "list[Hit]", captions: list[str]
) -> dict[str, Any]:
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
    return {"query": title, **counts, "found": found}


def _table(title: str, hits: "list[Hit]", captions: list[str]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column("")
    table.add_column("score", justify="right")
    table.add_column("picture", overflow="fold")
    table.add_column("caption", overflow="fold")
    for rank, (hit, caption) in enumerate(zip(hits, captions, strict=True), 1):
        table.add_row(str(rank), f"{hit.score:.3f}", Text(hit.pair.key), Text(caption))
    return table


def _write_sheet(
    path: Path,
    title: str,
    counts: dict[str, int],
    hits: "list[Hit]",
    captions: list[str],
    asked: bytes | None,
) -> None:
    from clipft.data.images import decode_image
    from clipft.report.html import thumbnail, write_page
    from clipft.search.page import SHEET_SIDE, SheetImage, contact_sheet

    def small(data: bytes) -> bytes:
        return thumbnail(decode_image(data, at_least=SHEET_SIDE), SHEET_SIDE)

    images = [
        SheetImage(hit.pair.key, hit.pair.shard, hit.score, caption, small(hit.pair.image))
        for hit, caption in zip(hits, captions, strict=True)
    ]
    of_all = counted(counts["pictures"], "picture")
    remark = f"The best {len(hits)} of {of_all}, by cosine with the query."
    write_page(path, contact_sheet(title, [remark], images, small(asked) if asked else None))
