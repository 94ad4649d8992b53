"""Finds the columns of images and captions in a table."""

import re
from collections.abc import Sequence
from pathlib import Path

from clipft.core.errors import UsageError, did_you_mean
from clipft.data.packing.options import PackOptions

# Common names of the columns, the most specific first
IMAGE_COLUMNS = (
    "image",
    "image_path",
    "filepath",
    "file_path",
    "path",
    "file_name",
    "filename",
    "image_name",
    "image_file",
    "img",
    "img_path",
    "photo",
    "picture",
    "jpg",
    "png",
    "image_url",
    "url",
)
CAPTION_COLUMNS = (
    "caption",
    "captions",
    "text",
    "title",
    "description",
    "comment",
    "sentence",
    "sentences",
    "alt_text",
    "prompt",
    "txt",
    "name",
)
# caption_0, caption_1 ...: each holds a caption of the same image
_NUMBERED = re.compile(r"(caption|text|description|sentence)s?[\s_-]?\d+", re.IGNORECASE)
_LISTED = 30
_LONGEST = 60
_IMAGE = re.compile(
    r"\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic|heif|jxl)$|^https?://", re.IGNORECASE
)


def names_image(text: str) -> bool:
    """Return whether a cell looks like the path or the URL of an image."""
    return bool(_IMAGE.search(text.strip()))


def shortened(text: str) -> str:
    """Return the beginning of ``text``, for a message."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def image_column(columns: Sequence[str], named: str) -> str | None:
    """Return the column of images: the one that the user named, or the first with a common name."""
    return _first(columns, [named] if named else IMAGE_COLUMNS)


def caption_columns(columns: Sequence[str], named: str) -> tuple[str, ...]:
    """Return the columns of captions: those that the user named, separated by commas; or the first
    with a common name; or all with a common name and a number. Empty if one is missing."""
    if found := _first(columns, [named] if named else CAPTION_COLUMNS):
        return (found,)
    if not named:
        return tuple(column for column in columns if _NUMBERED.fullmatch(column))
    each = [_first(columns, [name.strip()]) for name in named.split(",")]
    return tuple(column for column in each if column) if all(each) else ()


def find_columns(
    table: Path, columns: Sequence[str], options: PackOptions, by_type: Sequence[str] = ()
) -> tuple[str, tuple[str, ...]]:
    """Return the column of images and the columns of captions.

    There are no columns of captions if a caption template makes the captions. ``by_type`` are the
    columns whose type says that they hold images.

    Raises:
        UsageError: There is no such column.
    """
    image = image_column(columns, options.image_column)
    if not options.image_column:
        image = image or next(iter(by_type), None)
    captions = caption_columns(columns, options.caption_column)
    if image is None:
        raise _missing(table, columns, "--image-column", options.image_column, "images")
    if not captions and (options.caption_column or not options.caption):
        raise _missing(table, columns, "--caption-column", options.caption_column, "captions")
    return image, captions


def _first(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """Find a column by its exact name or, failing that, ignoring case, spaces and underscores."""
    alike = {_key(column): column for column in reversed(columns)}
    for name in names:
        found = name if name in columns else alike.get(_key(name))
        if found is not None:
            return found
    return None


def _key(name: str) -> str:
    return re.sub(r"[\s_\-]+", "", name).casefold()


def _missing(table: Path, columns: Sequence[str], option: str, named: str, kind: str) -> UsageError:
    listed = ", ".join(shortened(column) for column in columns[:_LISTED])
    if len(columns) > _LISTED:
        listed += f" and {len(columns) - _LISTED} more"
    message = f"{table} has no column {named or f'of {kind} with a usual name'}; it has {listed}"
    if any(names_image(column) for column in columns):
        return UsageError(
            message,
            "the first line seems to be data: write a line with the names of the columns above "
            "it, such as image,caption",
        )
    meant = did_you_mean(named, columns) if named else ""
    return UsageError(message, f"{meant} name the column with {option}".lstrip())
