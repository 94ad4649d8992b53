"""Group ids depend on the pairs alone, not on the batch or its padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipft.config.sources import load_settings
from clipft.core.errors import UsageError
from clipft.data.batch import Batch
from clipft.data.captions.tokenizer import padded
from clipft.data.order import EpochPlan
from clipft.data.positives import make_positives
from clipft.data.shards.folders import open_pairs
from clipft.data.shards.stream import open_stream
from tests.conftest import add, jpeg, write_shard
from tests.inputs import encoder

END = encoder().eos_token_id


def positives(pairs, **given):
    settings = load_settings({"positives": "group", **given}, environ={}).values
    return make_positives(settings, pairs, END, lambda note: None)


def batch(ids, numbers=None):
    return Batch(torch.empty(0), padded(ids, END), tuple(numbers or range(len(ids))))


def test_pairs_have_no_groups(catalogue):
    pairs = open_pairs(catalogue / "train")
    assert positives(pairs, positives="pair").ids(batch([[1, END]])) is None


texts = st.lists(st.integers(0, END - 1), max_size=6).map(lambda ids: [*ids, END])


@given(rows=st.lists(texts, min_size=2, max_size=12))
def test_captions_are_equal_only_where_their_ids_are_equal(rows):
    source = positives([], positives="caption")
    together = source.ids(batch(rows)).tolist()
    alone = [source.ids(batch([row])).item() for row in rows]
    assert together == alone  # other rows, and so other padding, change nothing
    assert all(0 <= one < 1 << 63 for one in together)
    same = [[a == b for a in rows] for b in rows]
    assert [[a == b for a in together] for b in together] == same


def test_groups_are_the_values_of_a_field(catalogue):
    pairs = open_pairs(catalogue / "train")
    ids = positives(pairs, group_field="color").ids(batch([[END]] * 96, range(96)))
    colours = [pairs.metadata(number)["color"] for number in range(96)]
    assert len(set(ids.tolist())) == len(set(colours)) > 1
    for one, colour in zip(ids, colours, strict=True):
        assert {c for c, other in zip(colours, ids, strict=True) if other == one} == {colour}


def test_pairs_without_the_field_are_each_their_own_group(tmp_path):
    import tarfile

    from clipft.data.demo.catalogue import render_pair

    values = ['{"a": {"id": 7}}', '{"a": {"id": "7"}}', "{}", '{"a": {"id": " "}}', "{broken"]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, value in enumerate(values):
            add(tar, f"{number}.jpg", jpeg(render_pair(1, number)))
            add(tar, f"{number}.txt", b"a chair")
            add(tar, f"{number}.json", value.encode())
    ids = positives(open_pairs(tmp_path), group_field="a.id").ids(batch([[END]] * 5)).tolist()
    assert ids[0] == ids[1]
    assert len(set(ids)) == 4


@pytest.mark.parametrize(
    ("field", "message", "hint"),
    [
        ("colour", "no pair has a field 'colour'", "did you mean color?"),
        ("", "needs --group-field", "the metadata has"),
    ],
)
def test_a_field_that_no_pair_has_is_refused(catalogue, field, message, hint):
    with pytest.raises(UsageError, match=message) as caught:
        positives(open_pairs(catalogue / "train"), group_field=field)
    assert hint in caught.value.hint


def test_streams_have_no_groups(tmp_path):
    write_shard(tmp_path / "0.tar", range(3))
    with pytest.raises(UsageError, match="--stream"):
        positives(open_stream(tmp_path, 2, 0), group_field="color")


def test_the_ids_of_a_plan_do_not_depend_on_the_batches(catalogue):
    pairs = open_pairs(catalogue / "train")
    source = positives(pairs, group_field="type")
    order = list(EpochPlan(96, 32, 8, 1).order(0, 0))
    whole = source.ids(batch([[END]] * 96, order))
    parts = [source.ids(batch([[END]] * 8, order[i : i + 8])) for i in range(0, 96, 8)]
    assert torch.equal(torch.cat(parts), whole)
