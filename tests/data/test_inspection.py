import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipft.cli.app import run
from clipft.data.inspection import leak, near_pairs, near_photos, read_facts
from clipft.data.shards import open_pairs
from tests.conftest import add


def photo(seed: int, quality: int = 95, side: int = 300) -> bytes:
    """A coarse pattern of its own on white, like a catalogue's."""
    draw = np.random.default_rng(seed)
    pattern = Image.fromarray(draw.integers(0, 256, (6, 6, 3), np.uint8)).resize((200, 200))
    image = Image.new("RGB", (300, 300), (255, 255, 255))
    image.paste(pattern, (50, 50))
    buffer = io.BytesIO()
    image.resize((side, side)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write(path, pairs):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, (image, caption) in enumerate(pairs):
            add(tar, f"{key}.jpg", image)
            add(tar, f"{key}.txt", caption.encode())
    return open_pairs(path.parent)


def quiet(done, total):
    return None


@pytest.fixture
def catalogue(tmp_path):
    train = [(photo(i), f"thing {i}") for i in range(20)]
    train += [(photo(3), "other words"), (photo(4, quality=60), "again"), (photo(50), "Thing  5")]
    train += [(photo(51)[:2000], "broken"), (photo(52, side=40), "long " * 100)]
    write(tmp_path / "train" / "0.tar", train)
    val = [(photo(100), "x"), (photo(7), "y"), (photo(8, quality=60), "z"), (photo(101), "thing 9")]
    write(tmp_path / "val" / "0.tar", val)
    return tmp_path


def test_every_finding_is_counted(catalogue, capsys):
    assert run(["inspect", str(catalogue), "--model", "tiny", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    train = found["train"]
    assert (train["pairs"], train["usable"]) == (25, 24)
    assert [b["pair"] for b in train["broken"]] == ["0.tar:23"]
    assert "truncated" in train["broken"][0]["reason"]
    assert "broken in train: 0.tar:23" in printed.err
    assert train["kinds"] == {"jpeg": 24}
    assert train["shorter_side"] == {"min": 40, "median": 300, "max": 300}
    assert train["smaller_than_model"] == 1
    assert train["captions_cut"] == 1
    assert (train["same_photo"], train["near_photo"], train["same_caption"]) == (1, 2, 1)
    assert train["largest_group"] == 2
    assert train["ceiling"]["text_to_image"] == {"r@1": 23 / 24, "r@5": 1.0, "r@10": 1.0}
    assert train["ceiling"]["image_to_text"]["r@1"] == 23 / 24
    shared = found["val_in_train"]
    assert (shared["same_photo"], shared["near_photo"], shared["same_caption"]) == (1, 1, 1)
    assert shared["examples"] == ["0.tar:1", "0.tar:2", "0.tar:3"]


def test_against_another_catalogue_and_tables_for_people(catalogue, tmp_path, capsys):
    write(tmp_path / "other" / "0.tar", [(photo(0), "a"), (photo(900), "b")])
    args = ["inspect", str(catalogue / "train"), "--against", str(tmp_path / "other")]
    assert run([*args, "--model", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert "photos with a near-identical one" in shown
    assert run([*args, "--model", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["against"]["same_photo"] == 1


def test_nothing_there(tmp_path, capsys):
    assert run(["inspect", str(tmp_path / "none"), "--model", "tiny"]) == 3
    assert "no folder" in capsys.readouterr().err


HASHES = st.lists(st.integers(0, 2**64 - 1), max_size=12)
FLIPS = st.lists(
    st.tuples(st.integers(0, 11), st.sets(st.integers(0, 63), max_size=9)), max_size=12
)


@given(HASHES, FLIPS, st.integers(0, 8))
def test_near_pairs_misses_none_and_makes_up_none(hashes, flips, near):
    rows = list(hashes)
    for at, bits in flips:
        if at < len(hashes):
            rows.append(hashes[at] ^ sum(1 << bit for bit in bits))
    wanted = [
        (i, j)
        for i in range(len(rows))
        for j in range(i + 1, len(rows))
        if (rows[i] ^ rows[j]).bit_count() <= near
    ]
    assert near_pairs(np.array(rows, np.uint64), near) == wanted


def test_colours_of_one_product_are_not_the_same_photo(tmp_path):
    def swatch(colour):
        image = Image.new("RGB", (300, 300), (255, 255, 255))
        image.paste(Image.new("RGB", (200, 100), colour), (50, 100))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    pairs = [(swatch((90, 60, 30)), "walnut"), (swatch((200, 170, 130)), "oak")]
    facts = read_facts(write(tmp_path / "0.tar", pairs), quiet)
    assert not near_photos(facts, 8)
    assert leak(facts[:1], facts[1:], 8).near_photo == 0
