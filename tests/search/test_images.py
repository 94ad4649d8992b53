import os
import shutil

import pytest

from clipft.core.errors import DataError
from clipft.data.demo.catalogue import render_pair
from clipft.search.images import open_images
from tests.conftest import jpeg, write_shard


def states(folder):
    return {part.state for part in open_images(folder)}


def keys(folder):
    return [part.read(n).key for part in open_images(folder) for n in range(part.count)]


@pytest.fixture
def photos(tmp_path):
    """600 files in two folders; all but the first have only the names of images."""
    folder = tmp_path / "photos"
    (folder / "more" / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    image = jpeg(render_pair(7, 1))
    for place in (folder, folder / "more" / "deep"):
        for number in range(300):
            (place / f"{number:03d}.JPG").write_bytes(b"")
    (folder / "000.JPG").write_bytes(image)
    (folder / "000.txt").write_text("a chair")
    (folder / "note.pdf").touch()
    (folder / ".hidden" / "a.jpg").touch()
    return folder


def test_all_images_of_all_folders_are_found_once(photos):
    found = keys(photos)
    assert len(found) == len(set(found)) == 600
    assert "more/deep/299.JPG" in found
    pairs = (part.read(n) for part in open_images(photos) for n in range(part.count))
    first = next(pair for pair in pairs if pair.caption)
    assert (first.key, first.caption) == ("000.JPG", b"a chair")
    assert first.image == (photos / "000.JPG").read_bytes()


@pytest.mark.parametrize("change", ["added", "removed", "written", "touched"])
def test_changing_one_file_changes_one_part(change, photos):
    before = states(photos)
    file = photos / "more" / "deep" / "123.JPG"
    if change == "added":
        file.with_name("new.png").touch()
    elif change == "removed":
        file.unlink()
    elif change == "written":
        file.write_bytes(b"other")
    else:
        os.utime(file, (1, 1))
    after = states(photos)
    assert len(after) == len(before) >= 4
    assert len(after - before) == 1


def test_shards_are_found_in_the_folder_or_in_its_splits(catalogue):
    assert len(keys(catalogue)) == 136
    assert len(keys(catalogue / "val")) == 40


def test_changing_a_shard_leaves_the_other_parts_as_they_are(catalogue, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(catalogue, folder)
    before = states(folder)
    write_shard(folder / "val" / "00000.tar", range(2000, 2010))
    assert len(states(folder) & before) == len(before) - 1


def test_a_missing_folder_and_one_without_images_are_errors(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no image"):
        open_images(tmp_path)


def test_a_file_that_was_removed_is_an_error(photos):
    part = open_images(photos)[0]
    shutil.rmtree(photos)
    with pytest.raises(DataError, match="cannot read"):
        part.read(0)
