"""The images ranked first for some captions, against a plain sort."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from clipft.embedding.embed import Embeddings
from clipft.evaluation.gallery import (
    Rankings,
    all_cases,
    choose_cases,
    choose_to_look_up,
    mistaken_categories,
)
from clipft.evaluation.rankings import CaptionGroups, rank_images


def embeddings(seed: int, groups: list[int], skip: int) -> Embeddings:
    """Random embeddings of pairs, of which every ``skip``-th could not be used."""
    generator = torch.Generator().manual_seed(seed)
    numbers = tuple(n for n in range(len(groups)) if skip == 0 or n % skip)
    images = normalize(torch.randn(len(numbers), 6, generator=generator), dim=1)
    texts = normalize(torch.randn(len(numbers), 6, generator=generator), dim=1)
    return Embeddings(images, texts, numbers, ())


def one_each(groups):
    return CaptionGroups(torch.tensor(groups), torch.arange(len(groups)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.lists(st.integers(0, 5), min_size=3, max_size=40), st.integers(0, 3))
def test_ranks_and_first_images_match_a_plain_sort(seed, groups, skip):
    if skip == 1:  # nothing left
        return
    embedded = embeddings(seed, groups, skip)
    found = rank_images(embedded, one_each(groups), "x")
    firsts = {groups[number]: number for number in reversed(embedded.numbers)}
    assert found.queries == sorted(firsts.values())
    scores = (embedded.texts @ embedded.images.T).numpy()
    for query, rank, first in zip(found.queries, found.ranks, found.first, strict=True):
        row = scores[embedded.numbers.index(query)]
        order = [embedded.numbers[at] for at in (-row).argsort(kind="stable")]
        assert first == order[:5]
        right = [at for at, number in enumerate(order, 1) if groups[number] == groups[query]]
        assert rank == right[0]


def test_queries_are_spread_over_the_set_if_there_are_many_captions():
    found = rank_images(embeddings(1, list(range(2500)), 0), one_each(range(2500)), "x")
    assert len(found.queries) == 834 and found.queries[-1] == 2499


def test_rankings_are_read_back_and_other_files_give_none(tmp_path):
    found = Rankings("x", [1, 2], [3, 1], [[4, 5], [2, 1]])
    found.write(tmp_path / "a.json")
    assert Rankings.read(tmp_path / "a.json") == found
    (tmp_path / "b.json").write_text('{"queries": []}')
    assert Rankings.read(tmp_path / "b.json") is None is Rankings.read(tmp_path / "c.json")


def test_the_greatest_gains_and_losses_are_chosen():
    before = Rankings("x", list(range(30)), [40, 400, 1, 2, *[7] * 26], [[n] for n in range(30)])
    after = Rankings("x", list(range(30)), [2, 300, 9, 2, *[7] * 26], [[n] for n in range(30)])
    cases = choose_cases(before, after)
    assert [case.query for case in cases if case.kind == "gain"] == [0, 1]
    assert [case.query for case in cases if case.kind == "loss"] == [2]
    assert [case.kind for case in cases].count("miss") == 4
    assert [case.kind for case in cases].count("any") == 4
    assert len({case.query for case in cases}) == len(cases)
    other = Rankings("y", after.queries, after.ranks, after.first)
    assert {case.kind for case in choose_cases(before, other)} == {"any"}


def test_a_miss_is_among_the_first_of_neither_model():
    before = Rankings("x", [0, 1, 2, 3], [9, 9, 2, 6], [[n] for n in range(4)])
    after = Rankings("x", [0, 1, 2, 3], [9, 5, 2, 6], [[n] for n in range(4)])
    cases = choose_cases(before, after)
    assert [case.query for case in cases if case.kind == "miss"] == [0, 3]


def test_queries_to_look_up_show_a_bounded_number_of_images():
    ranks, first = [1] * 900, [list(range(n, n + 5)) for n in range(900)]
    cases = all_cases(Rankings("x", list(range(900)), ranks, first), None)
    chosen = choose_to_look_up(cases)
    images = {image for case in chosen for image in case.first_before}
    assert 236 <= len(images) <= 240 and 48 <= len(chosen) < 100
    assert [case.query for case in chosen] == sorted(case.query for case in chosen)
    assert max(case.query for case in chosen) > 600  # they are spread over all
    assert choose_to_look_up(cases[:40]) == cases[:40]


def test_categories_are_counted_that_a_first_image_was_taken_for():
    labels = ["chair", "chair", "stool", None]
    before = Rankings("x", [0, 1, 2, 3], [2, 2, 1, 1], [[2], [2], [2], [0]])
    after = Rankings("x", [0, 1, 2, 3], [1, 2, 1, 1], [[0], [2], [0], [0]])
    assert mistaken_categories(all_cases(before, after), labels) == [
        {"category": "chair", "taken_for": "stool", "queries": 2, "before": 2, "after": 1},
        {"category": "stool", "taken_for": "chair", "queries": 1, "before": 0, "after": 1},
    ]
    (alone,) = mistaken_categories(all_cases(before, None), labels)
    assert (alone["before"], alone["after"]) == (2, None)


def test_an_image_with_the_caption_among_others_is_right():
    """Pair 1 has the caption of pair 0 as its second; pair 2 could not be used."""
    vectors = torch.eye(4)
    captions = CaptionGroups(torch.tensor([7, 8, 7, 7, 9]), torch.tensor([0, 1, 1, 2, 3]))
    embedded = Embeddings(
        images=vectors[[3, 0, 2]],
        texts=vectors[[0, 1, 0, 2]],
        numbers=(0, 1, 3),
        skipped=(),
        owners=torch.tensor([0, 1, 1, 2]),
    )
    found = rank_images(embedded, captions, "x")
    assert found.queries == [0, 1, 3]
    assert found.ranks == [1, 3, 1]  # pair 1 is right for the caption of pair 0, and scores best
    assert found.first[0][0] == 1
