"""What pack takes, inspection, training and search take as well, whatever the files are called."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipft.data.inspection import split_facts
from clipft.data.loader import LoaderOptions, evaluation_batches
from clipft.data.pair_facts import read_facts
from clipft.data.shards.folders import open_pairs
from clipft.search.images import open_images
from tests.data.packing.pack_helpers import packed
from tests.data.test_images import BROKEN_EXIF, chunk, png_with
from tests.inputs import preprocessing

CASES = Path(__file__).parents[2] / ".." / "shared" / "cases"


def image(kind: str, **more: object) -> bytes:
    """Return noise in a format; equal noise would be a duplicate, so its size depends on it."""
    noise = np.random.default_rng(len(kind) + len(more)).integers(0, 256, (60, 80, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind, **more)
    return buffer.getvalue()


def dark() -> bytes:
    """Return a PNG of 16 bits, 12 of which are used."""
    buffer = io.BytesIO()
    ramp = np.linspace(0, 4095, 4800).astype(np.uint16).reshape(60, 80)
    Image.fromarray(ramp).save(buffer, "PNG")
    return buffer.getvalue()


TAKEN = {
    "a.jfif": image("JPEG"),
    "b.avif": image("AVIF"),
    "c.jpg": image("AVIF", quality=30),
    "d.jp2": image("JPEG2000"),
    "e": image("JPEG", quality=50),
    "f.JPE": image("JPEG", quality=60),
    "g.ppm": image("PPM"),
    "h.png": png_with(chunk(b"zTXt", b"a\0\0" + b"x")),
    "i.jpg": image("JPEG", quality=70, exif=BROKEN_EXIF["a fraction over zero"]),
    "j.png": dark(),
}
REFUSED = {
    "k.heic": (b"\0\0\0\x18ftypheic" + bytes(200), "damaged or unusual HEIC data"),
    "l.jpg": (b"<html>404</html>", "not an image but a web page"),
    "m.png": (b"8BPS", "not an image"),
}


@pytest.fixture
def raw(tmp_path):
    for name, data in {**TAKEN, **{name: data for name, (data, _) in REFUSED.items()}}.items():
        path = tmp_path / "raw" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(f"thing {name}")
    return tmp_path / "raw"


@pytest.mark.parametrize("options", [{}, {"near": -1}, {"near": -1, "check": True}, {"size": 32}])
def test_pack_takes_images_by_their_bytes(raw, tmp_path, options):
    pytest.importorskip("pillow_heif")
    result = packed(raw, tmp_path / "out", val_share=0, **options)
    assert result.skipped == {reason: 1 for _, reason in REFUSED.values()}
    assert result.train_pairs == len(TAKEN)


def test_inspection_training_and_search_take_what_pack_takes(raw, tmp_path):
    packed(raw, tmp_path / "out", val_share=0)
    pairs = open_pairs(tmp_path / "out" / "train")
    facts = read_facts(pairs, lambda done, total: None, workers=2)
    assert [fact.broken for fact in facts] == [""] * len(TAKEN)
    figures = split_facts(pairs, facts, [], 77, 32, [])
    assert figures.more_than_8_bits == 1
    assert figures.kinds == {"jpeg": 4, "avif": 2, "png": 2, "jpeg2000": 1, "ppm": 1}
    batches = evaluation_batches(pairs, preprocessing("none", 32), 4, LoaderOptions())
    assert [len(batch) for batch in batches] == [4, 4, 2]
    for folder in (tmp_path / "out", raw):
        found = [part.read(n).key for part in open_images(folder) for n in range(part.count)]
        assert len(found) == len(TAKEN) + (len(REFUSED) if folder == raw else 0)


@pytest.mark.parametrize(
    ("case", "pairs", "skipped"),
    [
        ("01-broken-exif/photos", 4, {}),
        ("15-other-endings/only", 8, {}),
        ("15-other-endings/photos", 18, {"damaged or unusual HEIC data": 2}),
    ],
)
def test_cases_that_went_wrong(case, pairs, skipped, tmp_path):
    source = CASES / case
    if not source.is_dir():
        pytest.skip("the cases are not here; their inputs are made above")
    result = packed(source, tmp_path / "out", val_share=0)
    assert (result.train_pairs, result.skipped) == (pairs, skipped)
