"""Which pairs are measured: those of the test split if there is one, and never to choose by."""

import json
import shutil

import pytest

from clipft.ablation.grid import Grid, plan_runs
from clipft.ablation.runner import TEST, measure_on_test, read_state, write_state
from clipft.cli.app import run
from clipft.data.shards.folders import open_pairs
from tests.data.shards.test_names import write_tar
from tests.tiny_run import TINY

FIGURES = ("--num-workers", "0", "--precision", "fp32", "--resamples", "0")


@pytest.fixture(scope="module")
def data(catalogue, tmp_path_factory):
    """The catalogue with test pairs: the first shard of its training pairs, other than the
    validation pairs in number."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        (folder / split).symlink_to(catalogue / split)
    (folder / "test").mkdir()
    shutil.copy(min((catalogue / "train").glob("*.tar")), folder / "test")
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    where = ("--data-dir", str(data), "--output-dir", str(out))
    assert run(["train", *TINY, "--epochs", "1", *where]) == 0
    return out / "dual_lora"


def counts(data):
    """The pairs of each split; a smoke test validates on 64 at most."""
    return {s: min(64, len(open_pairs(data / s))) for s in ("train", "val", "test")}


@pytest.mark.parametrize(("chosen", "split"), [("auto", "test"), ("test", "test"), ("val", "val")])
def test_evaluate_uses_the_test_pairs_and_says_so(trained, data, capsys, chosen, split):
    command = ["evaluate", str(trained), "--data-dir", str(data), *FIGURES, "--split", chosen]
    assert run([*command, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["split"] == split
    assert found["pairs"] == found["evaluation"]["before"]["pairs"] == counts(data)[split]
    name = {"test": "test", "val": "validation"}[split]
    assert f"Evaluating on the {name} pairs of {data}." in " ".join(printed.err.split())


def test_without_test_pairs_the_validation_pairs_are_used(trained, catalogue, capsys):
    where = ["--data-dir", str(catalogue), *FIGURES]
    assert run(["evaluate", str(trained), *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "val"
    assert run(["evaluate", str(trained), *where, "--split", "test"]) == 3
    assert f"no folder {catalogue}/test" in " ".join(capsys.readouterr().err.split())


def test_the_table_names_the_split(trained, data, capsys):
    assert run(["evaluate", str(trained), "--data-dir", str(data), *FIGURES]) == 0
    assert "Test" in capsys.readouterr().out
    assert run(["zero-shot", "--model", "tiny", "--data-dir", str(data), *FIGURES]) == 0
    printed = capsys.readouterr()
    assert "Test" in printed.out and "Validation" not in printed.out
    assert "on the test pairs" in " ".join(printed.err.split())


def test_alpha_is_chosen_on_the_validation_pairs(trained, data, capsys):
    command = ["evaluate", str(trained), *FIGURES, "--interpolate", "0,1", "--json"]
    assert run([*command, "--data-dir", str(data)]) == 0
    tested = json.loads(capsys.readouterr().out)
    assert run([*command, "--data-dir", str(data), "--split", "val"]) == 0
    validated = json.loads(capsys.readouterr().out)
    assert tested["evaluation"] != validated["evaluation"]
    assert tested["interpolation"] == validated["interpolation"]


def test_a_run_is_the_same_with_and_without_test_pairs(trained, catalogue, tmp_path):
    where = ("--data-dir", str(catalogue), "--output-dir", str(tmp_path))
    assert run(["train", *TINY, "--epochs", "1", *where]) == 0
    left, right = (
        json.loads((folder / "evaluation.json").read_text())
        for folder in (trained, tmp_path / "dual_lora")
    )
    assert left == right


def test_an_ablation_reports_the_test_pairs_and_chooses_by_the_others(trained, data, tmp_path):
    flags = {"data_dir": data, "model": "tiny", "mini_train": True, "num_workers": 0}
    runs = plan_runs(Grid(["dual_lora"], [42], {}), flags, tmp_path)
    runs[0].home.mkdir(parents=True)
    shutil.copytree(trained, runs[0].folder)
    shutil.copy(f"{trained}_checkpoint.pt", runs[0].home)
    measured = []
    measure_on_test(runs, measured.append)
    measure_on_test(runs, measured.append)  # not again
    assert measured == runs
    write_state(tmp_path, runs, {})
    state = read_state(tmp_path)["runs"][0]
    found = json.loads((runs[0].home / TEST).read_text())
    assert state["test"] == found
    assert found["before"]["pairs"] == counts(data)["test"] != state["before"]["pairs"]


def test_inspect_says_why_files_are_no_pairs(data, tmp_path, capsys):
    shutil.copytree(data / "test", tmp_path / "train")
    names = ["1.image.jpg", "1.mask.png", "1.caption.txt", "2.jpg"]
    write_tar(tmp_path / "train" / "masks.tar", *names)
    page = tmp_path / "page.html"
    assert run(["inspect", str(tmp_path), "--model", "tiny", "--html", str(page)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for reason in ("no caption", "several image files with one key (image, mask)"):
        assert f"- {reason}" in shown and f"- {reason}" in page.read_text()


def test_inspect_shows_test_pairs_and_what_they_share(data, capsys):
    assert run(["inspect", str(data), "--model", "tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    pairs = len(open_pairs(data / "test"))
    assert found["test"]["pairs"] == found["test_in_train"]["same_photo"] == pairs
    assert found["test_in_val"]["same_photo"] == found["val_in_train"]["same_photo"] == 0
