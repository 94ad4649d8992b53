"""``clipft embed``: what is in the files, who opens them, and what a second run does."""

import json
import shutil
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.compute
import pytest
from pyarrow import parquet

from clipft.cli.app import run
from clipft.core.common import silent
from clipft.core.errors import DataError, UsageError
from clipft.core.part import Part
from clipft.data.demo.catalogue import render_pair
from clipft.data.loader import LoaderOptions
from clipft.data.shards.folders import open_pairs
from clipft.embedding.embed import embed_texts
from clipft.runs.load import open_model
from clipft.search.images import open_images
from clipft.search.index import open_index
from clipft.search.tables.embed import EmbedChoices, embed_dataset
from clipft.search.tables.folder import EmbeddingsFolder
from tests import warm
from tests.conftest import add, jpeg, write_shard
from tests.loaded_settings import loaded_settings

BOTH = ("images", "texts")


@pytest.fixture(scope="module")
def tiny():
    return open_tiny()


def open_tiny():
    now = loaded_settings(device="cpu", precision="fp32", num_workers=0)
    return open_model("tiny", now, ("device", "precision", "num_workers"))


def embed(model, data, out, progress=silent, tables=BOTH, **choices):
    return embed_dataset(model, open_images(data), out, EmbedChoices(tables, **choices), progress)


@pytest.fixture(scope="module")
def written(tiny, catalogue, tmp_path_factory):
    """The embeddings of the catalogue, with indexes. Read only."""
    out = tmp_path_factory.mktemp("embedded") / "out"
    embed(tiny, catalogue, out, index=True)
    return out


def read(out, table="images"):
    return pyarrow.concat_tables(
        [parquet.read_table(path) for path in sorted((out / table).glob("*.parquet"))]
    )


def vectors(table):
    return np.stack(table["vector"].to_numpy(zero_copy_only=False)).astype(np.float32)


def test_each_image_has_its_row_and_the_embedding_of_the_model(written, tiny, catalogue):
    table, pairs = read(written), open_pairs(catalogue / "val")
    assert table.column_names[:3] == ["key", "split", "caption"]
    assert table.column_names[-2:] == ["sha256", "vector"]
    assert table.schema.field("vector").type == pyarrow.list_(pyarrow.float32(), 128)
    assert len(table) == 136
    rows = table.filter(pyarrow.compute.equal(table["split"], "val"))
    index = open_index(tiny, open_images(catalogue / "val"), LoaderOptions(), lambda *_: None)
    for number, row in enumerate(rows.to_pylist()):
        pair = pairs[number]
        assert (row["key"], row["caption"]) == (pair.key, pair.caption.decode())
        assert row["color"] == json.loads(pair.metadata)["color"]
        assert row["vector"] == pytest.approx(index.vectors[0][number].tolist(), abs=1e-5)


def test_each_caption_has_its_row(written, tiny, catalogue):
    table = read(written, "texts")
    captions = table["caption"].to_pylist()
    assert len(captions) == 136
    expected = embed_texts(tiny.loaded, captions[:20]).numpy()
    np.testing.assert_allclose(vectors(table)[:20], expected, atol=1e-5)


def test_the_schema_says_how_the_vectors_were_made(written, tiny):
    about = json.loads(read(written).schema.metadata[b"clipft"])
    assert about["model"] == "tiny"
    assert (about["dim"], about["dtype"], about["normalized"]) == (128, "float32", True)
    assert len(about["weights"]) == 32
    assert about == json.loads((written / "embeddings.json").read_text())
    assert not list(written.glob(".*"))


def test_nothing_in_the_files_tells_where_the_data_are(written, catalogue):
    for path in written.rglob("*"):
        if path.is_file():
            assert str(catalogue).encode() not in path.read_bytes(), path


@pytest.fixture(scope="module")
def searched(tiny, catalogue, written):
    """A thousand queries, float32 [1000, D], and for each the keys of the ten best images and
    their scores in ``clipft search``, best first."""
    captions = read(written, "texts")["caption"].to_pylist()
    kinds = ("a photo of", "two of", "an old", "a cheap", "the back of", "buy", "not", "one more")
    texts = [f"{kind} {caption}" for kind in kinds for caption in captions][:1000]
    images = open_images(catalogue)
    index = open_index(tiny, images, LoaderOptions(), lambda *_: None)
    queries, keys = embed_texts(tiny.loaded, texts), [pair.key for pair in index.images]
    found = []
    for query in queries:
        scores = index.scores(query)
        best = index.ranked(scores, 10)
        found.append(([keys[number] for number in best], scores[best]))
    return queries.numpy(), found


