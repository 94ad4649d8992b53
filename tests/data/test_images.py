import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipft.data.augmentation import Transform, augment
from clipft.data.images import BadImage, decode_image, resize_shorter

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


def bomb() -> bytes:
    """Make the header of a 30,000 x 30,000 PNG with next to no data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + crc

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
