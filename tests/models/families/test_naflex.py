"""SigLIP 2 NaFlex: images keep their shape, and embed as they do in transformers."""

import random

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModel, Siglip2Config, Siglip2ImageProcessor, Siglip2Model

from clipft.config.scenarios import SCENARIOS
from clipft.config.sections.model import InputSizes
from clipft.config.sources import load_settings
from clipft.core.errors import UsageError
from clipft.core.patches import Patches
from clipft.data.captions.tokenizer import CaptionEncoder, padded
from clipft.data.demo.catalogue import render_pair
from clipft.data.images.augmentation import Transform
from clipft.models.architectures import ARCHITECTURES
from clipft.models.huggingface import merged, write_adapter, write_transformers
from clipft.models.pretrained import load_pretrained
from clipft.models.trainable import adapt
from tests.models.checkpoints import TEXTS, write_naflex

FAMILY = ARCHITECTURES["siglip2"]
SIZES = [(200, 120), (90, 160), (128, 128), (400, 40), (30, 300), (7, 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_naflex(tmp_path_factory.mktemp("naflex"))


def images() -> list[Image.Image]:
    drawn = (render_pair(3, number).image for number in range(len(SIZES)))
    return [image.resize(size) for image, size in zip(drawn, SIZES, strict=True)]


def strips(inputs, augmentation: str = "none") -> torch.Tensor:
    transform = Transform(augmentation, inputs.image_size, inputs.squashed, patches=inputs.patches)
    return torch.stack([transform(image, 0) for image in images()])


def tuned(folder, scenario: str = "zero_shot", **given: object):
    settings = load_settings({"lora_r": "4", **given}, environ={}).values
    torch.manual_seed(0)
    base = load_pretrained(str(folder))
    return base, adapt(base, SCENARIOS[scenario], settings).eval()


def ids_of(inputs) -> torch.Tensor:
    encoder = CaptionEncoder(inputs.tokenizer, inputs.context_length)
    return padded([text.ids for text in encoder(TEXTS)], encoder.eos_token_id)


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1


@pytest.mark.parametrize("seed", range(8))
@torch.inference_mode()
def test_features_equal_those_of_transformers_on_random_configurations(seed):
    draw = random.Random(seed)
    heads, patch, most = draw.choice([1, 2, 4]), draw.choice([4, 6, 8]), draw.randint(9, 40)
    tower = {
        "hidden_size": heads * 8,
        "num_attention_heads": heads,
        "num_hidden_layers": draw.randint(1, 3),
        "intermediate_size": draw.choice([24, 40]),
    }
    text = {**tower, "vocab_size": 60, "max_position_embeddings": 12, "eos_token_id": 3}
    vision = {**tower, "patch_size": patch, "num_patches": draw.choice([9, 16, 25])}
    torch.manual_seed(seed)
    clip = Siglip2Model(Siglip2Config(vision_config=vision, text_config=text)).eval()
    made = Siglip2ImageProcessor(patch_size=patch, max_num_patches=most)(
        images(), return_tensors="pt"
    )
    theirs = clip.get_image_features(**made).pooler_output
    transform = Transform("none", 0, patches=Patches(patch, most))
    pixels = torch.stack([transform(image, 0) for image in images()])
    ours = FAMILY.project_images(clip, FAMILY.pixel_features(clip, pixels, normalized))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (theirs[0] - theirs[1]).abs().max() > 1e-3  # images differ by far more
    ids = torch.randint(4, 60, (3, 12))
    ids[:, 7] = 3
    ids[:, 8:] = clip.config.text_config.pad_token_id
    theirs = clip.get_text_features(input_ids=ids).pooler_output
    ours = FAMILY.project_texts(clip, FAMILY.text_features(clip, ids[:, :9]))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_pixels_equal_those_of_the_image_processor(folder):
    inputs = load_pretrained(str(folder)).inputs
    made = Siglip2ImageProcessor.from_pretrained(folder)(images(), return_tensors="pt")
    for strip, patches, shape in zip(
        strips(inputs), made["pixel_values"], made["spatial_shapes"].tolist(), strict=True
    ):
        grid = (strip[:2, 0, :2].long() * torch.tensor([[256], [1]])).sum(0).tolist()
        assert grid == shape
        ours = strip[:, :, 8:].unflatten(2, (-1, 8)).permute(2, 1, 3, 0).flatten(1)
        count = grid[0] * grid[1]
        torch.testing.assert_close(normalized(ours[:count]), patches[:count], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [n for n, s in SCENARIOS.items() if s.trains])
def test_every_scenario_trains(name, folder):
    scenario = SCENARIOS[name]
    base, model = tuned(folder, name, lora_targets="all")
    found, texts = model.train()(strips(base.inputs)[: len(TEXTS)], ids_of(base.inputs))
    assert found.requires_grad == model.images_trainable
    assert texts.requires_grad == model.texts_trainable
    (found @ texts.T).diagonal().sum().backward()
    learning = [n for n, p in model.trainable() if p.grad is not None]
    for projection, path in FAMILY.projections.items():
        wanted = scenario.full or projection in scenario.projections
        assert any(f"{path}." in name for name in learning) == wanted
    assert any(".lora_B" in name for name in learning) == bool(scenario.lora)


@torch.inference_mode()
def test_an_image_embeds_alone_as_it_does_among_others(folder):
    base, model = tuned(folder)
    pixels = strips(base.inputs)
    together = model.encode_images(pixels)
    alone = torch.cat([model.encode_images(pixel[None]) for pixel in pixels])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("augmentation", ["simple", "advanced"])
def test_augmented_images_keep_their_shape(augmentation, folder):
    inputs = load_pretrained(str(folder)).inputs
    plain, changed = strips(inputs), strips(inputs, augmentation)
    assert torch.equal(changed, strips(inputs, augmentation))  # the same seed, the same pixels
    assert torch.equal(plain[:, :2, 0, :2], changed[:, :2, 0, :2])
    assert not torch.equal(plain, changed)


def test_simple_augmentation_moves_and_mirrors():
    """A gradient from left to right stays one, in one of the two directions."""
    wide = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (32, 64, 3))
    transform = Transform("simple", 0, patches=Patches(8, 32))
    slopes = set()
    for seed in range(8):
        strip = transform(Image.fromarray(np.ascontiguousarray(wide)), seed)[0, 0, 8:]
        row = strip[: 8 * 8].long()
        slopes.add(int(torch.sign(row[-1] - row[0])))
        assert (row.diff().abs() <= 1).all()
    assert slopes == {-1, 1}


@torch.inference_mode()
def test_transformers_opens_what_was_trained_and_written(folder, tmp_path):
    base, model = tuned(folder, "full")
    for _, parameter in model.trainable():
        parameter.add_(0.01 * torch.randn_like(parameter))
    ours, _ = model(strips(base.inputs), ids_of(base.inputs))
    write_transformers(merged(model), base, tmp_path)
    opened = AutoModel.from_pretrained(tmp_path).eval()
    made = Siglip2ImageProcessor.from_pretrained(tmp_path)(images(), return_tensors="pt")
    theirs = torch.nn.functional.normalize(opened.get_image_features(**made).pooler_output, dim=-1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert load_pretrained(str(tmp_path)).inputs.patches == base.inputs.patches


def test_peft_alone_opens_the_adapter(folder, tmp_path):
    base, model = tuned(folder, "dual_lora", lora_targets="all")
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.05 * torch.randn_like(parameter))
        ours, _ = model(strips(base.inputs), ids_of(base.inputs))
    write_adapter(model, str(folder), tmp_path)
    alone = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), tmp_path).eval()
    made = Siglip2ImageProcessor.from_pretrained(folder)(images(), return_tensors="pt")
    with torch.no_grad():
        theirs = alone.get_image_features(**made).pooler_output
    theirs = torch.nn.functional.normalize(theirs, dim=-1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_image_size_is_the_number_of_patches(folder, tmp_path):
    base = load_pretrained(str(folder), InputSizes(image_size=64))
    assert base.inputs.patches == Patches(8, 64) and base.inputs.image_size == 64
    assert base.inputs.images == "any shape, as up to 64 patches of 8 x 8 pixels,"
    write_transformers(base.model, base, tmp_path)
    assert load_pretrained(str(tmp_path)).inputs.patches == Patches(8, 64)
    with pytest.raises(UsageError, match="not a multiple of the model's patches of 8 pixels"):
        load_pretrained(str(folder), InputSizes(image_size=60))
    assert load_pretrained(str(folder)).inputs.image_size == 39  # of 24 patches
