"""Layouts as data sets come in: names of splits, tables beside images, COCO, Flickr, links."""

import json
import shutil

import pytest
from PIL import Image

from clipft.cli.app import run
from clipft.core.errors import DataError
from clipft.data.shards.folders import open_pairs
from clipft.data.shards.splits import split_named
from tests.data.packing.pack_helpers import metadata_of, packed, pairs_of, pattern, write_pair
from tests.data.packing.test_sources import png, write_table


def captions(folder):
    """The captions of the pairs in the shards of a folder, sorted."""
    return sorted(caption.decode() for _, caption in pairs_of(folder))


def write_pairs(folder, numbers, name="p{}.png"):
    for number in numbers:
        write_pair(folder / name.format(number), number, f"thing {number}")


def write_images(folder, numbers, name="p{}.png"):
    for number in numbers:
        write_pair(folder / name.format(number), number, None)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[(name, "train") for name in ("train", "Train", "training", "train2017")],
        *[(name, "val") for name in ("val", "validation", "valid", "dev", "VAL", "val2014")],
        *[(name, "test") for name in ("test", "Testing", "test2015")],
        *[(name, "") for name in ("tests", "trainers", "values", "latest", "val12", "")],
    ],
)
def test_names_of_splits_are_known(name, split):
    assert split_named(name) == split


@pytest.mark.parametrize("val", ["val", "validation", "valid", "dev", "Validation"])
def test_the_folders_of_a_source_are_its_splits(tmp_path, val):
    raw = tmp_path / "raw"
    write_pairs(raw / "train", range(12))
    write_pairs(raw / val, range(20, 24))
    write_pairs(raw / "test", range(30, 33))
    result = packed(raw, tmp_path / "out")
    assert (result.train_pairs, result.val_pairs, result.test_pairs) == (12, 4, 3)
    assert captions(tmp_path / "out" / "val") == [f"thing {n}" for n in range(20, 24)]
    assert captions(tmp_path / "out" / "test") == [f"thing {n}" for n in range(30, 33)]


def test_test_pairs_are_never_trained_on(tmp_path):
    """Without a train folder as well, and however deep the folder is."""
    write_pairs(tmp_path / "raw" / "chairs", range(20))
    write_pairs(tmp_path / "raw" / "chairs" / "test", range(30, 33))
    result = packed(tmp_path / "raw", tmp_path / "out", val_share=0.2)
    assert (result.train_pairs, result.val_pairs, result.test_pairs) == (16, 4, 3)
    assert captions(tmp_path / "out" / "test") == ["thing 30", "thing 31", "thing 32"]


def test_pairs_beside_the_folders_of_the_splits_are_skipped(tmp_path):
    write_pairs(tmp_path / "raw" / "train", range(12))
    write_pairs(tmp_path / "raw" / "unsorted", range(20, 24))
    result = packed(tmp_path / "raw", tmp_path / "out", val_share=0.25)
    assert (result.train_pairs, result.val_pairs) == (9, 3)
    assert result.skipped == {"in none of the splits train, val and test": 4}


def test_a_source_with_test_pairs_alone_is_an_error(tmp_path):
    write_pairs(tmp_path / "raw" / "test", range(3))
    with pytest.raises(DataError, match=r"no training pairs in .*: it has 3 in test"):
        packed(tmp_path / "raw", tmp_path / "out")


def test_leaks_into_the_test_pairs_are_counted(tmp_path, capsys):
    write_pairs(tmp_path / "raw" / "train", range(12))
    write_pairs(tmp_path / "raw" / "test", [3, 20])
    result = packed(tmp_path / "raw", tmp_path / "out", val_share=0)
    assert (result.test_shared_photos, result.test_shared_captions) == (1, 1)
    out = str(tmp_path / "out2")
    assert run(["pack", str(tmp_path / "raw"), out, "--processes", "1"]) == 0
    assert "1 test pair also in the training pairs (same image)" in capsys.readouterr().err


