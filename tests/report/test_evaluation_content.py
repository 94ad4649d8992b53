"""How a report shows evaluations of real embeddings, as rows and as charts."""

import pytest

from clipft.metrics.figures import figure_tables
from clipft.report.charts import category_charts, interpolation_charts
from tests.evaluations import evaluation_json
from tests.report.regions import regions


@pytest.fixture(scope="module")
def evaluation() -> dict:
    return evaluation_json()


def test_every_figure_has_a_row_with_its_interval(evaluation):
    paired, grouped = figure_tables([], evaluation)
    assert "60 pairs" in paired["title"] and "56 captions, 60 images" in grouped["title"]
    rows = {row["key"]: row for table in (paired, grouped) for row in table["rows"]}
    r10 = evaluation["difference"]["paired"]["text_to_image"]["r@10"]
    assert rows["text_to_image/r@10"]["change"] == r10
    assert (
        rows["text_to_image/r@10"]["before"]["low"] < rows["text_to_image/r@10"]["before"]["high"]
    )
    ceiling = evaluation["before"]["paired"]["text_to_image"]["ceiling"]["r@1"]
    assert rows["text_to_image/r@1"]["ceiling"] == ceiling < 1
    assert rows["mean_recall"]["change"] == evaluation["difference"]["recall"]
    found = evaluation["after"]["grouped"]["image_to_text"]["figures"]["ndcg@10"]
    assert rows["grouped/image_to_text/ndcg@10"]["after"] == found
    units = {row["key"].split("/")[-1]: row["unit"] for row in rows.values()}
    assert units["r@10"] == units["hit@1"] == units["mean_recall"] == "percent"
    assert units["median_rank"] == "rank" and units["map"] == "decimal"


def test_each_figure_is_defined(evaluation):
    for table in figure_tables([], evaluation):
        named = {row["key"].split("/")[-1] for row in table["rows"]} - {"mean_recall"}
        assert named | {"ties", "interval"} <= table["definitions"].keys()


def test_categories_are_bars_with_intervals(evaluation):
    from clipft.report.report import Gallery, run_content
    from clipft.report.run_page import run_page
    from clipft.runs.records import RunRecords

    epoch = {"kind": "epoch", "epoch": 0, "step": 0, "improved": False, "train_loss": None}
    one = {"r@1": 0.1, "r@5": 0.1, "r@10": 0.1, "median_rank": 3.0, "mrr": 0.5}
    epoch |= {"val_loss": 3.0, "retrieval": {"text_to_image": one, "image_to_text": one}}
    epoch["retrieval"]["pairs"] = 60
    settings = [{"name": n, "value": "x", "default": "x", "changed": False} for n in ("scenario",)]
    settings.append({"name": "model", "value": "m", "default": "x", "changed": True})
    kept = {"keep_dir": "<b>general", **evaluation}
    content = run_content(
        RunRecords("f", settings, {}, [], [epoch], {}, evaluation, None, kept, [], {}), Gallery()
    )
    (chart,) = category_charts(content["categories"])
    assert chart.labels == ["<i>chair (40)", "lamp (20)"]
    assert [series.name for series in chart.series] == ["pretrained", "fine-tuned"]
    found = evaluation["after"]["by_category"]["lamp"]["paired"]["text_to_image"]["figures"]["r@10"]
    assert chart.series[1].values[1] == found["value"]
    assert chart.series[1].intervals[1] == (found["low"], found["high"])
    page = run_page(content, {})
    assert "<i>chair" not in page and "&lt;b&gt;general" in page and ">General set</h2>" in page
    names = regions(page)
    assert len(names) == len(set(names)) > 5


def change(value: float) -> dict:
    return {"value": value, "low": value - 0.02, "high": value + 0.02, "clear": abs(value) > 0.02}


def test_interpolated_weights_are_charted():
    points = [
        {"alpha": a, "recall": 0.1, "gain": change(a / 10), "keep": {"change": change(-a / 20)}}
        for a in (0.0, 0.5, 1.0)
    ]
    along, against = interpolation_charts({"points": points, "best": 0.5})
    assert [list(p) for p in along.series[0].points] == [[0.0, 0.0], [0.5, 0.05], [1.0, 0.1]]
    assert along.series[1].intervals[2] == pytest.approx((-0.07, -0.03))
    assert against.series[0].points[1] == [-0.025, 0.05, "at 0.5"]
    alone = [{**point, "keep": None} for point in points]
    assert len(interpolation_charts({"points": alone, "best": 1.0})) == 1
    assert interpolation_charts(None) == []


def test_without_an_evaluation_the_figures_of_the_epochs_are_shown():
    one = {"r@1": 0.1, "r@5": 0.2, "r@10": 0.3, "median_rank": 3.0, "mrr": 0.5}
    before = {"text_to_image": one, "image_to_text": one, "pairs": 9}
    epoch = {"kind": "epoch", "epoch": 0, "improved": False, "retrieval": before}
    (table,) = figure_tables([epoch], None)
    assert table["rows"][0]["before"] == {"value": pytest.approx(0.2)}
    assert table["rows"][0]["after"] is None and figure_tables([], None) == []
