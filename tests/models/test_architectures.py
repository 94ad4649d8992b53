"""Models of every architecture give the same results as the pipelines of transformers."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    SiglipTokenizer,
)

from clipft.config.scenarios import SCENARIOS
from clipft.config.sources import load_settings
from clipft.core.errors import ModelError
from clipft.data.captions.tokenizer import CaptionEncoder, padded
from clipft.data.demo.catalogue import render_pair
from clipft.data.images.augmentation import Transform
from clipft.models.pretrained import PretrainedModel, load_inputs, load_pretrained
from clipft.models.trainable import TrainableModel, adapt
from tests.models.checkpoints import (
    TEXTS,
    write_altclip,
    write_chinese_clip,
    write_clip,
    write_metaclip_2,
    write_siglip,
)

Folders = Callable[[str], Path]

KINDS = {
    "ViT-B-32": lambda folder: write_clip(folder, 32),
    "ViT-B-16": lambda folder: write_clip(folder, 16),
    "ViT-L-14": lambda folder: write_clip(folder, 14),
    "ViT-L-14-336": lambda folder: write_clip(folder, 14, size=336),
    "LAION": lambda folder: write_clip(folder, 32, act="gelu"),
    "old-config": lambda folder: write_clip(folder, 32, end=2),
    "SigLIP": write_siglip,
    "MetaCLIP-2": write_metaclip_2,
    "Chinese-CLIP": write_chinese_clip,
    "AltCLIP": write_altclip,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = KINDS[kind](tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


def some_images() -> list[Image.Image]:
    """Return a wide, a tall and a square image."""
    sizes = [(200, 120), (90, 160), (128, 128), (64, 64)]
    drawn = (render_pair(3, number).image for number in range(len(sizes)))
    return [image.resize(size) for image, size in zip(drawn, sizes, strict=True)]


@cache
def pretrained(folder: Path) -> PretrainedModel:
    return load_pretrained(str(folder))


def tuned(folder: Path, scenario: str = "zero_shot", **given: object) -> TrainableModel:
    settings = load_settings({"lora_r": "4", **given}, environ={}).values
    torch.manual_seed(0)
    return adapt(deepcopy(pretrained(folder)), SCENARIOS[scenario], settings).eval()


def pixels_and_ids(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = pretrained(folder).inputs
    transform = Transform("none", inputs.image_size, inputs.squashed)
    encoder = CaptionEncoder(inputs.tokenizer, inputs.context_length)
    ids = padded([encoded.ids for encoded in encoder(TEXTS)], encoder.eos_token_id)
    return torch.stack([transform(image, 0) for image in some_images()]), ids


def pipeline(kind: str, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed with transformers alone."""
    if kind == "SigLIP":
        tokenizer = SiglipTokenizer.from_pretrained(str(folder))
        model = SiglipModel.from_pretrained(str(folder)).eval()
        processor = SiglipProcessor(SiglipImageProcessor.from_pretrained(str(folder)), tokenizer)
        text = {"padding": "max_length", "return_attention_mask": False}
    else:
        model = AutoModel.from_pretrained(str(folder)).eval()
        image_processor = CLIPImageProcessor.from_pretrained(str(folder))
        processor = CLIPProcessor(image_processor, AutoTokenizer.from_pretrained(str(folder)))
        text = {"padding": True}
    given = processor(text=TEXTS, images=some_images(), return_tensors="pt", **text)
    with torch.no_grad():
        images = model.get_image_features(pixel_values=given["pixel_values"]).pooler_output
        texts = model.get_text_features(
            **{k: v for k, v in given.items() if k != "pixel_values"}
        ).pooler_output
    unit = torch.nn.functional.normalize
    return unit(images, dim=-1), unit(texts, dim=-1)


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_equal_those_of_the_transformers_pipeline(kind, folders):
    expected_images, expected_texts = pipeline(kind, folders(kind))
    with torch.no_grad():
        images, texts = tuned(folders(kind))(*pixels_and_ids(folders(kind)))
    torch.testing.assert_close(texts, expected_texts, atol=2e-6, rtol=1e-4)
    # Pixels differ by one step of 255 at most; images differ among each other by far more
    assert far(images, expected_images) < far(expected_images[:2], expected_images[2:]) / 10


@pytest.mark.parametrize(
    ("kind", "side", "context", "squashed"),
    [("ViT-L-14-336", 336, 77, False), ("SigLIP", 64, 64, True)],
)
def test_inputs_follow_the_configuration_of_the_checkpoint(kind, side, context, squashed, folders):
    inputs = load_inputs(str(folders(kind)))
    assert (inputs.image_size, inputs.context_length) == (side, context)
    assert inputs.squashed == squashed


