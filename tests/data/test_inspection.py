import base64
import io
import json
import os
import re
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipft.cli.app import run
from clipft.core.errors import StorageError
from clipft.data import duplicates
from clipft.data.duplicates import close_hashes, near_duplicates
from clipft.data.inspection import histogram, leak, near_images, split_facts
from clipft.data.pair_facts import read_facts
from clipft.data.shards.folders import open_pairs
from clipft.report.html import PageImage, write_page
from clipft.report.inspection_page import Inspected, findings_page
from tests.conftest import add
from tests.report.regions import regions


def image_bytes(seed: int, quality: int = 95, side: int = 300) -> bytes:
    """Draw a coarse pattern of its own on white, like a product in a catalogue."""
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
    train = [(image_bytes(i), f"thing {i}") for i in range(20)]
    train += [
        (image_bytes(3), "other words"),
        (image_bytes(4, quality=60), "again"),
        (image_bytes(50), "Thing  5"),
    ]
    train += [(image_bytes(51)[:2000], "broken"), (image_bytes(52, side=40), "long " * 100)]
    write(tmp_path / "train" / "0.tar", train)
    val = [
        (image_bytes(100), "x"),
        (image_bytes(7), "y"),
        (image_bytes(8, quality=60), "z"),
        (image_bytes(101), "thing 9"),
    ]
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


