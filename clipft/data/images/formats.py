"""Recognizes the type of a file by its first bytes, whatever its name says.

``FORMATS`` lists the image formats that are read. All commands read the same ones, because they all
decode with ``decode.py``. A file of another type is refused, and the message names the type.
"""

import os
import re
import struct
from contextlib import suppress
from typing import Literal

FORMATS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "MPO": ("jpg", "mpo"),
    "PNG": ("png", "apng"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif",),
    "JPEG2000": ("jp2", "j2k", "jpx", "jpf"),
    "PPM": ("ppm", "pgm", "pbm", "pnm", "pfm"),
    "HEIF": ("heic", "heif", "hif"),
    "JXL": ("jxl",),
}
"""The formats that are read, by Pillow's names, and the suffixes of their files. ``clipft pack``
uses the first suffix in shards."""
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

PLUGIN_EXTRA = "clipft[heif]"
"""What to install for the formats of ``PLUGINS``."""
PLUGINS = {"HEIF": "pillow_heif", "JXL": "pillow_jxl"}
"""Formats that Pillow reads only with a plug-in, and the module of the plug-in."""

HEAD_BYTES = 1024
"""This many bytes of a file are enough to recognize its type."""

_IMAGES = [
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("WEBP", re.compile(rb"(?s)RIFF....WEBP")),
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("TIFF", re.compile(rb"(?s)II[*+]\0|MM\0[*+]|MM\*\0|II\0\*")),
    ("AVIF", re.compile(rb"(?s).{4}ftyp(avi[fs]|(mif1|msf1|miaf).{4}(.{4}){0,8}avi[fs])")),
    ("HEIF", re.compile(rb"(?s).{4}ftyp(hei[cxmsf]|hev[cxms]|mif1|msf1)")),
    ("JPEG2000", re.compile(rb"(?s)\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n")),
    ("JXL", re.compile(rb"(?s)\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n")),
    ("PPM", re.compile(rb"P[1-6fF]\s")),
    ("BMP", re.compile(rb"(?s)BM.{12}")),
]
_TEXT = rb"(?si)(\xef\xbb\xbf)?\s*"
# Other content that files with names of images may have. The first match is used.
_NO_IMAGES = [
    ("a web page", re.compile(_TEXT + rb"(<!--.*?-->\s*)?<(!doctype html|html|head|body)")),
    ("an XML document", re.compile(_TEXT + rb"<\?xml(?!.*<svg)")),
    ("JSON", re.compile(_TEXT + rb"[{\[]\s*[\"{\[]")),
    ("a pointer of Git LFS: run `git lfs pull`", re.compile(rb"version https://git-lfs")),
    # Git without symbolic links leaves these, and so do archives of a Hugging Face cache
    (
        "a symbolic link saved as text: copy the files with `cp -rL`",
        re.compile(rb"(\.\./)+[^\0\n]+\Z"),
    ),
    ("a PDF document", re.compile(rb"%PDF")),
    ("a ZIP archive", re.compile(rb"PK\x03\x04")),
    ("a gzip archive", re.compile(rb"\x1f\x8b")),
    ("a video", re.compile(rb"(?s).{4}ftyp(?!crx )|\x1aE\xdf\xa3|RIFF....AVI ")),
    ("HDF5 data", re.compile(rb"\x89HDF\r\n")),
    ("a NumPy array", re.compile(rb"\x93NUMPY")),
]
_OTHER_IMAGES = [
    ("SVG", re.compile(_TEXT + rb"<(\?xml.*?<)?(!doctype |!--.*?-->\s*<)?svg[\s>]")),
    ("GIMP", re.compile(rb"gimp xcf")),
    ("DICOM", re.compile(rb"(?s).{128}DICM")),
    ("OpenEXR", re.compile(rb"\x76\x2f\x31\x01")),
    ("Radiance", re.compile(rb"#\?(RADIANCE|RGBE)")),
    ("raw camera", re.compile(rb"(?s).{4}ftypcrx |FUJIFILMCCD-RAW|II[RU][OS\0]")),
]

_BYTE_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II": "little", b"MM": "big"}
_ORIENTATION = 0x0112
_SIZES = {1: 1, 3: 2, 4: 4}  # bytes of a number by its type in EXIF
_JXL_CODESTREAM = re.compile(rb"(?s)^\xff\x0a|jxlc\xff\x0a|jxlp.{4}\xff\x0a")
_JPEG_COLORS = re.compile(rb"(?s)JFIF\0.{9}|Adobe.{7}")
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


