import json
import math
import socket
import time
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from clipft.config.scenarios import SCENARIOS
from clipft.config.sources import load_settings
from clipft.core.errors import ModelError
from clipft.models.pretrained import (
    ModelInputs,
    PretrainedModel,
    load_inputs,
    load_pretrained,
)
from clipft.models.source import model_source
from clipft.models.trainable import TrainableModel, adapt

SETTINGS = load_settings({}, environ={}).values

# The true ViT-B/32 at r = 16
TRAINABLE = {
    "zero_shot": 0,
    "linear_probe": 655_360,
    "dual_lora": 1_638_400,
    "vision_lora": 983_040,
    "text_lora": 655_360,
    "full": 151_277_313,
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_trainable_parameters_of_a_full_size_vit_b_32(name):
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig())
    total = sum(p.numel() for p in clip.parameters())
    inputs = ModelInputs(None, 77, 224, (0.5,) * 3, (0.5,) * 3)
    base = PretrainedModel("vit", clip, inputs, total)
    counted = adapt(base, SCENARIOS[name], SETTINGS).parameters_count()
    assert counted.base == 151_277_313
    assert counted.trainable == TRAINABLE[name]


@pytest.mark.parametrize("name", SCENARIOS)
def test_only_parameters_named_by_the_scenario_get_gradients(name):
    scenario = SCENARIOS[name]
    model = adapt(load_pretrained("tiny"), scenario, SETTINGS)
    names = [n for n, _ in model.trainable()]
    assert model.images_trainable == any("vision" in n or "visual" in n for n in names)
    assert ("logit_scale" in "".join(names)) == scenario.full
    if scenario.lora and not scenario.full:
        wanted = {f"{tower}_model" for tower in scenario.lora}
        found = {t for t in ("vision_model", "text_model") for n in names if t in n}
        assert found == wanted


@pytest.mark.parametrize(
    ("name", "vision_tower", "text_tower", "images", "texts"),
    [
        ("zero_shot", False, False, False, False),
        ("linear_probe", False, False, True, True),
        ("dual_lora", True, True, True, True),
        ("vision_lora", True, False, True, False),
        ("text_lora", False, True, False, True),
        ("full", True, True, True, True),
    ],
)
def test_each_scenario_reports_which_towers_train(name, vision_tower, text_tower, images, texts):
    model = adapt(load_pretrained("tiny"), SCENARIOS[name], SETTINGS)
    assert (model.vision_tower_trainable, model.text_tower_trainable) == (vision_tower, text_tower)
    assert (model.images_trainable, model.texts_trainable) == (images, texts)


def test_an_adapted_model_starts_as_the_pretrained_one():
    base = load_pretrained("tiny")
    pixels = torch.randint(
        0, 256, (2, 3, base.inputs.image_size, base.inputs.image_size), dtype=torch.uint8
    )
    ids = torch.tensor(base.inputs.tokenizer(["a red chair", "a lamp"], padding=True)["input_ids"])
    pretrained = adapt(base, SCENARIOS["zero_shot"], SETTINGS).eval()
    with torch.no_grad():
        expected = pretrained(pixels, ids)
        tuned = adapt(load_pretrained("tiny"), SCENARIOS["dual_lora"], SETTINGS).eval()(pixels, ids)
    torch.testing.assert_close(tuned, expected)


def test_normalization_equals_the_image_processor():
    from transformers import CLIPImageProcessor

    base = load_pretrained("tiny")
    processor = CLIPImageProcessor(
        image_mean=list(base.inputs.mean), image_std=list(base.inputs.std)
    )
    pixels = torch.randint(
        0, 256, (1, 3, base.inputs.image_size, base.inputs.image_size), dtype=torch.uint8
    )
    theirs = processor(
        images=list(pixels), do_resize=False, do_center_crop=False, return_tensors="pt"
    )["pixel_values"]
    model = adapt(base, SCENARIOS["zero_shot"], SETTINGS)
    torch.testing.assert_close(
        pixels.float() * model._gain + model._shift, theirs, atol=1e-5, rtol=1e-5
    )


