"""Decodes the bytes of an image file to an upright RGB image.

An image that cannot be decoded correctly is refused, and the message of ``BadImage`` says why.
Damage outside the pixels (in EXIF and text, color profiles, further frames, bytes after the end) is
no reason to refuse an image. Of these data, only the orientation and transparency are used.
"""

import ctypes
import functools
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from PIL import Image, ImageFile, UnidentifiedImageError, _imaging

from clipft.core.errors import first_line
from clipft.data.images.deep_pixels import (
    ORIENTATION,
    color_to_rgb,
    gray_to_rgb,
    is_deep_color,
    is_deep_gray,
    load,
)
from clipft.data.images.formats import (
    PLUGIN_EXTRA,
    PLUGINS,
    BadImage,
    exif_orientation,
    format_of,
    jxl_size,
    name_of,
    not_read,
    reason_against,
    split_side_information,
)

MAX_PIXELS = 80_000_000
"""Larger images are refused: they may be decompression bombs."""
MAX_ASPECT = 100
"""Longer images are refused: once its shorter side is resized for the model, 20,000 x 1 pixels
would take 5 GB."""

_DRAFT_MARGIN = 2
# Where Pillow keeps XMP, and the EXIF data that ImageMagick writes into a PNG
_OTHER_EXIF = {"xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow issues warnings and log messages about odd files, which would be printed into the progress
# display. This is a filter because catch_warnings is not thread-safe
warnings.filterwarnings("ignore", module="PIL|pillow_heif|pillow_jxl")
logging.getLogger("PIL").addHandler(logging.NullHandler())


class OpenedImage:
    """An image whose header was read but not its pixels: ``format`` (Pillow's name), ``size`` and
    whether the pixels have more than 8 bits are known."""

    def __init__(self, data: bytes, exif: bytes = b"") -> None:
        self._data = data
        with _as_bad_image():
            self._image = _open(data)
        if exif:
            self._image.info["exif"] = exif
        self.format, self.size = self._image.format or "", self._image.size
        _check_size(*self.size)
        self.is_deep = is_deep_gray(self._image) or is_deep_color(self._image)

    def decode(self, at_least: int = 0) -> Image.Image:
        """Decode the image, once, as ``decode_image`` does.

        Raises:
            BadImage: It is truncated or otherwise broken.
        """
        try:
            with _as_bad_image():
                return _decode(self._image, self._data, at_least)
        except BadImage:
            if bare := _without_side_information(self._data):
                with suppress(BadImage):
                    return bare.decode(at_least)
            raise

    def verify(self) -> None:
        """Check the image without decoding it, if its format has checksums. Afterwards the image
        can no longer be decoded.

        Raises:
            BadImage: It is broken.
        """
        try:
            with _as_bad_image():
                self._image.verify()
        except BadImage:  # perhaps only the data besides the pixels are broken
            open_image(self._data).decode()


def decode_image(data: bytes, at_least: int = 0) -> Image.Image:
    """Decode to upright RGB with 8 bits. Transparency becomes white, the first of several frames is
    used, and color profiles are not applied.

    ``at_least`` allows a JPEG to be decoded at a reduced scale whose shorter side stays above twice
    that many pixels. This is faster, and the pixels are close to the full decode but not equal.

    Raises:
        BadImage: It is not an image, is truncated or otherwise broken, has more than
            ``MAX_PIXELS`` or is longer than ``MAX_ASPECT``.
    """
    return open_image(data).decode(at_least)


def open_image(data: bytes) -> OpenedImage:
    """Read the header of an image.

    Raises:
        BadImage: It is not an image, or it is too large to be decoded safely.
    """
    try:
        return OpenedImage(data)
    except BadImage:
        if bare := _without_side_information(data):
            return bare
        raise


def _without_side_information(data: bytes) -> OpenedImage | None:
    """Open an image again without its metadata, which may be why Pillow refused it. Return None if
    the image has none or still cannot be opened."""
    if found := split_side_information(data):
        with suppress(BadImage):
            return OpenedImage(*found)
    return None


@contextmanager
def _as_bad_image() -> Iterator[None]:
    """Turn whatever Pillow raises into ``BadImage``."""
    try:
        yield
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {MAX_PIXELS:,} pixels are too many") from error
    except Exception as error:  # Pillow's plug-ins raise errors of any type
        reason = first_line(error) or type(error).__name__
        if reason.startswith("decoder error"):  # an error code that Pillow has no text for
            reason = "damaged, or compressed in an unknown way"
        raise BadImage(reason) from error


def _open(data: bytes) -> ImageFile.ImageFile:
    if not data:
        raise BadImage("an empty file")
    kind = format_of(data)
    if not kind:
        raise BadImage(reason_against(data) or _reason_of_pillow(data))
    _prepare(kind)
    if kind == "JXL" and (size := jxl_size(data)):
        _check_size(*size)
    try:
        # Pillow tries no other format: many of its plug-ins take almost anything
        return Image.open(io.BytesIO(data), formats=[kind])
    except UnidentifiedImageError as error:  # its own message names an object in memory
        raise BadImage(f"damaged or unusual {name_of(kind)} data") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels are too many")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{width}x{height} is more than {MAX_ASPECT} times as long as wide")


