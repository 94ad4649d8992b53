"""Packing a folder: the shards, the split, skipped pairs, and what is in the way."""

import io
import json
import os
import tarfile
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipft.cli.app import run
from clipft.core.errors import DataError, StorageError, UsageError
from clipft.data.duplicates import validation_rows
from clipft.data.shards.folders import open_pairs
from tests.data.packing.pack_helpers import digests, packed, pairs_of, write_pair


def test_every_pair_is_packed_byte_for_byte(raw, tmp_path):
    result = packed(raw, tmp_path / "out", shard_pairs=7)
    assert (result.train_pairs, result.val_pairs) == (54, 6)
    assert result.shards == 8 + 1
    arrived = pairs_of(tmp_path / "out" / "train") | pairs_of(tmp_path / "out" / "val")
    sent = {(p.read_bytes(), p.with_suffix(".txt").read_bytes()) for p in raw.rglob("*.PNG")}
    assert arrived == sent


def test_the_same_input_gives_the_same_bytes_and_another_seed_another_split(raw, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        packed(raw, tmp_path / name, seed=seed, shard_pairs=7)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert pairs_of(tmp_path / "a" / "val") != pairs_of(tmp_path / "c" / "val")


def test_webdataset_can_read_the_shards(raw, tmp_path):
    import webdataset

    packed(raw, tmp_path / "out")
    url = str(tmp_path / "out" / "train" / "00000.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False))
    assert len(samples) == 54
    assert all({"png", "txt"} <= set(sample) for sample in samples)
    assert len({sample["__key__"] for sample in samples}) == 54
    sizes = json.loads((tmp_path / "out" / "train" / "sizes.json").read_text())
    assert sizes == {"00000.tar": 54}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=80),
    share=st.floats(0, 0.5),
    seed=st.integers(0, 9),
)
def test_no_image_and_no_caption_is_in_both_splits(rows, share, seed):
    images, captions = [f"p{a}" for a, _ in rows], [f"c{b}" for _, b in rows]
    val = validation_rows([images, captions], share, seed)
    train = set(range(len(rows))) - val
    assert not {images[i] for i in val} & {images[i] for i in train}
    assert not {captions[i] for i in val} & {captions[i] for i in train}


@given(n=st.integers(20, 500), share=st.floats(0, 0.5))
def test_without_duplicates_the_split_has_exactly_the_share(n, share):
    names = [str(i) for i in range(n)]
    assert len(validation_rows([names], share, 1)) == round(share * n)


@given(
    labels=st.lists(st.sampled_from("abcd"), min_size=1, max_size=120),
    share=st.floats(0.01, 0.5),
    seed=st.integers(0, 3),
)
def test_each_label_has_about_its_share_and_stays_in_training(labels, share, seed):
    images = [str(row) for row in range(len(labels))]
    val = [labels[row] for row in validation_rows([images], share, seed, labels)]
    assert set(labels) == {label for label in labels if val.count(label) < labels.count(label)}
    for label in set(labels):
        # One more or less by rounding, and what labels with a single pair leave to the next
        assert abs(val.count(label) - share * labels.count(label)) < 3


def test_a_split_of_the_source_is_kept_and_its_leaks_are_counted(tmp_path):
    raw = tmp_path / "raw"
    for i in range(10):
        write_pair(raw / "train" / f"{i}.png", i, f"thing {i}")
    write_pair(raw / "val" / "same image.png", 3, "other words")
    write_pair(raw / "val" / "same words.png", 99, "Thing  4")
    result = packed(raw, tmp_path / "out")
    assert (result.train_pairs, result.val_pairs) == (10, 2)
    assert (result.shared_photos, result.shared_captions) == (1, 1)


