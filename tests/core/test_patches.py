"""How many patches an image becomes that keeps its shape."""

from hypothesis import given
from hypothesis import strategies as st
from transformers.models.siglip2.image_processing_siglip2 import (
    get_image_size_for_max_num_patches,
)

from clipft.core.patches import Patches

SIDE = st.integers(1, 5000)


@given(SIDE, SIDE, st.sampled_from([8, 14, 16]), st.integers(1, 1024))
def test_the_grid_is_that_of_transformers_image_processor(width, height, size, most):
    rows, columns = Patches(size, most).grid(width, height)
    expected = get_image_size_for_max_num_patches(height, width, size, most)
    assert (rows * size, columns * size) == expected
    assert rows * columns <= most or (rows, columns) == (1, 1)


def test_a_strip_has_room_for_the_grid_and_all_patches():
    assert Patches(16, 256).shape == (3, 16, 16 * 257)
    assert Patches(16, 256).side == 256
    assert Patches(16, 128).side == 181
