"""What a model's files tell before torch is imported."""

import json
import shutil
from pathlib import Path

import pytest

from clipft.core.errors import ModelError
from clipft.models.architectures import ARCHITECTURES
from clipft.models.source import FAMILIES, check_model, find_model, model_source


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(model_source("tiny"), tmp_path / "model"))


def test_every_family_has_an_architecture():
    assert tuple(ARCHITECTURES) == FAMILIES


def test_a_whole_model_is_found(model):
    found = find_model(str(model))
    assert (found.source, found.family) == (str(model), "clip")
    assert found.image_processor == json.loads((model / "preprocessor_config.json").read_text())


def test_the_image_processor_of_a_newer_model_is_within_its_processor(model):
    (model / "processor_config.json").write_text('{"image_processor": {"image_mean": [0, 0, 0]}}')
    assert find_model(str(model)).image_processor == {"image_mean": [0, 0, 0]}
    (model / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert "image_std" in find_model(str(model)).image_processor


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", "{", "cannot load model"),
        ("config.json", "[]", "no config.json found"),
        ("config.json", '{"model_type": "bert"}', "is a bert model, not CLIP"),
        ("config.json", "version https://git-lfs.github.com/spec/v1", "pointer of Git LFS"),
        ("preprocessor_config.json", None, "preprocessor_config.json is missing"),
        ("preprocessor_config.json", "{", "cannot load model"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(model, file, content, message):
    (model / file).unlink()
    if content is not None:
        (model / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        check_model(str(model))


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ModelError, match=r"model\.onnx is not a file of weights that clipft reads"):
        check_model(str(tmp_path / "model.onnx"))


def hub(tmp_path, monkeypatch, files: dict[str, str]) -> str:
    """A model in the cache of the hub, which cannot be reached; return its name."""
    root = tmp_path / "hub" / "models--some--model"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    for name, text in files.items():
        (snapshot / name).write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return "some/model"


def test_a_model_in_the_cache_of_the_hub_is_found_without_a_network(tmp_path, monkeypatch, model):
    names = ("config.json", "preprocessor_config.json")
    name = hub(tmp_path, monkeypatch, {file: (model / file).read_text() for file in names})
    assert find_model(name).family == "clip"


def test_an_adapter_of_the_hub_leads_to_its_base_model(tmp_path, monkeypatch, model):
    adapter = json.dumps({"base_model_name_or_path": str(model)})
    name = hub(tmp_path, monkeypatch, {"adapter_config.json": adapter})
    assert find_model(name).source == str(model)


@pytest.mark.parametrize("name", ["no-such/model", "nosuchmodel", "a b", "a/b/c", "--"])
def test_a_model_that_nobody_has_is_refused(name):
    with pytest.raises(ModelError, match="cannot get model"):
        check_model(name)
