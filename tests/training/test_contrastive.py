"""The gradient of a step must be that of one large batch, however it is cut."""

import pytest
import torch

from clipft.data.loader import Batch
from clipft.modelling.adapt import TrainableModel, adapt
from clipft.modelling.base import load_base
from clipft.scenarios import SCENARIOS
from clipft.settings_sources import load_settings
from clipft.training.contrastive import (
    ExactAccumulation,
    LocalAccumulation,
    contrastive_loss,
)
from clipft.training.precision import Precision

FP32 = Precision("fp32", torch.device("cpu"))
OFF = torch.amp.GradScaler("cpu", enabled=False)
PAIRS = 12


def make_model(scenario: str, dropout: float = 0.0) -> TrainableModel:
    settings = load_settings({"lora_dropout": str(dropout)}, environ={}).values
    torch.manual_seed(0)
    model = adapt(load_base("tiny"), SCENARIOS[scenario], settings).train()
    with torch.no_grad():  # away from LoRA's start, where half the gradients are 0
        for _, parameter in model.trainable():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def pairs() -> Batch:
    base = load_base("tiny")
    generator = torch.Generator().manual_seed(3)
    size = base.inputs.image_size
    pixels = torch.randint(0, 256, (PAIRS, 3, size, size), dtype=torch.uint8, generator=generator)
    texts = [f"a {word} chair number {i}" for i, word in enumerate(["red", "blue", "oak"] * 4)]
    ids = torch.tensor(base.inputs.tokenizer(texts, padding=True)["input_ids"])
    return Batch(pixels, ids, tuple(range(PAIRS)))


def cut(batch: Batch, micro: int) -> list[Batch]:
    return [
        Batch(
            batch.pixel_values[i : i + micro],
            batch.input_ids[i : i + micro],
            batch.numbers[i : i + micro],
        )
        for i in range(0, len(batch), micro)
    ]


def gradients(model: TrainableModel) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.trainable() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("micro", [1, 2, 5, 12])
@pytest.mark.parametrize("scenario", [n for n, s in SCENARIOS.items() if s.trains])
def test_exact_is_one_big_batch_in_transformers_own_words(scenario, micro, pairs):
    model = make_model(scenario)
    pixels = pairs.pixel_values.float() * model._gain - model._shift
    output = model.clip(input_ids=pairs.input_ids, pixel_values=pixels, return_loss=True)
    output.loss.backward()
    expected = gradients(model)
    step = ExactAccumulation(model, FP32, OFF, seed=1)
    loss = step(0, cut(pairs, micro))
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-5)
    assert_same(gradients(model), expected)


def test_dropout_is_replayed(pairs):
    """Equal to one graph over all micro-batches with the same masks."""
    model = make_model("dual_lora", dropout=0.3)
    step = ExactAccumulation(model, FP32, OFF, seed=1)
    batches = cut(pairs, 4)
    images = torch.cat([step.images(7, i, batch) for i, batch in enumerate(batches)])
    texts = torch.cat([step.texts(7, i, batch) for i, batch in enumerate(batches)])
    whole = contrastive_loss(images, texts, model.logit_scale)
    whole.backward()
    expected = gradients(model)
    assert step(7, batches).item() == pytest.approx(whole.item(), rel=1e-6)
    assert_same(gradients(model), expected)
    step(8, batches)  # another step draws other masks
    name = next(iter(expected))
    assert not torch.allclose(gradients(model)[name], expected[name], atol=1e-6)


def test_bf16_autocast_changes_nothing_between_the_passes(pairs):
    model = make_model("linear_probe")
    bf16 = Precision("bf16", torch.device("cpu"))
    at_once = ExactAccumulation(model, bf16, OFF, seed=1)(0, [pairs])
    expected = gradients(model)
    cut_up = ExactAccumulation(model, bf16, OFF, seed=1)(0, cut(pairs, 6))
    assert cut_up.item() == pytest.approx(at_once.item(), rel=2e-2)
    for name, gradient in gradients(model).items():
        similarity = torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert similarity > 0.99


def test_local_is_the_mean_of_the_micro_batches_own_losses(pairs):
    model = make_model("dual_lora")
    batches = cut(pairs, 5)
    step = LocalAccumulation(model, FP32, OFF, seed=1)
    parts = [
        contrastive_loss(*model(b.pixel_values, b.input_ids), model.logit_scale) * len(b) / PAIRS
        for b in batches
    ]
    sum(parts).backward()
    expected = gradients(model)
    assert step(0, batches).item() == pytest.approx(sum(parts).item(), rel=1e-5)
    assert_same(gradients(model), expected)


def test_the_random_state_outside_does_not_matter(pairs):
    model = make_model("dual_lora", dropout=0.5)
    step = ExactAccumulation(model, FP32, OFF, seed=1)
    torch.manual_seed(1)
    one = step(3, cut(pairs, 6)).item()
    torch.manual_seed(2)
    assert step(3, cut(pairs, 6)).item() == one
