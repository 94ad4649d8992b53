"""The name of a field means the same wherever it is given: in captions, groups and labels."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipft.core.errors import UsageError
from clipft.data.captions.fields import check_field, field_names, field_value, fields_hint
from clipft.data.captions.template import CaptionTemplate


class Pairs(list):
    """Metadata in memory, read as from shards."""

    def metadata(self, number):
        return self[number]


@pytest.mark.parametrize(
    ("metadata", "name", "value"),
    [
        ({"color": "red"}, "color", "red"),
        ({"product": {"id": 7}}, "product.id", 7),
        ({"attributes.color": "red"}, "attributes.color", "red"),
        ({"attributes.color": "red", "attributes": {"color": "blue"}}, "attributes.color", "red"),
        ({"a.b": {"c": 1}}, "a.b.c", 1),
        ({"a": {"b.c": 1}}, "a.b.c", 1),
        ({"a": {"b": {"c": 1}}}, "a.b.c", 1),
        ({"a": {"b": 1}}, "a.c", None),
        ({"a": [1]}, "a.b", None),
        ({}, "a", None),
        ({"": 1}, "", 1),
    ],
)
def test_a_name_finds_a_column_with_a_dot_or_a_field_in_an_object(metadata, name, value):
    assert field_value(metadata, name) == value


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_match_however_they_are_encoded(form):
    other = "NFD" if form == "NFC" else "NFC"
    metadata = {unicodedata.normalize(form, "größe"): "L"}
    assert field_value(metadata, unicodedata.normalize(other, "größe")) == "L"


nested = st.recursive(
    st.text(max_size=3) | st.integers(),
    lambda inner: st.dictionaries(st.text("abä", min_size=1, max_size=2), inner, min_size=1),
    max_leaves=6,
)


@given(metadata=st.dictionaries(st.text("abä", min_size=1, max_size=2), nested))
def test_every_name_that_is_listed_finds_a_value(metadata):
    for name in field_names(metadata):
        assert field_value(metadata, name) is not None


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("colour", "color"),
        ("COLOR", "color"),
        ("prodct.id", "product.id"),
        ("id", "product.id"),
        ("product_id", "product.id"),
        ("sku", "SKU"),
    ],
)
def test_the_nearest_name_is_offered(wrong, meant):
    known = ["color", "product.id", "SKU", "name"]
    assert f"did you mean {meant}?" in fields_hint(wrong, known)


def test_a_field_of_one_pair_among_many_is_found():
    pairs = Pairs([{"name": "x"}] * 5000)
    pairs[4321] = {"rare": "y"}
    check_field("--caption '{rare}'", "rare", pairs)


def test_an_object_is_no_field_but_its_parts_are():
    with pytest.raises(UsageError, match="no pair has a field 'size'") as caught:
        check_field("--caption '{size}'", "size", Pairs([{"size": {"width": 80}}]))
    assert "did you mean size.width?" in caught.value.hint


def test_a_long_list_of_fields_is_cut():
    hint = fields_hint("x", [f"column_{number:03}" for number in range(300)])
    assert "and 280 more" in hint and len(hint) < 400


def test_a_template_takes_a_column_with_a_dot():
    template = CaptionTemplate.parse("{attributes.color} {size.width}")
    metadata = b'{"attributes.color": "red", "size": {"width": 80}}'
    assert template.captions(b"", metadata) == ["red 80"]
    assert template.fields == ["attributes.color", "size.width"]
