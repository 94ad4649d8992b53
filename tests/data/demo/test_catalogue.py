"""The demo's catalogue: reproducible, varied, and described by its captions."""

from random import Random

import numpy as np
import pytest

from clipft.data.demo.catalogue import render_pair, write_catalogue
from clipft.data.demo.drawing import COLORS, MATERIALS, Paint
from clipft.data.demo.furniture import KINDS, Paints


@pytest.fixture(scope="module")
def pairs():
    return [render_pair(3, index) for index in range(200)]


def test_a_pair_depends_only_on_its_seed_and_index(pairs):
    alone = render_pair(3, 17)
    assert alone.caption == pairs[17].caption
    assert alone.metadata == pairs[17].metadata
    assert alone.image.tobytes() == pairs[17].image.tobytes()


def test_drawing_leaves_the_global_generators_alone():
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    render_pair(0, 0)
    assert (np.random.get_state()[1] == before).all()


def test_a_shorter_catalogue_is_a_prefix_of_a_longer_one(tmp_path):
    for folder, count in (("short", 5), ("long", 12)):
        write_catalogue(tmp_path / folder, count, 3, lambda done, total: None)
    short = sorted((tmp_path / "short").rglob("*.*"))
    assert len(short) == 3 * 5
    for path in short:
        longer = tmp_path / "long" / path.relative_to(tmp_path / "short")
        assert longer.read_bytes() == path.read_bytes()


def test_another_seed_gives_other_images_and_keys(pairs):
    other = render_pair(4, 0)
    assert other.key != pairs[0].key
    assert other.image.tobytes() != pairs[0].image.tobytes()


def test_images_are_small_rgb_and_all_different(pairs):
    assert {(pair.image.mode, pair.image.size) for pair in pairs} == {("RGB", (128, 128))}
    assert len({pair.image.tobytes() for pair in pairs}) == len(pairs)


def test_captions_are_sentences_of_bounded_length_and_mostly_unique(pairs):
    captions = [pair.caption for pair in pairs]
    assert all(6 <= len(caption.split()) <= 25 for caption in captions)
    assert all(caption[0].isupper() and caption.endswith(".") for caption in captions)
    assert len(set(captions)) >= 0.98 * len(captions)


def test_captions_stay_true_when_the_image_is_mirrored(pairs):
    words = {word.strip(".,") for pair in pairs for word in pair.caption.lower().split()}
    assert not words & {"left", "right"}


def test_the_caption_names_the_kind_and_says_the_color_in_one_of_two_words(pairs):
    words: dict[str, set[str]] = {}
    for pair in pairs:
        assert pair.metadata["type"] in pair.caption
        before, _, _ = pair.caption.partition(f" {pair.metadata['type']}")
        words.setdefault(pair.metadata["color"], set()).add(before.lower().split()[-2])
    assert all(len(said) <= 2 for said in words.values())


def test_records_have_every_field_and_cover_the_variety(pairs):
    fields = {"id", "name", "type", "color", "material", "view", "category"}
    assert all(pair.metadata.keys() == fields for pair in pairs)
    assert {pair.metadata["color"] for pair in pairs} == set(COLORS)
    assert {pair.metadata["material"] for pair in pairs} == set(MATERIALS)
    assert len({pair.metadata["type"] for pair in pairs}) >= 10
    assert len({pair.metadata["view"] for pair in pairs}) == 4
    assert len({pair.metadata["id"] for pair in pairs}) == len(pairs)


def test_keys_are_safe_file_names_and_unique(pairs):
    keys = [pair.key for pair in pairs]
    assert len(set(keys)) == len(keys)
    assert all(key.replace("_", "").isalnum() for key in keys)


def test_every_kind_of_furniture_can_be_built():
    paints = Paints(Paint((10, 20, 30)), Paint((40, 50, 60)), Paint((70, 80, 90)))
    for kind in KINDS:
        for seed in range(10):
            solids, detail = kind.build(paints, Random(seed))
            assert solids and detail
