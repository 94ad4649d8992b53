"""Families whose text tower is a BERT, against transformers' own models and processors."""

import random

import pytest
import torch
from peft import PeftModel
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
)

from clipft.config.scenarios import SCENARIOS
from clipft.config.sections.model import InputSizes
from clipft.config.sources import load_settings
from clipft.core.errors import UsageError
from clipft.data.captions.tokenizer import CaptionEncoder, padded
from clipft.models.architectures import ARCHITECTURES
from clipft.models.huggingface import merged, write_adapter, write_transformers
from clipft.models.pretrained import load_pretrained
from clipft.models.trainable import adapt
from tests.models.checkpoints import CHINESE_TEXTS, write_altclip, write_chinese_clip

KINDS = {"chinese_clip": write_chinese_clip, "altclip": write_altclip}
END, PAD = 3, 1


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    return KINDS[request.param](tmp_path / request.param)


def random_model(kind: str, seed: int):
    """Make a small model with as many layers, heads and positions as the seed says."""
    draw = random.Random(seed)

    def tower() -> dict:
        heads = draw.choice([1, 2, 4])
        return {
            "hidden_size": heads * draw.choice([8, 12]),
            "num_attention_heads": heads,
            "num_hidden_layers": draw.randint(1, 3),
            "intermediate_size": draw.choice([24, 40]),
            "hidden_act": draw.choice(["gelu", "quick_gelu"]),
        }

    vision = {**tower(), "patch_size": 8, "image_size": draw.choice([16, 32])}
    text = {**tower(), "vocab_size": 60, "max_position_embeddings": 24, "initializer_range": 0.4}
    text |= {"pad_token_id": PAD, "eos_token_id": END}
    if kind == "altclip":
        text["project_dim"] = draw.choice([16, 20])
    config, model = {
        "chinese_clip": (ChineseCLIPConfig, ChineseCLIPModel),
        "altclip": (AltCLIPConfig, AltCLIPModel),
    }[kind]
    torch.manual_seed(seed)
    size = draw.choice([12, 16])
    return model(config(projection_dim=size, vision_config=vision, text_config=text)).eval()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_features_equal_those_of_transformers_on_random_configurations(kind, seed):
    clip, family = random_model(kind, seed), ARCHITECTURES[kind]
    side, lengths = clip.config.vision_config.image_size, torch.tensor([2, 5, 9, 14])
    pixels = torch.randn(4, 3, side, side)
    ids = torch.randint(4, 60, (4, 14))
    places = torch.arange(14)
    ids[places >= lengths[:, None] - 1] = END  # clipft pads with the end token
    mask = places < lengths[:, None]
    theirs = clip.get_text_features(
        input_ids=ids.masked_fill(~mask, PAD), attention_mask=mask.long()
    ).pooler_output
    ours = family.project_texts(clip, family.text_features(clip, ids))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (theirs[0] - theirs[1]).abs().max() > 1e-2  # texts differ by far more
    theirs = clip.get_image_features(pixel_values=pixels).pooler_output
    ours = family.project_images(clip, family.image_features(clip, pixels))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_training_draws_no_dropout_of_the_text_tower(folder):
    """Its masks would differ between two passes over the same rows."""
    base = load_pretrained(str(folder))
    assert base.model.config.text_config.hidden_dropout_prob == 0.1
    model = adapt(base, SCENARIOS["full"], load_settings({}, environ={}).values).train()
    ids = torch.randint(5, 60, (3, 9))
    assert torch.equal(model.encode_texts(ids), model.encode_texts(ids))


def test_texts_have_as_many_tokens_as_the_authors_trained_with(folder):
    base = load_pretrained(str(folder))
    expected = {"chinese_clip": 52, "altclip": 77}[folder.name]
    assert base.inputs.context_length == expected
    encoder = CaptionEncoder(base.inputs.tokenizer, expected)
    (long,) = encoder(["椅子 " * 200])
    assert len(long.ids) <= expected and long.ids[-1] == base.inputs.tokenizer.eos_token_id


def test_another_context_length_is_exported_and_read_again(folder, tmp_path):
    base = load_pretrained(str(folder), InputSizes(context_length=120))
    weights = load_pretrained(str(folder)).fingerprint()
    assert (base.inputs.context_length, base.fingerprint()) == (120, weights)
    write_transformers(base.model, base, tmp_path / "out")
    assert load_pretrained(str(tmp_path / "out")).inputs.context_length == 120
    with pytest.raises(UsageError, match="has positions for 512 tokens"):
        load_pretrained(str(folder), InputSizes(context_length=513))


def tuned(folder):
    settings = load_settings({"lora_r": "4", "lora_targets": "all"}, environ={}).values
    torch.manual_seed(0)
    base = load_pretrained(str(folder))
    model = adapt(base, SCENARIOS["dual_lora"], settings).eval()
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return base, model


def inputs_of(base, folder):
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    encoder = CaptionEncoder(base.inputs.tokenizer, base.inputs.context_length)
    ids = padded([text.ids for text in encoder(CHINESE_TEXTS)], encoder.eos_token_id)
    made = AutoTokenizer.from_pretrained(folder)(CHINESE_TEXTS, padding=True, return_tensors="pt")
    return pixels, ids, made


@torch.inference_mode()
def embeddings_of(clip, pixel_values, texts):
    found = clip(pixel_values=pixel_values, **texts)
    return found.image_embeds, found.text_embeds


@torch.inference_mode()
def test_transformers_opens_what_was_trained_and_written(folder, tmp_path):
    base, model = tuned(folder)
    pixels, ids, made = inputs_of(base, folder)
    ours, normal = model(pixels, ids), model._normalize(pixels)
    write_transformers(merged(model), base, tmp_path / "out")
    opened = AutoModel.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    again = processor(text=CHINESE_TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(again["input_ids"], made["input_ids"])
    for one, other in zip(ours, embeddings_of(opened, normal, again), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_peft_alone_opens_the_adapter(folder, tmp_path):
    base, model = tuned(folder)
    adapted = {name for name, _ in model.clip.named_modules() if name.endswith("lora_A.default")}
    layers = [base.model.config.vision_config, base.model.config.text_config]
    assert len(adapted) == 6 * sum(config.num_hidden_layers for config in layers)
    pixels, ids, made = inputs_of(base, folder)
    with torch.no_grad():
        ours, normal = model(pixels, ids), model._normalize(pixels)
    write_adapter(model, str(folder), tmp_path)
    alone = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), tmp_path).eval()
    for one, other in zip(ours, embeddings_of(alone, normal, made), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_what_the_families_lack_is_said(folder):
    family = ARCHITECTURES[folder.name]
    assert set(family.not_exported) == {"open_clip"}
    assert "a BERT" in family.unshardable
    assert load_pretrained(str(folder)).remarks() == [
        f"{folder}: its text tower runs in the code of transformers. The faster encoder of "
        "clipft fits CLIP's towers only."
    ]
