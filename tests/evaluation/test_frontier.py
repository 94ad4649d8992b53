"""Runs beside the weights between two models: which is better on the own and the general pairs."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clipft.cli.app import run
from clipft.evaluation.frontier import dominates
from clipft.evaluation.wise_ft import Point
from clipft.metrics.figures import frontier_sentences
from clipft.metrics.relevance import Identities
from clipft.metrics.retrieval import EvaluationOptions, evaluate
from clipft.report.charts import interpolation_charts
from tests.conftest import write_shard


def evaluation(share: float, seed: int = 3):
    """Of 200 pairs whose texts follow their images by ``share``, and besides that by chance."""
    generator = torch.Generator().manual_seed(seed)
    images, noise = torch.randn(2, 200, 16, generator=generator)
    own, options = np.arange(200), EvaluationOptions(1 << 20, 200, 1)
    texts = normalize(share * images + noise, dim=1)
    identities = Identities(own, own, None)
    return evaluate(normalize(images, dim=1), texts, identities, [None] * 200, options)


LOW, HIGH = evaluation(0.4), evaluation(1.0)
CHANCE = evaluation(0.4, seed=4)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((HIGH, HIGH), (LOW, LOW), True),
        ((HIGH, LOW), (LOW, LOW), True),
        ((LOW, HIGH), (LOW, LOW), True),
        ((HIGH, LOW), (LOW, HIGH), False),
        ((LOW, LOW), (LOW, LOW), False),
        ((CHANCE, LOW), (LOW, LOW), False),
        ((HIGH, LOW), (LOW, CHANCE), True),  # a loss that may be due to chance
    ],
)
def test_a_point_dominates_if_it_is_clearly_better_and_nowhere_clearly_worse(one, other, expected):
    first, second = (Point(1.0, own, {}, general, {}) for own, general in (one, other))
    assert dominates(first, second) is expected


def test_a_run_is_measured_beside_the_points_in_between(catalogue, tmp_path, capsys):
    write_shard(tmp_path / "general" / "0.tar", range(2000, 2020))
    small = ("--model", "tiny", "--mini-train", "--num-workers", "0", "--precision", "fp32")
    where = ("--data-dir", str(catalogue), "--output-dir", str(tmp_path))
    assert run(["train", *small, *where, "--preserve", "20", "--resamples", "20"]) == 0
    folder = tmp_path / "dual_lora"
    capsys.readouterr()
    options = ("--keep", str(tmp_path / "general"), "--resamples", "50", "--num-workers", "0")
    asked = ("--interpolate", "0,1", "--frontier", str(folder))
    assert run(["evaluate", str(folder), *options, *asked]) == 0
    shown = capsys.readouterr().out
    left = json.loads((folder / "interpolation.json").read_text())
    (one,), end = left["runs"], left["points"][-1]  # the run itself is the end of the line
    assert one["name"] == "--preserve 20" and one["run"] == str(folder)
    assert {key: one[key] for key in ("recall", "gain", "keep")} == {
        key: end[key] for key in ("recall", "gain", "keep")
    }
    assert "--preserve 20" in shown and frontier_sentences([one])[0] in " ".join(shown.split())
    chart = interpolation_charts(left)[1]
    assert [series.name for series in chart.series] == ["between both models", "other runs"]
    assert chart.series[1].points[0][2] == "--preserve 20"
    assert frontier_sentences([one])[0] in chart.note


def test_a_frontier_needs_two_axes_and_points(catalogue, tmp_path, capsys):
    assert run(["evaluate", str(tmp_path), "--frontier", str(tmp_path)]) == 2
    assert "--keep DATA and --interpolate" in capsys.readouterr().err


def test_the_sentence_names_the_points():
    told = {"name": "--preserve 3", "dominates": [0.5, 0.75], "dominated_by": []}
    assert frontier_sentences([told]) == [
        "--preserve 3 dominates alpha 0.5, 0.75; no alpha dominates it."
    ]
