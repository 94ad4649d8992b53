"""The report of a finished run, read from its files and by a parser of HTML."""

import base64
import io
import json
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from clipft.cli.app import run
from clipft.data.demo.catalogue import render_pair
from tests.conftest import add, jpeg

EVIL = "</script><script>alert({n})</script> & \"{n}\" <img src=x onerror='alert(1)'>"
SMALL = [
    *("--model", "tiny", "--epochs", "2", "--effective-batch-size", "16", "--lr", "1e-3"),
    *("--micro-batch-size", "16", "--num-workers", "0", "--precision", "fp32"),
]


def write_evil(path: Path, numbers: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            image = jpeg(render_pair(7, number))
            add(tar, f"<b>{number:03d}.jpg", image[:99] if number == 3 else image)
            add(tar, f"<b>{number:03d}.txt", EVIL.format(n=number).encode())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Train on pairs whose captions and keys hold markup; return the folder with data and runs."""
    root = tmp_path_factory.mktemp("report")
    write_evil(root / "data" / "train" / "0.tar", range(48))
    write_evil(root / "data" / "val" / "0.tar", range(100, 130))
    args = ["--data-dir", str(root / "data"), "--output-dir", str(root / "runs")]
    assert run(["train", *SMALL, *args, "--max-bad", "0.1"]) == 0
    return root


@pytest.fixture
def folder(made) -> Path:
    return made / "runs" / "dual_lora"


@pytest.fixture
def page(folder) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def content(folder) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def charts(page: str) -> dict[str, dict]:
    """Return the data of the page's charts by title."""
    title, data = r"<figcaption><b>([^<]+)</b>", r'<script type="application/json"[^>]*>(.*?)<'
    found = re.findall(f"{title}.*?{data}", page, re.DOTALL)
    return {title: json.loads(data) for title, data in found}


class Elements(HTMLParser):
    """Collects the elements of a page with their attributes, as a browser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_run_that_trained_nothing_has_no_empty_columns(made, tmp_path):
    args = ["--data-dir", str(made / "data"), "--output-dir", str(tmp_path), "--max-bad", "0.1"]
    assert run(["train", *SMALL, "--scenario", "zero_shot", *args]) == 0
    page = (tmp_path / "zero_shot" / "report.html").read_text(encoding="utf-8")
    table = page.partition('<table class="dumbbell">')[2].partition("</table>")[0]
    assert "pretrained</th>" in table and "difference" not in table
    assert "fine-tuned" not in table and 'class="c1"' not in table


def test_the_page_loads_nothing_from_elsewhere(page):
    elements = Elements(page).found
    assert {tag for tag, _ in elements}.isdisjoint({"link", "iframe", "object", "base", "form"})
    loaded = [a[name] for _, a in elements for name in ("src", "srcset") if name in a]
    assert loaded and all(address.startswith("data:image/jpeg;base64,") for address in loaded)
    linked = {a["href"] for _, a in elements if "href" in a}
    assert linked <= {f"#{a['id']}" for _, a in elements if "id" in a}
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    style = page[page.index("<style>") : page.index("</style>")]
    assert not re.search(r"@import|url\(", style)
    assert "sourceMappingURL" not in page
    # The library names its home in comments; nothing else names any address
    assert set(re.findall(r"https?://[\w./#-]+", re.sub(r"base64,[^\"]+", "", page))) <= {
        "https://www.chartjs.org",
        "https://github.com/kurkle/color#readme",
    }
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_hostile_words_are_shown_and_not_run(page):
    assert "&lt;/script&gt;&lt;script&gt;alert(1" in page
    assert not re.search(r"<script>alert|<img src=x|<b>1\d\d", page)
    scripts = re.findall(r"<script[^>]*>", page)
    assert scripts.count("<script>") == 3  # Chart.js, the charts, and the page's own
    assert all("application/json" in tag for tag in scripts if tag != "<script>")


def test_the_page_says_what_the_json_says(page, content):
    assert content["verdict"] in page
    for row in content["figures"][0]["rows"]:
        assert row["name"] in page
    drawn = charts(page)
    assert [y for _, y in drawn["Recall"]["series"][0]["points"]] == content["epochs"][
        "mean_recall"
    ]
    steps = content["steps"]
    assert drawn["Loss"]["series"][0]["points"] == [
        [x, y] for x, y in zip(steps["step"], steps["loss"], strict=True)
    ]
    assert {"Learning rate", "Throughput", "Waiting for data"} <= drawn.keys()


def test_the_json_says_what_the_run_left(folder, content):
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert content["steps"]["loss"] == [line["loss"] for line in steps]
    rows = {row["name"]: row for row in content["figures"][0]["rows"]}
    assert rows["text → image R@10"]["before"]["value"] == result["before"]["text_to_image"]["r@10"]
    assert rows["text → image R@10"]["after"]["value"] == result["after"]["text_to_image"]["r@10"]
    assert content["plan"]["trainable_parameters"] == 81920
    assert content["environment"]["torch"] and content["seconds"] > 0
    assert content["peak_memory_bytes"] > 1e8
    changed = {entry["name"] for entry in content["settings"] if entry["changed"]}
    assert {"model", "epochs", "lr", "max_bad"} <= changed and "wd" not in changed
    assert content["skipped"]["counts"] == {"train": 1}
    assert content["skipped"]["listed"][0]["key"] == "<b>003"


def test_the_gallery_marks_the_right_images(page, content):
    cases = content["gallery"]
    assert {case["kind"] for case in cases} >= {"any"}
    for case in cases:
        for hits, rank in ((case["before"], "rank_before"), (case["after"], "rank_after")):
            assert len(hits) == 5
            first = next((at for at, hit in enumerate(hits, 1) if hit["right"]), None)
            assert (first or 6) == min(case[rank], 6)
        if case["kind"] == "gain":
            assert case["rank_after"] < case["rank_before"]
        if case["kind"] == "loss":
            assert case["rank_after"] > case["rank_before"]
    gallery = page[page.index(">Gallery</h2>") : page.rindex("<script>")]
    right = sum(hit["right"] for c in cases for hit in (*c["before"], *c["after"]))
    assert gallery.count("✓ right") == right


def test_thumbnails_are_small_and_few(page):
    thumbnails = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert 20 < len(thumbnails) <= 18 * 11 + 12
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for data in thumbnails]
    assert {max(size) for size in sizes} == {96}
    assert len(page) < 1_500_000


def test_charts_images_and_tables_have_descriptions(page):
    canvases = re.findall(r"<canvas[^>]*>", page)
    assert canvases and all('role="img" aria-label="' in tag for tag in canvases)
    images = [attributes for tag, attributes in Elements(page).found if tag == "img"]
    assert images and all(str(image["alt"]).startswith("Image ") for image in images)
    assert page.count("<caption") == page.count("<table")


def test_the_report_can_be_made_again_elsewhere(made, folder, content, tmp_path, capsys):
    target = tmp_path / "new" / "page.html"
    assert run(["report", str(folder), "--html", str(target), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {**content, "page": str(target)}
    assert json.loads(target.with_suffix(".json").read_text()) == content
    assert target.read_text() == (folder / "report.html").read_text()


def test_other_pairs_give_no_gallery(catalogue, folder, tmp_path, capsys):
    args = ["--html", str(tmp_path / "page.html"), "--data-dir", str(catalogue), "--json"]
    assert run(["report", str(folder), *args]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["gallery"] == []
    assert "not those of the run" in printed["gallery_note"]


def test_a_run_that_has_not_ended_has_a_report(folder, tmp_path, capsys):
    partial = tmp_path / "partial"
    partial.mkdir()
    (partial / "settings.toml").write_bytes((folder / "settings.toml").read_bytes())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (partial / "metrics.jsonl").write_text("\n".join(lines[:3]) + '\n{"kind": "st')
    assert run(["report", str(partial), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert not printed["finished"] and len(printed["steps"]["step"]) == 2
    assert "has not ended" in (partial / "report.html").read_text()


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert run(["report", str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err


def test_a_curve_of_many_steps_has_few_points():
    from clipft.report.report import step_curves

    step = {"loss": 2.0, "lr": 0.1, "pairs": 8, "seconds": 0.5, "data_seconds": 0.1}
    steps = [{**step, "step": n, "loss": None if n == 7 else 2.0} for n in range(1, 100_001)]
    curves = step_curves(steps)
    assert len(curves["step"]) == len(curves["loss"]) == 500
    assert curves["step"][-1] == 100_000
    assert set(curves["loss"]) == {2.0} and curves["pairs_per_s"][0] == pytest.approx(16)
    assert curves["data_wait"][0] == pytest.approx(0.2)


def test_the_summary_in_wandb_has_the_figures_of_the_report(made, content, tmp_path):
    args = ["--data-dir", str(made / "data"), "--output-dir", str(tmp_path), "--max-bad", "0.1"]
    assert run(["train", *SMALL, *args, "--wandb", "offline"]) == 0
    (kept,) = tmp_path.glob("dual_lora/wandb/offline-run-*/*.wandb")
    sent = kept.read_bytes()
    for row in content["figures"][0]["rows"]:
        for kind in ("before", "after", "change"):
            assert f"{kind}/{row['key']}".encode() in sent


def test_the_first_screen_shows_gains_and_losses(page, content):
    from clipft.report.overview import main_cases, main_figures

    chosen = [case["kind"] for _, case in main_cases(content["gallery"])]
    kinds = [case["kind"] for case in content["gallery"]]
    assert len(chosen) == min(6, len(kinds))
    assert chosen.count("gain") >= min(4, kinds.count("gain"))
    assert chosen.count("loss") >= min(2, kinds.count("loss"))
    shown = main_figures(content["figures"], None)
    rows = {row["name"]: row for row in content["figures"][0]["rows"]}
    top = 100 / float(shown.ticks[-1][0].removesuffix("%")) * 100
    for row in shown.rows:
        assert row.before.at == pytest.approx(rows[row.name]["before"]["value"] * top)
        assert row.after.at == pytest.approx(rows[row.name]["after"]["value"] * top)
        assert 0 <= row.after.at <= 100 and row.name in page


def test_kept_captions_can_be_looked_up(page, content):
    lookup = content["lookup"]
    images = json.loads(re.search(r'id="lookup-images">(.*?)</script>', page)[1])
    shown = {str(n) for q in lookup["queries"] for n in (*q["before"], *q["after"])}
    assert len(lookup["queries"]) == 30 and set(images) == shown
    assert lookup["pairs"][str(lookup["queries"][1]["pair"])]["caption"] == EVIL.format(n=101)


def test_the_command_that_reproduces_a_run_is_one_that_can_be_typed(content):
    import shlex

    from clipft.report.run_page import train_command

    words = shlex.split(train_command(content["settings"]).replace("\\\n", " "))
    assert words[:2] == ["clipft", "train"]
    assert words[words.index("--lr") + 1] == "0.001" and "--max-bad" in words
