"""A run in which photos of one product attract each other."""

import json

import pytest

from clipft.cli.app import run
from tests.tiny_run import TINY

PRODUCTS = ["--photo-pairs", "0.5", "--group-field", "type"]
CURRENT = ["--hard-negatives", "2", "--hard-negatives-by", "current", "--group-field", "type"]


def test_a_run_measures_other_photos_of_a_product(catalogue, tmp_path):
    where = ["--data-dir", str(catalogue), "--output-dir", str(tmp_path)]
    assert run(["train", *TINY, *PRODUCTS, *where]) == 0
    folder = tmp_path / "dual_lora"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for model in ("before", "after"):
        part = evaluation[model]["photos"]["image_to_image"]
        assert part["candidates"] == 39 and {"hit@1", "map"} <= part["figures"].keys()
    change = evaluation["difference"]["photos"]["image_to_image"]["hit@1"]
    assert change["low"] <= change["value"] <= change["high"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss_floor"] > 0 for line in lines if line["kind"] == "step")
    assert all(line["val_floor"] > 0 for line in lines if line["kind"] == "epoch")
    assert "Another photo of the same product" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--photo-pairs", "0.5"], "--photo-pairs needs --group-field"),
        (["--photo-pairs", "1", "--group-field", "typ"], "no pair has a field 'typ'"),
        ([*PRODUCTS, "--scenario", "text_lora"], "changes nothing in scenario text_lora"),
        ([*PRODUCTS, "--stream"], "--photo-pairs cannot be used with --stream"),
        (["--photo-pairs", "-1"], "must be at least 0"),
        ([*CURRENT, "--hard-negatives", "0"], "current has no effect without a number"),
        ([*CURRENT, "--stream"], "--hard-negatives cannot be used with --stream"),
        (
            [*CURRENT, "--scenario", "text_lora"],
            "--hard-negatives-by current changes nothing in scenario text_lora",
        ),
    ],
)
def test_mistakes_are_refused(given, message, catalogue, tmp_path, capsys):
    where = ["--data-dir", str(catalogue), "--output-dir", str(tmp_path / "out")]
    assert run(["train", *TINY, *given, *where]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