def test_siglip_features_and_projections_equal_transformers(folders):
    model = tuned(folders("SigLIP"))
    pixels, ids = pixels_and_ids(folders("SigLIP"))
    with torch.no_grad():
        normal = pixels.float() * model._gain + model._shift
        images = model.clip.get_image_features(pixel_values=normal).pooler_output
        filled = torch.nn.functional.pad(ids, (0, 64 - ids.shape[1]), value=1)
        texts = model.clip.get_text_features(input_ids=filled).pooler_output
        ours = model(pixels, ids)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(ours[0], unit(images, dim=-1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours[1], unit(texts, dim=-1), atol=1e-6, rtol=1e-5)


def test_siglip_loss_equals_transformers(folders):
    from clipft.training.step.losses import make_loss

    model = tuned(folders("SigLIP"))
    pixels, ids = pixels_and_ids(folders("SigLIP"))
    filled = torch.nn.functional.pad(ids, (0, 64 - ids.shape[1]), value=1)
    with torch.no_grad():
        normal = pixels.float() * model._gain + model._shift
        theirs = model.clip(input_ids=filled, pixel_values=normal, return_loss=True).loss
        ours = make_loss(load_settings({}, environ={}).values, model)(*model(pixels, ids))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_texts_are_pooled_at_their_end_despite_an_old_configuration(folders, tmp_path):
    """The old rule, pooling at the highest id, breaks if tokens were added to the vocabulary."""
    folder = shutil.copytree(folders("old-config"), tmp_path / "added")
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_tokens(["furniturium"])
    tokenizer.save_pretrained(str(folder))
    legacy = CLIPModel.from_pretrained(str(folder))
    legacy.text_model.resize_token_embeddings(49409)
    legacy.config.text_config.vocab_size = 49409
    legacy.save_pretrained(str(folder))
    base = load_pretrained(str(folder))
    ids = torch.tensor(tokenizer(["a furniturium chair", "furniturium"], padding=True)["input_ids"])
    with torch.no_grad():
        hidden = base.model.text_model(input_ids=ids).last_hidden_state
        right = hidden[torch.arange(2), (ids == 49407).int().argmax(1)]
        assert torch.equal(base.model.text_model(input_ids=ids).pooler_output, right)
        theirs = CLIPModel.from_pretrained(str(folder)).eval().text_model(input_ids=ids)
    assert not torch.allclose(theirs.pooler_output, right)


@pytest.mark.parametrize("kind", ["SigLIP", "MetaCLIP-2", "Chinese-CLIP", "AltCLIP"])
@pytest.mark.parametrize("name", [n for n, s in SCENARIOS.items() if s.trains])
def test_every_scenario_trains_other_families(name, kind, folders):
    scenario = SCENARIOS[name]
    model = tuned(folders(kind), name)
    pixels, ids = pixels_and_ids(folders(kind))
    images, texts = model.train()(pixels, ids)
    assert images.requires_grad == model.images_trainable
    assert texts.requires_grad == model.texts_trainable
    (images @ texts.T).diagonal().sum().backward()
    learning = [n for n, p in model.trainable() if p.grad is not None]
    for projection, path in model.architecture.projections.items():
        wanted = scenario.full or projection in scenario.projections
        assert any(f"{path}." in name for name in learning) == wanted
    assert any(".lora_B" in name for name in learning) == bool(scenario.lora)
    again = tuned(folders(kind), name)
    again.load_trainable_state(model.trainable_state())


def test_peft_alone_opens_the_adapter_of_siglip(folders, tmp_path):
    model = tuned(folders("SigLIP"), "dual_lora", lora_targets="all")
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.clip.save_pretrained(str(tmp_path))
    base = SiglipModel.from_pretrained(str(folders("SigLIP")))
    alone = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    pixels, ids = pixels_and_ids(folders("SigLIP"))
    filled = torch.nn.functional.pad(ids, (0, 64 - ids.shape[1]), value=1)
    normal = pixels.float() * model._gain + model._shift
    with torch.no_grad():
        images = alone.get_image_features(pixel_values=normal).pooler_output
        texts = alone.get_text_features(input_ids=filled).pooler_output
        ours = model(pixels, ids)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(ours[0], unit(images, dim=-1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours[1], unit(texts, dim=-1), atol=1e-6, rtol=1e-5)


def test_siglip_keeps_its_own_bias_and_temperature(folders):
    model = tuned(folders("SigLIP"), "dual_lora", loss="siglip")
    model.clamp_logit_scale()  # at ln 100 it would change what does not train
    assert model.logit_scale.item() == pytest.approx(4.7)
    assert model.logit_bias.item() == pytest.approx(-12.9)
    assert not any("logit" in name for name, _ in model.trainable())
    full = tuned(folders("SigLIP"), "full")
    assert {"logit_scale", "logit_bias"} <= {name for name, _ in full.trainable()}


def test_siglip_captions_are_truncated_at_a_word_boundary(folders):
    inputs = load_inputs(str(folders("SigLIP")))
    encoder = CaptionEncoder(inputs.tokenizer, 12)
    text = "a red chair and an oak table and a blue sofa"
    (caption,) = encoder([text])
    assert caption.length > 12 >= len(caption.ids)
    assert caption.ids[-1] == encoder.eos_token_id
    kept = inputs.tokenizer.decode(caption.ids[:-1]).split()
    assert kept == text.split()[: len(kept)]
    assert (
        CaptionEncoder(inputs.tokenizer, 64)(TEXTS)[1].ids == inputs.tokenizer(TEXTS[1]).input_ids
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "is a bert model, not CLIP"),
        ({"model_type": "siglip2", "vision_config": {"vision_use_head": False}}, "no head"),
        ({"model_type": "siglip", "vision_config": {"vision_use_head": False}}, "no head"),
    ],
)
def test_unsupported_models_are_refused(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_pretrained(str(tmp_path))
