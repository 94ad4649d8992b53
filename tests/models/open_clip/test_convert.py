"""Converted checkpoints of open_clip give open_clip's own embeddings."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clipft.cli.app import run
from clipft.core.errors import ModelError
from clipft.data.demo.catalogue import render_pair
from clipft.models.open_clip.config import siglip_activation, target_of
from clipft.models.open_clip.convert import converted_folder, read_report
from clipft.models.open_clip.names import CONFIG_FILE, is_open_clip, public_open_clip_name
from clipft.models.open_clip.sources import find_source
from clipft.models.open_clip.tensors import to_open_clip, to_transformers
from clipft.models.pretrained import load_inputs, load_pretrained
from tests.models.open_clip.folders import CONFIG, changed, describe, make, write
from tests.models.open_clip.folders import write_word_tokenizer as words

TEXTS = ["a photo of a red chair", "An oak table, with 4 drawers!", "two lamps & a sofa"]
SCALED = changed({"ls_init_value": 1e-4}, {"ls_init_value": 0.3}, nonscalar_logit_scale=True)
KINDS = {
    "gelu": CONFIG,
    "quick_gelu": changed({"patch_dropout": 0.5}, custom_text=True, quick_gelu=True),
    "tanh": changed(
        {"act_kwargs": {"approximate": "tanh"}, "pos_embed_type": "sin_cos_2d"},
        {"norm_kwargs": {"eps": 1e-3}},
    ),
    "layer_scale": SCALED,
}


def embeddings(place: str) -> list[torch.Tensor]:
    """Embed images and texts with open_clip alone: its preprocessing, tokenizer and encoders."""
    model, _, preprocess = open_clip.create_model_and_transforms(place)
    pixels = torch.stack([preprocess(image) for image in images()])
    with torch.no_grad():
        return [
            model.eval().encode_image(pixels, normalize=True),
            model.encode_text(open_clip.get_tokenizer(place)(TEXTS), normalize=True),
        ]


def images() -> list[Image.Image]:
    sizes = [(128, 96), (64, 100), (80, 80)]
    return [render_pair(3, n).image.resize(size) for n, size in enumerate(sizes)]


def ours(name: str) -> list[torch.Tensor]:
    """Embed the same with clipft: its preprocessing, tokens and encoders."""
    from clipft.config.scenarios import SCENARIOS
    from clipft.config.sources import load_settings
    from clipft.data.captions.tokenizer import CaptionEncoder, padded
    from clipft.data.images.augmentation import Transform
    from clipft.models.trainable import adapt

    base = load_pretrained(name)
    transform = Transform("none", base.inputs.image_size, base.inputs.squashed)
    encoder = CaptionEncoder(base.inputs.tokenizer, base.inputs.context_length)
    ids = padded([encoded.ids for encoded in encoder(TEXTS)], encoder.eos_token_id)
    pixels = torch.stack([transform(image, 0) for image in images()])
    model = adapt(base, SCENARIOS["zero_shot"], load_settings({}, environ={}).values)
    with torch.no_grad():
        return list(model.eval()(pixels, ids))


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(found[1], expected[1], atol=2e-6, rtol=1e-4)
    # Pixels may differ by one step of 255: images differ among each other by far more
    apart = (expected[0][0] - expected[0][1]).abs().max()
    assert (found[0] - expected[0]).abs().max() < apart / 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_embeds_as_open_clip_does(kind, tmp_path):
    name = f"local-dir:{write(tmp_path, KINDS[kind])}"
    base = load_pretrained(name)
    tensors = len(make(KINDS[kind]).state_dict())
    assert base.conversion.startswith(f"{tensors} of {tensors} tensors used, largest difference")
    assert read_report(converted_folder(name)).difference < 2e-6
    assert_same(ours(name), embeddings(name))


@pytest.mark.parametrize("clean", ["whitespace", "canonicalize"])
@pytest.mark.parametrize(("end", "family"), [(1, "clip"), (2, "metaclip_2")])
def test_texts_are_read_and_pooled_as_by_another_tokenizer(end, family, clean, tmp_path):
    """transformers' CLIP takes an end token of 2 for OpenAI's mistake, and pools elsewhere."""
    given = {"hf_tokenizer_name": "x/y", "vocab_size": 64, "pool_type": "eos", "eos_id": end}
    given["tokenizer_kwargs"] = {"clean": clean}
    name = f"local-dir:{write(words(tmp_path, end), changed(text=given))}"
    base = load_pretrained(name)
    assert base.model.config.model_type == family
    assert read_report(converted_folder(name)).difference < 2e-6
    assert_same(ours(name), embeddings(name))
    with torch.no_grad():
        ids = base.inputs.tokenizer(TEXTS, padding=True, return_tensors="pt").input_ids
        theirs = base.model.get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(
        torch.nn.functional.normalize(theirs, dim=-1), embeddings(name)[1], atol=2e-6, rtol=1e-4
    )


@pytest.mark.slow
def test_preprocessing_follows_the_configuration(tmp_path):
    given = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "resize_mode": "squash"}
    name = f"local-dir:{write(tmp_path, preprocess={**given, 'interpolation': 'bilinear'})}"
    inputs = load_inputs(name)
    assert (inputs.mean, inputs.std, inputs.squashed) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3), True)
    assert "images are resized with bicubic interpolation, not bilinear" in (
        load_pretrained(name).conversion
    )
    assert not load_inputs(f"local-dir:{write(tmp_path / 'plain')}").squashed


def test_a_bias_without_a_place_is_counted_and_told(tmp_path):
    name = f"local-dir:{write(tmp_path, changed(init_logit_bias=-10))}"
    assert load_pretrained(name).conversion.startswith("62 of 63 tensors used")
    assert "its bias of -10 for the sigmoid loss cannot be stored in a CLIP" in (
        load_pretrained(name).conversion
    )


def test_a_model_is_converted_once_and_again_when_its_file_changes(tmp_path, monkeypatch):
    folder = write(tmp_path / "model")
    first = converted_folder(f"local-dir:{folder}")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert converted_folder(str(folder)) == converted_folder(f"local-dir:{folder}") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    model = make(CONFIG)
    model.logit_scale.data.fill_(3.0)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    assert converted_folder(str(folder)) != first
    assert load_pretrained(str(folder)).model.logit_scale == 3.0


def test_without_open_clip_nothing_is_compared_and_the_registry_is_not_known(tmp_path, monkeypatch):
    from tests.models.checkpoints import clip_tokenizer

    found = "clipft.models.open_clip.sources.importlib.util.find_spec"
    monkeypatch.setattr(found, lambda name: None)
    name = f"local-dir:{write(tmp_path)}"
    with pytest.raises(ModelError, match="cannot get CLIP's tokenizer") as raised:
        load_pretrained(name)
    assert "clipft[open_clip]" in raised.value.hint
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained", lambda *_, **__: clip_tokenizer()
    )
    assert load_pretrained(name).conversion == (
        "62 of 62 tensors used, not compared with open_clip, which is not installed"
    )
    with pytest.raises(ModelError, match="open_clip:ViT-B-32/openai needs open_clip"):
        load_pretrained("open_clip:ViT-B-32/openai")


def test_a_file_is_named_with_its_model(tmp_path, monkeypatch):
    """As ``open_clip.create_model(NAME, pretrained=FILE)`` takes it."""
    folder = write(tmp_path / "model")
    file = folder / "open_clip_pytorch_model.bin"
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"ViT-tiny": CONFIG})
    base = load_pretrained(f"open_clip:ViT-tiny/{file}")
    assert base.fingerprint() == load_pretrained(str(file)).fingerprint()
    alone = Path(shutil.move(file, tmp_path / "alone.bin"))
    with pytest.raises(ModelError, match="does not say which model it is") as raised:
        load_pretrained(str(alone))
    assert f"open_clip:ViT-B-32/{alone}" in raised.value.hint
    describe(tmp_path, CONFIG)
    assert load_pretrained(str(alone)).fingerprint() == base.fingerprint()


def test_training_checkpoints_and_halves_are_read(tmp_path):
    """open_clip's own checkpoints of training: of several processes, with the optimizer's state."""
    state = make(CONFIG).half().state_dict()
    describe(tmp_path, CONFIG)
    content = {"epoch": 3, "name": "x", "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save({**content, "optimizer": {"state": {}, "lr": 0.1}}, tmp_path / "epoch_3.pt")
    save_file(state, tmp_path / "half.safetensors")
    one, other = (load_pretrained(str(tmp_path / n)) for n in ("epoch_3.pt", "half.safetensors"))
    assert one.fingerprint() == other.fingerprint()
    assert one.model.dtype == torch.float32


@pytest.mark.slow
def test_the_same_weights_are_the_same_model_in_either_library(catalogue, tmp_path):
    """The tiny model, exported for open_clip and read again: the run is the same to the bit."""
    folder = tmp_path / "exported"
    assert run(["export", "tiny", str(folder), "--format", "open_clip"]) == 0
    options = [
        "--mini-train",
        "--lr",
        "1e-3",
        "--precision",
        "fp32",
        "--num-workers",
        "0",
        "--data-dir",
    ]
    states = []
    for number, model in enumerate(("tiny", f"local-dir:{folder}")):
        out = tmp_path / str(number)
        given = ["train", "--model", model, *options, str(catalogue), "--output-dir", str(out)]
        assert run(given) == 0
        (checkpoint,) = out.rglob("*_checkpoint.pt")
        content = torch.load(checkpoint, weights_only=True)
        assert content["base_model"]["name"] == model
        states.append(content)
    assert states[0]["base_model"]["fingerprint"] == states[1]["base_model"]["fingerprint"]
    assert all(
        torch.equal(weight, states[1]["model_state_dict"][name])
        for name, weight in states[0]["model_state_dict"].items()
    )


@pytest.mark.slow
def test_every_command_takes_a_converted_model(catalogue, tmp_path, capsys):
    """Which says once how it was converted."""
    folder, out = tmp_path / "exported", tmp_path / "out"
    assert run(["export", "tiny", str(folder), "--format", "open_clip"]) == 0
    model = ["--model", str(folder), "--precision", "fp32"]
    data = ["--num-workers", "0", "--data-dir", str(catalogue)]
    more = ["--epochs", "1", "--effective-batch-size", "32", "--output-dir", str(out)]
    capsys.readouterr()
    assert run(["train", *model, *data, *more]) == 0
    said = f"{folder}: 86 of 86 tensors used, largest difference from open_clip's own encoders"
    assert " ".join(capsys.readouterr().err.split()).count(said) == 1
    assert run(["evaluate", str(out / "dual_lora"), *data]) == 0
    assert run(["zero-shot", str(folder), *data]) == 0
    assert run(["find-batch-size", *model, "--effective-batch-size", "32"]) == 0
    assert run(["doctor", *model, *data, "--json"]) == 0
    assert "86 of 86 tensors used" in capsys.readouterr().out


def test_names_are_recognized_and_published_without_paths(tmp_path):
    assert is_open_clip("open_clip:ViT-B-32/openai") and is_open_clip("hf-hub:laion/x")
    assert is_open_clip("./weights.safetensors")
    assert not any(map(is_open_clip, ("tiny", "openai/clip-vit-base-patch32", str(tmp_path))))
    assert public_open_clip_name("hf-hub:laion/x") == "hf-hub:laion/x"
    assert public_open_clip_name("open_clip:ViT-B-32/openai") == "open_clip:ViT-B-32/openai"
    assert public_open_clip_name("open_clip:ViT-B-32//home/me/x.pt") == "open_clip:ViT-B-32/x.pt"
    assert public_open_clip_name("local-dir:/home/me/model") == "model"


UNSUPPORTED = {
    "RN50": "its image tower is a ResNet",
    "roberta-ViT-B-32": "its text tower is roberta-base of transformers",
    "coca_ViT-B-32": "it is a CoCa",
    "ViT-L-14-CLIPA": "its image tower has no norm before its first layer",
    "nllb-clip-base-siglip": "its text tower is facebook/nllb-200-distilled-600M of transformers",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_towers_that_transformers_lacks_are_refused_by_name(name):
    """Before their weights are downloaded."""
    with pytest.raises(ModelError) as raised:
        find_source(
            f"open_clip:{name}/{open_clip.pretrained.list_pretrained_tags_by_model(name)[0]}"
        )
    assert str(raised.value).endswith(UNSUPPORTED[name]) and raised.value.exit_code == 5


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (changed({"attentional_pool": True}), "pools by attention"),
        (changed({"pool_type": "avg"}), "pools with avg"),
        (changed({"qk_norm": True}), "it has qk_norm"),
        (changed({"image_size": [64, 32]}), "64 x 32 pixels"),
        (changed(text={"pool_type": "last"}), "pools texts by last"),
        (changed(text={"pool_type": "eos"}), "at id 2, and its tokenizer ends them with 49407"),
        (changed(text={"proj_type": "none"}), "its text tower has no projection"),
        (changed(text={"embed_cls": True}), "appends a class token"),
        (changed(later_setting=1), "it has later_setting"),
    ],
)
def test_settings_that_transformers_lacks_are_refused_by_name(config, why, tmp_path):
    describe(tmp_path, config)
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ModelError, match=why) as raised:
        load_pretrained(f"local-dir:{tmp_path}")
    assert raised.value.exit_code == 5
    assert str(raised.value).startswith(f"cannot use local-dir:{tmp_path}: ")


def test_a_configuration_that_does_not_fit_the_weights_is_refused(tmp_path):
    write(tmp_path)
    describe(tmp_path, changed({"width": 96}))
    with pytest.raises(ModelError, match="of another shape in the file") as raised:
        load_pretrained(f"local-dir:{tmp_path}")
    assert CONFIG_FILE in str(raised.value) and "visual." in str(raised.value)
    describe(tmp_path, changed({"layers": 3}))
    with pytest.raises(ModelError, match=r"visual.transformer.resblocks.2.*not in the file|12 wei"):
        load_pretrained(f"local-dir:{tmp_path}")


def test_a_tower_that_timm_lacks_is_no_error_of_the_disk(tmp_path):
    write(tmp_path)
    describe(tmp_path, changed({"timm_model_name": "no_such_tower"}))
    with pytest.raises(ModelError, match=r"cannot convert .*: Unknown model \(no_such_tower\)"):
        load_pretrained(f"local-dir:{tmp_path}")


def test_rules_map_every_tensor_of_siglip_to_every_tensor_of_transformers():
    """On the meta device, because timm has no small SigLIP."""
    import transformers

    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    target = target_of(config, 1)
    with torch.device("meta"):
        theirs = open_clip.CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"})
        ours = transformers.SiglipModel(transformers.SiglipConfig(**target.config)).state_dict()
    flat = {name.removeprefix("text."): t for name, t in theirs.state_dict().items()}
    mapped = to_transformers(flat, target.rules)
    assert {n: t.shape for n, t in mapped.items()} == {n: t.shape for n, t in ours.items()}
    back = to_open_clip(mapped, target.rules)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in flat.items()}


@pytest.mark.parametrize("name", timm.list_models("vit_*_siglip_[0-9]*", exclude_filters="*_gap_*"))
def test_the_activation_of_a_siglip_is_that_of_timm(name):
    with torch.device("meta"):
        tower = timm.create_model(name, depth=1)
    _, size, patch, _, side = name.split("_")
    act = type(tower.blocks[0].mlp.act).__name__
    expected = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh"}[act]
    assert siglip_activation(size, int(patch.removeprefix("patch")), int(side)) == expected


def test_weights_that_are_not_finite_are_refused(tmp_path):
    write(tmp_path)
    state = make(CONFIG).state_dict()
    state["ln_final.weight"][0] = torch.nan
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"not finite.*ln_final.weight"):
        load_pretrained(f"local-dir:{tmp_path}")


def test_a_converted_folder_opens_in_transformers_alone(tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    folder = converted_folder(f"local-dir:{write(tmp_path)}")
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    given = processor(text=TEXTS, images=images(), return_tensors="pt", padding=True)
    with torch.no_grad():
        found = model(**given)
    expected = embeddings(f"local-dir:{tmp_path}")
    torch.testing.assert_close(found.text_embeds, expected[1], atol=2e-6, rtol=1e-4)
    assert json.loads((folder / "open_clip.json").read_text())["used"] == 62
    assert load_file(folder / "model.safetensors")["logit_scale"].shape == ()
