import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipft.cli.app import run
from clipft.core.cache import cache_folder
from clipft.data.images.decode import decode_image
from clipft.data.loader import LoaderOptions, evaluation_batches
from clipft.data.shards.folders import open_pairs
from clipft.embedding.embed import embed_texts
from clipft.search.images import open_images
from clipft.search.index import open_index
from tests.exports import opened, write_checkpoint
from tests.inputs import preprocessing


@pytest.fixture
def search(capsys):
    """Runs a search and returns its JSON."""

    def searching(*given) -> dict:
        capsys.readouterr()
        assert run(["search", *map(str, given), "--num-workers", "0", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return searching


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints"), "dual_lora")


@pytest.fixture
def photos(catalogue, tmp_path) -> Path:
    """12 loose images; the first cannot be decoded."""
    folder, pairs = tmp_path / "photos", open_pairs(catalogue / "val", limit=12)
    folder.mkdir()
    for pair in (pairs[number] for number in range(12)):
        (folder / f"{pair.key}.jpg").write_bytes(pair.image)
        (folder / f"{pair.key}.txt").write_bytes(pair.caption)
    (folder / "01000.jpg").write_bytes(b"<html>")
    return folder


def test_the_best_are_those_by_the_embeddings_of_the_model(search, tuned, catalogue):
    found = search(tuned, catalogue / "val", "green lamp", "--top", 7, "--precision", "fp32")
    pairs = open_pairs(catalogue / "val")
    batch = next(evaluation_batches(pairs, preprocessing("none"), 40, LoaderOptions()))
    with torch.inference_mode():
        images = opened(tuned).loaded.model.eval().encode_images(batch.pixel_values)
    scores = images @ embed_texts(opened(tuned).loaded, ["green lamp"])[0]
    expected = scores.argsort(descending=True, stable=True)[:7].tolist()
    assert [hit["key"] for hit in found["found"]] == [pairs[n].key for n in expected]
    assert [hit["score"] for hit in found["found"]] == pytest.approx(
        scores[expected].tolist(), abs=1e-5
    )
    first = pairs[expected[0]]
    assert found["found"][0]["caption"] == first.caption.decode()
    assert found["found"][0]["source"] == "00000.tar"


def test_an_image_finds_itself(search, catalogue, tmp_path):
    image = decode_image(open_pairs(catalogue / "val")[5].image)
    image.save(tmp_path / "asked.png")
    page = tmp_path / "found.html"
    found = search("tiny", catalogue, "--image", tmp_path / "asked.png", "--top", 1, "--html", page)
    text = page.read_text()
    assert "Like asked.png" in text and str(tmp_path) not in text
    assert text.count("data:image/jpeg") == 2
    assert found["found"][0]["key"] == "01005"
    assert found["found"][0]["score"] == pytest.approx(1, abs=1e-3)
    assert found["pictures"] == 136


def test_the_second_search_embeds_nothing_and_a_change_only_its_part(
    search, tuned, catalogue, tmp_path
):
    data = tmp_path / "data"
    shutil.copytree(catalogue / "train", data)
    one = search(tuned, data, "a table")
    again = search(tuned, data, "a table")
    assert (one["embedded_now"], again["embedded_now"]) == (96, 0)
    assert one["found"] == again["found"]
    shutil.copy(catalogue / "val" / "00000.tar", data / "00002.tar")
    changed = search(tuned, data, "a table")
    assert (changed["embedded_now"], changed["pictures"]) == (40, 136)
    other_model = search("tiny", data, "a table")
    assert other_model["embedded_now"] == 136


def test_a_stopped_search_continues_where_it_was(tuned, catalogue):
    parts, model = open_images(catalogue), opened(tuned)

    def kill(done: int, total: int) -> None:
        if done > 64:  # the part of the first shard is saved by then
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_index(model, parts, LoaderOptions(), kill)
    index = open_index(model, parts, LoaderOptions(), lambda done, total: None)
    assert (index.embedded, len(index.images)) == (76, 136)
    shutil.rmtree(cache_folder() / "pictures")
    whole = open_index(model, parts, LoaderOptions(), lambda done, total: None)
    for one, other in zip(index.vectors, whole.vectors, strict=True):
        assert np.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"0" * 5000])
def test_a_damaged_cache_is_replaced(damage, search, catalogue):
    one = search("tiny", catalogue / "val", "a table")
    (file,) = cache_folder().rglob("pictures/*/*.npy")
    file.write_bytes(damage)
    again = search("tiny", catalogue / "val", "a table")
    assert again["embedded_now"] == 40
    assert again["found"] == one["found"]


def test_loose_images_with_one_that_cannot_be_decoded(search, photos, capsys):
    found = search("tiny", photos, "a table", "--top", 50)
    assert (found["pictures"], found["unusable"], len(found["found"])) == (12, 1, 11)
    assert all(hit["caption"] for hit in found["found"])
    again = search("tiny", photos, "a table", "--top", 50)
    assert (again["embedded_now"], again["unusable"]) == (0, 1)


def test_an_exported_folder_finds_what_the_run_finds(search, tuned, catalogue, tmp_path):
    assert run(["export", str(tuned), str(tmp_path / "out")]) == 0
    one = search(tuned, catalogue / "val", "a round table", "--precision", "fp32")
    other = search(tmp_path / "out", catalogue / "val", "a round table", "--precision", "fp32")
    scores = [[hit["score"] for hit in result["found"]] for result in (one, other)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_the_page_shows_the_images_and_escapes_their_captions(search, photos, tmp_path):
    for text in photos.glob("*.txt"):
        text.write_text("<script>alert(1)</script> & chair")
    page = tmp_path / "found.html"
    query = '<b>"light" & oak'
    found = search("tiny", photos, query, "--top", 5, "--html", page)
    text = page.read_text()
    assert "<script>alert" not in text and "<b>&quot;" not in text and query not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; chair" in text
    assert text.count("<figure>") == len(re.findall(r"data:image/jpeg;base64,", text)) == 5
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    for hit in found["found"]:
        assert hit["key"] in text


def test_wrong_usage_is_an_error(photos, tmp_path, capsys):
    assert run(["search", "tiny", str(photos)]) == 2
    assert run(["search", "tiny", str(photos), "words", "--image", str(photos / "01001.jpg")]) == 2
    assert "and not both" in capsys.readouterr().err
    assert run(["search", "tiny", str(photos), "--image", str(photos / "01000.jpg")]) == 3
    assert "01000.jpg: not an image" in capsys.readouterr().err
    assert run(["search", "tiny", str(photos), "--image", str(photos / "none.jpg")]) == 3
    assert run(["search", "tiny", str(tmp_path / "none"), "chair"]) == 3
    assert run(["search", str(tmp_path), str(photos), "chair"]) == 5
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    assert run(["search", "tiny", str(tmp_path / "a.png"), "chair"]) == 3
