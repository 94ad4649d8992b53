"""Several captions for an image: the lines of a ``.txt``, and lists."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipft.data.captions.lines import fold_lines, join_lines, split_lines
from clipft.data.captions.template import BadCaption, CaptionTemplate

FIVE = b"one\r\n\r\n  two \nthree\n\n\t\nfour\nfive\n"


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ("a chair\n", ["a chair"]),
        ("\n\n a chair \r\n", ["a chair"]),
        ("one\ntwo", ["one", "two"]),
        ("one\rtwo", ["one", "two"]),
        (FIVE.decode(), ["one", "two", "three", "four", "five"]),
        ("form\ffeed next\x85line para\u2029graph", ["form\ffeed next\x85line para\u2029graph"]),
        (" \n\t\r\n", []),
        ("", []),
    ],
)
def test_each_line_that_is_not_blank_is_a_caption(text, captions):
    assert split_lines(text) == captions
    assert split_lines(text, "joined") == [" ".join(captions)][: len(captions)]


@given(st.lists(st.text(min_size=1), max_size=6))
def test_lists_written_as_lines_are_read_back(captions):
    folded = [fold_lines(text) for text in captions]
    stored = join_lines(captions)
    assert split_lines(stored.decode()) == [text for text in folded if text]


def test_a_list_item_that_json_cannot_mean_becomes_a_question_mark():
    assert join_lines(["half \ud83e", "a\nb"]) == b"half ?\na b"


def texts(source, txt=b"", metadata=None, lines="separate"):
    stored = b"" if metadata is None else json.dumps(metadata).encode()
    return CaptionTemplate.parse(source, lines).captions(txt, stored)


def test_a_template_repeats_what_is_around_the_caption():
    assert texts("{caption}", FIVE) == ["one", "two", "three", "four", "five"]
    assert texts("a {kind}: {caption}", b"one\ntwo", {"kind": "sofa"}) == [
        "a sofa: one",
        "a sofa: two",
    ]
    assert texts("{name} || {caption}", b"one\ntwo", {"name": "K"}) == ["K", "one", "two"]
    assert texts("{caption}, {name}", b"one\ntwo", {}) == ["one", "two"]
    assert texts("{caption}", b"same\nsame\nother") == ["same", "other"]


def test_joined_lines_are_one_caption():
    assert texts("{caption}", FIVE, lines="joined") == ["one two three four five"]
    assert texts("{kind}. {caption}", b"one\ntwo", {"kind": "sofa"}, "joined") == ["sofa. one two"]


def test_lists_in_json_are_captions_and_their_line_breaks_are_spaces():
    assert texts("{caption}", metadata={"caption": ["one\nmore", "two"]}) == ["one more", "two"]
    assert texts("see {caption}", metadata={"caption": ["one", "two"]}) == ["see one", "see two"]
    assert texts("{caption}", metadata=["one", "two"]) == ["one", "two"]
    assert texts("{caption}", metadata=[{"id": 7, "caption": "one"}, {"id": 8}]) == ["one"]
    assert texts("{caption}", b"own", ["one", "two"]) == ["own"]


@pytest.mark.parametrize("metadata", [[], [None, ""], {"caption": []}, {"caption": ["", "\n"]}])
def test_a_list_without_text_is_no_caption(metadata):
    with pytest.raises(BadCaption, match="empty"):
        texts("{caption}", metadata=metadata)
    with pytest.raises(BadCaption, match="empty"):
        texts("a photo of {caption}", metadata=metadata)
