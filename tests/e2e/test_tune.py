"""A search as a user runs it, with real trainings."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from clipft.cli.app import run
from clipft.config.sources import load_settings
from clipft.tune.soup import greedy_soup
from tests.conftest import write_shard
from tests.tiny_run import TINY

pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def searched(catalogue, tmp_path_factory) -> dict:
    """Two trials on pairs with a test split, and two seeds to confirm the best one."""
    root = tmp_path_factory.mktemp("tune")
    data, out = root / "data", root / "out"
    data.mkdir()
    for split in ("train", "val"):
        (data / split).symlink_to(catalogue / split)
    write_shard(data / "test" / "00000.tar", range(2000, 2030))
    args = ["tune", *TINY, "--data-dir", str(data), "--output-dir", str(out), "--budget", "2"]
    args += ["--search", "lr,lora-targets", "--confirm", "2", "--resamples", "100"]
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = run([*args, "--json"])
    assert code == 0, stderr.getvalue()
    content = json.loads(stdout.getvalue())
    return {"data": data, "out": out, "args": args, "content": content, "said": stderr.getvalue()}


def test_a_search_trains_measures_and_answers(searched):
    out, content, said = searched["out"], searched["content"], searched["said"]
    assert json.loads((out / "tune.json").read_text()) == content
    assert len(content["trials"]) == 2 and content["measured"]["split"] == "test"
    assert "trial 0: the defaults ..." in said and "trial 1: " in said
    for trial in content["trials"]:
        if trial["state"] == "finished":
            result = json.loads((out / trial["folder"] / "result.json").read_text())
            assert result["steps"] == trial["steps"]
            assert (out / trial["folder"] / "report.html").is_file()


def test_the_defaults_are_those_of_train_and_its_toml_repeats_the_trial(searched, tmp_path):
    data, out = searched["data"], searched["out"]
    where = ["--data-dir", str(data), "--output-dir"]
    assert run(["train", *TINY, *where, str(tmp_path / "bare")]) == 0
    theirs = json.loads((tmp_path / "bare" / "dual_lora" / "result.json").read_text())
    ours = json.loads((out / "trials" / "0000" / "dual_lora" / "result.json").read_text())
    assert ours["after"] == theirs["after"]

    content = json.loads((out / "tune.json").read_text())
    again = ["--config", str(out / "best.toml"), "--output-dir", str(tmp_path / "again")]
    assert run(["train", *again]) == 0
    theirs = json.loads((tmp_path / "again" / "dual_lora" / "result.json").read_text())
    chosen = content["trials"][content["chosen"]]
    assert (
        json.loads((out / chosen["folder"] / "result.json").read_text())["after"]
        == (theirs["after"])
    )


def test_the_best_runs_are_averaged(searched, tmp_path):
    """With seeds that start from one model, the mean is a model that all commands open."""
    out = searched["out"]
    tried = json.loads((out / "souped.json").read_text())
    assert len(tried["of"]) == len(set(tried["of"])) >= 2
    soup = searched["content"]["soup"]
    assert tried["found"] == soup
    settings = load_settings({"data_dir": searched["data"], "model": "tiny"}, environ={}).values
    settings = settings.model_copy(update={"num_workers": 0, "resamples": 20})
    folders = [Path(folder) for folder in tried["of"]]
    found = greedy_soup(folders, tmp_path / "soup", settings, lambda text: None)
    if found is None:
        assert soup is None and not (tmp_path / "soup").exists()
    else:
        assert len(found["kept"]) >= 2 and set(found["kept"]) <= set(tried["of"])
        assert (tmp_path / "soup" / "best.pt").is_file()


def test_the_same_command_has_nothing_left_to_do(searched, capsys):
    out, args = searched["out"], searched["args"]
    before = (out / "tune.json").stat().st_mtime_ns
    assert run(args) == 0
    printed = capsys.readouterr()
    assert "trial 0" not in printed.err and "confirming" not in printed.err
    assert "clipft train --config" in printed.err and "2 trials" in printed.out
    assert (out / "tune.json").stat().st_mtime_ns > before
    assert len((printed.out + printed.err).splitlines()) <= 24


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--budget", "soon"], "30m or 2h, or a number of trials"),
        (["--search", "lrr"], "did you mean lr"),
        (["--search", "lr", "--lr", "1e-3"], "it is set to 0.001 as well"),
        (["--scenario", "zero_shot"], "trains nothing"),
        (["--confirm", "0"], "at least 1"),
        (["--label-prompts", "a photo of {}"], "trains for accuracy"),
    ],
)
def test_wrong_usage_is_reported_before_anything_is_written(args, message, tmp_path, capsys):
    given = ["--data-dir", str(tmp_path / "none"), "--output-dir", str(tmp_path / "out")]
    assert run(["tune", *given, *args]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused_in_the_same_folder(searched, capsys):
    assert run([*searched["args"], "--wd", "0.2"]) == 2
    assert "holds a search with other settings: wd 0.1 -> 0.2" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_share_a_search(catalogue, tmp_path, capsys):
    where = ["--data-dir", str(catalogue), "--output-dir", str(tmp_path / "out")]
    small = ["--search", "lr", "--budget", "3", "--confirm", "2", "--resamples", "20"]
    assert run(["tune", *TINY, *where, *small, "--workers", "2", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [trial["number"] for trial in content["trials"]] == [0, 1, 2]
    assert "running" not in {trial["state"] for trial in content["trials"]}
