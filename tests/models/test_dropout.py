"""The mask of a row depends on its key, step and tower only, and drops the right share."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipft.models.dropout import RowDropout, RowMasks


def through(keys, positions=6, width=40, p=0.25, seed=(1, 2, 0)):
    masks = RowMasks(p)
    first, second = RowDropout(width, masks), RowDropout(width, masks)
    masks.use(seed, np.array(keys, np.uint64), positions)
    ones = torch.ones(len(keys), positions, width)
    return torch.stack([first(ones), second(ones)], dim=1)


def test_masks_of_a_row_do_not_depend_on_the_other_rows():
    together = through([5, 9, 2**63 + 1])
    assert torch.equal(through([9])[0], together[1])
    assert torch.equal(through([2**63 + 1, 5])[[1, 0]], together[[0, 2]])


def test_masks_of_a_longer_row_begin_with_those_of_a_shorter_one():
    assert torch.equal(through([5], positions=11)[:, :, :4], through([5], positions=4))


def test_masks_differ_between_keys_steps_and_layers():
    one = through([5, 6])
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0, 0], one[0, 1])
    assert not torch.equal(through([5, 6], seed=(1, 3, 0)), one)


def test_the_right_share_is_dropped_and_the_mean_is_preserved():
    kept = through(range(200), p=0.05)
    assert abs((kept == 0).float().mean().item() - 0.05) < 0.002
    assert abs(kept.mean().item() - 1) < 0.003


def test_evaluation_drops_nothing():
    dropout = RowDropout(4, RowMasks(0.5)).eval()
    values = torch.randn(2, 3, 4)
    assert dropout(values) is values


def dropped(rows=400, positions=4, width=256, p=0.1):
    """What is dropped, as float64 of mean 0 and variance 1: [rows * positions, width]."""
    masks = RowMasks(p)
    dropout = RowDropout(width, masks)
    masks.use((1, 2), np.arange(rows, dtype=np.uint64), positions)
    gone = dropout(torch.ones(rows, positions, width)) == 0
    return (gone.double() - p).reshape(-1, width) / (p * (1 - p)) ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5])
def test_no_two_columns_rows_or_positions_are_dropped_together(p):
    """Independent values have correlations of mean square 1 / n, and none far from 0."""
    for values in (dropped(p=p), dropped(p=p)[:300].T):
        n, count = values.shape
        correlations = values.T @ values / n
        correlations.fill_diagonal_(0)
        expected = (1 / n) ** 0.5
        mean_square = correlations.pow(2).sum() / (count * (count - 1))
        assert mean_square**0.5 == pytest.approx(expected, rel=0.1)
        assert correlations.abs().max() < 8 * expected


def test_the_number_of_dropped_values_varies_as_it_does_by_chance():
    counts = dropped(rows=2000, p=0.2).sum(1)  # of variance ``width`` by chance
    assert counts.var().item() / 256 == pytest.approx(1, abs=0.05)


def test_three_columns_are_no_more_often_dropped_together_than_by_chance():
    values = dropped(rows=3000, p=0.2)
    generator = torch.Generator().manual_seed(0)
    first, second, third = torch.randint(256, (3, 2000), generator=generator)
    different = (first != second) & (second != third) & (first != third)
    triples = values[:, first] * values[:, second] * values[:, third]
    mean_square = triples.mean(0)[different].pow(2).mean() ** 0.5
    assert mean_square.item() == pytest.approx(len(values) ** -0.5, rel=0.15)


@given(
    width=st.integers(1, 70),
    positions=st.integers(1, 9),
    keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6),
    cut=st.integers(0, 6),
)
def test_a_row_has_its_mask_in_every_chunk(width, positions, keys, cut):
    together = through(keys, positions, width)
    for part in (slice(0, cut), slice(cut, None)):
        if keys[part]:
            assert torch.equal(through(keys[part], positions, width), together[part])
