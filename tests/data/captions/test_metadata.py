import json
import tarfile

import pytest

from clipft.core.errors import UsageError
from clipft.data.captions.metadata import describe
from clipft.data.captions.template import DEFAULT_TEMPLATE, CaptionTemplate
from clipft.data.overlap import same_images
from clipft.data.shards.dataset import ChosenPairs
from clipft.data.shards.folders import open_pairs
from tests.conftest import add

IMAGES = [b"one", b"two", b"one", b"three", b"four!", b"three"]
FIELDS = [{"kind": "sofa", "id": 7}, {"kind": " "}, {"kind": True}, {"kind": ["a"]}, {}, None]


@pytest.fixture
def pairs(tmp_path):
    for shard, numbers in (("0.tar", (0, 1, 2)), ("1.tar", (3, 4, 5))):
        with tarfile.open(tmp_path / shard, "w") as tar:
            for number in numbers:
                add(tar, f"{number}.jpg", IMAGES[number])
                add(tar, f"{number}.txt", b"" if number == 4 else f"caption {number}".encode())
                if FIELDS[number] is not None:
                    add(tar, f"{number}.json", json.dumps(FIELDS[number]).encode())
    return open_pairs(tmp_path)


def test_equal_files_have_equal_numbers(pairs):
    assert same_images(pairs).tolist() == [0, 1, 0, 3, 4, 3]


def test_pairs_are_described_by_caption_label_and_group(pairs):
    said = describe(pairs, DEFAULT_TEMPLATE, "kind", "id")
    assert [d.label for d in said] == ["sofa", None, None, None, None, None]
    assert [d.group for d in said] == ["7", None, None, None, None, None]
    assert [d.captions for d in said[:2]] == [("caption 0",), ("caption 1",)]
    assert said[4].captions == ("",)  # not measured, and no reason to stop


def test_the_first_alternative_of_a_template_is_evaluated(pairs):
    template = CaptionTemplate.parse("a {kind} || {caption}").for_evaluation()
    said = describe(pairs, template, "kind", None)
    assert [d.captions for d in said[:2]] == [("a sofa",), ("caption 1",)]


def test_a_group_field_that_no_pair_has_is_refused(pairs):
    with pytest.raises(UsageError, match="kid") as error:
        describe(pairs, DEFAULT_TEMPLATE, "kind", "kid")
    assert "did you mean" in error.value.hint


def test_chosen_pairs_keep_their_numbers(pairs):
    chosen = ChosenPairs(pairs, [4, 1])
    assert len(chosen) == 2
    assert [chosen[place].number for place in (0, 1)] == [4, 1]
    assert chosen[1].image == IMAGES[1]
