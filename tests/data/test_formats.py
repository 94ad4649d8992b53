"""What a file is by its bytes, and what may be left out of it."""

import struct
import subprocess
import sys
import textwrap

import pytest
from PIL import Image

from clipft.data.images.decode import decode_image
from clipft.data.images.formats import (
    FORMATS,
    IMAGE_SUFFIXES,
    BadImage,
    exif_orientation,
    format_of,
    is_unnamed_image,
    jxl_size,
    split_side_information,
)
from tests.data.test_images import encoded, plain

FTYP = b"\0\0\0\x18ftyp"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_formats_are_told_by_the_first_bytes_as_pillow_tells_them(kind):
    data = encoded(plain(), kind)
    assert format_of(data) == kind
    assert decode_image(data).size == (40, 20)
    assert FORMATS[kind][0] in IMAGE_SUFFIXES


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_ppm_is_told_by_its_first_bytes(mode):
    assert format_of(encoded(Image.new(mode, (4, 4)), "PPM")) == "PPM"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<!DOCTYPE html><html>404</html>", "not an image but a web page"),
        (b"\xef\xbb\xbf \n<HTML><body>", "not an image but a web page"),
        (b"<?xml version='1.0'?><Error><Code>NoSuchKey", "not an image but an XML document"),
        (b"<?xml version='1.0'?>\n<svg xmlns='x'>", "SVG images are not read: convert them"),
        (b"<svg width='9'>", "SVG images are not read"),
        (b'{"error": "not found"}', "not an image but JSON"),
        (b"version https://git-lfs.github.com/spec/v1", "not an image but a pointer of Git LFS"),
        (b"../../blobs/1a833a0f", "not an image but a symbolic link saved as text"),
        (b"%PDF-1.7", "not an image but a PDF document"),
        (b"PK\x03\x04....", "not an image but a ZIP archive"),
        (FTYP + b"isom" + bytes(20), "not an image but a video"),
        (FTYP + b"crx " + bytes(20), "raw camera images are not read"),
        (encoded(plain(), "TGA"), "TGA images are not read: convert them to JPEG or PNG"),
        (encoded(plain(), "ICO"), "ICO images are not read"),
        (encoded(plain(), "DDS"), "DDS images are not read"),
        (bytes(5000), "not an image"),
        (b"\x89PNG\r\n\x1a\n", "damaged or unusual PNG data"),
        (FTYP + b"heic" + bytes(200), "damaged or unusual HEIC data"),
    ],
)
def test_other_files_are_refused_by_the_name_of_what_they_are(data, reason):
    with pytest.raises(BadImage) as caught:
        decode_image(data)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(("kind", "module"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")])
def test_plugins_are_used_if_they_are_there_and_named_if_not(kind, module):
    pytest.importorskip(module).__dict__.get("register_heif_opener", lambda: None)()
    data = encoded(plain(), kind)
    assert format_of(data) == kind
    assert decode_image(data).size == (40, 20)
    code = f"""
        import sys
        sys.modules[{module!r}] = None  # as if it were not installed
        from clipft.data.images.decode import decode_image
        decode_image(bytes.fromhex({data.hex()!r}))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60).stderr
    name = {"HEIF": "HEIC", "JXL": "JPEG XL"}[kind]
    assert f"BadImage: to read {name} images: pip install 'clipft[heif]'" in said


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_what_pixels_do_not_need_can_be_left_out(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.effect_noise((40, 20), 80).convert("RGB")
    whole = encoded(photo, kind, exif=exif, icc_profile=b"x" * 300, comment=b"hello", dpi=(9, 9))
    bare, kept = split_side_information(whole + b"trailing")
    assert b"x" * 20 not in bare and b"hello" not in bare  # a few may be among the pixels
    assert exif_orientation(kept) == 6
    assert decode_image(bare).tobytes() == decode_image(encoded(photo, kind)).tobytes()


def test_nothing_is_left_out_of_other_formats_or_bare_images():
    assert split_side_information(encoded(plain(), "GIF")) is None
    assert split_side_information(encoded(plain(), "PNG")) is None


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 3, 4])
def test_the_orientation_is_read_in_both_byte_orders_and_every_size(order, kind):
    value = struct.pack(order + {1: "B3x", 3: "H2x", 4: "L"}[kind], 6)
    entries = struct.pack(order + "HHLL", 0x010E, 2, 2**31, 2**31)  # a text out of reach
    entries += struct.pack(order + "HHL", 0x0112, kind, 1) + value
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "L", 8)
    tiff = head + struct.pack(order + "H", 2) + entries
    assert exif_orientation(b"Exif\0\0" + tiff) == 6
    assert exif_orientation(b"Exif\0\0Exif\0\0" + tiff) == 6
    for size in range(len(tiff)):
        exif_orientation(tiff[:size])  # never raises
    assert exif_orientation(tiff.replace(value, struct.pack(order + "L", 99))) is None


def test_only_files_without_an_ending_are_opened(tmp_path):
    for name in ("photo", "photo.dat"):
        (tmp_path / name).write_bytes(encoded(plain(), "WEBP"))
    (tmp_path / "notes").write_text("not an image")
    (tmp_path / "folder").mkdir()
    names = ("photo", "photo.dat", "notes", "folder", "nowhere")
    found = [name for name in names if is_unnamed_image(str(tmp_path / name))]
    assert found == ["photo"]


@pytest.mark.parametrize("size", [(8, 8), (40, 40), (300, 200), (31, 77), (9000, 2), (3, 300_000)])
def test_the_size_of_a_jpeg_xl_is_known_before_it_is_decoded(size):
    pytest.importorskip("pillow_jxl")
    data = encoded(Image.new("L", size), "JXL", lossless=True)
    assert jxl_size(data) == size


def test_a_large_jpeg_xl_is_refused_before_it_is_decoded():
    pytest.importorskip("pillow_jxl")
    bits = 0 | 3 << 1 | (30_000 - 1) << 3 | 1 << 33  # the height in 30 bits, and as wide as high
    with pytest.raises(BadImage, match="30000x30000 pixels are too many"):
        decode_image(b"\xff\x0a" + bits.to_bytes(12, "little"))
