"""Models at other lengths of texts and sizes of images, compared with transformers' own ways."""

import pytest
import torch
from transformers import AutoProcessor, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from clipft.config.sections.model import InputSizes
from clipft.core.errors import UsageError
from clipft.models.huggingface import write_transformers
from clipft.models.positions import resize_images, resize_texts, stretched
from clipft.models.pretrained import load_pretrained

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def clip() -> CLIPModel:
    torch.manual_seed(0)
    vision = {**VISION, "image_size": 32, "patch_size": 8}
    text = {**TEXT, "eos_token_id": 49}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def siglip() -> SiglipModel:
    torch.manual_seed(0)
    vision = {**VISION, "image_size": 32, "patch_size": 8}
    return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=vision)).eval()


@pytest.mark.parametrize("make", [clip, siglip])
@torch.inference_mode()
def test_images_of_another_size_are_those_of_transformers_interpolation(make):
    model, pixels = make(), torch.randn(2, 3, 48, 48)
    expected = model.vision_model(pixels, interpolate_pos_encoding=True).pooler_output
    resize_images(model, 48)
    torch.testing.assert_close(model.vision_model(pixels).pooler_output, expected)


@torch.inference_mode()
def test_short_texts_read_the_same_and_long_ones_to_their_end():
    model = clip()
    short = torch.tensor([[1, 5, 7, 49]])
    expected = model.text_model(short).pooler_output
    resize_texts(model, 200)
    torch.testing.assert_close(model.text_model(short).pooler_output, expected, rtol=0, atol=0)
    long = torch.randint(0, 49, (1, 200))
    long[0, -1] = 49
    other = long.clone()
    other[0, 190] = (other[0, 190] + 1) % 49
    read, changed = (model.text_model(ids).pooler_output for ids in (long, other))
    assert not torch.equal(read, changed)


def test_positions_are_stretched_as_long_clip_does():
    rows = torch.arange(77.0)[:, None].expand(77, 3)
    longer = stretched(rows, 248)
    assert longer.shape == (248, 3)
    assert torch.equal(longer[:20], rows[:20])
    assert longer[20, 0] == 20 and longer[-1, 0] == 76
    steps = longer[21:, 0] - longer[20:-1, 0]
    torch.testing.assert_close(steps, torch.full_like(steps, 56 / 227), rtol=0, atol=1e-4)
    assert torch.equal(stretched(rows, 30), rows[:30])


def test_an_image_size_that_has_no_whole_patches_is_refused():
    with pytest.raises(UsageError, match="patches of 8 pixels") as refused:
        resize_images(clip(), 50)
    assert refused.value.hint == "use 48"


@torch.inference_mode()
def test_transformers_opens_what_was_resized_and_written(tmp_path):
    base = load_pretrained("tiny", InputSizes(context_length=120, image_size=96))
    assert (base.inputs.context_length, base.inputs.image_size) == (120, 96)
    assert base.fingerprint() != load_pretrained("tiny").fingerprint()
    write_transformers(base.model, base, tmp_path)
    opened, processor = CLIPModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    text = "a " + "very " * 30 + "red chair"
    made = processor(text=[text], images=[torch.zeros(3, 130, 100)], return_tensors="pt")
    assert made["input_ids"].shape[1] > 77 and made["pixel_values"].shape[2:] == (96, 96)
    output = opened.eval()(**made)
    ours = base.model(**made)
    torch.testing.assert_close(output.image_embeds, ours.image_embeds)
    torch.testing.assert_close(output.text_embeds, ours.text_embeds)
