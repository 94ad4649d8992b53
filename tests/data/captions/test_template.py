import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from clipft.config.settings import Settings
from clipft.core.errors import UsageError
from clipft.data.captions.template import BadCaption, CaptionTemplate


def captions(template, txt="", **metadata):
    parsed = CaptionTemplate.parse(template)
    return parsed.captions(txt.encode(), json.dumps(metadata).encode())


THREE = "{type}, {color}. {name}"


@pytest.mark.parametrize(
    ("template", "metadata", "text"),
    [
        (THREE, {"type": "Sofa", "color": "red", "name": "KIVIK"}, "Sofa, red. KIVIK"),
        (THREE, {"type": "Sofa", "name": "KIVIK"}, "Sofa. KIVIK"),
        (THREE, {"color": "red", "name": "KIVIK"}, "red. KIVIK"),
        (THREE, {"type": "Sofa", "color": "red"}, "Sofa, red."),
        (THREE, {"type": "Sofa", "color": "", "name": None}, "Sofa"),
        (THREE, {"name": "KIVIK"}, "KIVIK"),
        ("{type} ({color}, {size})", {"type": "Sofa"}, "Sofa"),
        ("{type} ({color}, {size})", {"type": "Sofa", "size": 160}, "Sofa (160)"),
        ("{type} ({color}, {size})", {"type": "Sofa", "color": "red"}, "Sofa (red)"),
        ("{type} ({color}) by {brand}.", {"type": "Sofa", "brand": "X"}, "Sofa by X."),
        ("{type}, {color}.", {"type": "Sofa"}, "Sofa."),
        ("{type} - {color} / {name}", {"type": "Sofa", "name": "KIVIK"}, "Sofa / KIVIK"),
        ("{type}[ in {color}][, by {brand}]", {"type": "Sofa"}, "Sofa"),
        ("{type}[ in {color}][, by {brand}]", {"type": "Sofa", "brand": "X"}, "Sofa, by X"),
        ("{size.w} x {size.h} cm", {"size": {"w": 10, "h": 20.5}}, "10 x 20.5 cm"),
        ("a {materials} table", {"materials": ["oak", "", "steel"]}, "a oak, steel table"),
        ("{{{type}}} [[new]]", {"type": "Sofa"}, "{Sofa} [new]"),
        ("{name}", {"name": " two\n words\x00<|endoftext|> "}, "two words<|endoftext|>"),
    ],
)
def test_empty_fields_take_their_punctuation_along(template, metadata, text):
    assert captions(template, **metadata) == [text]


def test_the_txt_is_the_default_and_can_be_mixed_in():
    assert captions("{caption}", txt="\ufeff a  chair\n", caption="no") == ["a chair"]
    assert captions("{caption}. {name}", txt="a chair", name="POANG") == ["a chair. POANG"]
    assert captions("{caption}", caption="of the metadata") == ["of the metadata"]


def test_several_captions_in_order_and_none_twice():
    template = "{a} || {caption} || {b} || {several}"
    assert captions(template, txt="x", a="y", several=["p", "x", ""]) == ["y", "x", "p"]


@pytest.mark.parametrize("metadata", [{}, {"type": None}, {"type": []}, {"type": {"a": 1}}])
def test_a_template_whose_fields_are_all_empty_gives_no_caption(metadata):
    with pytest.raises(BadCaption, match="empty"):
        captions("a photo of a {type}", **metadata)


def test_broken_metadata_counts_as_missing():
    for data in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000):
        assert CaptionTemplate.parse("{caption}. {name}").captions(b"a", data) == ["a."]


@pytest.mark.parametrize(
    "template", ["", "{a", "a}", "[{a}", "{a}]", "{}", "{a.}", "{a} || ", "[]"]
)
def test_a_wrong_template_is_refused(template):
    with pytest.raises(UsageError, match="--caption"):
        CaptionTemplate.parse(template)


WORD = st.text("abcäß漢", min_size=1, max_size=4)


@given(
    st.lists(st.sampled_from([", ", ". ", "; ", " - ", " ", ": "]), min_size=3, max_size=3),
    st.lists(WORD | st.just(""), min_size=4, max_size=4),
    st.booleans(),
)
def test_no_gap_is_left_and_no_value_lost(separators, values, bracket):
    first, second, third = separators
    inner = f"({{b}}{second}{{c}})" if bracket else f"{{b}}{second}{{c}}"
    template = f"{{a}}{first}{inner}{third}{{d}}"
    if not any(values):
        with pytest.raises(BadCaption):
            captions(template, **dict(zip("abcd", values, strict=True)))
        return
    (text,) = captions(template, **dict(zip("abcd", values, strict=True)))
    at = 0
    for value in filter(None, values):
        at = text.index(value, at) + len(value)
    assert "\0" not in text
    for gap in (", ,", ", .", ". .", ". ,", "- -", "()", "( ", " )", "(,", ",)", "; ;", ": :"):
        assert gap not in text
    assert text[0] not in ",.;:- "
    assert text[-1] not in ",;:- "


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(source):
    try:
        parsed = CaptionTemplate.parse(source)
    except UsageError:
        return
    try:
        assert all(parsed.captions(b"a", b'{"a": 1}'))
    except BadCaption:
        return


def fields(given: str, **metadata: Any) -> dict[str, float]:
    template = CaptionTemplate.of(Settings(fields=given))
    return template.weighted_captions(b"text", json.dumps(metadata).encode())


def test_fields_are_captions_with_weights():
    assert fields("name:1,description:0.5", name="Sofa", description="Soft.") == {
        "Sofa": 1.0,
        "Soft.": 0.5,
    }
    assert fields("name, size.width :2,caption:3", name="Sofa", size={"width": 80}) == {
        "Sofa": 1.0,
        "80": 2.0,
        "text": 3.0,
    }


def test_values_of_a_field_share_its_weight_and_equal_texts_add_theirs():
    found = fields("colors:1,name:0.5,empty:9", colors=["red", "blue"], name="red", empty=" ")
    assert found == {"red": 1.0, "blue": 0.5}


def test_an_evaluation_measures_the_first_field_that_a_pair_has():
    template = CaptionTemplate.of(Settings(fields="name:1,description:5")).for_evaluation()
    assert template.first == "{name}"
    assert template.captions(b"", b'{"name": "Sofa", "description": "Soft."}') == ["Sofa"]
    assert template.captions(b"", b'{"name": "", "description": "Soft."}') == ["Soft."]
    assert CaptionTemplate.parse("a {name} || {caption}").first == "a {name}"


@pytest.mark.parametrize("given", ["name:0", "name:-1", "name:x", ":1", "name:inf", "name:nan"])
def test_a_weight_that_is_none_is_refused(given):
    with pytest.raises(ValidationError, match="is not a field and a weight above 0"):
        Settings(fields=given)


def test_fields_and_a_caption_cannot_be_combined():
    with pytest.raises(UsageError, match="--caption and --fields cannot be used together"):
        CaptionTemplate.of(Settings(fields="name:1", caption="{name}"))
