"""The columns that fields of the metadata become."""

import json

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipft.search.tables.columns import add_kinds, columns_of, converted, merged

TYPES = {
    "bool": pyarrow.bool_(),
    "int": pyarrow.int64(),
    "float": pyarrow.float64(),
    "text": pyarrow.string(),
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


def kinds(*metadata):
    fields = {}
    for one in metadata:
        add_kinds(fields, one)
    return fields


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2, None], "int"),
        ([1, 2.5], "float"),
        ([True, False], "bool"),
        ([True, 1], "text"),
        (["a", 1], "text"),
        ([[1], {"a": 2}], "text"),
        ([2**63], "text"),
    ],
)
def test_a_field_has_the_kind_that_holds_all_of_its_values(values, kind):
    assert kinds(*({"x": value} for value in values)) == {"x": kind}


def test_texts_stay_as_they_are_and_others_become_json():
    given = ("oak", 5, [1, "a"], True)
    assert [converted(v, "text") for v in given] == ["oak", "5", '[1, "a"]', "true"]
    assert converted(None, "text") is None


def test_names_do_not_collide():
    fields = dict.fromkeys(["caption", "Vector", "field_caption", "a.b", "a_b", "Size", "size"])
    names = [column.name for column in columns_of(dict.fromkeys(fields, "int")).values()]
    assert len({name.casefold() for name in names}) == len(names) == 7
    assert not {"caption", "vector"} & {name.casefold() for name in names}
    assert not any("." in name for name in names)


def test_only_so_many_fields_become_columns():
    assert len(columns_of({f"product{n}": "int" for n in range(2000)})) == 500


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), max_size=5))
def test_every_metadata_fits_into_the_columns(several):
    """Whatever JSON holds, in whichever order the parts are read."""
    several = [json.loads(json.dumps(one)) for one in several]
    fields = kinds(*several)
    assert merged(kinds(one) for one in reversed(several)) == fields
    for field, column in columns_of(fields).items():
        values = [converted(one.get(field), column.kind) for one in several]
        array = pyarrow.array(values, TYPES[column.kind])
        assert array.null_count == sum(one.get(field) is None for one in several)