def test_weights_load_into_the_same_scenario_and_no_other():
    torch.manual_seed(1)
    model = adapt(load_pretrained("tiny"), SCENARIOS["dual_lora"], SETTINGS)
    state = {name: torch.randn_like(value) for name, value in model.trainable_state().items()}
    model.load_trainable_state(state)
    for name, value in model.trainable_state().items():
        assert torch.equal(value, state[name])
    other = adapt(load_pretrained("tiny"), SCENARIOS["vision_lora"], SETTINGS)
    with pytest.raises(ModelError, match="does not fit"):
        other.load_trainable_state(state)


def adapted(scenario: str, **given: str) -> TrainableModel:
    settings = load_settings(given, environ={}).values
    return adapt(load_pretrained("tiny"), SCENARIOS[scenario], settings)


@pytest.mark.parametrize(
    ("scenario", "given", "scales"),
    [
        ("full", {}, ["logit_scale"]),
        ("full", {"logit_scale": "frozen"}, []),
        ("dual_lora", {}, []),
        ("dual_lora", {"logit_scale": "trained"}, ["logit_scale"]),
        ("linear_probe", {"logit_scale": "trained"}, ["logit_scale"]),
        ("dual_lora", {"loss": "siglip"}, ["logit_bias", "logit_scale"]),
        ("linear_probe", {"loss": "siglip", "logit_scale": "frozen"}, []),
        ("zero_shot", {"loss": "siglip"}, []),
    ],
)
def test_temperature_and_bias_train_and_are_saved_as_set(scenario, given, scales):
    model = adapted(scenario, **given)
    named = {name.rpartition(".")[2]: p for name, p in model.trainable() if p.ndim == 0}
    assert sorted(named) == scales
    with torch.no_grad():
        for parameter in named.values():
            parameter.fill_(1.25)
    again = adapted(scenario, **given)
    again.load_trainable_state(model.trainable_state())
    values = {"logit_scale": again.logit_scale, "logit_bias": again.logit_bias}
    assert all(values[name].item() == 1.25 for name in scales)


def test_the_sigmoid_loss_gives_clip_a_bias_and_resets_its_temperature():
    model = adapted("dual_lora", loss="siglip")
    assert model.logit_scale.exp().item() == pytest.approx(10)
    assert model.logit_bias.item() == -10
    assert adapted("dual_lora").logit_bias is None


def test_the_logit_scale_stays_at_or_below_100():
    model = adapt(load_pretrained("tiny"), SCENARIOS["full"], SETTINGS)
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == pytest.approx(math.log(100))


def test_a_frozen_logit_scale_above_100_stays_as_it_was_pretrained():
    base = load_pretrained("tiny")
    with torch.no_grad():
        base.model.logit_scale.fill_(5.0)  # e^5 = 148
    model = adapt(base, SCENARIOS["dual_lora"], SETTINGS)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == 5.0  # no checkpoint holds it: resuming would find 5 again


@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
def test_an_attention_that_would_ignore_causality_is_refused(tower):
    base = load_pretrained("tiny")
    getattr(base.model, tower).config._attn_implementation = "eager"
    with pytest.raises(ModelError, match="attends with eager, and clipft needs sdpa"):
        adapt(base, SCENARIOS["dual_lora"], SETTINGS)


def test_a_folder_that_asks_for_eager_attention_is_loaded_with_sdpa(tmp_path):
    for file in Path(model_source("tiny")).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["attn_implementation"] = part["_attn_implementation"] = "eager"
    (tmp_path / "config.json").write_text(json.dumps(config))
    adapt(load_pretrained(str(tmp_path)), SCENARIOS["dual_lora"], SETTINGS)  # checks both towers


def test_different_weights_have_different_fingerprints():
    base = load_pretrained("tiny")
    before = base.fingerprint()
    assert load_pretrained("tiny").fingerprint() == before
    with torch.no_grad():
        base.model.logit_scale += 1e-3
    assert base.fingerprint() != before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/folder", "config.json is missing"),
        ("no-such-org/no-such-model", "cannot get model no-such-org/no-such-model"),
    ],
)
def test_a_missing_model_is_an_error(name, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=message):
        load_pretrained(name)


def test_without_a_network_the_hub_is_not_asked_again_and_again(monkeypatch, tmp_path):
    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("clipft.models.source.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"cannot get model some/model: .*Name or service"):
        load_inputs("some/model")
    assert time.monotonic() - began < 5  # the hub's client would try for a minute


def test_tiny_is_the_packaged_model_even_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_pretrained("tiny").parameters_count > 1_000_000
