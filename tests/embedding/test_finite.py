"""An embedding that is not a number is refused, or its step skipped, by the name of its pair."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipft.cli.app import run
from clipft.config.settings import Settings
from clipft.config.sources import load_settings
from clipft.data.demo.catalogue import render_pair
from clipft.embedding.embed import embed_texts
from clipft.embedding.finite import NotFiniteError, check_finite_rows
from clipft.embedding.load import load_model
from clipft.evaluation.evaluator import EvaluationSet
from clipft.models.pretrained import load_inputs
from clipft.models.source import model_source
from tests.conftest import jpeg
from tests.faults.helpers import write_tar

WORD = "q"
TRAIN = ["train", "--epochs", "1", "--effective-batch-size", "2", "--micro-batch-size", "2"]
TRAIN += ["--num-workers", "0", "--device", "cpu", "--precision", "fp32", "--stop-on", "never"]


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of tiny whose embedding of one word is finite, and overflows in the first layer."""
    folder = Path(shutil.copytree(model_source("tiny"), tmp_path / "model"))
    tokenizer = load_inputs("tiny").tokenizer
    (token,) = tokenizer(WORD, add_special_tokens=False).input_ids
    weights = load_file(folder / "model.safetensors")
    weights["text_model.embeddings.token_embedding.weight"][token] = 3e38
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_data(folder: Path, train: set[int], val: set[int]) -> Path:
    """Write 24 training and 8 validation pairs; the captions of these numbers have the word."""
    for side, count, broken in (("train", 24, train), ("val", 8, val)):
        members = []
        for number in range(count):
            caption = f"{side} {number}" + f" {WORD}" * (number in broken)
            image = jpeg(render_pair(len(side), number))
            members += [(f"{number:02}.jpg", image), (f"{number:02}.txt", caption.encode())]
        write_tar(folder / side / "00000.tar", members)
    return folder


def settings_of(model: Path, data: Path, **given: str) -> Settings:
    values = {"model": str(model), "data_dir": str(data), "precision": "fp32", "num_workers": "0"}
    return load_settings({**values, "scenario": "zero_shot", **given}, environ={}).values


def train(model: Path, data: Path, out: Path, scenario: str, *more: str) -> int:
    where = ["--model", str(model), "--data-dir", str(data), "--output-dir", str(out)]
    return run([*TRAIN, *where, "--scenario", scenario, *more])


def test_the_first_row_and_the_number_of_others_are_named():
    rows = torch.ones(5, 3)
    check_finite_rows(rows, str)
    rows[[1, 4]] = torch.tensor([1.0, torch.nan, torch.inf])
    with pytest.raises(NotFiniteError, match=r"embedding of row 1 is not .* 1 other") as caught:
        check_finite_rows(rows, lambda row: f"row {row}")
    assert caught.value.exit_code == 5
    assert "--precision fp32" in caught.value.hint


@pytest.mark.parametrize(
    ("cache", "named"), [("true", f"the caption 'val 3 {WORD}'"), ("false", "03 in 00000.tar")]
)
def test_evaluation_names_the_pair(cache, named, model, tmp_path):
    data = write_data(tmp_path / "data", set(), {3})
    settings = settings_of(model, data, feature_cache=cache)
    loaded = load_model(settings)
    pairs = EvaluationSet.open(loaded.base.inputs, settings)
    with pytest.raises(NotFiniteError) as caught:
        pairs.evaluate(loaded)
    assert f"{named} is not a number" in caught.value.message
    assert not list((tmp_path / "cache").glob("features/texts*"))


def test_a_text_is_named(model, tmp_path):
    loaded = load_model(settings_of(model, tmp_path))
    with pytest.raises(NotFiniteError, match=f"the text '{WORD}' is not a number"):
        embed_texts(loaded, ["a chair", WORD])


def test_search_names_the_image_and_caches_nothing(model, tmp_path, capsys):
    """A row of NaN in the cache stands for an image that cannot be decoded."""
    weights = load_file(model / "model.safetensors")
    weights["vision_model.embeddings.class_embedding"][:] = 3e38
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    data = write_data(tmp_path / "data", set(), set())
    command = ["search", str(model), str(data / "val"), "a lamp", "--num-workers", "0"]
    assert run([*command, "--precision", "fp32"]) == 5
    said = " ".join(capsys.readouterr().err.split())
    assert "error: the embedding of the image 00 in 00000.tar is not a number" in said
    assert not list((tmp_path / "cache").rglob("*.npy"))


@pytest.mark.parametrize("loss", ["exact", "local"])
def test_training_skips_the_step_and_names_the_pair(loss, model, tmp_path, capsys):
    """It goes on, because one pair of many should not cost the run."""
    data, out = write_data(tmp_path / "data", {5}, set()), tmp_path / "out"
    assert train(model, data, out, "text_lora", "--accumulation", loss) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "was not applied: the embedding of the caption of 05 in 00000.tar is not a nu" in said
    assert said.count("was not applied") == 1
    saved = torch.load(out / "text_lora_checkpoint.pt", weights_only=True)
    assert all(weight.isfinite().all() for weight in saved["model_state_dict"].values())
    lines = map(json.loads, (out / "text_lora" / "metrics.jsonl").read_text().splitlines())
    epoch = [line for line in lines if line["kind"] == "epoch"][-1]
    assert epoch["train_loss"] > 0  # that of the other steps


def test_ten_broken_steps_in_a_row_end_the_run_with_the_pair(model, tmp_path, capsys):
    data = write_data(tmp_path / "data", set(range(24)), set())
    assert train(model, data, tmp_path / "out", "text_lora") == 6
    said = " ".join(capsys.readouterr().err.split())
    assert "not finite for 10 steps in a row; in the last one, the embedding of the capt" in said


def test_training_refuses_a_frozen_tower_that_gives_no_numbers(model, tmp_path, capsys):
    """Nothing that the run does could change its features."""
    data = write_data(tmp_path / "data", {5}, set())
    assert train(model, data, tmp_path / "out", "vision_lora") == 5
    said = " ".join(capsys.readouterr().err.split())
    assert f"error: the embedding of the caption 'train 5 {WORD}' is not a number" in said
