import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipft.core.errors import UsageError
from clipft.metrics import relevance as module
from clipft.metrics.relevance import Identities, numbered, relevance

few = st.integers(0, 6)


def edges(related):
    return set(zip(related.edge_texts.tolist(), related.edge_images.tolist(), strict=True))


def test_equal_captions_and_equal_images_count_once():
    related = relevance(Identities(numbered("aabc"), numbered([1, 2, 1, 3])))
    assert related.text_pairs.tolist() == [0, 2, 3]
    assert related.image_pairs.tolist() == [0, 1, 3]
    assert edges(related) == {(0, 0), (0, 1), (1, 0), (2, 2)}
    assert related.clusters.tolist() == [0, 0, 0, 1]


def test_every_image_of_a_group_is_right_for_every_text_of_it():
    groups = numbered(["sofa", "sofa", None, None])
    related = relevance(Identities(numbered("abcd"), np.arange(4), groups))
    assert edges(related) == {(0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (3, 3)}
    assert related.clusters.tolist() == [0, 0, 1, 2]


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(few, few, st.integers(-1, 3)), min_size=1, max_size=20))
def test_edges_and_clusters_follow_their_definition(pairs):
    captions, images, groups = map(np.array, zip(*pairs, strict=True))
    related = relevance(Identities(captions, images, groups))
    texts, shown = captions[related.text_pairs], images[related.image_pairs]
    assert len(set(texts.tolist())) == len(texts) == len(set(captions.tolist()))
    found = {(int(texts[t]), int(shown[p])) for t, p in edges(related)}
    expected = {(c, p) for c, p, _ in pairs} | {
        (c, p) for c, _, g in pairs for _, p, h in pairs if g == h >= 0
    }
    assert found == expected
    for i, (caption, image, group) in enumerate(pairs):
        for j, (c, p, g) in enumerate(pairs):
            if caption == c or image == p or group == g >= 0:
                assert related.clusters[i] == related.clusters[j]
    assert len(set(related.clusters.tolist())) == count_components(pairs)


def count_components(pairs):
    left, count = set(range(len(pairs))), 0
    while left:
        reached, count = [left.pop()], count + 1
        while reached:
            c, p, g = pairs[reached.pop()]
            near = {
                j
                for j in left
                if pairs[j][0] == c or pairs[j][1] == p or (pairs[j][2] == g and g >= 0)
            }
            left -= near
            reached += near
    return count


def test_a_long_chain_is_one_cluster():
    captions = np.arange(2000) // 2
    images = (np.arange(2000) + 1) // 2
    assert relevance(Identities(captions, images)).clusters.max() == 0


def test_groups_too_large_to_list_are_refused(monkeypatch):
    monkeypatch.setattr(module, "_MOST_EDGES", 10)
    with pytest.raises(UsageError, match="4 pairs"):
        relevance(Identities(np.arange(4), np.arange(4), np.zeros(4, np.int64)))
