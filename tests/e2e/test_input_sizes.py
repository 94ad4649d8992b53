"""A run with another context length and image size, and with shorter embeddings."""

import json

from clipft.cli.app import run

SIZES = ("--context-length", "120", "--image-size", "72", "--matryoshka", "64")
SMALL = ("--num-workers", "0", "--precision", "fp32", "--resamples", "50", "--device", "cpu")


def answer(capsys):
    return json.loads(capsys.readouterr().out)


def test_a_resized_model_is_trained_compared_and_exported(catalogue, tmp_path, capsys):
    data = ("--data-dir", str(catalogue), *SMALL)
    own = ("--model", "tiny", "--output-dir", str(tmp_path / "runs"), "--max-train-pairs", "64")
    small = ("--epochs", "1", "--effective-batch-size", "32", "--micro-batch-size", "16")
    assert run(["train", *own, *small, *data, *SIZES]) == 0
    folder = tmp_path / "runs" / "dual_lora"
    assert not (folder / "adapter").exists()  # it would lack the positions
    capsys.readouterr()

    assert run(["evaluate", str(folder), *data, "--json"]) == 0
    found = answer(capsys)["evaluation"]
    # The comparison is with the model as it was published, not with a stretched one
    assert run(["train", "--scenario", "zero_shot", *own, *data]) == 0
    evaluated = tmp_path / "runs" / "zero_shot" / "evaluation.json"
    published = json.loads(evaluated.read_text())["before"]
    capsys.readouterr()
    assert found["before"]["paired"] == published["paired"]
    for model in ("before", "after"):
        sizes = found[model]["by_dimensions"]
        assert list(sizes)[1:] == ["64"]
        whole = next(iter(sizes.values()))["recall"]
        assert abs(whole - found[model]["recall"]) < 1e-6

    assert run(["export", str(folder), str(tmp_path / "peft"), "--format", "peft"]) == 2
    assert "--context-length" in capsys.readouterr().err
    assert run(["export", str(folder), str(tmp_path / "whole")]) == 0
    written = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert written["text_config"]["max_position_embeddings"] == 120
    assert written["vision_config"]["image_size"] == 72
