import csv
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipft.cli.app import run
from clipft.data import pack as module
from clipft.data.pack import pack
from clipft.data.pack_options import PackOptions
from clipft.data.shards import open_pairs
from clipft.data.split import validation_rows
from clipft.errors import DataError, StorageError, UsageError


def picture(path: Path, colour: int, caption: str | None = "a chair", metadata: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (colour % 256, colour // 256, 0)).save(path, "PNG")
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    if metadata:
        path.with_suffix(".json").write_text(metadata)


def quiet(done: int, total: int) -> None:
    return None


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*.tar"))
    }


@pytest.fixture
def raw(tmp_path) -> Path:
    for i in range(60):
        picture(tmp_path / "raw" / f"set{i % 3}" / f"p {i}.5.PNG", i, f"product number {i}")
    return tmp_path / "raw"


def pairs_of(folder: Path) -> set[tuple[bytes, bytes]]:
    dataset = open_pairs(folder)
    return {(dataset[i].image, dataset[i].caption) for i in range(len(dataset))}


def test_every_pair_arrives_byte_for_byte(raw, tmp_path):
    result = pack(raw, tmp_path / "out", PackOptions(shard_pairs=7), quiet)
    assert (result.train_pairs, result.val_pairs) == (54, 6)
    assert result.shards == 8 + 1
    arrived = pairs_of(tmp_path / "out" / "train") | pairs_of(tmp_path / "out" / "val")
    sent = {(p.read_bytes(), p.with_suffix(".txt").read_bytes()) for p in raw.rglob("*.PNG")}
    assert arrived == sent


def test_same_input_same_bytes_and_other_seeds_other_splits(raw, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pack(raw, tmp_path / name, PackOptions(seed=seed, shard_pairs=7), quiet)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert pairs_of(tmp_path / "a" / "val") != pairs_of(tmp_path / "c" / "val")


def test_webdataset_reads_the_shards(raw, tmp_path):
    import webdataset

    pack(raw, tmp_path / "out", PackOptions(), quiet)
    url = str(tmp_path / "out" / "train" / "00000.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False))
    assert len(samples) == 54
    assert all({"png", "txt"} <= set(sample) for sample in samples)
    assert len({sample["__key__"] for sample in samples}) == 54


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=80),
    share=st.floats(0, 0.5),
    seed=st.integers(0, 9),
)
def test_no_photo_and_no_caption_is_ever_on_both_sides(rows, share, seed):
    photos, captions = [f"p{a}" for a, _ in rows], [f"c{b}" for _, b in rows]
    val = validation_rows([photos, captions], share, seed)
    train = set(range(len(rows))) - val
    assert not {photos[i] for i in val} & {photos[i] for i in train}
    assert not {captions[i] for i in val} & {captions[i] for i in train}


@given(n=st.integers(20, 500), share=st.floats(0, 0.5))
def test_without_duplicates_the_share_is_met(n, share):
    names = [str(i) for i in range(n)]
    assert len(validation_rows([names], share, 1)) == round(share * n)


def test_the_sources_own_split_is_kept_and_its_leaks_are_told(tmp_path):
    raw = tmp_path / "raw"
    for i in range(10):
        picture(raw / "train" / f"{i}.png", i, f"thing {i}")
    picture(raw / "val" / "same photo.png", 3, "other words")
    picture(raw / "val" / "same words.png", 99, "Thing  4")
    result = pack(raw, tmp_path / "out", PackOptions(), quiet)
    assert (result.train_pairs, result.val_pairs) == (10, 2)
    assert (result.shared_photos, result.shared_captions) == (1, 1)


def test_what_cannot_be_used_is_counted_and_listed(tmp_path):
    raw = tmp_path / "raw"
    for i in range(30):
        picture(raw / f"{i}.png", i, f"thing {i}")
    picture(raw / "no caption.png", 50, None)
    (raw / "no image.txt").write_text("words")
    picture(raw / "blank.png", 51, " \n")
    picture(raw / "html.png", 52, "html")
    (raw / "html.png").write_text("<html>")
    (tmp_path / "outside.png").write_bytes((raw / "1.png").read_bytes())
    (raw / "link.png").symlink_to(tmp_path / "outside.png")
    result = pack(raw, tmp_path / "out", PackOptions(), quiet)
    assert result.train_pairs + result.val_pairs == 30
    assert result.skipped == {
        "no caption": 1,
        "no image": 1,
        "empty caption": 1,
        "not an image": 1,
        "a link out of the folder": 1,
    }
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 5


def test_check_finds_pictures_that_break_off(tmp_path):
    raw = tmp_path / "raw"
    for i in range(5):
        picture(raw / f"{i}.jpg", i, f"thing {i}")
        Image.effect_noise((300, 300), 90).save(raw / f"{i}.jpg", "JPEG")
    data = (raw / "3.jpg").read_bytes()
    (raw / "3.jpg").write_bytes(data[: len(data) // 2])
    result = pack(raw, tmp_path / "out", PackOptions(check=True, val_share=0), quiet)
    assert result.train_pairs == 4


def test_keys_are_plain_and_unique(tmp_path):
    raw = tmp_path / "raw"
    for i, name in enumerate(("a/x y.png", "b/x.y.png", "c/X_y.png", "d/家具.png")):
        picture(raw / name, i, f"thing {i}")
    pack(raw, tmp_path / "out", PackOptions(val_share=0), quiet)
    with tarfile.open(tmp_path / "out" / "train" / "00000.tar") as tar:
        keys = {Path(name).stem for name in tar.getnames()}
    assert len(keys) == 4
    assert all(key.isascii() and "." not in key and " " not in key for key in keys)


def test_a_former_pack_is_replaced_only_when_asked(raw, tmp_path):
    out = tmp_path / "out"
    pack(raw, out, PackOptions(), quiet)
    with pytest.raises(UsageError, match="former pack"):
        pack(raw, out, PackOptions(), quiet)
    before = digests(out)
    (raw / "set0" / "p 0.5.PNG").unlink()
    pack(raw, out, PackOptions(overwrite=True), quiet)
    assert digests(out) != before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").touch()
    with pytest.raises(UsageError, match="not empty"):
        pack(raw, tmp_path / "other", PackOptions(overwrite=True), quiet)


def test_a_full_disk_leaves_the_former_pack_as_it_was(raw, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pack(raw, out, PackOptions(shard_pairs=7), quiet)
    before = digests(out)

    def full(building, job, options):
        raise OSError(28, "No space left on device", job.name)

    monkeypatch.setattr(module, "_write_shard", full)
    with pytest.raises(StorageError, match="No space left"):
        pack(raw, out, PackOptions(overwrite=True), quiet)
    assert digests(out) == before
    monkeypatch.undo()
    pack(raw, out, PackOptions(shard_pairs=7, overwrite=True), quiet)
    assert digests(out) == before
    assert not list(out.rglob(".clipft-part*"))


@pytest.mark.parametrize("make", [False, True])
def test_nothing_to_pack(tmp_path, make):
    if make:
        (tmp_path / "raw").mkdir()
        (tmp_path / "raw" / "a.txt").write_text("alone")
    with pytest.raises(DataError):
        pack(tmp_path / "raw", tmp_path / "out", PackOptions(), quiet)
    assert not (tmp_path / "out" / "train").exists()


def test_the_command(raw, tmp_path, capsys):
    assert run(["pack", str(raw), str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["train_pairs"] == 54
    assert "Next: clipft train --data-dir" in captured.err
    assert run(["pack", str(raw), str(tmp_path / "out")]) == 2
    assert run(["pack", str(tmp_path / "none"), str(tmp_path / "out2")]) == 3


def test_a_pack_that_broke_off_goes_on_and_ends_with_the_same_bytes(raw, tmp_path, monkeypatch):
    options = PackOptions(shard_pairs=7, threads=1)
    pack(raw, tmp_path / "whole", options, quiet)
    write, written = module._write_shard, []

    def dies_at_the_fourth(building, job, options):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(job.name)
        return write(building, job, options)

    monkeypatch.setattr(module, "_write_shard", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        pack(raw, tmp_path / "out", options, quiet)
    assert not digests(tmp_path / "out" / "train")
    kept = {p.name: p.stat().st_ino for p in (tmp_path / "out").rglob("*.tar")}
    assert len(kept) == 3
    monkeypatch.undo()
    pack(raw, tmp_path / "out", options, quiet)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    now = {p.name: p.stat().st_ino for p in (tmp_path / "out" / "train").glob("*.tar")}
    assert kept.items() <= now.items()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".clipft-pack.json",
        "train",
        "val",
    ]


def test_what_changed_since_it_broke_off_is_packed_anew(raw, tmp_path, monkeypatch):
    options = PackOptions(shard_pairs=7)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_marks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(raw, tmp_path / "out", options, quiet)
    for path in raw.rglob("*.txt"):
        path.write_text(f"{path.read_text()} in oak")
    pack(raw, tmp_path / "out", options, quiet)
    pack(raw, tmp_path / "fresh", options, quiet)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_the_number_of_threads_changes_no_byte(raw, tmp_path):
    for threads in (1, 5):
        pack(raw, tmp_path / str(threads), PackOptions(shard_pairs=7, threads=threads), quiet)
    assert digests(tmp_path / "1") == digests(tmp_path / "5")


def test_size_makes_large_pictures_smaller_and_leaves_small_ones(tmp_path):
    raw = tmp_path / "raw"
    for name, size in (("wide", (400, 100)), ("tall", (90, 300)), ("small", (40, 30))):
        picture(raw / f"{name}.png", 1, name)
        Image.effect_noise(size, 50).save(raw / f"{name}.png")
    pack(raw, tmp_path / "out", PackOptions(val_share=0, size=64), quiet)
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


def test_a_picture_that_breaks_when_made_smaller_is_left_out(tmp_path):
    raw = tmp_path / "raw"
    for i in range(3):
        picture(raw / f"{i}.jpg", i, f"thing {i}")
        Image.effect_noise((300, 300), 90).save(raw / f"{i}.jpg", "JPEG")
    (raw / "1.jpg").write_bytes((raw / "1.jpg").read_bytes()[:9000])
    result = pack(raw, tmp_path / "out", PackOptions(val_share=0, size=64), quiet)
    assert result.train_pairs == 2
    assert sum(result.skipped.values()) == 1
    assert "1.jpg" in (tmp_path / "out" / "skipped.jsonl").read_text()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_tables(tmp_path, kind):
    raw = tmp_path / "raw"
    rows = []
    for i in range(6):
        picture(raw / f"p{i}.png", i, None)
        rows.append({"id": str(i), "filepath": f"p{i}.png", "title": f'a "fine", chair {i}'})
    rows.append({"id": "7", "filepath": "gone.png", "title": "x"})
    rows.append({"id": "8", "filepath": "https://example.com/a.jpg", "title": "x"})
    table = raw / f"products.{kind}"
    with table.open("w", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter={"csv": ",", "tsv": "\t"}[kind])
            writer.writeheader()
            writer.writerows(rows)
    result = pack(table, tmp_path / "out", PackOptions(val_share=0), quiet)
    assert result.train_pairs == 6
    assert result.skipped == {"no such file": 1, "a URL: download the pictures first": 1}
    dataset = open_pairs(tmp_path / "out" / "train")
    found = {dataset[n].caption.decode(): dataset.metadata(n) for n in range(6)}
    assert found == {f'a "fine", chair {i}': {"id": str(i)} for i in range(6)}


def test_a_column_that_is_not_there(tmp_path):
    (tmp_path / "t.csv").write_text("picture,words\na.png,x\n")
    with pytest.raises(UsageError, match="it has picture, words") as caught:
        pack(tmp_path / "t.csv", tmp_path / "out", PackOptions(), quiet)
    assert "--image-column" in caught.value.hint


def test_a_product_stays_on_one_side(tmp_path):
    raw = tmp_path / "raw"
    for i in range(60):
        picture(raw / f"{i}.png", i, f"thing {i}", json.dumps({"sku": i // 5}))
    pack(raw, tmp_path / "out", PackOptions(val_share=0.3, group_field="sku"), quiet)
    sides = []
    for split in ("train", "val"):
        dataset = open_pairs(tmp_path / "out" / split)
        sides.append({dataset.metadata(n)["sku"] for n in range(len(dataset))})
    assert not sides[0] & sides[1]
    assert len(sides[1]) == pytest.approx(4, abs=1)
