import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipft.data.images.augmentation import Transform, augment
from clipft.data.images.decode import decode_image, open_image, resize_shorter
from clipft.data.images.formats import BadImage

FURNITURE = Path(__file__).parents[2] / ".." / "shared" / "data" / "furniture" / "val"
needs_images = pytest.mark.skipif(
    not FURNITURE.is_dir(), reason="the furniture images are not here"
)


def encoded(image: Image.Image, kind: str, **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def plain(colour=(200, 30, 40), size=(40, 20)) -> Image.Image:
    return Image.new("RGB", size, colour)


def near(image: Image.Image, colour, at=(5, 5)) -> bool:
    return max(abs(a - b) for a, b in zip(image.getpixel(at), colour, strict=True)) <= 6


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (encoded(plain(), "JPEG"), (200, 30, 40)),
        (encoded(plain(), "JPEG", progressive=True), (200, 30, 40)),
        (encoded(plain().convert("CMYK"), "JPEG"), (200, 30, 40)),
        (encoded(plain().convert("L"), "JPEG"), (82, 82, 82)),
        (encoded(plain().convert("P"), "PNG"), (204, 51, 51)),
        (encoded(plain(), "WEBP", lossless=True), (200, 30, 40)),
        (encoded(Image.new("RGBA", (40, 20), (0, 0, 0, 0)), "PNG"), (255, 255, 255)),
        (encoded(Image.new("LA", (40, 20), (0, 128)), "PNG"), (127, 127, 127)),
        (encoded(Image.new("1", (40, 20), 1), "PNG"), (255, 255, 255)),
        (encoded(plain((200, 30, 40), (1, 1)).resize((1, 1)), "PNG"), (200, 30, 40)),
    ],
    ids="jpeg progressive cmyk grey palette webp alpha half-alpha one-bit 1x1".split(),  # noqa: SIM905
)
def test_every_kind_becomes_the_right_rgb(data, colour):
    image = decode_image(data)
    assert image.mode == "RGB"
    assert near(image, colour, (0, 0))


def test_16_bit_greys_keep_their_shades():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = decode_image(encoded(Image.fromarray(ramp), "PNG"))
    assert np.abs(np.asarray(image)[..., 0].flatten().astype(int) - np.arange(256)).max() <= 1


def test_float_images_are_not_black():
    grey = np.full((4, 4), 0.5, np.float32)
    assert near(decode_image(encoded(Image.fromarray(grey), "TIFF")), (128, 128, 128), (1, 1))