def test_a_share_for_testing_leaves_the_validation_pairs_as_they_were(tmp_path):
    write_pairs(tmp_path / "raw", range(40))
    one = packed(tmp_path / "raw", tmp_path / "one", val_share=0.25)
    two = packed(tmp_path / "raw", tmp_path / "two", val_share=0.25, test_share=0.25)
    assert (one.train_pairs, one.val_pairs, one.test_pairs) == (30, 10, 0)
    assert (two.train_pairs, two.val_pairs, two.test_pairs) == (20, 10, 10)
    assert captions(tmp_path / "one" / "val") == captions(tmp_path / "two" / "val")
    assert not set(captions(tmp_path / "two" / "test")) & set(captions(tmp_path / "two" / "train"))
    # An earlier test set does not stay beside a pack without one
    packed(tmp_path / "raw", tmp_path / "two", val_share=0.25, overwrite=True)
    assert not (tmp_path / "two" / "test").exists()


def test_duplicates_stay_out_of_the_test_pairs(tmp_path):
    for number in range(60):
        write_pair(tmp_path / "raw" / f"p{number}.png", number % 20, f"thing {number % 20}")
    packed(tmp_path / "raw", tmp_path / "out", val_share=0.2, test_share=0.2)
    seen = [set(captions(tmp_path / "out" / split)) for split in ("train", "val", "test")]
    assert all(seen)
    assert len(seen[0] | seen[1] | seen[2]) == sum(map(len, seen)) == 20


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("root", [True, False], ids=["one table", "a table in each split"])
def test_an_imagefolder_is_packed(tmp_path, kind, root):
    raw = tmp_path / "raw"
    splits = {"train": range(8), "validation": range(10, 13), "test": range(20, 22)}
    rows = []
    for split, numbers in splits.items():
        write_images(raw / split, numbers)
        own = [
            {"file_name": f"p{n}.png", "text": f"thing {n}", "label": f"l{n % 3}"} for n in numbers
        ]
        rows += [{**row, "file_name": f"{split}/{row['file_name']}"} for row in own]
        if not root:
            write_table(raw / split / f"metadata.{kind}", own)
    if root:
        write_table(raw / f"metadata.{kind}", rows)
    write_images(raw / "train", [99])
    result = packed(raw, tmp_path / "out")
    assert (result.train_pairs, result.val_pairs, result.test_pairs) == (8, 3, 2)
    assert result.skipped == {"no caption": 1}
    assert metadata_of(tmp_path / "out" / "test") == {
        "thing 20": {"label": "l2"},
        "thing 21": {"label": "l0"},
    }


def test_a_folder_of_parquet_parts_is_packed(tmp_path):
    for split, number in (("train", 0), ("train", 1), ("validation", 2), ("test", 3)):
        rows = [
            {"image": {"bytes": png(10 * number + n), "path": None}, "text": f"thing {number}.{n}"}
            for n in range(4)
        ]
        write_table(tmp_path / "repo" / "data" / f"{split}-{number:05d}-of-00002.parquet", rows)
    (tmp_path / "repo" / "README.md").write_text("a card")
    result = packed(tmp_path / "repo", tmp_path / "out")
    assert (result.train_pairs, result.val_pairs, result.test_pairs) == (8, 4, 4)
    assert captions(tmp_path / "out" / "test") == [f"thing 3.{n}" for n in range(4)]
    assert dict(result.not_read.endings) == {"md": 1}


def test_parquet_of_the_hubs_converter_is_packed(tmp_path):
    for split, number in (("train", 0), ("test", 1)):
        rows = [{"image": png(10 * number + n), "caption": f"{split} {n}"} for n in range(3)]
        write_table(tmp_path / "repo" / "default" / split / "0000.parquet", rows)
    result = packed(tmp_path / "repo", tmp_path / "out", val_share=0)
    assert (result.train_pairs, result.test_pairs) == (3, 3)


