"""What an inspection says of its figures, from a clean data set on."""

from dataclasses import asdict, replace

import pytest

from clipft.data.inspection import SplitFacts
from clipft.report.findings import findings, verdict

CLEAN = SplitFacts(
    pairs=1000,
    usable=1000,
    captions=1000,
    bytes=10**6,
    no_pairs={},
    broken=[],
    bad_captions=[],
    kinds={"jpeg": 1000},
    more_than_8_bits=0,
    shorter_side={"min": 300, "median": 400, "max": 500},
    shorter_side_counts=[[300, 399, 400], [400, 499, 600]],
    smaller_than_model=0,
    smallest=[],
    captions_with_html={"pairs": 0, "examples": []},
    captions_with_broken_characters={"pairs": 0, "examples": []},
    bad_metadata=[],
    caption_tokens={"min": 5, "median": 9, "max": 20},
    caption_token_counts=[[0, 9, 500], [10, 19, 500]],
    captions_cut=0,
    tokens_lost=0.0,
    same_photo=0,
    near_photo=0,
    same_caption=0,
    groups=0,
    largest_group=1,
    duplicates=[],
    categories={},
    ceiling={
        "text_to_image": {"r@1": 1.0, "r@5": 1.0, "r@10": 1.0},
        "image_to_text": {"r@1": 1.0, "r@5": 1.0, "r@10": 1.0},
    },
)
LEAK = {"same_photo": 0, "near_photo": 0, "same_caption": 0, "examples": [], "matches": []}


def judged(train=CLEAN, val=CLEAN, leaks=None):
    splits = {name: asdict(s) for name, s in (("train", train), ("val", val)) if s}
    found = findings(splits, leaks or {}, max_bad=0.01)
    return found, verdict(found, splits)


def test_clean_data_can_be_trained_on_and_nothing_is_found():
    found, said = judged(leaks={"Validation pairs that are also in training": LEAK})
    assert not found
    assert said == (
        "This data can be trained on: 1,000 training pairs, 1,000 validation pairs, and nothing "
        "wrong was found."
    )


@pytest.mark.parametrize(
    ("changes", "text", "prevents"),
    [
        ({"usable": 985}, "15 of 1,000 training pairs cannot be used, and --max-bad allows", True),
        ({"usable": 999}, "1 of 1,000 training pairs cannot be used", False),
        ({"usable": 0}, "no training pair can be used", True),
        ({"usable": 200, "pairs": 200}, "there are only 200 training pairs", False),
        ({"no_pairs": {"no caption": 1}}, "1 file in train is not part of a pair", False),
        ({"captions_cut": 11, "tokens_lost": 0.25}, "11 training captions are longer", False),
        ({"smaller_than_model": 101}, "101 training images are smaller", False),
        ({"captions_with_html": {"pairs": 1}}, "the captions of 1 training pair have HTML", False),
        ({"captions_with_broken_characters": {"pairs": 3}}, "have broken characters", False),
        ({"bad_metadata": [{"pair": "a", "reason": "b"}]}, "cannot be read", False),
    ],
)
def test_each_trouble_of_the_training_pairs_is_told(changes, text, prevents):
    found, said = judged(train=replace(CLEAN, **changes))
    (finding,) = found
    assert text in finding.text and finding.prevents == prevents and finding.advice
    assert said.startswith("This data cannot be trained on yet: " if prevents else "This data can")


def test_what_a_run_tolerates_is_what_the_finding_says():
    """As ``Settings.too_many_bad``: a single bad pair never stops a run, however small."""
    small = replace(CLEAN, pairs=50, usable=49)
    assert not any(finding.prevents for finding in judged(train=small)[0])
    assert any(finding.prevents for finding in judged(train=replace(small, usable=48))[0])


def test_data_that_is_not_split_cannot_be_trained_on():
    found, said = judged(val=None)
    assert "there are no validation pairs" in said and "clipft pack" in found[0].advice
    splits = {"photos": asdict(CLEAN)}
    said = verdict(findings(splits, {}, 0.01), splits)
    assert said.endswith("there are no training and no validation pairs.")


def test_validation_pairs_that_are_also_in_training_are_told_with_their_section():
    title = "Validation pairs that are also in training"
    found, said = judged(leaks={title: LEAK | {"same_photo": 2, "near_photo": 1}})
    (finding,) = found
    assert finding.text.endswith("3 by their image") and finding.section == title
    assert said.endswith("1,000 validation pairs. 1 thing to look at first.")


def test_equal_captions_of_the_validation_pairs_limit_paired_recall():
    bounds = {"text_to_image": {"r@1": 0.9}, "image_to_text": {"r@1": 0.99}}
    found, _ = judged(val=replace(CLEAN, ceiling=bounds))
    assert "limit paired R@1 of validation to 90.0%" in found[0].text
    assert not judged(train=replace(CLEAN, ceiling=bounds))[0]


def test_few_validation_pairs_are_told_with_the_reach_of_their_intervals():
    found, _ = judged(val=replace(CLEAN, pairs=40, usable=40))
    assert "only 40 validation pairs" in found[0].text and "15 points" in found[0].advice


def test_what_prevents_training_comes_first():
    found, _ = judged(
        train=replace(CLEAN, captions_with_html={"pairs": 5}), val=replace(CLEAN, usable=0)
    )
    assert [finding.prevents for finding in found] == [True, False]