def test_the_order_of_hits_is_that_of_a_search(written, searched):
    table = read(written)
    keys, matrix = np.array(table["key"].to_pylist()), vectors(table)
    for query, (expected, _) in zip(*searched, strict=True):
        own = np.argsort(-np.vecdot(matrix, query), kind="stable")[:10]
        assert keys[own].tolist() == expected


def test_faiss_finds_what_a_search_finds(written, searched):
    faiss = pytest.importorskip("faiss")
    keys = np.array(parquet.read_table(written / "images.ids.parquet")["key"].to_pylist())
    queries, found = searched
    _, rows = faiss.read_index(str(written / "images.faiss")).search(queries, 10)
    for own, (expected, scores) in zip(keys[rows], found, strict=True):
        # It adds up in another order, so that only scores that are nearly equal may swap
        apart = np.flatnonzero(-np.diff(scores) > 1e-6) + 1
        for one, other in zip(
            np.split(own, apart)[:-1], np.split(expected, apart)[:-1], strict=True
        ):
            assert sorted(one) == sorted(other)


def test_the_ids_of_faiss_are_the_rows(written):
    faiss = pytest.importorskip("faiss")
    for name in BOTH:
        table, index = read(written, name), faiss.read_index(str(written / f"{name}.faiss"))
        ids = parquet.read_table(written / f"{name}.ids.parquet")
        assert ids["key"].to_pylist() == table["key"].to_pylist()
        assert (index.ntotal, index.d, index.metric_type) == (136, 128, faiss.METRIC_INNER_PRODUCT)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_polars_and_duckdb_open_the_files(dtype, written, tiny, catalogue, tmp_path):
    polars, duckdb = pytest.importorskip("polars"), pytest.importorskip("duckdb")
    out = written
    if dtype == "float16":
        out = tmp_path / "out"
        embed(tiny, catalogue / "val", out, dtype=dtype)
    frame = polars.read_parquet(out / "images" / "*.parquet")
    assert isinstance(frame.schema["vector"], polars.Array)
    rows = read(out)
    assert frame["key"].to_list() == rows["key"].to_pylist()
    np.testing.assert_array_equal(frame["vector"].to_numpy().astype(np.float32), vectors(rows))
    similar = "array_cosine_similarity(vector::FLOAT[128], ?::FLOAT[128])"
    query = vectors(rows)[7].tolist()
    best = duckdb.execute(
        f"SELECT key, color FROM '{out}/images/*.parquet' ORDER BY {similar} DESC LIMIT 1", [query]
    ).fetchone()
    assert best == (rows["key"][7].as_py(), rows["color"][7].as_py())


def test_datasets_opens_the_folder_by_its_card(written, tmp_path):
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(str(written), "texts", cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 96, "val": 40}
    assert found["val"].features["vector"].length == 128
    assert found["val"][0]["caption"] == render_pair(7, 1000).caption


@pytest.mark.slow  # its import takes three seconds
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_lancedb_searches_the_files(dtype, tiny, catalogue, tmp_path):
    lancedb = pytest.importorskip("lancedb")
    from pyarrow.dataset import dataset

    embed(tiny, catalogue, tmp_path / "out", dtype=dtype)
    files = dataset(tmp_path / "out" / "images")
    table = lancedb.connect(tmp_path / "db").create_table("images", files.to_table())
    rows = read(tmp_path / "out")
    found = table.search(vectors(rows)[3].tolist()).metric("cosine").limit(1)
    assert found.to_list()[0]["key"] == rows["key"][3].as_py()


class Killed:
    """Progress that interrupts the work on a table after some pairs."""

    def __init__(self, table, after):
        self.table, self.after = table, after

    def __call__(self, title):
        return silent(title) if self.table not in title else self

    def __enter__(self):
        def report(done, total):
            if done > self.after:
                raise KeyboardInterrupt

        return report

    def __exit__(self, *_):
        return None

    @staticmethod
    def fail(*_):
        raise KeyboardInterrupt