def test_tables_that_are_named_after_splits_are_packed(tmp_path):
    write_images(tmp_path / "raw" / "images", range(9))
    for split, numbers in (("train", range(5)), ("val", range(5, 7)), ("test", range(7, 9))):
        rows = [{"image": f"images/p{n}.png", "caption": f"thing {n}"} for n in numbers]
        write_table(tmp_path / "raw" / f"{split}.csv", rows)
    result = packed(tmp_path / "raw", tmp_path / "out")
    assert (result.train_pairs, result.val_pairs, result.test_pairs) == (5, 2, 2)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_column_split_of_a_table_decides_the_split(tmp_path, kind):
    write_images(tmp_path / "raw", range(10))
    splits = ["train"] * 5 + ["validation", "valid", "test", "TEST", "?"]
    rows = [
        {"image": f"p{n}.png", "caption": f"thing {n}", "split": split}
        for n, split in enumerate(splits)
    ]
    write_table(tmp_path / "raw" / f"list.{kind}", rows)
    result = packed(tmp_path / "raw" / f"list.{kind}", tmp_path / "out")
    assert (result.train_pairs, result.val_pairs, result.test_pairs) == (5, 2, 2)
    assert result.skipped == {"in none of the splits train, val and test": 1}
    assert any("The column split of" in note for note in result.notes)


def test_a_column_split_with_other_values_means_nothing(tmp_path):
    write_images(tmp_path / "raw", range(10))
    rows = [{"image": f"p{n}.png", "caption": f"t {n}", "split": n % 3} for n in range(10)]
    write_table(tmp_path / "raw" / "list.csv", rows)
    result = packed(tmp_path / "raw" / "list.csv", tmp_path / "out", val_share=0.2)
    assert (result.train_pairs, result.val_pairs, result.test_pairs) == (8, 2, 0)


def test_coco_captions_are_packed(tmp_path):
    coco = tmp_path / "coco"
    for split, numbers in (("train", range(6)), ("val", range(10, 12))):
        write_images(coco / f"{split}2017", numbers, "{:012d}.jpg")
        content = {
            "images": [{"id": n, "file_name": f"{n:012d}.jpg", "height": 16} for n in numbers],
            "annotations": [
                {"image_id": n, "id": 10 * n + k, "caption": f"thing {n} seen\nas {k} "}
                for n in numbers
                for k in range(5)
            ],
        }
        (coco / "annotations").mkdir(exist_ok=True)
        (coco / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(content))
        (coco / "annotations" / f"instances_{split}2017.json").write_text("{}")
    write_images(coco / "test2017", [20])
    result = packed(coco, tmp_path / "out")
    assert (result.train_pairs, result.val_pairs, result.test_pairs) == (6, 2, 0)
    assert result.skipped == {"no caption": 1}
    val = open_pairs(tmp_path / "out" / "val")
    found = {val[n].caption.decode() for n in range(2)}
    assert found == {"\n".join(f"thing {n} seen as {k}" for k in range(5)) for n in (10, 11)}
    assert {val.metadata(n)["id"] for n in range(2)} == {10, 11}


