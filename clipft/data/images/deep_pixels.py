"""Reduces pixels of more than 8 bits to 8 where Pillow would do it wrong.

The brightest pixel decides how many bits an image uses: the smallest even number, at least 8, that
holds it. The largest value with that many bits becomes white. So an image with 12 bits in a 16-bit
file is as bright as one that uses all 16. Floating-point pixels up to 2 are taken to be in [0, 1],
and others to be whole numbers. Values far below zero are refused.
"""

import io
import re
import sys
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from clipft.data.images.formats import BadImage, format_of

ORIENTATION = 0x0112  # the tag of EXIF and TIFF
# Tags of TIFF
_PHOTOMETRIC, _WHITE_IS_ZERO = 0x0106, 0
_SAMPLE_FORMAT, _SIGNED = 0x0153, 2
_NOISE = 0.1
"""Pixels may be below zero by this share of the brightest one."""
_DEEP = re.compile(";16[BLN]")
# How Pillow names the two orders of the bytes of a color; N is the order of this machine
_SWAPPED = {"RGB;16B": "RGB;16L", "RGB;16L": "RGB;16B", "RGB;16N": "RGB;16B"}
if sys.byteorder == "big":
    _SWAPPED["RGB;16N"] = "RGB;16L"


def is_deep_gray(image: Image.Image) -> bool:
    """Return whether it is a gray image of more than 8 bits."""
    return image.mode in {"I", "F"} or image.mode.startswith("I;")


def is_deep_color(image: ImageFile.ImageFile) -> bool:
    """Return whether an image that is not loaded yet has 16-bit colors, whose upper 8 bits Pillow
    keeps."""
    if len(image.tile) != 1 or is_deep_gray(image):
        return False
    # A letter for the order of the bytes; "BGR;16" means 16 bits for all three colors
    return bool(_DEEP.search(str(image.tile[0].args)))


def gray_to_rgb(image: Image.Image) -> Image.Image:
    """Reduce a gray image of 16 or 32 bits to 8. Pillow's own ``convert`` clips it to white.

    Raises:
        BadImage: It has pixels that are not numbers, or far below zero.
    """
    values, key = np.asarray(image), image.info.get("transparency")
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if values.dtype == np.int32 and tags and _SIGNED not in tags.get(_SAMPLE_FORMAT, ()):
        values = values.view(np.uint32)  # Pillow has no mode for them
    if not np.isfinite(values).all():
        raise BadImage("some pixel values are NaN or infinite")
    gray = _to_8_bits(values)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        gray = 255 - gray
    if isinstance(key, int):
        gray[values == key] = 255
    return Image.fromarray(gray).convert("RGB")


def color_to_rgb(image: Image.Image, data: bytes) -> Image.Image | None:
    """Reduce a loaded image with 16-bit colors that use fewer than 16 bits to RGB.

    Returns None if the colors use all bits, because the upper 8 that Pillow kept are right then.

    Raises:
        BadImage: They use fewer, and the lower half of each color cannot be read.
    """
    high = np.asarray(image)
    if high.max(initial=0) >= 1 << (14 - 8):
        return None
    again = Image.open(io.BytesIO(data), formats=[format_of(data) or ""])
    tile = again.tile[0]
    # In the other byte order, Pillow takes the lower half of each color for the upper one
    args = tile.args if isinstance(tile.args, tuple) else (str(tile.args),)
    if args[0] not in _SWAPPED:
        raise BadImage("16-bit colors that use few of their bits: convert it to 8 bits")
    again.tile = [tile._replace(args=(_SWAPPED[args[0]], *args[1:]))]
    load(again)
    values = high.astype(np.uint16) << 8 | np.asarray(again)
    return Image.fromarray(_to_8_bits(values))


def load(image: ImageFile.ImageFile) -> None:
    """Load the pixels of an opened image, even where its EXIF data are odd."""
    if image.format == "TIFF":  # Pillow turns it upright here, and reads all EXIF data for that
        with suppress(Exception):
            exif = image.getexif()
            for tag in set(exif) - {ORIENTATION}:
                del exif[tag]
    image.load()


def _to_8_bits(values: "np.ndarray[Any, Any]") -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Map the pixels of an image to uint8 by the rule above.

    Raises:
        BadImage: Some are far below zero.
    """
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if -low > _NOISE * high:
        raise BadImage(f"pixel values from {low:g} to {high:g}: convert it to 8 bits")
    if values.dtype.kind == "f" and high <= 2:
        white = 1
    else:
        bits = max(8, int(high).bit_length())
        white = 2 ** (bits + bits % 2) - 1
    return np.clip(np.rint(values * (255.0 / white)), 0, 255).astype(np.uint8)
