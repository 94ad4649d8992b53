"""Both models search the same images, and each image has its rank with the other one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipft.browse.comparison import rank_of
from clipft.browse.judging import held_out_numbers
from clipft.core.errors import DataError, UsageError
from clipft.data.demo.catalogue import render_pair
from clipft.search.images import JoinedParts, open_images
from tests.conftest import jpeg


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, np.nan]), min_size=1, max_size=12))
def test_a_rank_is_the_place_in_the_sorted_list(values):
    scores = np.array(values, np.float32)
    usable = [n for n in range(len(values)) if not np.isnan(values[n])]
    for place, number in enumerate(sorted(usable, key=lambda n: (-scores[n], n)), 1):
        assert rank_of(number, scores) == place


def test_the_ranks_with_the_other_model_are_those_of_its_list(comparison):
    found = comparison.by_words("a red chair")
    for own, other in (
        (found.pretrained, found.fine_tuned),
        (found.fine_tuned, found.pretrained),
    ):
        assert [image.rank for image in own] == list(range(1, 9))
        assert [i.score for i in own] == sorted((i.score for i in own), reverse=True)
        ranks = {image.number: image.rank for image in other}
        for image in own:
            if image.number in ranks:
                assert image.other_rank == ranks[image.number]
            else:
                assert image.other_rank > len(other)


def test_an_image_of_the_catalogue_is_found_first_by_both(comparison):
    found = comparison.by_image(jpeg(render_pair(7, 1003)))
    for images in (found.pretrained, found.fine_tuned):
        assert images[0].key == "01003"
        assert images[0].score == pytest.approx(1, abs=1e-3)
    assert found.query.name.startswith("image:")


def test_a_query_is_cut_where_the_models_stop_reading_and_it_is_said(comparison):
    assert comparison.by_words("a chair").query.note == ""
    assert "tokens" in comparison.by_words("chair " * 200).query.note


def test_examples_are_captions_from_all_over_the_images(comparison):
    found = comparison.examples(range(96, 136))
    captions = [comparison.caption(number) for number in range(96, 136)]
    places = [captions.index(caption) for caption in found]
    assert len(found) == len(set(found)) == 4
    assert places == sorted(places) and places[-1] > 20
    assert comparison.examples([]) == [] and len(comparison.examples([100])) == 1


@pytest.mark.parametrize("words", ["", " \n", "\x00"])
def test_no_words_are_no_query(comparison, words):
    with pytest.raises(UsageError, match="no words"):
        comparison.by_words(words)


def test_what_is_no_image_is_refused(comparison):
    with pytest.raises(DataError, match="not an image"):
        comparison.by_image(b"chair")


def test_captions_are_drawn_from_what_no_run_is_trained_on(catalogue):
    assert held_out_numbers(open_images(catalogue), catalogue) == list(range(96, 136))
    val = catalogue / "val"
    assert held_out_numbers(open_images(val), val) == list(range(40))
    train = catalogue / "train"
    assert held_out_numbers(open_images(train), train) == []


def test_loose_images_in_val_are_held_out_too(tmp_path):
    for path in ("train/a.jpg", "train/b.jpg", "val/c.jpg"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(jpeg(render_pair(7, 1)))
    parts = open_images(tmp_path)
    keys = [JoinedParts(parts)[number].key for number in held_out_numbers(parts, tmp_path)]
    assert keys == ["val/c.jpg"]