def test_the_first_frame_of_an_animation():
    frames = [plain((0, 0, 0)), plain((255, 255, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert near(decode_image(data), (0, 0, 0))


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(plain(), "JPEG", exif=exif)).size == (20, 40)


def chunk(name: bytes, body: bytes) -> bytes:
    """Make a chunk of a PNG."""
    crc = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + crc


def bomb() -> bytes:
    """Make the header of a 30,000 x 30,000 PNG with next to no data."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>404</html>", encoded(plain(size=(300, 300)), "JPEG")[:300], bomb()],
    ids=["empty", "html", "truncated", "bomb"],
)
def test_a_file_that_is_not_an_image_is_refused_with_a_reason(data):
    with pytest.raises(BadImage, match=r"\w"):
        decode_image(data)


NOISE = Image.effect_noise((9, 6), 80).resize((72, 48)).convert("RGB")


def exif(*entries: tuple[int, int, int, int], ifd_at: int = 8) -> bytes:
    """Make EXIF data of entries (tag, type, count, value), in the order they are given."""
    table = b"".join(struct.pack("<HHLL", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<LH", ifd_at, len(entries)) + table + bytes(4)


ORIENTED = (0x0112, 3, 1, 6)
BROKEN_EXIF = {
    "a fraction over zero": exif(ORIENTED, (0x011A, 10, 1, 38)) + struct.pack("<ll", -1, 0),
    "a text out of reach": exif((0x010E, 2, 999, 2**31), ORIENTED),
    "cut in an entry": exif(ORIENTED, (0x011A, 5, 1, 99))[:-9],
    "no resolution": exif(ORIENTED, (0x011A, 5, 0, 0), (0x0128, 3, 1, 2)),
    "a broken folder within": exif(ORIENTED, (0x8769, 4, 1, 2**32 - 1), (0x8825, 4, 1, 3)),
    "a folder within itself": exif(ORIENTED, (0x8769, 4, 1, 8)),
    "an unknown type": exif((0x010E, 77, 1, 1), ORIENTED),
    "written twice": b"Exif\0\0" + exif(ORIENTED),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("trouble", BROKEN_EXIF)
def test_broken_exif_costs_neither_the_image_nor_its_orientation(kind, trouble):
    try:
        data = encoded(NOISE, kind, exif=BROKEN_EXIF[trouble], quality=95)
    except Exception:
        pytest.skip("Pillow cannot write it")
    upright = NOISE.transpose(Image.Transpose.ROTATE_270)
    image = decode_image(data)
    assert image.size == upright.size
    difference = np.asarray(image).astype(int) - np.asarray(upright)
    assert np.abs(difference).mean() < 6


@given(st.binary(max_size=120))
@settings(deadline=None, max_examples=60)
def test_no_exif_data_make_an_image_unreadable(tail):
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(plain(), kind, exif=b"Exif\0\0II*\0\x08\0\0\0" + tail)
        assert set(decode_image(data).size) == {20, 40}


def png_with(*chunks: bytes) -> bytes:
    """Make a PNG of noise with chunks before its pixels, and some after them."""
    data = encoded(NOISE, "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03")],
        [chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 << 20)))],
        [chunk(b"iTXt", b"a\0\x01\0\0\0" + zlib.compress(bytes(2 << 20)))],
        [chunk(b"zTXt", b"a%d\0\0" % n + zlib.compress(bytes(1000_000))) for n in range(70)],
        [chunk(b"zTXt", b"a\0\x07")],
        [chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2 << 20)))],
        [chunk(b"iCCP", b"x\0\x05")],
        [chunk(b"iCCP", b"x")],
        [chunk(b"gAMA", b"\0")],
        [chunk(b"pHYs", b"\0")],
        [chunk(b"acTL", b"\0")],
        [chunk(b"acTL", struct.pack(">II", 3, 0)), chunk(b"fcTL", bytes(26))],
        [chunk(b"tEXt", b"a\0b")[:-4] + b"\0\0\0\0"],
    ],
    ids="exif text-bomb itxt-bomb many-texts method icc-bomb icc-method icc gamma dpi "  # noqa: SIM905
    "animation frame checksum".split(),
)
def test_broken_chunks_of_a_png_do_not_cost_its_pixels(chunks):
    opened = open_image(png_with(*chunks))
    assert opened.size == NOISE.size
    assert opened.decode().tobytes() == NOISE.tobytes()
    open_image(png_with(*chunks)).verify()


def test_broken_pixels_of_a_png_do():
    data = bytearray(encoded(NOISE, "PNG"))
    at = data.index(b"IDAT") + 30
    data[at : at + 8] = bytes(8)
    with pytest.raises(BadImage):
        decode_image(bytes(data))
    with pytest.raises(BadImage):
        open_image(bytes(data)).verify()


def segment(marker: int, body: bytes) -> bytes:
    """Make a segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


@pytest.mark.parametrize(
    "segments",
    [
        segment(0xE0, b"JFIF\0\1"),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xE2, b"ICC_PROFILE\0\x01\x09" + bytes(50)),
        segment(0xE2, b"MPF\0" + bytes(30)),
        segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed"),
        segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0\0\0\0\4abcd"),
        segment(0xE1, b"Exif\0\0"),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe"),
        segment(0xFE, b"\xff" * 300),
    ],
    ids="jfif icc icc-parts mpo photoshop resolution exif xmp comment".split(),  # noqa: SIM905
)
def test_broken_segments_of_a_jpeg_do_not_cost_its_pixels(segments):
    data = encoded(NOISE, "JPEG")
    broken = data[:2] + segments + data[2:] + b"trailing \xff\xd8\xff bytes"
    assert decode_image(broken).tobytes() == decode_image(data).tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_bytes_after_the_end_do_no_harm(kind):
    data = encoded(plain(), kind)
    assert decode_image(data + b"PK\x03\x04" * 99).tobytes() == decode_image(data).tobytes()


def test_xmp_turns_an_image_whose_exif_is_broken():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(NOISE, "JPEG", exif=b"Exif\0\0?", xmp=xmp)
    assert decode_image(data).size == (48, 72)


RAMP = np.linspace(0, 1, 256)


def shades(values: np.ndarray, kind: str = "TIFF", **more) -> np.ndarray:
    """Write 256 gray values, decode them, and return what became of them."""
    image = Image.fromarray(values.reshape(16, 16))
    return np.asarray(decode_image(encoded(image, kind, **more)))[..., 0].flatten().astype(int)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_any_number_of_bits_in_16_keeps_its_range(bits, kind):
    values = np.rint(RAMP * (2**bits - 1)).astype(np.uint16)
    assert np.abs(shades(values, kind) - np.arange(256)).max() <= 1


@pytest.mark.parametrize("bits", [12, 16, 24, 32])
def test_integers_of_32_bits_keep_their_range(bits):
    if bits < 32:
        found = shades(np.rint(RAMP * (2**bits - 1)).astype(np.int32))
    else:  # Pillow has no unsigned mode: it writes and reads the bits as signed
        values = np.rint(RAMP * (2**32 - 1)).astype(np.uint32)
        data = encoded(Image.fromarray(values.view(np.int32).reshape(16, 16)), "TIFF")
        data = data.replace(struct.pack("<HHLL", 339, 3, 1, 2), struct.pack("<HHLL", 339, 3, 1, 1))
        found = np.asarray(decode_image(data))[..., 0].flatten().astype(int)
    assert np.abs(found - np.arange(256)).max() <= 1


@pytest.mark.parametrize("white", [1.0, 255.0, 4095.0, 65535.0])
def test_floats_keep_their_range(white):
    found = shades((RAMP * white).astype(np.float32))
    assert np.abs(found - np.arange(256)).max() <= 1


def test_floats_a_little_outside_of_their_range_are_clipped():
    found = shades(np.where(RAMP > 0.99, 1.04, RAMP - 0.02).astype(np.float32))
    assert found[0] == 0 and found[-1] == 255 and abs(found[128] - 123) <= 1


@pytest.mark.parametrize(
    "values",
    [RAMP * 2 - 1, (RAMP * 2 - 1) * np.pi, RAMP * 3000 - 1024],
    ids=["normalized", "angles", "hounsfield"],
)
def test_values_far_below_zero_are_refused_by_name(values):
    with pytest.raises(BadImage, match="pixel values from -"):
        shades(values.astype(np.float32))


def test_white_as_zero_is_turned_around():
    values = np.rint(RAMP * 65535).astype(np.uint16)
    data = encoded(Image.fromarray(values.reshape(16, 16)), "TIFF")
    data = data.replace(struct.pack("<HHLL", 262, 3, 1, 1), struct.pack("<HHLL", 262, 3, 1, 0))
    found = np.asarray(decode_image(data))[..., 0].flatten().astype(int)
    assert np.abs(found - np.arange(256)[::-1]).max() <= 1


def deep_png(values: np.ndarray) -> bytes:
    """Make a PNG of colors [H, W, C] of 16 bits, which Pillow cannot write."""
    height, width, channels = values.shape
    kind = {2: 4, 3: 2, 4: 6}[channels]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_colors_with_few_of_16_bits_keep_their_range(bits):
    ramp = np.rint(RAMP * (2**bits - 1)).astype(np.uint16).reshape(16, 16, 1)
    found = np.asarray(decode_image(deep_png(np.concatenate([ramp, ramp // 2, ramp // 4], 2))))
    want = np.arange(256).reshape(16, 16)
    for channel, part in enumerate((1, 2, 4)):
        assert np.abs(found[..., channel].astype(int) - want / part).max() <= 1


def test_colors_packed_into_16_bits_are_not_deep():
    pixels = np.full((4, 4), 0b00011_000011_00011, "<u2").tobytes()
    head = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    head += struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    data = b"BM" + struct.pack("<IHHI", 14 + len(head) + len(pixels), 0, 0, 14 + len(head))
    opened = open_image(data + head + pixels)
    assert not opened.is_deep
    assert near(opened.decode(), (24, 12, 24), (0, 0))


@pytest.mark.parametrize("channels", [2, 4])
def test_dark_colors_of_16_bits_with_alpha_are_refused_and_others_are_read(channels):
    values = np.full((4, 4, channels), 65535, np.uint16)
    assert near(decode_image(deep_png(values)), (255, 255, 255), (0, 0))
    with pytest.raises(BadImage, match="16-bit colors that use few of their bits"):
        decode_image(deep_png(values // 16))


def transparent(mode: str, key, **more) -> Image.Image:
    """Return the decoded PNG of a black image, in which the color ``key`` is transparent."""
    return decode_image(encoded(Image.new(mode, (4, 4)), "PNG", transparency=key, **more))


@pytest.mark.parametrize(
    ("mode", "key"), [("L", 0), ("RGB", (0, 0, 0)), ("I;16", 0), ("P", 0), ("P", b"\0"), ("1", 0)]
)
def test_a_transparent_color_becomes_white(mode, key):
    assert near(transparent(mode, key), (255, 255, 255), (0, 0))


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 0, 0)), ("I;16", 7), ("P", 7)])
def test_other_colors_stay(mode, key):
    assert near(transparent(mode, key), (0, 0, 0), (0, 0))


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA"])
def test_alpha_in_tiff_becomes_white(mode):
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    if mode == "PA":
        pytest.skip("Pillow cannot write it")
    assert near(decode_image(encoded(clear, "TIFF")), (255, 255, 255), (0, 0))


def test_cmyk_is_read_the_right_way_round():
    """Adobe's JPEGs hold it inverted, TIFFs as it is."""
    for kind in ("JPEG", "TIFF"):
        white = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), kind))
        red = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind))
        assert near(white, (255, 255, 255)) and near(red, (255, 0, 0))