def test_pairs_that_cannot_be_used_are_counted_and_listed(tmp_path):
    raw = tmp_path / "raw"
    for i in range(30):
        write_pair(raw / f"{i}.png", i, f"thing {i}")
    write_pair(raw / "no caption.png", 50, None)
    (raw / "no image.txt").write_text("words")
    write_pair(raw / "blank.png", 51, " \n")
    write_pair(raw / "html.png", 52, "html")
    (raw / "html.png").write_text("<html>")
    (tmp_path / "outside.png").write_bytes((raw / "1.png").read_bytes())
    (raw / "link.png").symlink_to(tmp_path / "outside.png")
    result = packed(raw, tmp_path / "out")
    assert result.train_pairs + result.val_pairs == 30
    assert result.skipped == {
        "no caption": 1,
        "no image": 1,
        "empty caption": 1,
        "not an image but a web page": 1,
        "a link out of the folder": 1,
    }
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 5


@pytest.mark.parametrize("options", [{"near": -1, "check": True}, {"near": 4}])
def test_truncated_images_are_skipped(tmp_path, options):
    raw = tmp_path / "raw"
    for i in range(5):
        write_pair(raw / f"{i}.jpg", i, f"thing {i}")
        Image.effect_noise((300, 300), 90).save(raw / f"{i}.jpg", "JPEG")
    for name, share in (("3.jpg", 2), ("2.jpg", 3)):
        data = (raw / name).read_bytes()
        (raw / name).write_bytes(data[: len(data) // share])
    result = packed(raw, tmp_path / "out", val_share=0, **options)
    assert result.train_pairs == 3
    assert result.skipped == {"image file is truncated": 2}  # however many bytes are missing


def test_keys_are_plain_and_unique(tmp_path):
    raw = tmp_path / "raw"
    names = ["a/x y.png", "b/x.y.png", "c/X_y.png", "d/家具.png", f"{'long' * 60}.png"]
    names += [f"e/{'long' * 60}.png", os.fsdecode(b"f/caf\xe9.png")]
    for i, name in enumerate(names):
        write_pair(raw / name, i, f"thing {i}")
    packed(raw, tmp_path / "out", val_share=0)
    with tarfile.open(tmp_path / "out" / "train" / "00000.tar") as tar:
        keys = {Path(name).stem for name in tar.getnames()}
    assert len(keys) == len(names)
    assert all(key.isascii() and "." not in key and " " not in key for key in keys)


def test_an_earlier_pack_is_replaced_only_with_overwrite(raw, tmp_path):
    out = tmp_path / "out"
    packed(raw, out)
    with pytest.raises(UsageError, match="holds an earlier pack"):
        packed(raw, out)
    before = digests(out)
    (raw / "set0" / "p 0.5.PNG").unlink()
    packed(raw, out, overwrite=True)
    assert digests(out) != before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").touch()
    with pytest.raises(UsageError, match="not empty"):
        packed(raw, tmp_path / "other", overwrite=True)


def test_a_full_disk_leaves_the_earlier_pack_unchanged(raw, tmp_path, monkeypatch):
    out = tmp_path / "out"
    packed(raw, out, shard_pairs=7)
    before = digests(out)

    def full(tar, info, *_):
        raise OSError(28, "No space left on device", info.name)

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(StorageError, match="No space left"):
        packed(raw, out, overwrite=True)
    assert digests(out) == before
    monkeypatch.undo()
    packed(raw, out, shard_pairs=7, overwrite=True)
    assert digests(out) == before
    assert not list(out.rglob(".clipft-part*"))


@pytest.mark.parametrize("make", [False, True])
def test_a_source_without_pairs_is_an_error(tmp_path, make):
    if make:
        (tmp_path / "raw").mkdir()
        (tmp_path / "raw" / "a.txt").write_text("alone")
    with pytest.raises(DataError):
        packed(tmp_path / "raw", tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()


def test_the_command_prints_its_result_and_the_next_command(raw, tmp_path, capsys):
    assert run(["pack", str(raw), str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["train_pairs"] == 54
    assert "Next:" not in captured.err
    assert run(["pack", str(raw), str(tmp_path / "shown")]) == 0
    assert f"Next: clipft inspect {tmp_path / 'shown'}" in capsys.readouterr().err
    assert run(["pack", str(raw), str(tmp_path / "out")]) == 2
    assert run(["pack", str(tmp_path / "none"), str(tmp_path / "out2")]) == 3


def test_size_shrinks_large_images_and_keeps_small_ones(tmp_path):
    raw = tmp_path / "raw"
    for name, size in (("wide", (400, 100)), ("tall", (90, 300)), ("small", (40, 30))):
        write_pair(raw / f"{name}.png", 1, name)
        Image.effect_noise(size, 50).save(raw / f"{name}.png")
    packed(raw, tmp_path / "out", val_share=0, size=64)
    dataset = open_pairs(tmp_path / "out" / "train")
    sizes = {}
    for number in range(len(dataset)):
        image = Image.open(io.BytesIO(dataset[number].image))
        sizes[dataset[number].caption.decode()] = (image.format, image.size)
    assert sizes == {
        "wide": ("JPEG", (256, 64)),
        "tall": ("JPEG", (64, 213)),
        "small": ("PNG", (40, 30)),
    }


def test_an_image_that_cannot_be_shrunk_is_skipped(tmp_path):
    raw = tmp_path / "raw"
    for i in range(3):
        write_pair(raw / f"{i}.jpg", i, f"thing {i}")
        Image.effect_noise((300, 300), 90).save(raw / f"{i}.jpg", "JPEG")
    (raw / "1.jpg").write_bytes((raw / "1.jpg").read_bytes()[:9000])
    result = packed(raw, tmp_path / "out", val_share=0, size=64, near=-1)
    assert result.train_pairs == 2
    assert sum(result.skipped.values()) == 1
    assert "1.jpg" in (tmp_path / "out" / "skipped.jsonl").read_text()
    assert (tmp_path / "out" / "train" / "sizes.json").read_text() == '{"00000.tar": 2}\n'


def test_with_a_label_field_each_split_has_all_labels(tmp_path):
    """All pairs of a label share their caption; each photo occurs twice, and stays in one split."""
    raw, shares = tmp_path / "raw", {"val_share": 0.2, "test_share": 0.2}
    for i in range(60):
        label = json.dumps({"kind": f"kind {i % 6}"})
        write_pair(raw / f"{i}.png", i // 12 * 6 + i % 6, f"a thing of kind {i % 6}", label)
    packed(raw, tmp_path / "captions", **shares)
    result = packed(raw, tmp_path / "labels", **shares, label_field="kind")
    assert (result.val_pairs, result.test_pairs, result.notes) == (12, 12, [])
    found = {}
    for out, split in product(("captions", "labels"), ("train", "val", "test")):
        pairs = open_pairs(tmp_path / out / split)
        found[out, split] = {pairs.metadata(n)["kind"] for n in range(len(pairs))}
    assert not found["captions", "train"] & found["captions", "val"]
    assert len(found["labels", "train"]) == len(found["labels", "val"]) == 6
    assert len(found["labels", "test"]) == 6
    images = [{image for image, _ in pairs_of(tmp_path / "labels" / s)} for s in ("train", "val")]
    assert not images[0] & images[1]


def test_pairs_with_the_same_group_field_stay_in_one_split(tmp_path):
    raw = tmp_path / "raw"
    for i in range(60):
        write_pair(raw / f"{i}.png", i, f"thing {i}", json.dumps({"sku": i // 5}))
    packed(raw, tmp_path / "out", val_share=0.3, group_field="sku")
    skus = []
    for split in ("train", "val"):
        dataset = open_pairs(tmp_path / "out" / split)
        skus.append({dataset.metadata(n)["sku"] for n in range(len(dataset))})
    assert not skus[0] & skus[1]
    assert len(skus[1]) == pytest.approx(4, abs=1)