@pytest.mark.parametrize(("table", "expected"), [("images", (76, 136)), ("texts", (0, 76))])
def test_after_a_kill_it_goes_on(table, expected, written, tiny, catalogue, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        embed(tiny, catalogue, out, Killed(table, 64))  # the part of the first shard is written
    assert not list(out.glob("*/*.parquet")), "no file has its final place before all are there"
    again = embed(tiny, catalogue, out)
    assert tuple(again.embedded_now.values()) == expected
    same(out, written)


def same(one, other):
    """Assert that two folders hold the same, up to the rounding of other batches."""
    for name in BOTH:
        a, b = read(one, name), read(other, name)
        assert a.drop(["vector"]).equals(b.drop(["vector"]))
        np.testing.assert_allclose(vectors(a), vectors(b), atol=1e-6)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_the_last_part_joins_them(order, written, tiny, catalogue, tmp_path):
    out = tmp_path / "out"
    early = embed(tiny, catalogue, out, share=Part(order[0], 2))
    own = {1: 60 + 40, 2: 36}[order[0]]  # the first and the third shard are those of part 1
    assert early.embedded_now == {"images": own, "texts": early.embedded_now["texts"]}
    assert (early.joined, early.left, early.rows) == (False, 2 * (own == 36) + 2, {})
    assert not list(out.glob("*/*.parquet")), "nothing is in its place before all are there"
    last = embed(tiny, catalogue, out, share=Part(order[1], 2), index=True)
    assert (last.joined, last.left) == (True, 0)
    assert last.rows == {"images": 136, "texts": 136}
    assert (out / "images.faiss").exists()
    assert not list(out.glob(".*"))
    same(out, written)


def test_a_part_that_fails_to_join_is_made_up_for(written, tiny, catalogue, tmp_path):
    """It was killed, or the disk was full, after all files were complete."""
    out = tmp_path / "out"
    embed(tiny, catalogue, out, share=Part(1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddingsFolder, "publish", Killed.fail)
        with pytest.raises(KeyboardInterrupt):
            embed(tiny, catalogue, out, share=Part(2, 2))
    again = embed(tiny, catalogue, out, share=Part(1, 2))
    assert (again.joined, again.embedded_now) == (True, {"images": 0, "texts": 0})
    same(out, written)


def test_exactly_one_of_the_parts_that_run_at_once_joins_them(written, tiny, catalogue, tmp_path):
    for turn in range(4):
        out, started = tmp_path / str(turn), threading.Barrier(3)

        def part(number, out=out, started=started):
            started.wait(60)
            return embed(tiny, catalogue, out, share=Part(number, 3))

        with ThreadPoolExecutor(3) as threads:
            results = list(threads.map(part, (1, 2, 3)))
        assert [result.joined for result in results].count(True) == 1
        assert not list(out.glob(".*"))
        same(out, written)


def test_only_one_process_at_a_time_changes_the_folder(tmp_path):
    """Each adds one to a number in a file, without a lock of its own, and now and then removes the
    hidden folder, as the one that joins does."""
    folder, together = EmbeddingsFolder(tmp_path / "out"), threading.Barrier(4)
    (tmp_path / "out").mkdir()
    count = tmp_path / "out" / "count"
    count.write_text("0")

    def add(worker):
        together.wait(60)
        for turn in range(50):
            with folder.alone():
                found = int(count.read_text())
                time.sleep(0.0002)
                count.write_text(str(found + 1))
                if turn % 3 == 0:
                    folder.begin({"worker": 0}, overwrite=True)
                else:
                    folder.discard()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(add, range(4)))
    assert count.read_text() == "200"
    assert not folder.building.exists()


STALLS = """
import os, sys, time
from pathlib import Path
import tests.search.test_embed as t

data, out, number = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
replace, moved = os.replace, []

def stalling(source, target):
    replace(source, target)
    if Path(target).parent == out / "images":
        moved.append(target)
    if len(moved) == 2:
        (out.parent / "moving").touch()
        time.sleep(600)

os.replace = stalling
t.embed(t.open_tiny(), data, out, share=t.Part(number, 2))
"""


def test_a_part_takes_over_from_one_that_is_killed_while_it_joins(
    written, tiny, catalogue, tmp_path
):
    out = tmp_path / "out"
    embed(tiny, catalogue, out, share=Part(2, 2))
    joining = warm.Popen([sys.executable, "-c", STALLS, str(catalogue), str(out), "1"])
    while not (tmp_path / "moving").exists():
        assert joining.poll() is None
        time.sleep(0.02)
    assert not (out / "embeddings.json").exists(), "the mark is of a complete folder"
    with ThreadPoolExecutor(1) as threads:
        again = threads.submit(embed, tiny, catalogue, out, share=Part(2, 2))
        with pytest.raises(TimeoutError):  # two must not move files at once
            again.result(0.5)
        joining.kill()
        joining.wait(60)
        result = again.result(60)
    assert (result.joined, result.embedded_now) == (True, {"images": 0, "texts": 0})
    assert not list(out.glob(".*"))
    same(out, written)


def test_parts_of_other_options_are_refused(tiny, catalogue, tmp_path):
    out = tmp_path / "out"
    embed(tiny, catalogue, out, share=Part(1, 2))
    with pytest.raises(UsageError, match="with dtype float32, and not float16"):
        embed(tiny, catalogue, out, share=Part(2, 2), dtype="float16")
    assert len(list(out.glob(".*/*/*.parquet"))) == 4


def test_parts_replace_embeddings_of_other_options(tiny, catalogue, tmp_path):
    out, anew = tmp_path / "out", {"dtype": "float16", "overwrite": True}
    embed(tiny, catalogue, out)
    first = embed(tiny, catalogue, out, share=Part(1, 2), **anew)
    assert not first.joined
    last = embed(tiny, catalogue, out, share=Part(2, 2), **anew)
    assert (last.joined, last.embedded_now["images"]) == (True, 36), "those of part 1 are kept"
    assert read(out).schema.field("vector").type == pyarrow.list_(pyarrow.float16(), 128)


def test_an_unchanged_folder_is_left_alone(written, tiny, catalogue, tmp_path):
    out = shutil.copytree(written, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")}
    again = embed(tiny, catalogue, out)
    assert again.embedded_now == {"images": 0, "texts": 0}
    assert again.rows == {"images": 136, "texts": 136}
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")}
    assert (out / "images.faiss").exists(), "it still fits"


def test_only_what_changed_is_embedded_again(written, tiny, catalogue, tmp_path):
    """The pairs are in other shards now; one is new and two are gone."""
    out, data = shutil.copytree(written, tmp_path / "out"), tmp_path / "data"
    write_shard(data / "train" / "00000.tar", range(2, 40))
    write_shard(data / "train" / "00007.tar", [*range(40, 96), 5000])
    shutil.copytree(catalogue / "val", data / "val")
    again = embed(tiny, data, out)
    assert again.embedded_now["images"] == 1
    assert again.embedded_now["texts"] <= 1
    assert again.rows == {"images": 135, "texts": 135}
    names = {path.name for path in (out / "images").glob("*.parquet")}
    assert names == {f"{name}-0000.parquet" for name in ("train-00000", "train-00007", "val-00000")}
    assert not list(out.glob("*.faiss")), "an index of other rows would be wrong"
    embed(tiny, data, tmp_path / "anew")
    same(out, tmp_path / "anew")


def test_a_new_field_reaches_all_files_and_embeds_nothing(tiny, catalogue, tmp_path):
    data, out = shutil.copytree(catalogue, tmp_path / "data"), tmp_path / "out"
    embed(tiny, data, out, tables=("images",))
    pair = render_pair(7, 1)
    with tarfile.open(data / "train" / "00002.tar", "w") as tar:
        add(tar, "more.jpg", jpeg(pair))
        add(tar, "more.json", json.dumps({"stock": 3, "caption": "of the shop"}).encode())
    again = embed(tiny, data, out, tables=("images",))
    assert again.embedded_now == {"images": 0}  # the image is that of another pair
    rows = {row["key"]: row for row in read(out).to_pylist()}  # all files have the same columns
    assert (rows["more"]["stock"], rows["more"]["field_caption"]) == (3, "of the shop")
    assert (rows["more"]["caption"], rows["00001"]["stock"]) == ("of the shop", None)


def test_other_options_are_refused_or_made_anew(tiny, catalogue, tmp_path):
    data, out = catalogue / "val", tmp_path / "out"
    embed(tiny, data, out, tables=("images",))
    with pytest.raises(UsageError, match=r"with dtype float32, and not float16") as refused:
        embed(tiny, data, out, tables=("images",), dtype="float16")
    assert "--overwrite" in refused.value.hint
    assert len(read(out)) == 40
    anew = embed(tiny, data, out, tables=("images",), dtype="float16", overwrite=True)
    assert anew.embedded_now == {"images": 40}
    assert read(out).schema.field("vector").type == pyarrow.list_(pyarrow.float16(), 128)
    assert not list(out.glob(".*"))


def test_another_model_is_refused(tiny, catalogue, tmp_path):
    data, out = catalogue / "val", tmp_path / "out"
    embed(tiny, data, out, tables=("images",))
    trained = replace(tiny, loaded=replace(tiny.loaded, fingerprint="of other weights"))
    with pytest.raises(UsageError, match="embeddings of another model"):
        embed(trained, data, out, tables=("images",))


def test_fewer_dimensions_are_the_first_ones_at_unit_length(written, tiny, catalogue, tmp_path):
    embed(tiny, catalogue / "val", tmp_path / "out", tables=("images",), dim=16)
    short, whole = vectors(read(tmp_path / "out")), vectors(read(written))[96:, :16]
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        short, whole / np.linalg.norm(whole, axis=1, keepdims=True), atol=1e-5
    )
    with pytest.raises(UsageError, match="--dim 129: the embeddings of this model have 128"):
        embed(tiny, catalogue / "val", tmp_path / "other", dim=129)


def test_several_captions_no_caption_and_a_broken_image(tiny, tmp_path):
    photos = tmp_path / "photos"
    (photos / "val").mkdir(parents=True)
    (photos / "a.jpg").write_bytes(jpeg(render_pair(7, 1)))
    (photos / "a.txt").write_text("a red chair\na chair\n")
    (photos / "val" / "b.jpg").write_bytes(jpeg(render_pair(7, 2)))
    (photos / "c.jpg").write_bytes(b"<html>")
    (photos / "c.txt").write_text("a chair")
    result = embed(tiny, photos, tmp_path / "out")
    images = {row["key"]: row for row in read(tmp_path / "out").to_pylist()}
    assert {key: row["caption"] for key, row in images.items()} == {
        "a.jpg": "a red chair",
        "val/b.jpg": None,
    }
    assert (images["a.jpg"]["split"], images["val/b.jpg"]["split"]) == (None, "val")
    texts = read(tmp_path / "out", "texts").to_pylist()
    assert sorted((row["key"], row["caption"]) for row in texts) == [
        ("a.jpg", "a chair"),
        ("a.jpg", "a red chair"),
        ("c.jpg", "a chair"),
    ]
    assert result.embedded_now == {"images": 3, "texts": 2}, "equal captions are embedded once"
    (skipped,) = map(json.loads, (tmp_path / "out" / "skipped.jsonl").read_text().splitlines())
    assert skipped["key"] == "c.jpg" and "not an image" in skipped["reason"]


def test_nothing_to_embed_is_an_error_and_leaves_nothing(tiny, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"<html>")
    with pytest.raises(DataError, match="none of the 1 image can be used"):
        embed(tiny, tmp_path / "photos", tmp_path / "out")
    with pytest.raises(DataError, match="no pair has a caption"):
        embed(tiny, tmp_path / "photos", tmp_path / "out", tables=("texts",))
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_made_again(written, tiny, catalogue, tmp_path):
    out = shutil.copytree(written, tmp_path / "out")
    file = out / "images" / "val-00000-0000.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    assert embed(tiny, catalogue, out).embedded_now == {"images": 40, "texts": 0}
    assert len(read(out)) == 136


def test_parts_are_written_while_others_are_read(tiny, tmp_path):
    """Memory does not grow with the data: a part is begun when those before it are written, except
    as far as the loader reads ahead."""
    for number in range(40):
        write_shard(tmp_path / "data" / f"{number:05d}.tar", range(4 * number, 4 * number + 4))
    parts, begun_before_writing = open_images(tmp_path / "data"), []
    building = tmp_path / "out" / ".clipft-building" / "images"

    def watched(place, part):
        def read(number):
            begun_before_writing.append(place - len(list(building.glob("*.parquet"))))
            return part.read(number)

        return replace(part, read=read)

    parts = [watched(place, part) for place, part in enumerate(parts)]
    embed_dataset(tiny, parts, tmp_path / "out", EmbedChoices(("images",)), silent)
    assert max(begun_before_writing) <= 24  # of 4 images; a batch has 64


def test_the_command(catalogue, tmp_path, capsys):
    out, given = tmp_path / "out", ["--num-workers", "0", "--precision", "fp32", "--json"]
    assert run(["embed", "tiny", str(catalogue / "val"), str(out), "--texts", *given]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["dim"], result["dtype"]) == ({"texts": 40}, 128, "float32")
    assert not (out / "images").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    assert run(["embed", "tiny", str(catalogue), str(tmp_path / "mine")]) == 2
    assert "holds no embeddings" in capsys.readouterr().err
    assert run(["embed", "tiny", str(catalogue), str(out), "--dtype", "float8"]) == 2
    assert run(["embed", "tiny", str(tmp_path / "none"), str(tmp_path / "new")]) == 3
    assert run(["embed", str(tmp_path / "none"), str(catalogue), str(tmp_path / "new")]) == 5
    assert not (tmp_path / "new").exists()