class BadImage(Exception):
    """An image cannot be used; the message says why its pair is skipped."""


def format_of(head: bytes) -> str | None:
    """Return the name in ``FORMATS`` of the format of a file with these first bytes, or None. An
    MPO begins like a JPEG and counts as one."""
    head = head[:HEAD_BYTES]
    return next((name for name, pattern in _IMAGES if pattern.match(head)), None)


def is_unnamed_image(path: str) -> bool:
    """Return whether a file without a file extension is an image, judging by its first bytes."""
    name = os.path.basename(path)
    if "." in name or not os.path.isfile(path):
        return False
    with suppress(OSError), open(path, "rb") as file:
        return format_of(file.read(HEAD_BYTES)) is not None
    return False


def name_of(kind: str) -> str:
    """Return the common name of a format in ``FORMATS``."""
    return {"HEIF": "HEIC", "JXL": "JPEG XL", "JPEG2000": "JPEG 2000"}.get(kind, kind)


def reason_against(head: bytes) -> str | None:
    """Return why a file with these first bytes is not read, or None if its type is unknown."""
    head = head[:HEAD_BYTES]
    for name, pattern in _NO_IMAGES:
        if pattern.match(head):
            return f"not an image but {name}"
    for name, pattern in _OTHER_IMAGES:
        if pattern.match(head):
            return not_read(name)
    return None


def not_read(name: str) -> str:
    """Say that images of this format are not read."""
    return f"{name} images are not read: convert them to JPEG or PNG"


def split_side_information(data: bytes) -> tuple[bytes, bytes] | None:
    """Return a PNG or JPEG without the data that its pixels do not need, and its EXIF data.

    Returns None for another format, or if there is nothing to leave out.
    """
    kind = format_of(data)
    if kind == "PNG":
        bare, exif = _split_png(data)
    elif kind == "JPEG":
        bare, exif = _split_jpeg(data)
    else:
        return None
    return None if len(bare) >= len(data) else (bare, exif)


def _split_png(data: bytes) -> tuple[bytes, bytes]:
    """Keep the chunks that the pixels need, up to the end or to an incomplete chunk. The frames of
    an animation are left out, except for the default image."""
    kept, exif, at = [data[:8]], b"", 8
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if name in _PNG_PIXELS:
            kept.append(data[at:end])
        elif name == b"eXIf":
            exif = b"Exif\0\0" + data[at + 8 : end - 4]
        at = end
    return b"".join([*kept, _PNG_END]), exif


def _split_jpeg(data: bytes) -> tuple[bytes, bytes]:
    """Leave out comments and application data before the first scan. JFIF and Adobe's segment stay,
    because they say what the colors mean."""
    kept, exif, at = [data[:2]], b"", 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0xDA:
            break
        segment = data[at:end]
        if segment[4:].startswith(b"Exif\0\0"):
            exif += segment[4:] if not exif else segment[10:]
        elif _JPEG_COLORS.match(segment, 4) or not _is_application_data(marker):
            kept.append(segment)
        at = end
    return b"".join([*kept, data[at:]]), exif


def _is_application_data(marker: int) -> bool:
    return 0xE0 <= marker <= 0xEF or marker == 0xFE  # a comment


def exif_orientation(exif: bytes) -> int | None:
    """Return the orientation in EXIF data, from 1 to 8; None if there is none.

    Everything else in the data may be broken. Pillow's own reader fails at the first tag whose
    value lies outside the data.
    """
    tiff = exif.replace(b"Exif\0\0", b"")  # some cameras write it twice
    order = _BYTE_ORDERS.get(tiff[:2])
    if not order:
        return None

    def number(at: int, size: int = 2) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    first = number(4, size=4)
    for at in range(first + 2, min(first + 2 + 12 * number(first), len(tiff)), 12):
        if number(at) == _ORIENTATION:
            value = number(at + 8, _SIZES.get(number(at + 2), 2))
            return value if 1 <= value <= 8 else None
    return None


def jxl_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a JPEG XL image from its header (ISO/IEC 18181-1, SizeHeader).

    The plug-in decodes an image when it opens it, so the size must be checked before that.
    """
    start = _JXL_CODESTREAM.search(data)
    if not start:
        return None
    bits = int.from_bytes(data[start.end() : start.end() + 10], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & (1 << count) - 1, bits >> count
        return value

    is_small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if is_small else take((9, 13, 18, 30)[take(2)]) + 1

    height, ratio = side(), take(3)
    if not ratio:
        return side(), height
    across, down = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height * across // down, height
