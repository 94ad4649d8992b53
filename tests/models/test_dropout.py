"""The mask of a row depends on its key, step and tower only, and drops the right share."""

import numpy as np
import torch

from clipft.embedding.dropout import RowDropout, RowMasks


def through(keys, positions=6, width=40, p=0.25, seed=(1, 2, 0)):
    masks = RowMasks(p)
    first, second = RowDropout(width, masks), RowDropout(width, masks)
    masks.use(seed, np.array(keys, np.uint64))
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
