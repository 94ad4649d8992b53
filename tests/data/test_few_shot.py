"""Which pairs of each label a few-shot run has."""

from collections import Counter
from dataclasses import replace

import pytest

from clipft.config.settings import Settings
from clipft.core.errors import ClipftError
from clipft.data.few_shot import label_remarks, training_pairs
from clipft.data.overlap import same_images
from clipft.data.shards.folders import open_pairs


def chosen(catalogue, shots, seed=1, **given):
    label_field = given.pop("label_field", "type")
    return training_pairs(
        Settings(data_dir=catalogue, shots=shots, seed=seed, label_field=label_field, **given)
    )


def labels(pairs):
    return Counter(pairs.metadata(number)["type"] for number in range(len(pairs)))


def keys(pairs):
    return [pairs[number].key for number in range(len(pairs))]


def test_each_label_has_as_many_or_all_that_it_has(catalogue):
    whole = chosen(catalogue, 0)
    assert len(whole) == 96
    for shots in (1, 3, 1000):
        found = labels(chosen(catalogue, shots))
        assert found == {label: min(shots, count) for label, count in labels(whole).items()}


def test_the_choice_follows_from_the_seed_and_grows_with_the_shots(catalogue):
    assert keys(chosen(catalogue, 2)) == keys(chosen(catalogue, 2))
    assert keys(chosen(catalogue, 2)) != keys(chosen(catalogue, 2, seed=2))
    assert set(keys(chosen(catalogue, 2))) < set(keys(chosen(catalogue, 3)))


def test_chosen_pairs_are_what_they_are_among_all(catalogue):
    whole, few = chosen(catalogue, 0), chosen(catalogue, 2)
    for number, original in enumerate(few.chosen):
        mine, theirs = few[number], whole[original]
        assert mine.number == number
        assert (mine.key, mine.shard, mine.image) == (theirs.key, theirs.shard, theirs.image)
        assert few.named(number).key == mine.key
        assert few.image_sizes[number] == len(mine.image)
    assert len(same_images(few)) == len(few)


@pytest.mark.parametrize("shots", [0, 2])
def test_the_first_pairs_of_a_choice_are_those_of_the_choice(shots, catalogue):
    some = chosen(catalogue, shots)
    assert keys(some.first(5)) == keys(some)[:5]
    assert keys(some.first(1000)) == keys(some)


def test_another_choice_is_another_data_set(catalogue):
    one, other = chosen(catalogue, 2), chosen(catalogue, 2, seed=2)
    assert len(one) == len(other)
    assert one.identity() != other.identity() and one.state() != other.state()


def test_the_limit_comes_first(catalogue):
    assert max(chosen(catalogue, 2, max_train_pairs=20).chosen) < 20


@pytest.mark.parametrize("field", ["types", "nothing"])
def test_a_field_that_no_pair_has_is_refused_by_name(catalogue, field):
    with pytest.raises(ClipftError) as caught:
        chosen(catalogue, 2, label_field=field)
    assert caught.value.exit_code == 2
    assert f"no pair has a field '{field}'" in caught.value.message
    assert "type" in caught.value.hint


def test_labels_that_training_lacks_are_counted(catalogue):
    train, val = chosen(catalogue, 0), open_pairs(catalogue / "val")
    assert label_remarks(train, train, "type") == []
    few = replace(train, chosen=(0,))
    (remark,) = label_remarks(few, val, "type")
    kinds = labels(val).keys()
    unknown = len(kinds - labels(few).keys())
    assert f"{unknown} of {len(kinds)} labels of the validation pairs are missing from" in remark
