import io
import json
import os
import pickle
import tarfile

import pytest
from PIL import Image

from clipft.config.settings import Settings
from clipft.core.cache import cache_folder
from clipft.data.captions.table import LiveCaptions, caption_table
from clipft.data.captions.template import BadCaption, CaptionTemplate
from clipft.data.captions.tokenizer import CaptionEncoder
from clipft.data.shards.folders import open_pairs
from clipft.models.pretrained import load_inputs
from tests.conftest import add

TEMPLATE = CaptionTemplate.parse("{names} || {caption}")


@pytest.fixture(scope="module")
def encoder():
    return CaptionEncoder(load_inputs("tiny").tokenizer, 20)


@pytest.fixture
def pairs(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(9):
            names = [f"name {i} of {number}" for i in range(number % 4)]
            add(tar, f"{number}.png", buffer.getvalue())
            add(tar, f"{number}.txt", b"" if number in (0, 4) else b"long " * 5 * number)
            add(tar, f"{number}.json", json.dumps({"names": names}).encode())
    return open_pairs(tmp_path)


class Builds(list):
    def __call__(self):
        self.append(1)


def ids(source, pairs, epoch):
    found = []
    for number in range(len(pairs)):
        try:
            found.append(source.ids(pairs[number], epoch))
        except BadCaption:
            found.append(None)
    return found


@pytest.mark.parametrize("seed", [None, 3])
def test_the_table_gives_what_tokenizing_each_time_gives(pairs, encoder, seed):
    table = caption_table(pairs, TEMPLATE, encoder, seed, Builds())
    live = LiveCaptions(TEMPLATE, encoder, seed)
    sent = pickle.loads(pickle.dumps(table))
    by_epoch = [ids(table, pairs, epoch) for epoch in range(6)]
    assert by_epoch == [ids(live, pairs, epoch) for epoch in range(6)]
    assert by_epoch == [ids(sent, pairs, epoch) for epoch in range(6)]
    drawn = {tuple(rows[3]) for rows in by_epoch}
    assert len(drawn) == 1 if seed is None else len(drawn) > 1


def test_figures_describe_the_captions_before_truncation(pairs, encoder):
    figures = caption_table(pairs, TEMPLATE, encoder, 1, Builds()).figures
    # 0 + 1 + 2 + 3, twice, and 0 again: names; all but two have a .txt; 0 and 4 have neither
    assert (figures.captions, figures.none) == (12 + 7, 2)
    assert figures.most_tokens == 8 * 5 + 2
    assert figures.cut == sum(5 * number + 2 > 20 for number in range(9) if number != 4)


def test_the_table_is_made_once_and_again_when_anything_changes(pairs, encoder, tmp_path):
    builds = Builds()
    caption_table(pairs, TEMPLATE, encoder, 1, builds)
    caption_table(pairs, TEMPLATE, encoder, 2, builds)  # the seed draws, it does not build
    assert len(builds) == 1
    caption_table(pairs, CaptionTemplate.parse("{caption}"), encoder, 1, builds)
    assert len(builds) == 2
    os.utime(tmp_path / "0.tar", ns=(1, 1))
    caption_table(open_pairs(tmp_path), TEMPLATE, encoder, 1, builds)
    assert len(builds) == 3


def test_a_damaged_table_is_made_again(pairs, encoder):
    builds = Builds()
    whole = ids(caption_table(pairs, TEMPLATE, encoder, 1, builds), pairs, 0)
    (file,) = cache_folder().glob("captions/*/ids.npy")
    file.write_bytes(file.read_bytes()[:-6])
    assert ids(caption_table(pairs, TEMPLATE, encoder, 1, builds), pairs, 0) == whole
    assert len(builds) == 2


def test_without_a_cache_folder_it_is_kept_in_memory(pairs, encoder, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("CLIPFT_CACHE", str(blocked / "cache"))
    table = caption_table(pairs, TEMPLATE, encoder, 1, Builds())
    assert ids(table, pairs, 0) == ids(LiveCaptions(TEMPLATE, encoder, 1), pairs, 0)
    assert ids(pickle.loads(pickle.dumps(table)), pairs, 0)


WEIGHTED = CaptionTemplate.of(Settings(fields="names:3,caption:1"))


@pytest.mark.parametrize("seed", [None, 3])
def test_fields_are_drawn_by_their_weights_from_the_table_as_live(pairs, encoder, seed):
    table = caption_table(pairs, WEIGHTED, encoder, seed, Builds())
    again = caption_table(pairs, WEIGHTED, encoder, seed, Builds())
    live = LiveCaptions(WEIGHTED, encoder, seed)
    sent = pickle.loads(pickle.dumps(table))
    for epoch in range(6):
        expected = ids(live, pairs, epoch)
        assert all(ids(each, pairs, epoch) == expected for each in (table, again, sent))
    if seed is None:
        return
    # Pair 3 has three names, which share a weight of 3, and a .txt with a weight of 1
    own = tuple(encoder(["long " * 15])[0].ids)
    drawn = [tuple(table.ids(pairs[3], epoch)) for epoch in range(2000)]
    assert len(set(drawn)) == 4
    assert drawn.count(own) / 2000 == pytest.approx(0.25, abs=0.04)
    # Pair 8 has no names: what it has is drawn always
    assert len({tuple(table.ids(pairs[8], epoch)) for epoch in range(20)}) == 1


def test_a_table_that_lost_its_weights_is_made_again(pairs, encoder):
    builds = Builds()
    table = caption_table(pairs, WEIGHTED, encoder, 1, builds)
    (table.folder / "weights.npy").unlink()
    again = caption_table(pairs, WEIGHTED, encoder, 1, builds)
    assert len(builds) == 2 and again.weights.tolist() == table.weights.tolist()


def test_other_weights_are_another_table(pairs, encoder):
    other = CaptionTemplate.of(Settings(fields="names:1,caption:1"))
    one, two = (caption_table(pairs, t, encoder, 1, Builds()) for t in (WEIGHTED, other))
    assert one.folder != two.folder