def _reason_of_pillow(data: bytes) -> str:
    """Say in which rare format an image is. Many have no signature, so Pillow has to try them."""
    try:
        return not_read(Image.open(io.BytesIO(data)).format or "such")
    except Exception:  # of any type, as above
        return "not an image"


@functools.cache
def _prepare(kind: str) -> None:
    """Get ready to read a format: load its plug-in, or silence its library.

    Raises:
        BadImage: Pillow cannot read it, or only with a plug-in that is not installed.
    """
    if kind in PLUGINS:
        try:
            plugin: Any = importlib.import_module(PLUGINS[kind])
        except ImportError as error:
            raise BadImage(
                f"to read {name_of(kind)} images: pip install '{PLUGIN_EXTRA}'"
            ) from error
        if kind == "HEIF":
            plugin.register_heif_opener()
    Image.preinit()
    if kind not in Image.OPEN:
        Image.init()  # loads all plug-ins, which is slow
    if kind not in Image.OPEN:
        raise BadImage(f"this version of Pillow does not read {name_of(kind)} images")
    if kind == "TIFF":
        # libtiff prints errors to stderr, which Pillow raises as well. The symbol is looked up
        # through Pillow's own module, which gives the libtiff that Pillow uses.
        with suppress(OSError, AttributeError):
            libtiff = ctypes.CDLL(_imaging.__file__)
            libtiff.TIFFSetErrorHandler(None)
            libtiff.TIFFSetWarningHandler(None)


def _decode(image: ImageFile.ImageFile, data: bytes, at_least: int) -> Image.Image:
    if at_least:
        image.draft("RGB", (_DRAFT_MARGIN * at_least,) * 2)
    high_bytes_only = is_deep_color(image)
    load(image)
    pixels = color_to_rgb(image, data) if high_bytes_only else None
    pixels = pixels or _to_rgb(image)
    method = _TO_UPRIGHT.get(_orientation(image))
    return pixels if method is None else pixels.transpose(method)


def _orientation(image: ImageFile.ImageFile) -> int:
    """Return the orientation of loaded pixels from EXIF or XMP, or 1 (upright) if there is none."""
    # Pillow turns TIFF upright. The JPEG XL decoder does too, unless the file contains a JPEG
    if image.format == "TIFF" or (image.format == "JXL" and not getattr(image, "jpeg", False)):
        return 1
    # Not ImageOps.exif_transpose: it rewrites the EXIF data, and fails if they are odd
    value = exif_orientation(image.info.get("exif") or b"")
    others = _OTHER_EXIF & image.info.keys()
    if value is None and others:
        carrier = Image.new("1", (1, 1))
        carrier.info = {key: image.info[key] for key in others}
        with suppress(Exception):  # broken ones raise errors of any type
            value = carrier.getexif().get(ORIENTATION)
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if image.mode == "RGB" and key is None:
        return image
    if is_deep_gray(image):
        return gray_to_rgb(image)
    if image.mode in {"RGBa", "La"} or "A" in image.getbands() or key is not None:
        try:
            rgba = image.convert("RGBA")
        except Exception:  # a transparent color that the image cannot have
            image.info.pop("transparency", None)
            return image.convert("RGB")
        ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
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
