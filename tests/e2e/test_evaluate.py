"""``evaluate`` and ``zero-shot`` as a user runs them, on a run of the tiny model."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open

from clipft.cli.app import run
from clipft.core.errors import UsageError
from clipft.evaluation.request import parse_alphas
from clipft.runs.checkpoint import load_checkpoint
from tests.conftest import write_shard

SMALL = ("--num-workers", "0", "--precision", "fp32", "--resamples", "100")


@pytest.fixture(scope="module")
def trained(catalogue, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    small = ("--effective-batch-size", "32", "--micro-batch-size", "32", "--lr", "4e-3")
    where = ("--data-dir", str(catalogue), "--output-dir", str(out))
    assert run(["train", "--model", "tiny", "--epochs", "1", *small, *where, *SMALL]) == 0
    return out / "dual_lora"


@pytest.fixture
def data(catalogue):
    return ("--data-dir", str(catalogue), *SMALL)


def answer(capsys):
    return json.loads(capsys.readouterr().out)


def test_a_run_leaves_its_evaluation_and_evaluate_finds_the_same(trained, data, capsys):
    left = json.loads((trained / "evaluation.json").read_text())
    assert run(["evaluate", str(trained), *data, "--json"]) == 0
    found = answer(capsys)
    assert found["evaluation"] == left
    recall = left["difference"]["recall"]
    assert recall["value"] == pytest.approx(left["after"]["recall"] - left["before"]["recall"])
    assert recall["low"] <= recall["value"] <= recall["high"]
    epochs = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    start = next(e for e in epochs if e["kind"] == "epoch")["retrieval"]["text_to_image"]
    figures = left["before"]["paired"]["text_to_image"]["figures"]
    assert {name: figures[name]["value"] for name in start} == pytest.approx(start, abs=1e-6)


def test_the_main_figures_fit_a_screen(trained, data, capsys):
    assert run(["evaluate", str(trained), *data]) == 0
    printed = capsys.readouterr()
    shown = printed.out.rstrip().splitlines()
    assert re.match(r"(Fine-tuning helped|Fine-tuning hurt|No clear difference): ", shown[0])
    assert "mean recall" in printed.out and "image -> text" in printed.out
    assert "grouped" not in printed.out and "share of queries" not in printed.out
    assert "--all" in printed.err and "--definitions" in printed.err
    # transformers may show its progress where another test has asked it to
    said = [line for line in printed.err.splitlines() if "Loading weights" not in line]
    assert len(shown) + len([line for line in said if line]) <= 24


def test_the_terminal_shows_both_models_their_difference_and_definitions(trained, data, capsys):
    assert run(["evaluate", str(trained), *data, "--all", "--definitions"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "pretrained",
        "fine-tuned",
        "difference",
        "upper bound",
        "grouped",
        "share of queries",
    ):
        assert word in shown
    assert "[low, high]" in shown


def test_interpolation_ends_at_both_models(trained, data, tmp_path, capsys):
    folder = tmp_path / "dual_lora"
    shutil.copytree(trained, folder)
    general = tmp_path / "general"
    write_shard(general / "00000.tar", range(2000, 2020))
    half = tmp_path / "half.pt"
    options = ["--keep", str(general), "--interpolate", "0,0.5,1"]
    options += ["--save-interpolated", "0.5", str(half)]
    assert run(["evaluate", str(folder), *data, *options, "--json"]) == 0
    found = answer(capsys)
    compared, points = found["evaluation"], found["interpolation"]["points"]
    assert [point["alpha"] for point in points] == [0, 0.5, 1]
    assert points[0]["recall"] == compared["before"]["recall"]
    assert points[-1]["recall"] == compared["after"]["recall"]
    assert points[-1]["gain"] == compared["difference"]["recall"]
    assert points[0]["keep"]["recall"] == found["keep"]["before"]["recall"]
    assert points[-1]["keep"]["change"] == found["keep"]["difference"]["recall"]
    assert json.loads((folder / "interpolation.json").read_text())["points"] == points
    assert json.loads((folder / "kept.json").read_text())["before"]["pairs"] == 20

    content = load_checkpoint(half)
    assert content["best"] is None and content["interpolated_at"] == 0.5
    assert run(["evaluate", str(half), *data, "--json"]) == 0
    assert answer(capsys)["evaluation"]["after"]["recall"] == points[1]["recall"]


def test_impossible_requests_are_refused_before_the_work(trained, data, tmp_path, capsys):
    def refused(*options):
        code = run(["evaluate", str(trained), *data, *options])
        return code, capsys.readouterr().err

    assert refused("--interpolate", "0:2:0.5")[0] == 2
    code, said = refused("--save-interpolated", "1.5", str(tmp_path / "x.pt"))
    assert code == 2 and "between 0" in said
    assert refused("--save-interpolated", "0.5", str(tmp_path))[0] == 4
    code, said = refused("--group-field", "colr")
    assert code == 2 and "did you mean color" in said
    assert refused("--keep", str(tmp_path / "nowhere"))[0] == 3


def test_a_pretrained_model_has_nothing_to_interpolate(catalogue, data, tmp_path, capsys):
    where = ("--data-dir", str(catalogue), "--output-dir", str(tmp_path), *SMALL)
    assert run(["train", "--model", "tiny", "--scenario", "zero_shot", *where]) == 0
    left = json.loads((tmp_path / "zero_shot" / "evaluation.json").read_text())
    assert left["after"] is None and left["difference"] is None
    assert run(["evaluate", str(tmp_path / "zero_shot"), *data]) == 0
    assert run(["evaluate", str(tmp_path / "zero_shot"), *data, "--interpolate", "0,1"]) == 5
    assert "nothing was trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "points"),
    [("0:1:0.25", [0, 0.25, 0.5, 0.75, 1]), ("0.3", [0.3]), ("0,1", [0, 1]), ("1:1:1", [1])],
)
def test_alphas_are_read(text, points):
    assert parse_alphas(text) == points
    assert len(parse_alphas("0:1:0.01")) == 101


WRONG = ("", "a", "0:1", "0:1:0", "0:1:-1", "0:1:0.001", "1:0:0.1", "-1", "nan", "0:inf:1")


@pytest.mark.parametrize("text", [*WRONG, "0:1:nan"])
def test_invalid_alphas_are_refused(text):
    with pytest.raises(UsageError):
        parse_alphas(text)


def test_zero_shot_classifies_by_prompts_and_linearly_and_saves(catalogue, data, tmp_path, capsys):
    file = tmp_path / "classifier.safetensors"
    options = ("--label-field", "type", "--linear", "--save-classifier", str(file))
    assert run(["zero-shot", "--model", "tiny", *data, *options, "--json"]) == 0
    found = answer(capsys)["classification"]
    assert sum(map(sum, found["confusion"])) == found["images"] == 40
    assert found["top1_interval"]["low"] <= found["top1"] <= found["top1_interval"]["high"]
    assert found["linear"]["training_images"] > 40
    assert found["linear"]["images"] == 40 and found["linear"]["c"] > 0
    with safe_open(file, "pt") as saved:
        words, vectors = saved.metadata(), saved.get_tensor("label_vectors")
    assert words.pop("format") == "clipft-classifier-1"
    said = {name: json.loads(value) for name, value in words.items()}
    assert said["labels"] == found["names"] and said["templates"] == found["templates"]
    assert said["base_model"]["name"] == "tiny" and said["checkpoint"] is None
    assert said["logit_scale"] > 1
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(found["names"])))


def test_a_fine_tuned_model_classifies_too(trained, data, capsys):
    options = ("--label-field", "type")
    assert run(["zero-shot", str(trained), *data, *options, "--json"]) == 0
    found = answer(capsys)
    assert found["checkpoint"].endswith("best.pt") and found["classification"]["linear"] is None