def test_libraries_print_nothing(tmp_path):
    """libtiff prints to the file descriptor of stderr, not to Python's."""
    tiff = encoded(Image.effect_noise((64, 64), 80), "TIFF", compression="tiff_lzw")
    (tmp_path / "cut.tif").write_bytes(tiff[:8] + bytes(200) + tiff[208:])
    odd = (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", 4)
        + b"".join(
            struct.pack("<HHLL", tag, 3, 1, value)
            for tag, value in ((256, 4), (257, 4), (258, 16), (277, 65535))
        )
    )
    (tmp_path / "odd.tif").write_bytes(odd + bytes(4))
    (tmp_path / "bomb.png").write_bytes(bomb())
    code = f"""
import pathlib, threading
from clipft.data.images.decode import decode_image
from clipft.data.images.formats import BadImage
def work():
    for path in pathlib.Path({str(tmp_path)!r}).iterdir():
        try:
            decode_image(path.read_bytes())
        except BadImage:
            print("refused")
threads = [threading.Thread(target=work) for _ in range(3)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.count("refused") == 9


def test_long_images_keep_their_aspect():
    assert resize_shorter(plain(size=(100, 1)), 8).size == (800, 8)
    assert resize_shorter(plain(size=(3, 7)), 224).size == (224, 522)


@pytest.mark.parametrize("augmentation", ["none", "simple", "advanced"])
@pytest.mark.parametrize("size", [(64, 64), (300, 40), (40, 300), (1, 1), (500, 500)])
def test_every_augmentation_gives_the_models_square(augmentation, size):
    transform = Transform(augmentation, 64)
    for seed in range(5):
        out = transform(plain(size=size), seed)
        assert out.shape == (3, 64, 64)
        assert out.dtype == torch.uint8


def test_simple_moves_the_image_but_keeps_its_colors():
    transform = Transform("simple", 64)
    colour = torch.tensor([200, 30, 40])[:, None, None]
    assert all((transform(plain(), seed) == colour).all() for seed in range(4))


def test_simple_crops_within_the_padding_and_mirrors_half():
    ramp = np.tile(np.arange(64, dtype=np.uint8)[:, None, None] * 3, (1, 64, 3))
    down, across = Image.fromarray(ramp), Image.fromarray(ramp.transpose(1, 0, 2).copy())
    transform = Transform("simple", 64)
    shifts, mirrored = set(), 0
    for seed in range(400):
        column = transform(down, seed)[0, :, 0].int() // 3
        assert (column.diff() >= 0).all()
        shifts.add(int(column[32]) - 32)
        row = transform(across, seed)[0, 0].int()
        mirrored += bool(row[0] > row[-1])
    pad = round(64 / 14)
    assert shifts == set(range(-pad, pad + 1))
    assert 150 < mirrored < 250


@pytest.mark.parametrize("augmentation", ["simple", "advanced"])
def test_the_seed_alone_decides_and_the_global_generator_is_left_alone(augmentation):
    photo = Image.effect_noise((90, 70), 80).convert("RGB")
    transform = Transform(augmentation, 64)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = transform(photo, 7)
    assert (torch.get_rng_state() == before).all()
    torch.manual_seed(2)
    assert (transform(photo, 7) == first).all()
    assert any((transform(photo, seed) != first).any() for seed in (8, 9, 10))


@needs_images
def test_no_augmentation_is_within_one_step_of_the_models_own_processor():
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(do_normalize=False, do_rescale=False)
    transform = Transform("none", 224)
    for path in sorted(FURNITURE.glob("*.jpg"))[::12]:
        image = Image.open(path).convert("RGB")
        theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
        ours = transform(decode_image(path.read_bytes()), 0)
        assert (ours.int() - theirs.round().int()).abs().max() <= 1, path.name


@pytest.mark.parametrize("augmentation", ["none", "simple", "advanced"])
def test_squashed_images_are_whole_in_the_square(augmentation):
    halves = np.zeros((40, 300, 3), np.uint8)
    halves[:, 150:] = 255
    transform = Transform(augmentation, 64, squashed=True)
    out = transform(Image.fromarray(halves), 3)
    assert out.shape == (3, 64, 64)
    if augmentation != "advanced":
        assert out[:, :, 0].float().mean() != pytest.approx(out[:, :, -1].float().mean(), abs=200)


def test_squashing_is_within_one_step_of_siglips_processor():
    from transformers import SiglipImageProcessor

    processor = SiglipImageProcessor(
        do_normalize=False, do_rescale=False, size={"height": 64, "width": 64}
    )
    image = Image.effect_noise((150, 90), 80).convert("RGB")
    theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
    ours = Transform("none", 64, squashed=True)(image, 0)
    assert (ours.int() - theirs.round().int()).abs().max() <= 1


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(2, 40), st.integers(0, 2**62), st.booleans()
)
@settings(deadline=None)
def test_the_device_shifts_as_a_worker_does(width, height, size, seed, squashed):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(noise)
    cut = torch.empty(3, size, size, dtype=torch.uint8)
    shift = Transform("simple", size, squashed, leave_shift=True).write(image, seed, cut)
    on_device = augment(cut[None], torch.tensor([shift]))[0]
    assert torch.equal(on_device, Transform("simple", size, squashed)(image, seed))


@given(st.integers(2, 40), st.integers(0, 40), st.integers(0, 2**62))
@settings(deadline=None)
def test_simple_is_a_crop_of_the_image_padded_with_its_edges(size, longer, seed):
    """As numpy has it: pad by a fourteenth, crop, mirror half of the time."""
    noise = np.random.default_rng(seed).integers(0, 256, (size + longer, size, 3), np.uint8)
    pad, draw = max(1, round(size / 14)), np.random.default_rng(seed)
    top, left = (int(draw.integers(0, n + 2 * pad, endpoint=True)) for n in (longer, 0))
    padded = np.pad(noise, ((pad, pad), (pad, pad), (0, 0)), "edge")
    crop = padded[top : top + size, left : left + size]
    crop = crop[:, ::-1] if draw.random() < 0.5 else crop
    ours = Transform("simple", size)(Image.fromarray(noise), seed)
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), crop)
