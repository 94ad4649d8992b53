"""The loss between photos of one product: its value, its gradient, and its place in a step."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from clipft.config.sections.model import LossSettings
from clipft.training.step.gradcache import LocalAccumulation
from clipft.training.step.losses import ContrastiveLoss, make_loss
from tests.training.process_helpers import results
from tests.training.step.test_gradcache import (
    ALL_ROOM,
    PAIRS,
    accumulation,
    assert_same,
    cut,
    gradients,
    load,
    pairs,
)

__all__ = ["pairs"]  # the fixture

PRODUCTS = torch.arange(PAIRS) % 5 - 2


def loss_of(weight: float, block: int | None = None) -> ContrastiveLoss:
    scale = torch.tensor(math.log(20.0), dtype=torch.float64, requires_grad=True)
    model = SimpleNamespace(logit_scale=scale, logit_bias=torch.tensor(-3.0, dtype=torch.float64))
    made = make_loss(LossSettings(loss="clip", photo_pairs=weight), model)
    return replace(made, block_logits=block)


def naive(images: Tensor, products: Tensor, scale: float) -> Tensor:
    """Khosla et al. 2020, equation 2, photo by photo."""
    total = images.new_zeros(())
    for own in range(len(images)):
        others = [i for i in range(len(images)) if i != own]
        partners = [n for n, i in enumerate(others) if products[i] == products[own]]
        if partners:
            logits = scale * images[own] @ images[others].T
            total = total - log_softmax(logits, 0)[partners].mean()
    return total / len(images)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 12),
    kinds=st.integers(1, 9),
    block=st.sampled_from([1, 7, 40, None]),
    weight=st.sampled_from([0.25, 2.0]),
)
def test_value_and_gradient_are_those_of_the_formula(seed, size, kinds, block, weight):
    draw = torch.Generator().manual_seed(seed)
    images, texts = (
        normalize(torch.randn(size, 4, generator=draw, dtype=torch.float64)).requires_grad_()
        for _ in range(2)
    )
    products = torch.randint(-kinds, kinds, (size,), generator=draw) * 3_000_000_000
    loss = loss_of(weight, block)
    ours = loss(images, texts, None, products)
    # The temperature is detached: it stays what images and texts make it
    theirs = loss(images, texts) + weight * naive(images, products, 20.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    leaves = (images, texts, loss.model.logit_scale)
    found, expected = (torch.autograd.grad(total, leaves) for total in (ours, theirs))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)


def test_it_is_never_below_its_bound_which_a_perfect_model_reaches():
    products = torch.tensor([0, 0, 0, 1, 1, 2])
    perfect = torch.eye(3, dtype=torch.float64)[products]
    loss = loss_of(0.5)
    bound = loss.lower_bound(None, products)
    assert bound == pytest.approx(0.5 * 3 * math.log(2) / 6)
    between_photos = loss(perfect, perfect, None, products) - loss(perfect, perfect)
    assert between_photos.item() == pytest.approx(bound, abs=1e-6)
    assert loss.lower_bound(None, torch.arange(6)) == loss_of(0).lower_bound(None, products) == 0


def with_products(loaded, **given):
    step = accumulation(loaded, **given)
    step.products = PRODUCTS
    step.loss = replace(step.loss, photo_pairs=0.7)
    return step


@pytest.mark.parametrize("micro", [1, 5, 12])
@pytest.mark.parametrize("scenario", ["dual_lora", "vision_lora", "linear_probe", "full"])
def test_exact_is_one_graph_over_the_whole_batch(scenario, micro, pairs):
    loaded = load(scenario)
    step = with_products(loaded)
    embedded = loaded.model(pairs.pixel_values, pairs.input_ids)
    whole = step.loss(*embedded, None, PRODUCTS)
    whole.backward()
    expected = gradients(loaded)
    assert step(0, cut(pairs, micro)).item() == pytest.approx(whole.item(), rel=1e-5)
    assert_same(gradients(loaded), expected)
    assert whole.item() > step.loss(*(e.detach() for e in embedded)).item()
    assert step.lower_bound == step.loss.lower_bound(None, PRODUCTS) > 0


def test_local_losses_attract_photos_within_a_micro_batch(pairs):
    loaded = load("dual_lora")
    step = with_products(loaded, kind=LocalAccumulation, room=ALL_ROOM)
    parts = [
        step.loss(*loaded.model(b.pixel_values, b.input_ids), None, PRODUCTS[list(b.numbers)])
        for b in cut(pairs, 6)
    ]
    mean = sum(parts) / 2
    mean.backward()
    expected = gradients(loaded)
    assert step(0, cut(pairs, 6)).item() == pytest.approx(mean.item(), rel=1e-5)
    assert_same(gradients(loaded), expected)


def test_two_processes_are_one():
    body = """
    from clipft.distributed.step_channel import open_channel
    from tests.training.step.test_gradcache import cut, gradients, load, make_pairs
    from tests.training.step.test_photo_pairs import with_products
    loaded, pairs = load("dual_lora"), make_pairs()
    alone = with_products(loaded)(0, cut(pairs, 4)).item()
    expected = gradients(loaded)
    step = with_products(loaded)
    step.channel = open_channel(processes, 100)
    own = cut(pairs, 4)[:2] if rank == 0 else cut(pairs, 4)[2:]
    together = step(0, own, 12).item()
    ours = gradients(loaded)
    worst = [(ours[n] - g).abs().max() / g.abs().max().clamp(min=1e-6) for n, g in expected.items()]
    result = [alone, together, float(max(worst))]
"""
    first, second = results(body)
    assert first[1] == second[1] == pytest.approx(first[0], rel=1e-5)
    assert max(first[2], second[2]) < 1e-3
