"""Decodes the bytes of an image file to an upright RGB image.

An image that cannot be decoded correctly is refused, and the message of ``BadImage`` says why.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from clipft.core.errors import first_line

MAX_PIXELS = 80_000_000
"""Larger images are refused: they may be decompression bombs."""
MAX_ASPECT = 100
"""Longer images are refused: once its shorter side is resized for the model, 20,000 x 1 pixels
would take 5 GB."""

WHITE = (255, 255, 255)
_DRAFT_MARGIN = 2


class BadImage(Exception):
    """An image cannot be used; the message says why its pair is skipped."""


def decode_image(data: bytes, at_least: int = 0) -> Image.Image:
    """Decode to upright RGB: transparency becomes white, 16 bits become 8, and of several frames
    the first is taken.

    ``at_least`` allows JPEG to be decoded at a reduced scale whose shorter side stays above twice
    that many pixels: this is faster, and close to the full decode but not equal to it.

    Raises:
        BadImage: It is not an image, is truncated or otherwise broken, has more than
            ``MAX_PIXELS`` or is longer than ``MAX_ASPECT``.
    """
    return decode_opened(open_image(data), at_least)


def open_image(data: bytes) -> Image.Image:
    """Read the header of an image: its format and size are then known, its pixels are not.

    Raises:
        BadImage: It is not an image, or decoding it would do harm.
    """
    if not data:
        raise BadImage("an empty file")
    with _as_bad_image():
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(f"{width}x{height} pixels are too many")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise BadImage(f"{width}x{height} is more than {MAX_ASPECT} times as long as wide")
        if image.format == "EPS":  # a program, which Pillow would have Ghostscript run
            raise BadImage("EPS is not decoded")
        return image


def decode_opened(image: Image.Image, at_least: int = 0) -> Image.Image:
    """Decode an image whose header was read, as ``decode_image`` does.

    Raises:
        BadImage: It is truncated or otherwise broken.
    """
    with _as_bad_image():
        if at_least:
            image.draft("RGB", (_DRAFT_MARGIN * at_least,) * 2)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def verify_opened(image: Image.Image) -> None:
    """Check an image without decoding it, after which it can no longer be used.

    Raises:
        BadImage: It is broken, as far as its format has checksums.
    """
    with _as_bad_image():
        image.verify()


@contextmanager
def _as_bad_image() -> Iterator[None]:
    """Turn whatever Pillow raises into ``BadImage``, and ignore its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # its own message names an object in memory
        raise BadImage("not an image") from error
    except Exception as error:  # Pillow's plug-ins raise errors of any type
        raise BadImage(first_line(error) or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in {"I", "F"} or image.mode.startswith("I;"):
        # 16-bit and float grays: Pillow's own ``convert`` would clip them to white
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise BadImage("not-a-number among the pixels")
        top = float(values.max(initial=0))
        scale = 255.0 if top <= 1.0 and values.dtype.kind == "f" else 255.0 / 65535.0
        if values.dtype.kind == "f" and 1.0 < top <= 255.0:
            scale = 1.0
        gray = np.clip(np.rint(values.astype(np.float64) * scale), 0, 255).astype(np.uint8)
        return Image.fromarray(gray).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (*WHITE, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")


def resized_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return (width, height) with the shorter one ``side``, rounded as ``CLIPImageProcessor``
    does."""
    width, height = size
    long = max(side, int(side * max(size) / min(size)))
    return (side, long) if width <= height else (long, side)


def resize_shorter(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to ``side`` pixels and keep the aspect; bicubic and antialiased."""
    return image.resize(resized_size(image.size, side), Image.Resampling.BICUBIC)