def test_the_splits_of_karpathy_are_packed(tmp_path):
    coco = tmp_path / "coco"
    write_images(coco / "train2014", range(4))
    write_images(coco / "val2014", range(4, 10))
    splits = ["train"] * 4 + ["restval", "restval", "val", "val", "test", "test"]
    images = [
        {
            "filepath": "train2014" if n < 4 else "val2014",
            "filename": f"p{n}.png",
            "split": split,
            "sentences": [{"raw": f"thing {n}"}, {"raw": f"it is {n}", "tokens": ["it"]}],
        }
        for n, split in enumerate(splits)
    ]
    (coco / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    result = packed(coco, tmp_path / "out")
    assert (result.train_pairs, result.val_pairs, result.test_pairs) == (6, 2, 2)
    assert captions(tmp_path / "out" / "test") == ["thing 8\nit is 8", "thing 9\nit is 9"]


def test_a_coco_file_without_captions_is_an_error(tmp_path):
    write_images(tmp_path / "coco", range(2))
    (tmp_path / "coco" / "captions_val2017.json").write_text('{"annotations": []}')
    with pytest.raises(DataError, match="does not have captions in COCO's format"):
        packed(tmp_path / "coco", tmp_path / "out")


FLICKR = {
    "results.csv": "image_name| comment_number| comment\n"
    + "".join(f"p{n}.png| 0| A thing, {n}\np{n}.png| 1| It is {n}\n" for n in range(5)),
    "captions.txt": "image,caption\n"
    + "".join(f'p{n}.png,"A thing, {n}"\np{n}.png,It is {n}\n' for n in range(5)),
    "results_20130124.token": "".join(
        f"p{n}.png#0\tA thing, {n}\np{n}.png#1\tIt is {n}\n" for n in range(5)
    ),
    "Flickr8k.token.txt": "".join(
        f"p{n}.png#0\tA thing, {n}\np{n}.png#1\tIt is {n}\n" for n in range(5)
    ),
}


@pytest.mark.parametrize("name", FLICKR)
def test_the_files_of_flickr_are_packed(tmp_path, name):
    write_images(tmp_path / "raw" / "Images", range(6))
    (tmp_path / "raw" / name).write_text(FLICKR[name])
    result = packed(tmp_path / "raw", tmp_path / "out", val_share=0)
    assert result.train_pairs == 5
    assert result.skipped == {"no caption": 1}
    expected = [f"A thing, {n}\nIt is {n}" for n in range(5)]
    assert captions(tmp_path / "out" / "train") == expected


@pytest.mark.parametrize(
    ("name", "header", "row"),
    [
        ("captions.txt", "image,caption", "p{}.png,{}"),
        ("results.csv", "image_name| comment_number| comment", "p{}.png| 0| {}"),
    ],
)
def test_a_stray_quotation_mark_swallows_no_captions(tmp_path, name, header, row):
    write_images(tmp_path / "raw" / "Images", range(4))
    said = ['"A dog', "A cat", 'A 24" shelf', 'A "fine" chair"']
    lines = [header, *(row.format(number, text) for number, text in enumerate(said))]
    (tmp_path / "raw" / name).write_text("\n".join(lines))
    packed(tmp_path / "raw", tmp_path / "out", val_share=0)
    assert captions(tmp_path / "out" / "train") == sorted(said)


def test_the_files_of_img2dataset_are_packed(tmp_path):
    for part in ("00000", "00001"):
        for n in range(4):
            write_pair(
                tmp_path / "raw" / part / f"{part}{n:04d}.jpg", int(part) * 9 + n, f"t {n}", "{}"
            )
        (tmp_path / "raw" / f"{part}_stats.json").write_text('{"count": 4}')
        (tmp_path / "raw" / f"{part}.parquet").write_bytes(b"PAR1")
    result = packed(tmp_path / "raw", tmp_path / "out", val_share=0)
    assert (result.train_pairs, result.skipped) == (8, {})
    assert dict(result.not_read.endings) == {"parquet": 2}


def test_raw_files_with_two_part_endings_are_pairs(tmp_path):
    for n in range(4):
        write_pair(tmp_path / "raw" / f"{n:04d}.image.png", n, None)
        (tmp_path / "raw" / f"{n:04d}.caption.txt").write_text(f"thing {n}")
    (tmp_path / "raw" / "._0000.image.png").write_bytes(b"\0\x05")
    result = packed(tmp_path / "raw", tmp_path / "out", val_share=0)
    assert (result.train_pairs, result.skipped) == (4, {})


@pytest.fixture
def hub_cache(tmp_path):
    """A snapshot in the cache of the Hugging Face Hub: every file is a link."""
    write_pairs(tmp_path / "plain", range(6))
    snapshot = tmp_path / "hub" / "snapshots" / "0a1b2c"
    blobs = tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_links_out_of_the_folder_are_refused_by_name(hub_cache, tmp_path):
    with pytest.raises(DataError) as caught:
        packed(hub_cache, tmp_path / "out")
    assert "12 x a link out of the folder; found 6 .png, 6 .txt" in caught.value.message
    assert "--follow-links" in caught.value.hint


def test_links_are_followed_on_request(hub_cache, tmp_path):
    (hub_cache / "again").symlink_to(".")  # would never end
    (hub_cache / "gone.png").symlink_to("nowhere")
    result = packed(hub_cache, tmp_path / "out", val_share=0, follow_links=True)
    assert (result.train_pairs, result.skipped) == (6, {"a link to nothing": 1})


@pytest.mark.parametrize("ending", ["jfif", "jpe", "avif", "jp2"])
def test_other_endings_of_images_are_read(tmp_path, ending):
    for n in range(3):
        write_pair(tmp_path / "raw" / f"p{n}.png", n, f"thing {n}")
        image = Image.open(tmp_path / "raw" / f"p{n}.png")
        kind = {"jfif": "JPEG", "jpe": "JPEG", "avif": "AVIF", "jp2": "JPEG2000"}[ending]
        image.save(tmp_path / "raw" / f"p{n}.{ending}", kind)
        (tmp_path / "raw" / f"p{n}.png").unlink()
    assert packed(tmp_path / "raw", tmp_path / "out", val_share=0).train_pairs == 3
    assert len(open_pairs(tmp_path / "out" / "train")) == 3


def test_an_avif_that_is_called_jpg_is_packed(tmp_path):
    write_pair(tmp_path / "raw" / "a.jpg", 1)
    pattern(1).save(tmp_path / "raw" / "a.jpg", "AVIF")
    assert packed(tmp_path / "raw", tmp_path / "out", val_share=0).train_pairs == 1


def test_files_that_are_not_read_are_named(tmp_path, capsys):
    write_pairs(tmp_path / "raw", range(3))
    (tmp_path / "raw" / "p3").write_bytes(b"notes")
    (tmp_path / "raw" / "p3.txt").write_text("thing 3")
    (tmp_path / "raw" / "p4.psd").write_bytes(b"8BPS")
    command = ["pack", str(tmp_path / "raw"), str(tmp_path / "out"), "--val-share", "0"]
    assert run([*command, "--processes", "1"]) == 0
    said = capsys.readouterr().err
    assert "note: not read: 1 without an ending, 1 .psd (p3, p4.psd)." in said


@pytest.mark.parametrize(
    ("files", "found", "hint"),
    [
        (["a.png", "b.png"], "2 .png (a.png, b.png)", "a .txt of the same name"),
        (["a.png", "list.csv"], "1 .csv, 1 .png", "`clipft pack {}/list.csv OUT`"),
        (["photos.zip"], "1 .zip (photos.zip)", "`unzip {}/photos.zip`"),
        (["photos.tar.gz"], "1 .gz", "`tar -xf {}/photos.tar.gz`"),
        (["a.psd", "b/c"], "1 without an ending, 1 .psd (b/c, a.psd)", "clipft pack"),
        ([], "found nothing", "clipft pack"),
    ],
)
def test_nothing_to_pack_says_what_is_there(tmp_path, files, found, hint):
    for name in files:
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(1))
    (tmp_path / "raw").mkdir(exist_ok=True)
    with pytest.raises(DataError) as caught:
        packed(tmp_path / "raw", tmp_path / "out")
    assert found in caught.value.message
    assert hint.format(tmp_path / "raw") in caught.value.hint


@pytest.mark.parametrize(
    ("files", "found", "hint"),
    [
        (["a.png", "a.txt"], "1 .png, 1 .txt", "`clipft pack {0} OUT`"),
        (["data/train-00000-of-00001.parquet"], "1 .parquet", "`clipft pack {0} OUT`"),
        (["b/train/0.tar"], "1 .tar (b/train/0.tar)", "name the folder with train/ in it: {0}/b"),
    ],
)
def test_nothing_to_train_on_says_what_is_there(tmp_path, files, found, hint, capsys):
    for name in files:
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    data = ["--data-dir", str(tmp_path / "raw")]
    assert run(["train", "--model", "tiny", "--mini-train", *data]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert f"no folder {tmp_path}/raw/train: {tmp_path}/raw holds {found}" in said
    assert hint.format(tmp_path / "raw") in said
