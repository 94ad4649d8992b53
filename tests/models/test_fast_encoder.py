"""The fast encoder gives the same results as the towers of transformers."""

import pytest
import torch
from transformers.activations import QuickGELUActivation

from clipft.config.sources import load_settings
from clipft.embedding.load import LoadedModel, load_model
from clipft.models import fast_encoder
from clipft.models.fast_encoder import QUICK_GELU, FastQuickGelu, FoldedMlp

ROWS = 5


def load(scenario: str, **given: object) -> LoadedModel:
    flags = {"model": "tiny", "scenario": scenario, "precision": "fp32", "device": "cpu"}
    loaded = load_model(load_settings({**flags, "lora_dropout": 0, **given}, environ={}).values)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from LoRA's start
        for _, parameter in loaded.model.trainable():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return loaded


def inputs(loaded: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size, end = loaded.base.inputs.image_size, loaded.base.inputs.tokenizer.eos_token_id
    pixels = torch.randint(0, 256, (ROWS, 3, size, size), dtype=torch.uint8, generator=generator)
    ids = torch.randint(5, 200, (ROWS, 9), generator=generator)
    for row, place in enumerate((8, 3, 1, 5, 8)):
        ids[row, place:] = end  # filled with the end, as CLIP's tokenizer does
    return pixels, ids


def theirs(loaded: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    model = loaded.model
    pixels, ids = inputs(loaded)
    normalised = pixels.float() * model._gain + model._shift
    return (
        model.clip.vision_model(pixel_values=normalised).pooler_output,
        model.clip.text_model(input_ids=ids).pooler_output,
    )


def ours(loaded: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, ids = inputs(loaded)
    return loaded.model.image_features(pixels), loaded.model.text_features(ids)


def with_gradients(loaded: LoadedModel, way) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    found = way(loaded)
    generator = torch.Generator().manual_seed(2)
    sum((f * torch.randn(f.shape, generator=generator)).sum() for f in found).backward()
    gradients = {n: p.grad.clone() for n, p in loaded.model.trainable() if p.grad is not None}
    loaded.model.zero_grad(set_to_none=True)
    return [f.detach() for f in found], gradients


def as_transformers_has_it(loaded: LoadedModel) -> LoadedModel:
    for layer in loaded.model.clip.modules():
        if isinstance(getattr(layer, "activation_fn", None), FastQuickGelu):
            layer.activation_fn = QuickGELUActivation()
    return loaded


@pytest.mark.parametrize(
    ("scenario", "given"),
    [
        ("full", {}),
        ("dual_lora", {"lora_targets": "all"}),
        ("dual_lora", {"gradient_checkpointing": True}),
        ("dual_lora", {"lora_dora": True}),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_features_and_gradients_equal_transformers(scenario, given, device, monkeypatch):
    """As computed on a CPU, and in the way of CUDA, here on the CPU."""
    monkeypatch.setattr(fast_encoder, "FOLDING_DEVICES", {"cpu"} if device == "cuda" else set())
    features, gradients = with_gradients(load(scenario, **given), ours)
    expected, expected_gradients = with_gradients(
        as_transformers_has_it(load(scenario, **given)), theirs
    )
    for found, wanted in zip(features, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, wanted in expected_gradients.items():
        torch.testing.assert_close(gradients[name], wanted, atol=2e-4, rtol=1e-3, msg=name)


def test_a_tower_with_a_single_layer_works():
    loaded = load("full")
    for tower in (loaded.model.clip.vision_model, loaded.model.clip.text_model):
        del tower.encoder.layers[1:]
    for found, wanted in zip(ours(loaded), theirs(as_transformers_has_it(loaded)), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_the_activation_is_bit_identical_and_its_derivative_is_right():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    lean, plain = FastQuickGelu(), QuickGELUActivation()
    for dtype in (torch.float32, torch.bfloat16):
        values = x.to(dtype).requires_grad_()
        assert torch.equal(lean(values), plain(values))
        with torch.no_grad():
            assert torch.equal(lean(values), plain(values))
    assert torch.autograd.gradcheck(lean, x[:50].double().requires_grad_())


def test_the_activation_keeps_a_single_tensor():
    kept = []
    x = torch.randn(64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        FastQuickGelu()(x)
    assert len(kept) == 1


def test_the_folded_mlp_is_that_of_transformers_and_so_are_its_gradients():
    draw = torch.Generator().manual_seed(0)
    shapes = ((7, 6), (24, 6), (24,), (6, 24), (6,))
    given = [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]
    leaves = [tensor.requires_grad_() for tensor in given]
    x, w1, b1, w2, b2 = leaves
    inner = x @ w1.T + b1
    expected = (inner * torch.sigmoid(QUICK_GELU * inner)) @ w2.T + b2
    torch.testing.assert_close(FoldedMlp.apply(*leaves), expected)
    assert torch.autograd.gradcheck(FoldedMlp.apply, leaves)


def test_the_folded_mlp_of_frozen_weights_keeps_a_single_tensor_beside_them():
    kept = []
    x, w1, b1, w2, b2 = (torch.randn(s) for s in ((7, 6), (24, 6), (24,), (6, 24), (6,)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        FoldedMlp.apply(x.requires_grad_(), w1, b1, w2, b2)
    assert [t.shape for t in kept if t is not w1 and t is not w2] == [(7, 24)]
