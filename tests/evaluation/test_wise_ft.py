"""Weights between the pretrained and the fine-tuned model, in every scenario."""

import pytest
import torch

from clipft.config.scenarios import SCENARIOS
from clipft.config.settings import Settings
from clipft.core.errors import ModelError
from clipft.evaluation.wise_ft import Interpolation
from clipft.models.pretrained import load_pretrained
from clipft.models.trainable import adapt

TRAINING = [name for name, scenario in SCENARIOS.items() if scenario.trains]


def trainable(scenario="dual_lora"):
    settings = Settings(model="tiny", scenario=scenario)
    return adapt(load_pretrained("tiny"), settings.declared_scenario, settings).eval()


def inputs():
    generator = torch.Generator().manual_seed(3)
    side = load_pretrained("tiny").inputs.image_size
    pixels = torch.randint(0, 256, (4, 3, side, side), generator=generator, dtype=torch.uint8)
    return pixels, torch.randint(1, 400, (4, 12), generator=generator)


@torch.inference_mode()
def encoded(model):
    images, texts = model(*inputs())
    return torch.cat([images, texts])


def moved(model):
    """Change every trainable weight, as training would, and return the weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in model.trainable():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return model.trainable_state()


@pytest.mark.parametrize("scenario", TRAINING)
def test_the_ends_are_the_pretrained_and_the_fine_tuned_model(scenario):
    base = load_pretrained("tiny")
    settings = Settings(model="tiny", scenario="zero_shot")
    pretrained = encoded(adapt(base, SCENARIOS["zero_shot"], settings).eval())
    model = trainable(scenario)
    start = model.trainable_state()
    path = Interpolation(start, moved(model))
    fine_tuned = encoded(model)
    assert not torch.allclose(pretrained, fine_tuned, atol=1e-3)
    model.load_trainable_state(path.at(0))
    torch.testing.assert_close(encoded(model), pretrained, atol=1e-6, rtol=0)
    model.load_trainable_state(path.at(1))
    torch.testing.assert_close(encoded(model), fine_tuned, atol=0, rtol=0)


def test_half_of_an_adapter_is_half_of_its_change():
    model = trainable()
    path = Interpolation(model.trainable_state(), moved(model))
    layer = next(m for m in model.modules() if hasattr(m, "get_delta_weight"))
    whole = layer.get_delta_weight("default").detach()
    model.load_trainable_state(path.at(0.5))
    torch.testing.assert_close(layer.get_delta_weight("default").detach(), whole / 2)


def test_full_weights_are_interpolated_linearly():
    model = trainable("full")
    start = model.trainable_state()
    end = moved(model)
    middle = Interpolation(start, end).at(0.25)
    for name, weight in middle.items():
        torch.testing.assert_close(weight, 0.75 * start[name] + 0.25 * end[name])


def test_weights_that_cannot_be_interpolated_are_refused():
    with pytest.raises(ModelError, match="nothing was trained"):
        Interpolation({}, {})
    model = trainable()
    fine_tuned = moved(model)
    with pytest.raises(ModelError, match="before training"):
        Interpolation(fine_tuned, fine_tuned)
    with pytest.raises(ModelError, match="scenario"):
        Interpolation(trainable("linear_probe").trainable_state(), fine_tuned)