def test_troubles_of_texts_are_counted(tmp_path, capsys):
    captions = [
        *("a plain chair", "Grüner Stuhl", "ÖL & FARBE", "3 < 4", "R&D; lab <3"),
        *("<p>a chair</p>", "Tom &amp; Jerry", "a&#39;b", "<br/>"),
        *("GrÃ¼ner Stuhl", "caf\ufffd", "\x1b[31mred"),
        "長い" * 90,
    ]
    write(tmp_path / "0.tar", [(image_bytes(n), caption) for n, caption in enumerate(captions)])
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        add(tar, "a.jpg", image_bytes(90))
        add(tar, "a.txt", b"Gr\xfcner Stuhl")
        add(tar, "a.json", b"{not json")
        add(tar, "b.jpg", image_bytes(91))
        add(tar, "b.txt", "grÜner stuhl".encode("utf-16"))
        add(tar, "b.json", b"Gr\xfcn")
    args = ["inspect", str(tmp_path), "--model", "tiny"]
    assert run([*args, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)[tmp_path.name]
    assert found["captions_with_html"]["pairs"] == 4
    assert found["captions_with_html"]["examples"][0] == f"{tmp_path.name}/0.tar:5"
    assert found["captions_with_broken_characters"]["pairs"] == 3
    assert found["bad_captions"] == [{"pair": "1.tar:a", "reason": "the caption is not UTF-8 text"}]
    assert found["bad_metadata"] == [
        {"pair": "1.tar:a", "reason": "the metadata is not JSON"},
        {"pair": "1.tar:b", "reason": "the metadata is not UTF-8 text"},
    ]
    assert found["same_caption"] == 2  # Grüner Stuhl, also broken, and in UTF-16
    assert found["captions_cut"] == 1 and 0.8 < found["tokens_lost"] < 0.9
    assert run(args) == 0
    shown = capsys.readouterr().out
    assert "HTML in captions" in shown and "tokens lost by those captions" in shown


def test_against_another_catalogue_and_tables_for_people(catalogue, tmp_path, capsys):
    write(tmp_path / "other" / "0.tar", [(image_bytes(0), "a"), (image_bytes(900), "b")])
    args = ["inspect", str(catalogue / "train"), "--against", str(tmp_path / "other")]
    assert run([*args, "--model", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert "near-duplicate images" in shown
    assert run([*args, "--model", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["against"]["same_photo"] == 1


def test_widths_fit_a_terminal_of_80_columns(catalogue, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["inspect", str(catalogue), "--model", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("highest text -> image R@1/5/10, %" in line for line in lines)


def test_faults_of_image_and_caption_are_told_apart(tmp_path, capsys):
    fine, image = image_bytes(1), Image.new("RGB", (30, 40), (200, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pairs = [(fine, "a"), (fine[:900], " "), (fine[:900], "b"), (image_bytes(2), "\ufeff \n")]
    write(tmp_path / "0.tar", [*pairs, (buffer.getvalue(), "small")])
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        add(tar, "alone.jpg", fine)
    assert run(["inspect", str(tmp_path), "--model", "tiny", "--json", "--num-workers", "0"]) == 0
    found = json.loads(capsys.readouterr().out)[tmp_path.name]
    assert (found["pairs"], found["usable"]) == (5, 2)
    assert [b["pair"] for b in found["broken"]] == ["0.tar:1", "0.tar:2"]
    assert found["bad_captions"] == [
        {"pair": "0.tar:1", "reason": "empty caption"},
        {"pair": "0.tar:3", "reason": "empty caption"},
    ]
    assert found["no_pairs"] == {"no caption": 1}
    assert found["kinds"] == {"jpeg": 1, "png": 1}
    stored = sum(len(data) + len(caption.encode()) for data, caption in pairs)
    assert found["bytes"] == stored + len(buffer.getvalue()) + len("small")
    assert found["smallest"] == [f"{tmp_path.name}/0.tar:4"]


def test_labels_are_counted_by_the_first_field_that_is_used(tmp_path):
    values = [{"category": None, "type": "sofa"}, {"type": " sofa "}, {"type": "lamp"}, {"type": 3}]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key, value in enumerate(values):
            add(tar, f"{key}.jpg", image_bytes(key))
            add(tar, f"{key}.txt", b"words")
            add(tar, f"{key}.json", json.dumps(value).encode())
    pairs = open_pairs(tmp_path)
    facts = read_facts(pairs, quiet)
    found = split_facts(pairs, facts, [], 77, 224, near_images(facts, 4)).categories
    assert found == {"field": "type", "labelled": 3, "counts": {"sofa": 2, "lamp": 1}}


def test_groups_name_what_links_them_and_the_upper_bound_follows(tmp_path):
    again = [
        (image_bytes(1), "one"),
        (image_bytes(1, quality=60), "two"),
        (image_bytes(3), "TWO"),
        (image_bytes(4), "x"),
    ]
    many = [(image_bytes(10 + i), "the same") for i in range(7)]
    pairs = write(tmp_path / "0.tar", [*again, *many, (image_bytes(4), "y")])
    facts = read_facts(pairs, quiet)
    found = split_facts(pairs, facts, [], 77, 224, near_images(facts, 4))
    assert (found.groups, found.largest_group) == (3, 7)
    assert [(g["size"], g["shares"]) for g in found.duplicates] == [
        (3, ["near photo", "caption"]),  # one - two by look, two - TWO by words
        (2, ["photo"]),
        (7, ["caption"]),
    ]
    assert found.duplicates[1]["pairs"] == ["0.tar:3", "0.tar:11"]
    assert found.ceiling["text_to_image"] == {"r@1": 5 / 12, "r@5": 10 / 12, "r@10": 1.0}
    assert found.ceiling["image_to_text"] == {"r@1": 11 / 12, "r@5": 1.0, "r@10": 1.0}


def test_many_copies_of_an_image_are_compared_once(tmp_path, monkeypatch):
    copies = [(image_bytes(1), f"copy {i}") for i in range(60)] + [
        (image_bytes(1, quality=60), "near")
    ]
    pairs = write(tmp_path / "0.tar", copies)
    compared = []
    close = duplicates.close_hashes
    monkeypatch.setattr(
        duplicates, "close_hashes", lambda h, near: compared.append(len(h)) or close(h, near)
    )
    facts = read_facts(pairs, quiet)
    found = split_facts(pairs, facts, [], 77, 224, near_images(facts, 4))
    assert compared == [2]
    assert (found.same_photo, found.near_photo, found.largest_group) == (59, 61, 61)


def test_matches_name_both_sides(catalogue):
    train, val = (
        read_facts(open_pairs(catalogue / name), quiet, 1, name) for name in ("train", "val")
    )
    assert leak(val, train, near_images([*val, *train], 4)).matches == [
        {"pair": "val/0.tar:1", "other": "train/0.tar:7", "shares": "photo"},
        {"pair": "val/0.tar:2", "other": "train/0.tar:8", "shares": "near photo"},
        {"pair": "val/0.tar:3", "other": "train/0.tar:9", "shares": "caption"},
    ]


def test_the_page_loads_no_other_file(catalogue, tmp_path, capsys):
    evil = [(image_bytes(200 + i // 2), f'<script>alert({i})</script> & "{i}"') for i in range(90)]
    write(catalogue / "train" / "1.tar", evil)
    target = tmp_path / "new" / "page.html"
    args = ["inspect", str(catalogue), "--model", "tiny", "--html", str(target), "--json"]
    assert run(args) == 0
    json.loads(capsys.readouterr().out)
    page = target.read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;alert(0)" in page
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]+", "", page))
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    images = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert 6 < len(images) <= 60
    assert len(images) == page.count("<img")
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for data in images]
    assert {max(size) for size in sizes} == {96, 40}
    for finding in ("train/0.tar:23", "0.tar:23", "Smaller than the model", "val/0.tar:2"):
        assert (finding in page) == (finding != "train/0.tar:23")
    names = regions(page)
    assert len(names) == len(set(names)) and "Validation pairs that are also in training" in names
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]


def test_a_page_has_sixty_images_at_most_and_some_of_each_kind():
    fetched = []

    def read_image(place):
        fetched.append(place)
        return PageImage(place, "words", b"jpeg")

    group = {"size": 40, "shares": ["photo"], "pairs": [f"again {i}" for i in range(12)]}
    split = {"broken": [], "bad_captions": [], "no_pairs": {}, "categories": {}}
    split |= {"duplicates": [group] * 24, "smallest": [f"small {i}" for i in range(12)]}
    split |= {"shorter_side_counts": [[200, 299, 8]], "caption_token_counts": []}
    matches = [{"pair": f"one {i}", "other": f"other {i}", "shares": "photo"} for i in range(12)]
    inspected = Inspected(
        title="x",
        verdict="This data can be trained on.",
        findings=[],
        tables=[],
        splits={"a": split, "b": split},
        leaks={"leak": {"matches": matches}},
        samples={"a": [f"sample {i}" for i in range(6)], "b": []},
        image_size=64,
        context=77,
    )
    page = findings_page(inspected, read_image)
    assert len(fetched) == page.count("<img") <= 60
    kinds = {place.split()[0] for place in fetched}
    assert kinds == {"again", "small", "one", "other", "sample"}
    assert "200 to 299" in page and "This data can be trained on." in page


def test_a_page_that_cannot_be_written_leaves_the_previous_one(tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    write_page(target, "former")

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="No space left"):
        write_page(target, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert target.read_text() == "former"


def test_missing_data_is_reported_before_a_model_is_asked_for(tmp_path, capsys):
    assert run(["inspect", str(tmp_path), "--model", str(tmp_path / "no-model")]) == 3
    assert "no .tar" in capsys.readouterr().err


def test_a_missing_folder_and_an_empty_folder(tmp_path, capsys):
    assert run(["inspect", str(tmp_path / "none"), "--model", "tiny"]) == 3
    assert "no folder" in capsys.readouterr().err


@given(st.lists(st.integers(0, 10**6)))
def test_a_histogram_counts_every_value_once_in_its_range(values):
    ranges = histogram(values)
    assert len(ranges) <= 12 and sum(count for _, _, count in ranges) == len(values)
    for first, last, count in ranges:
        assert count == sum(first <= value <= last for value in values)
    assert [r[0] for r in ranges[1:]] == [r[1] + 1 for r in ranges[:-1]]
    assert not ranges or (ranges[0][2] and ranges[-1][2])


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
    blocks = close_hashes(np.array(rows, np.uint64), near)
    found = {
        pair for one, other in blocks for pair in zip(one.tolist(), other.tolist(), strict=True)
    }
    assert sorted(found) == wanted


def test_two_colors_of_one_product_are_not_near_duplicates(tmp_path):
    def swatch(colour):
        image = Image.new("RGB", (300, 300), (255, 255, 255))
        image.paste(Image.new("RGB", (200, 100), colour), (50, 100))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    pairs = [(swatch((90, 60, 30)), "walnut"), (swatch((200, 170, 130)), "oak")]
    facts = read_facts(write(tmp_path / "0.tar", pairs), quiet)
    assert not near_duplicates([fact.perceptual_hash for fact in facts], 8)
    assert leak(facts[:1], facts[1:], near_images(facts, 8)).near_photo == 0


def test_the_caption_is_what_training_would_take(catalogue, capsys):
    more = ["--model", "tiny", "--caption", "always {caption}", "--json"]
    assert run(["inspect", str(catalogue), *more]) == 0
    longer = json.loads(capsys.readouterr().out)["train"]["caption_tokens"]
    assert run(["inspect", str(catalogue), "--model", "tiny", "--json"]) == 0
    shorter = json.loads(capsys.readouterr().out)["train"]["caption_tokens"]
    assert longer["max"] > shorter["max"]


def test_a_page_that_cannot_be_written_is_found_before_the_scan(catalogue, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.touch()
    page = ["--html", str(blocked / "page.html")]
    assert run(["inspect", str(catalogue), "--model", "tiny", *page]) == 4
    printed = capsys.readouterr()
    assert "cannot write" in printed.err
    assert "Reading" not in printed.err


def test_a_misspelt_field_is_an_error_and_not_a_catalogue_of_empty_captions(catalogue, capsys):
    assert run(["inspect", str(catalogue), "--model", "tiny", "--caption", "{colour}"]) == 2
    assert "no pair has a field 'colour'" in capsys.readouterr().err


def test_all_captions_of_a_pair_are_inspected(tmp_path, capsys):
    train = [
        (image_bytes(0), "a red chair\nsomething to sit on\n"),
        (image_bytes(1), "a blue chair\n\nSomething to sit on"),
        (image_bytes(2), "word " * 100),
    ]
    write(tmp_path / "train" / "0.tar", train)
    write(tmp_path / "val" / "0.tar", [(image_bytes(3), "a lamp\na blue chair")])
    assert run(["inspect", str(tmp_path), "--model", "tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    train = found["train"]
    assert (train["pairs"], train["captions"], found["val"]["captions"]) == (3, 5, 2)
    assert (train["same_caption"], train["captions_cut"], train["groups"]) == (1, 1, 1)
    assert train["duplicates"][0]["shares"] == ["caption"]
    assert train["ceiling"]["text_to_image"]["r@1"] == pytest.approx(4 / 5)
    (match,) = found["val_in_train"]["matches"]
    assert match == {"pair": "val/0.tar:0", "other": "train/0.tar:1", "shares": "caption"}
    assert run(["inspect", str(tmp_path), "--model", "tiny", "--caption-lines", "joined"]) == 0
    assert not re.search(r"^captions ", capsys.readouterr().out, re.MULTILINE)
