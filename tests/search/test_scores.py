"""Scores of images do not depend on the parts in which the images are stored."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipft.search.images import ImagePart, JoinedParts
from clipft.search.index import ImageIndex


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    dim=st.sampled_from([5, 128, 512]),
    seed=st.integers(0, 99),
)
def test_copies_of_an_image_have_equal_scores_in_parts_of_any_size(parts, dim, seed):
    draw = np.random.default_rng(seed)
    different = draw.standard_normal((3, dim)).astype(np.float32)
    which = draw.integers(0, 3, sum(parts))
    vectors = np.split(different[which], np.cumsum(parts)[:-1])
    images = JoinedParts([ImagePart("", count, int, int) for count in parts])
    query = torch.from_numpy(draw.standard_normal(dim).astype(np.float32))
    scores = ImageIndex(images, vectors, 0).scores(query)
    for image in range(3):
        assert len(set(scores[which == image].tolist())) <= 1
    np.testing.assert_allclose(scores, different[which] @ query.numpy(), atol=1e-4, rtol=1e-4)
