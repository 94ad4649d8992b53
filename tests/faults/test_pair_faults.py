"""Faults of single images and captions, and odd numbers of pairs (17, 18, 20, 21).

Tested elsewhere: each kind of image on its own, 16-bit and float greys, the bomb's header
(``data/test_images``); each kind of caption on its own (``data/captions/test_captions``); too many
broken images and one broken image in a run (``e2e/test_bad_input``); micro-batches of bad
pairs only (``data/test_loader``).
"""

import struct
import zlib
from functools import cache

import numpy as np
import pytest
from PIL import Image

from clipft.cli.app import run
from clipft.data.images.decode import decode_image
from clipft.data.loader import LoaderOptions, evaluation_batches, training_batches
from clipft.data.order import EpochPlan, Position
from clipft.data.shards.folders import open_pairs
from tests.conftest import write_shard
from tests.faults.helpers import (
    catalogue,
    encoded,
    good,
    one_error,
    skipped,
    train,
    trained_pairs,
    write_tar,
)
from tests.inputs import encoder, preprocessing

SIDE = 64
RED, GREEN, BLUE, GREY = (200, 40, 40), (40, 160, 60), (30, 60, 200), (128, 128, 128)
CORNERS = (RED, GREEN, BLUE, GREY)
WHITE = (255, 255, 255)
ROTATIONS = {  # EXIF orientation -> how the stored image differs from the upright one
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def four(*colours, side: int = 512) -> Image.Image:
    """Draw four squares: upper left, upper right, lower left, lower right."""
    image = Image.new("RGB", (2, 2))
    image.putdata(colours or CORNERS)
    return image.resize((side, side), Image.Resampling.NEAREST)


def chunk(name: bytes, body: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + crc


def png(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    """Encode a PNG that Pillow cannot write itself."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def deep_rgb() -> bytes:
    values = np.asarray(four(side=64)).astype(">u2") * 257
    return png(64, 64, 16, 2, b"".join(b"\0" + row.tobytes() for row in values))


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(four().transpose(ROTATIONS[orientation]), "JPEG", exif=exif, quality=95)


def see_through() -> Image.Image:
    """Make the upper left square transparent, with black as its hidden color."""
    image = four((0, 0, 0), GREEN, BLUE, GREY).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 256, 256))
    return image


def animated(kind: str, **more) -> bytes:
    black = Image.new("RGB", (512, 512))
    return encoded(four(), kind, save_all=True, append_images=[black, black], duration=100, **more)


def greys(image: Image.Image) -> tuple[tuple[int, int, int], ...]:
    return tuple(
        (image.convert("L").getpixel(at),) * 3 for at in ((0, 0), (511, 0), (0, 511), (511, 511))
    )


def images() -> dict[str, tuple[bytes, tuple[tuple[int, ...], ...]]]:
    """Return name -> (bytes, the expected colors of the four squares)."""
    image, through = four(), (WHITE, GREEN, BLUE, GREY)
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    kinds = {
        "plain.jpg": (encoded(image, "JPEG", quality=95), CORNERS),
        "progressive.jpeg": (encoded(image, "JPEG", progressive=True, quality=95), CORNERS),
        "cmyk.JPG": (encoded(image.convert("CMYK"), "JPEG", quality=95), CORNERS),
        "grey.jpg": (encoded(image.convert("L"), "JPEG"), greys(image)),
        "jpeg.named.png": (encoded(image, "JPEG", quality=95), CORNERS),
        "palette.png": (encoded(image.quantize(4), "PNG"), CORNERS),
        "rgba.PNG": (encoded(see_through(), "PNG"), through),
        "palette-through.png": (encoded(see_through().quantize(8), "PNG"), through),
        "grey-16.png": (encoded(deep, "PNG"), greys(image)),
        "rgb-16.png": (deep_rgb(), CORNERS),
        "moving.png": (animated("PNG"), CORNERS),
        "moving.gif": (animated("GIF"), CORNERS),
        "moving.webp": (animated("WEBP", lossless=True), CORNERS),
        "lossy.webp": (encoded(see_through(), "WEBP", quality=95), through),
        "bitmap.bmp": (encoded(image, "BMP"), CORNERS),
        "cmyk.tiff": (encoded(image.convert("CMYK"), "TIFF"), CORNERS),
        "grey-16.tif": (encoded(deep, "TIFF"), greys(image)),
        "dot.jpg": (encoded(Image.new("RGB", (1, 1), RED), "JPEG"), (RED,) * 4),
        "strip.png": (encoded(Image.new("RGB", (600, 6), BLUE), "PNG"), (BLUE,) * 4),
    }
    return kinds | {f"exif-{o}.jpg": (rotated(o), CORNERS) for o in ROTATIONS}


@cache
def broken() -> dict[str, tuple[bytes, str]]:
    """Return name -> (bytes, the start of the reason)."""
    photo = Image.effect_noise((300, 300), 90).convert("RGB")
    whole = {kind: encoded(photo, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF")}
    cut = {f"cut.{k.lower()}": (data[: len(data) // 2], "") for k, data in whole.items()}
    return cut | {
        "cut-late.jpg": (
            whole["JPEG"][: int(len(whole["JPEG"]) * 0.97)],
            "image file is truncated",
        ),
        "cut-early.jpg": (whole["JPEG"][:30], ""),
        "zero.jpg": (b"", "an empty file"),
        "zeros.jpg": (bytes(5000), "not an image"),
        "page.jpg": (b"<!DOCTYPE html><html>404</html>", "not an image"),
        "bomb.png": (
            png(30_000, 30_000, 1, 0, bytes(30_000 * 3751)),
            "more than 80,000,000 pixels are too many",
        ),
        "small-bomb.png": (
            png(10_000, 9_000, 1, 0, bytes(9_000 * 1251)),
            "10000x9000 pixels are too many",
        ),
        "long.jpg": (encoded(Image.new("RGB", (20_000, 1)), "JPEG"), "20000x1 is more than 100"),
        "tall.png": (encoded(Image.new("RGB", (1, 101)), "PNG"), "1x101 is more than 100"),
        "program.jpg": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
            "EPS images are not read",
        ),
        "nan.tiff": (
            encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"),
            "some pixel values are NaN or infinite",
        ),
    }


CAPTIONS = {  # caption -> the text that the model is to read
    "bom": (b"\xef\xbb\xbfa chair", "a chair"),
    "nul": (b"a\x00chair\x00", "achair"),
    "utf-16": ("a chair".encode("utf-16"), "a chair"),
    "crlf": (b"a chair\r\n", "a chair"),
    "lines": (b"a chair\r\nan oak chair\r\n", "a chair"),  # two captions; the first is taken
    "10000-words": (b"chair " * 10_000, "chair " * 100),
    "one-word-of-10000": (b"x" * 10_000, "x" * 10_000),
    "emoji": ("a 🪑 chair 👩‍🦽".encode(), "a 🪑 chair 👩‍🦽"),
    "right-to-left": ("كرسي خشبي \u202eabc".encode(), "كرسي خشبي \u202eabc"),
    "end-of-text": (
        b"a <|endoftext|> chair <|startoftext|>",
        "a <|endoftext|> chair <|startoftext|>",
    ),
    "half-end-of-text": (b"a <\x00|endoftext|>", "a <|endoftext|>"),
}
NOT_TEXT = {"latin-1": b"caf\xe9 table", "half-utf-16": b"\xff\xfea"}
EMPTY = {"empty": b"", "blank": b" \t\r\n", "nuls": b"\x00\x00", "only-bom": b"\xef\xbb\xbf"}


def squares(pixels: np.ndarray) -> np.ndarray:
    """Return the centers of the four squares of an image [S, S, 3]: int [4, 3]."""
    near, far = pixels.shape[0] // 4, pixels.shape[0] * 3 // 4
    return pixels[[near, near, far, far], [near, far, near, far]].astype(int)


def loaded(folder):
    """Return key -> (image [S, S, 3], token ids) of usable pairs; key -> reason of others."""
    dataset, pairs, reasons = open_pairs(folder), {}, {}
    for batch in evaluation_batches(dataset, preprocessing("none", SIDE), 1, LoaderOptions()):
        reasons |= {bad.key: bad.reason for bad in batch.skipped}
        for number, pixels, ids in zip(
            batch.numbers, batch.pixel_values, batch.input_ids, strict=True
        ):
            pairs[dataset[number].key] = (pixels.permute(1, 2, 0).numpy(), ids)
    return pairs, reasons


def test_every_kind_of_image_looks_as_it_should(tmp_path):
    wanted = images()
    members = [
        member
        for name, (data, _) in wanted.items()
        for member in ((f"{name}_.{name.rpartition('.')[2]}", data), (f"{name}_.txt", b"text"))
    ]
    write_tar(tmp_path / "a.tar", members)
    pairs, reasons = loaded(tmp_path)
    assert reasons == {}
    for name, (data, colours) in wanted.items():
        seen = squares(pairs[f"{name}_"][0])
        assert np.abs(seen - np.array(colours)).max() <= 8, name
        reduced = decode_image(data, at_least=SIDE)  # as in training
        seen = squares(np.asarray(reduced.resize((SIDE, SIDE))))
        assert np.abs(seen - np.array(colours)).max() <= 8, f"{name} reduced"


def test_every_kind_of_caption_reads_as_it_should(tmp_path):
    image = good([1])[0][1]
    members = []
    for name, (data, _) in CAPTIONS.items():
        members += [(f"{name}.jpg", image), (f"{name}.txt", data)]
    write_tar(tmp_path / "a.tar", members)
    pairs, reasons = loaded(tmp_path)
    assert reasons == {}
    for name, (_, text) in CAPTIONS.items():
        ids = pairs[name][1]
        assert ids.tolist() == encoder()([text])[0].ids, name
        assert ids.tolist().count(encoder().eos_token_id) == 1, name
        assert ids[-1] == encoder().eos_token_id, name


def test_a_run_over_every_broken_pair_lists_each_with_its_reason(tmp_path, capsys):
    image, caption = (data for _, data in good([1]))
    members = good(range(12))
    for name, (data, _) in broken().items():
        members += [(f"{name}_.{name.rpartition('.')[2]}", data), (f"{name}_.txt", caption)]
    for name, data in EMPTY.items():
        members += [(f"{name}.jpg", image), (f"{name}.txt", data)]
    for name, data in NOT_TEXT.items():
        members += [(f"{name}.jpg", image), (f"{name}.txt", data)]
    members += [("no-caption.jpg", image), ("no-image.txt", caption)]
    catalogue(tmp_path, members)
    assert train(tmp_path, "--max-bad", "1") == 0
    reasons = {key: reason for (_, key), reason in skipped(tmp_path).items()}
    starts = {f"{name}_": start for name, (_, start) in broken().items()}
    starts |= dict.fromkeys(EMPTY, "empty caption")
    starts |= {"latin-1": "the caption is not UTF-8", "half-utf-16": "the caption is not UTF-16"}
    starts |= {"no-caption": "no caption", "no-image": "no image"}
    assert reasons.keys() == starts.keys()
    assert [(key, r) for key, r in reasons.items() if not r or not r.startswith(starts[key])] == []
    assert not any("0x7" in reason for reason in reasons.values())  # no object in memory
    assert trained_pairs(tmp_path) == 12
    said = capsys.readouterr().err
    assert f"note: skipped {len(starts) - 2} bad pairs" in said
    assert "note: skipped 2 members of the train shards that are not pairs" in said


def test_too_many_broken_validation_pairs_end_with_3_before_training(tmp_path, capsys):
    catalogue(tmp_path, good(range(2)))
    write_shard(tmp_path / "val" / "00000.tar", range(1000, 1010), bad=[1003, 1007])
    assert train(tmp_path) == 3
    error, hint = one_error(capsys)
    assert error.startswith("2 of 10 validation pairs could not be used, more than --max-bad 0.01")
    assert "01003 in 00000.tar" in error
    assert "--max-bad" in hint
    assert not (tmp_path / "out" / "dual_lora_checkpoint.pt").exists()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_with_a_tenth_of_the_pairs_bad_the_others_are_seen_once_an_epoch(
    tmp_path, monkeypatch, workers
):
    monkeypatch.setattr("os.cpu_count", lambda: 8)  # 3 workers are 3 everywhere
    bad = set(range(4, 100, 10))
    write_shard(tmp_path / "only.tar", range(100), bad)  # fewer shards than workers
    dataset, plan = open_pairs(tmp_path), EpochPlan(100, 32, 5, seed=1)
    seen, skipped_numbers = {0: [], 1: []}, {0: [], 1: []}
    for step in training_batches(
        dataset, preprocessing("none", SIDE), plan, Position(), 2, LoaderOptions(workers)
    ):
        seen[step.epoch] += [n for batch in step.micro_batches for n in batch.numbers]
        skipped_numbers[step.epoch] += [int(skipped.key) for skipped in step.skipped]
    for epoch in (0, 1):
        assert sorted(seen[epoch]) == sorted(set(range(100)) - bad)
        assert sorted(skipped_numbers[epoch]) == sorted(bad)


def test_one_pair_to_train_on_and_one_to_validate_on(tmp_path, capsys):
    catalogue(tmp_path, good([1]), val=1)
    assert train(tmp_path, "--num-workers", "2") == 0
    said = capsys.readouterr().err
    assert "the effective batch of 32 is larger than the 1 training pairs" in said


def test_a_micro_batch_of_1_and_a_last_pair_that_joins_the_step_before(tmp_path, capsys):
    catalogue(tmp_path, good(range(5)), val=2)
    assert train(tmp_path, "--micro-batch-size", "1", "--effective-batch-size", "4") == 0
    assert trained_pairs(tmp_path) == 5
    assert "the last step of each epoch has 5 pairs" in capsys.readouterr().err


def test_an_effective_batch_of_1_is_refused(capsys):
    assert run(["train", "--effective-batch-size", "1"]) == 2
    assert "--effective-batch-size" in one_error(capsys)[0]


def with_bad(folder, train_pairs, bad_train, val_pairs=4, bad_val=()):
    write_shard(folder / "train" / "00000.tar", range(train_pairs), bad_train)
    write_shard(folder / "val" / "00000.tar", range(1000, 1000 + val_pairs), bad_val)


def test_a_bad_pair_counts_once_whatever_the_epochs(tmp_path):
    with_bad(tmp_path, 8, [5])
    assert train(tmp_path, "--epochs", "2") == 0  # one is allowed in one epoch, why not in two
    assert list(skipped(tmp_path)) == [("00000.tar", "00005")]


def test_a_bad_validation_pair_is_listed(tmp_path):
    with_bad(tmp_path, 4, [], 4, [1002])
    assert train(tmp_path) == 0
    assert list(skipped(tmp_path)) == [("00000.tar", "01002")]


def test_a_step_of_bad_pairs_only_is_a_data_error(tmp_path, capsys):
    with_bad(tmp_path, 4, range(4))
    assert train(tmp_path) == 3
    assert "--max-bad" in one_error(capsys)[0]


def test_a_step_of_bad_pairs_only_is_explained_even_if_bad_pairs_are_allowed(tmp_path, capsys):
    with_bad(tmp_path, 4, range(4))
    assert train(tmp_path, "--max-bad", "1") == 3
    error, _ = one_error(capsys)
    assert "none of the 4 pairs of step 1 can be used" in error
    assert "more than" not in error
    assert len(skipped(tmp_path)) == 4


def test_no_readable_validation_pair_is_a_data_error(tmp_path, capsys):
    with_bad(tmp_path, 4, [], 1, [1000])
    assert train(tmp_path) == 3
    assert "00000.tar" in one_error(capsys)[0]
