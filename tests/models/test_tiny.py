"""The packaged tiny CLIP: a small, complete model folder whose model has learned colors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

import clipft.models
from clipft.data.demo.drawing import COLORS
from tools.pretrain_tiny.pretrain import Scenes, build_model, pretrain, save_folder
from tools.pretrain_tiny.scenes import render_scene
from tools.pretrain_tiny.vocabulary import train_tokenizer

FOLDER = Path(clipft.models.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def model():
    return CLIPModel.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessor.from_pretrained(FOLDER)


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 6_000_000


def test_model_tokenizer_and_processor_fit_each_other(model, tokenizer, processor):
    config = model.config
    assert config.text_config.hidden_act == config.vision_config.hidden_act == "quick_gelu"
    assert config.text_config.max_position_embeddings == tokenizer.model_max_length == 77
    assert config.text_config.vocab_size == len(tokenizer)
    image = processor(Image.new("RGB", (300, 200)), return_tensors="pt")["pixel_values"]
    assert image.shape[-1] == config.vision_config.image_size
    assert np.allclose(processor.image_mean, [0.48145466, 0.4578275, 0.40821073])


def test_weights_are_finite_and_the_temperature_is_clamped(model):
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    assert 0 < model.logit_scale.item() <= np.log(100) + 1e-6


def test_the_end_token_has_the_highest_id_and_pads(model, tokenizer):
    assert tokenizer.is_fast
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1
    assert model.config.text_config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("a red cube")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1


@pytest.mark.parametrize(
    "text", ["a red chair", "chaise en bois é ü ß", "椅子と机", "стул 🪑 !?", "x\x01y", "½ £ % £"]
)
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids[1:-1]
    back = tokenizer.decode(ids, skip_special_tokens=True)
    assert back.replace(" ", "") == text.replace(" ", "")


def test_case_is_ignored(tokenizer):
    assert tokenizer("A RED Chair")["input_ids"] == tokenizer("a red chair")["input_ids"]


def test_ordinary_product_words_are_few_tokens(tokenizer):
    caption = "bookcase with three shelves, stained oak veneer, easy to keep clean"
    assert len(tokenizer(caption)["input_ids"]) <= 16


def test_padding_does_not_change_a_text_embedding(model, tokenizer):
    short = tokenizer(["a red cube"], return_tensors="pt")
    padded = tokenizer(["a red cube", "a blue ball on a grey floor"], padding=True)["input_ids"]
    with torch.no_grad():
        alone = model(**short, pixel_values=torch.zeros(1, 3, 72, 72)).text_embeds
        padded_ids = torch.tensor(padded[:1])
        batched = model(input_ids=padded_ids, pixel_values=torch.zeros(1, 3, 72, 72)).text_embeds
    assert torch.allclose(alone, batched, atol=1e-5)


def test_plain_colors_are_known_zero_shot(model, tokenizer, processor):
    names = [name for name in COLORS if name not in ("beige", "grey")]
    discs = [_disc(COLORS[name]) for name in names]
    scores = _similarities(model, tokenizer, processor, discs, [f"a {n} ball" for n in names])
    hits = (scores.argmax(dim=1) == torch.arange(len(names))).float().mean()
    assert hits >= 0.6  # chance: 0.09


def test_unseen_scenes_find_their_captions(model, tokenizer, processor):
    scenes = [render_scene(10_007, index) for index in range(64)]
    captions = [scene.captions[0] for scene in scenes]
    scores = _similarities(model, tokenizer, processor, [s.image for s in scenes], captions)
    hits = (scores.argmax(dim=1) == torch.arange(64)).float().mean()
    assert hits >= 0.25  # chance: 0.016


def test_a_scene_depends_only_on_its_seed_and_index():
    first, again = render_scene(1, 9, captions=2), render_scene(1, 9, captions=2)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.captions == again.captions
    assert first.image.tobytes() != render_scene(2, 9).image.tobytes()


def test_the_pretraining_program_writes_a_loadable_model(tmp_path):
    scenes = [render_scene(2, index, captions=4) for index in range(8)]
    images = [np.asarray(scene.image.resize((72, 72))) for scene in scenes]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    captions = [scene.captions for scene in scenes]
    tokenizer = train_tokenizer(texts[0] for texts in captions)
    model = build_model(tokenizer)
    before = model.visual_projection.weight.detach().clone()
    pretrain(model, tokenizer, Scenes(pixels, captions), 0.01, torch.Generator().manual_seed(0))
    assert not torch.equal(model.visual_projection.weight, before)
    save_folder(model, tokenizer, tmp_path)
    packaged = {path.name for path in FOLDER.iterdir()} - {"README.md"}
    assert {path.name for path in tmp_path.iterdir()} == packaged
    assert CLIPModel.from_pretrained(tmp_path).config.text_config.vocab_size == len(tokenizer)


def _disc(color):
    image = Image.new("RGB", (128, 128), (225, 222, 214))
    ImageDraw.Draw(image).ellipse((24, 24, 104, 104), fill=color)
    return image


def _similarities(model, tokenizer, processor, images, texts):
    pixels = processor(images, return_tensors="pt")
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens, **pixels).logits_per_image
