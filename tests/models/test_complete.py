"""Models that the libraries would complete with made-up parts are refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from clipft.config.scenarios import SCENARIOS
from clipft.config.sources import load_settings
from clipft.core.errors import ModelError
from clipft.doctor.examination import run_check
from clipft.models.huggingface import processor_of, write_adapter
from clipft.models.pretrained import load_inputs, load_pretrained
from clipft.models.source import model_source
from clipft.models.trainable import adapt
from clipft.runs.load import open_model
from tests.models.checkpoints import write_siglip

Weights = dict[str, Tensor]
WEIGHTS, TOKENIZER, IMAGES = "model.safetensors", "tokenizer.json", "preprocessor_config.json"


@pytest.fixture
def base(tmp_path) -> Path:
    return Path(shutil.copytree(model_source("tiny"), tmp_path / "base"))


@pytest.fixture
def adapter(tmp_path) -> Path:
    """The adapter and projections of tiny under dual_lora, with random values."""
    torch.manual_seed(1)
    settings = load_settings({"scenario": "dual_lora", "lora_r": "4"}, environ={}).values
    model = adapt(load_pretrained("tiny"), SCENARIOS["dual_lora"], settings)
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(model, "tiny", folder)
    return folder


def rewrite(file: Path, change: Callable[[Weights], Weights]) -> None:
    changed = {name: weight.contiguous() for name, weight in change(load_file(file)).items()}
    save_file(changed, file, {"format": "pt"})


def refusal(folder: Path, open_it: Callable[[str], object] = load_pretrained) -> ModelError:
    with pytest.raises(ModelError) as caught:
        open_it(str(folder))
    assert caught.value.exit_code == 5
    assert str(folder) in caught.value.message
    return caught.value


def without_layer(weights: Weights) -> Weights:
    return {k: w for k, w in weights.items() if "text_model.encoder.layers.1." not in k}


def not_a_number(weights: Weights) -> Weights:
    broken = weights["text_projection.weight"].clone()
    broken[3, 5] = float("nan")
    return {**weights, "text_projection.weight": broken}


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (
            lambda w: {f"module.{k}": v for k, v in w.items()},
            "110 weights of the model are not in the file, where names begin with 'module.': "
            "logit_scale, ",
            "without its wrapper",
        ),
        (
            without_layer,
            "16 weights of the model are not in the file: "
            "text_model.encoder.layers.1.layer_norm1.bias, "
            "text_model.encoder.layers.1.layer_norm1.weight, "
            "text_model.encoder.layers.1.layer_norm2.bias and 13 more",
            "from the same model",
        ),
        (
            lambda w: {**w, "head.weight": torch.zeros(2, 2)},
            "1 weight in the file is not in the model: head.weight",
            "from the same model",
        ),
        (
            lambda w: {**w, "text_projection.weight": torch.zeros(7, 5)},
            "1 weight is of another shape",
            "from the same model",
        ),
        (not_a_number, "1 weight of ", "diverged"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(base, change, message, hint):
    rewrite(base / WEIGHTS, change)
    error = refusal(base)
    assert message in error.message
    assert hint in error.hint


def test_weights_without_a_layer_are_refused_wherever_a_model_is_opened(base):
    rewrite(base / WEIGHTS, without_layer)
    settings = load_settings({"model": str(base)}, environ={})
    expected = "16 weights of the model are not in the file"
    assert expected in refusal(base, lambda name: open_model(name, settings, ())).message
    finding = run_check("model", settings.values)
    assert finding.status == "error"
    assert expected in finding.found


def test_position_ids_of_old_checkpoints_are_no_weights(base):
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    rewrite(base / WEIGHTS, lambda weights: {**weights, **ids})
    assert load_pretrained(str(base)).fingerprint() == load_pretrained("tiny").fingerprint()


def test_a_folder_without_a_tokenizer_is_refused(base):
    for file in base.glob("tokenizer*"):
        file.unlink()
    error = refusal(base, load_inputs)
    assert "no tokenizer" in error.message
    for file in ("tokenizer.json", "vocab.json", "merges.txt"):
        assert file in error.hint


def test_a_tokenizer_whose_vocabulary_is_empty_is_refused(base):
    content = json.loads((base / TOKENIZER).read_text())
    content["model"].update(vocab={}, merges=[])
    (base / TOKENIZER).write_text(json.dumps(content))
    refusal(base, load_inputs)


def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<sku>"])
    tokenizer.save_pretrained(base)
    message = refusal(base, load_inputs).message
    assert "has 2561 ids, the model 2560" in message
    assert "<sku>" in message


def test_a_tokenizer_of_another_model_is_refused(base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["vocab_size"] = 49408
    (base / "config.json").write_text(json.dumps(config))
    assert "has 2560 ids, the model 49408" in refusal(base, load_inputs).message


def test_a_tokenizer_that_does_not_end_its_texts_is_refused(base):
    """A CLIP would pool the first token of every text, so that all texts were the same."""
    content = json.loads((base / TOKENIZER).read_text())
    content["post_processor"] = None
    (base / TOKENIZER).write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    assert "does not add an end token" in refusal(base, load_inputs).message


def test_a_folder_without_an_image_processor_is_refused(base):
    (base / IMAGES).unlink()
    assert f"{IMAGES} is missing" in refusal(base, load_inputs).message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_std": [0.0, 0.3, 0.3]}, "image_std is [0.0, 0.3, 0.3]"),
        ({"image_mean": [0.5]}, "image_mean is [0.5]"),
        ({"image_mean": None}, "image_mean is None"),
        (None, "not a JSON object"),
    ],
)
def test_an_image_processor_that_cannot_normalize_is_refused(base, change, message):
    known = json.loads((base / IMAGES).read_text())
    (base / IMAGES).write_text("[]" if change is None else json.dumps({**known, **change}))
    assert message in refusal(base, load_inputs).message


def test_a_siglip_without_its_tokenizer_is_refused(tmp_path):
    folder = write_siglip(tmp_path)
    for file in [*folder.glob("spiece*"), *folder.glob("tokenizer*")]:
        file.unlink()
    refusal(folder, load_inputs)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"model_type": None}, "has no model_type"), ({"quantization_config": {"x": 1}}, "quant")],
)
def test_an_unknown_or_quantized_architecture_is_refused(base, config, message):
    known = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**known, **config}))
    assert message in refusal(base).message


class Trap:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_the_weights_is_not_run(base, tmp_path):
    (base / WEIGHTS).unlink()
    torch.save({"logit_scale": Trap(tmp_path / "trap")}, base / "pytorch_model.bin")
    error = refusal(base)
    assert "Weights only load failed" in error.message and "\n" not in error.message
    assert not (tmp_path / "trap").exists()


def test_code_beside_the_weights_is_not_run(base, tmp_path):
    (base / "own.py").write_text(f"open({str(tmp_path / 'trap')!r}, 'w')")
    of_file = {
        "config.json": {"AutoConfig": "own.Config", "AutoModel": "own.Model"},
        "tokenizer_config.json": {"AutoTokenizer": ["own.Tokenizer", None]},
        IMAGES: {"AutoImageProcessor": "own.Processor"},
    }
    for file, names in of_file.items():
        said = json.loads((base / file).read_text())
        (base / file).write_text(json.dumps({**said, "auto_map": names}))
    loaded = load_pretrained(str(base))
    processor_of(loaded)
    assert not (tmp_path / "trap").exists()


def test_pointers_of_git_lfs_are_told_from_weights(base):
    (base / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    error = refusal(base)
    assert f"{WEIGHTS} in " in error.message
    assert "git lfs pull" in error.hint


def test_a_folder_without_weights_is_not_looked_for_on_the_hub(base):
    (base / WEIGHTS).unlink()
    assert "hub" not in refusal(base).message


def test_an_adapter_opens_as_its_base_model_with_the_adapter_merged(adapter):
    model = load_pretrained(str(adapter)).model
    stored = load_file(adapter / "adapter_model.safetensors")
    at = "text_model.encoder.layers.0.self_attn.q_proj"
    down, up = (stored[f"base_model.model.{at}.lora_{name}.weight"] for name in "AB")
    scale = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"] / 4
    plain = load_pretrained("tiny").model
    merged = model.get_submodule(at).weight
    expected = plain.get_submodule(at).weight + scale * (up @ down)
    torch.testing.assert_close(merged, expected)
    projection = stored["base_model.model.text_projection.weight"]
    assert torch.equal(model.text_projection.weight, projection)
    opened = open_model(str(adapter), load_settings({"precision": "fp32"}, environ={}), ())
    assert torch.equal(opened.loaded.model.clip.get_submodule(at).weight, merged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: dict(list(w.items())[4:]), "4 missing (base_model.model.text_model.encoder"),
        (lambda w: {f"x.{k}": v for k, v in w.items()}, "26 missing"),
        (lambda w: {k: v for k, v in w.items() if "lora" in k}, "2 missing"),
        (lambda w: {**w, "base_model.model.a.lora_A.weight": torch.zeros(2, 2)}, "1 unexpected"),
    ],
)
def test_an_adapter_whose_weights_do_not_fit_is_refused(adapter, change, message):
    rewrite(adapter / "adapter_model.safetensors", change)
    assert message in refusal(adapter).message


def test_an_adapter_beside_a_whole_model_is_refused(adapter, base):
    for file in adapter.iterdir():
        shutil.copy(file, base)
    assert "whole model and a PEFT adapter" in refusal(base).message


def test_an_adapter_whose_base_is_missing_names_the_base(adapter):
    path = adapter / "adapter_config.json"
    config = {**json.loads(path.read_text()), "base_model_name_or_path": "/no/such/base"}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no model in /no/such/base"):
        load_pretrained(str(adapter))


def test_a_checkpoint_with_weights_that_are_not_finite_is_refused():
    settings = load_settings({"scenario": "dual_lora", "lora_r": "4"}, environ={}).values
    model = adapt(load_pretrained("tiny"), SCENARIOS["dual_lora"], settings)
    state = model.trainable_state()
    name = next(iter(state))
    state[name][0, 0] = float("inf")
    with pytest.raises(ModelError, match=f"1 weight of the checkpoint is not finite.*{name}"):
        model.load_trainable_state(state)
