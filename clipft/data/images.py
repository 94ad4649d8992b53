"""Bytes of an image file -> an upright RGB picture, and how large it should become.

What cannot be decoded rightly is refused with its reason.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from clipft.core.errors import first_line

MAX_PIXELS = 80_000_000
"""Larger pictures are taken for decompression bombs."""
MAX_ASPECT = 100
"""Longer pictures are refused: once the shorter side is the model's, 20,000 x 1 fills 5 GB."""

WHITE = (255, 255, 255)
_DEEP = {"I", "F"}
_DRAFT_MARGIN = 2


class BadImage(Exception):
    """The bytes are no picture that can be used; the message says why."""


def decode_image(data: bytes, at_least: int = 0) -> Image.Image:
    """Decode to upright RGB; transparency on white, 16 bit to 8, first frame of many.

    ``at_least`` lets JPEG be decoded at a reduced scale whose shorter side stays above
    twice that many pixels: faster, and close to, but not bitwise, the full decode.

    Raises:
        BadImage: not an image, truncated, more than ``MAX_PIXELS`` or ``MAX_ASPECT``.
    """
    return decode_opened(open_image(data), at_least)


def open_image(data: bytes) -> Image.Image:
    """The picture with its header read: format and size are known, the pixels not yet.

    Raises:
        BadImage: not an image, or one that would do harm: too large, too thin, code.
    """
    if not data:
        raise BadImage("an empty file")
    with _refusing():
        image = Image.open(io.BytesIO(data))
        _refuse_harmful(image)
        return image


def decode_opened(image: Image.Image, at_least: int = 0) -> Image.Image:
    """As ``decode_image``, of a picture whose header was read.

    Raises:
        BadImage: truncated, or otherwise broken.
    """
    with _refusing():
        if at_least:
            image.draft("RGB", (_DRAFT_MARGIN * at_least,) * 2)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def verify_opened(image: Image.Image) -> None:
    """Check what can be without decoding; the picture cannot be used after that.

    Raises:
        BadImage: it is broken, as far as its format has checksums.
    """
    with _refusing():
        image.verify()


@contextmanager
def _refusing() -> Iterator[None]:
    """Whatever Pillow's plug-ins raise becomes ``BadImage``; what they warn of is not told."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # its own message names an object in memory
        raise BadImage("not a picture") from error
    except Exception as error:  # Pillow's plug-ins raise whatever they like
        raise BadImage(first_line(error) or type(error).__name__) from error


def _refuse_harmful(image: Image.Image) -> None:
    """Look at what the header says, before anything is decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels are too many")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{width}x{height} is more than {MAX_ASPECT} times as long as wide")
    if image.format == "EPS":  # a program: Pillow has Ghostscript run it
        raise BadImage("EPS is not decoded")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in _DEEP or image.mode.startswith("I;"):
        return _from_deep(np.asarray(image))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (*WHITE, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")


def _from_deep(values: "np.ndarray[Any, Any]") -> Image.Image:
    """16-bit and float greys to 8 bit; Pillow's own ``convert`` clips them to white."""
    if not np.isfinite(values).all():
        raise BadImage("not-a-number among the pixels")
    top = float(values.max(initial=0))
    scale = 255.0 if top <= 1.0 and values.dtype.kind == "f" else 255.0 / 65535.0
    if values.dtype.kind == "f" and 1.0 < top <= 255.0:
        scale = 1.0
    grey = np.clip(np.rint(values.astype(np.float64) * scale), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def resized_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) with the shorter one ``side``, rounded as ``CLIPImageProcessor`` does."""
    width, height = size
    long = max(side, int(side * max(size) / min(size)))
    return (side, long) if width <= height else (long, side)


def resize_shorter(image: Image.Image, side: int) -> Image.Image:
    """Shorter side to ``side`` pixels, aspect kept; bicubic, antialiased."""
    return image.resize(resized_size(image.size, side), Image.Resampling.BICUBIC)
