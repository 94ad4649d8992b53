"""An ablation as a user runs it: stopped, resumed, and with a run that fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clipft.cli.app import run
from tests import warm

SMALL = [
    *("--model", "tiny", "--epochs", "3", "--effective-batch-size", "16", "--num-workers", "0"),
    *("--micro-batch-size", "16", "--precision", "fp32", "--checkpoint-every", "2"),
]
GRID = """
epochs = 1  # overridden by the flag
stop_on = "never"
[ablate]
scenarios = ["zero_shot", "full"]
seeds = [1]
set = { lr = [1e-3, 1e30] }
"""
FULL = "full-lr=0.001/seed-1"


@pytest.fixture(scope="module")
def ablation(catalogue, tmp_path_factory) -> dict:
    """Stopped within its second run by Ctrl-C, then run again, two at a time."""
    root = tmp_path_factory.mktemp("ablation")
    (root / "grid.toml").write_text(GRID)
    out = root / "out"
    args = ["ablate", str(root / "grid.toml"), *SMALL]
    args += ["--data-dir", str(catalogue), "--output-dir", str(out)]
    environment = {**os.environ, "CLIPFT_CACHE": str(root / "cache")}

    def start(*more: str) -> warm.Popen:
        return warm.Popen(
            [sys.executable, "-m", "clipft", *args, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    first = start()
    wait_for(out / FULL / "full" / "metrics.jsonl", '"step": 3,', first)
    first.send_signal(signal.SIGINT)
    first_output = first.communicate(timeout=60)
    halfway = json.loads((out / "ablation.json").read_text())
    second = start("--jobs", "2", "--json")
    second_output = second.communicate(timeout=180)
    return {
        "out": out,
        "catalogue": catalogue,
        "first": (first.returncode, *first_output),
        "halfway": {entry["variant"]: entry["state"] for entry in halfway["runs"]},
        "second": (second.returncode, *second_output),
    }


def wait_for(path: Path, text: str, process: warm.Popen) -> None:
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"{text} did not appear: {process.communicate()}")


def test_ctrl_c_saves_the_run_under_way_and_says_how_to_resume(ablation):
    code, _, stderr = ablation["first"]
    assert code == 75, stderr
    assert "hint: run the same command again to continue" in stderr
    assert "Traceback" not in stderr
    assert ablation["halfway"] == {
        "zero_shot": "finished",
        "full lr=0.001": "waiting",
        "full lr=1e+30": "waiting",
    }


def test_the_same_command_keeps_finished_runs_and_resumes_the_rest(ablation):
    _, _, stderr = ablation["second"]
    assert "Already finished: 1 of 3 runs." in stderr
    assert "zero_shot seed 1 ..." not in stderr
    log = (ablation["out"] / FULL / "log.txt").read_text()
    assert "Resuming after step" in log


@pytest.mark.slow
def test_the_resumed_run_equals_a_run_of_train(ablation, tmp_path):
    """It has the same weights as ``clipft train`` with the run's settings."""
    config = ablation["out"] / FULL / "run.toml"
    assert run(["train", "--config", str(config), "--output-dir", str(tmp_path)]) == 0
    ours = torch.load(ablation["out"] / FULL / "full_checkpoint.pt", weights_only=True)
    theirs = torch.load(tmp_path / "full_checkpoint.pt", weights_only=True)
    assert ours["settings"]["epochs"] == 3 and ours["settings"]["stop_on"] == "never"
    for name, value in theirs["model_state_dict"].items():
        torch.testing.assert_close(ours["model_state_dict"][name], value, atol=1e-3, rtol=1e-2)


def test_a_failed_run_is_in_the_table_and_the_exit_code(ablation):
    code, stdout, stderr = ablation["second"]
    assert code == 8
    assert "error: 1 of 3 runs failed, first full lr=1e+30 seed 1 with exit code 6" in stderr
    content = json.loads(stdout)
    states = {entry["variant"]: entry for entry in content["runs"]}
    bad = states["full lr=1e+30"]
    assert (bad["state"], bad["exit_code"]) == ("failed", 6)
    assert "is not a number" in bad["error"] and "--lr" in bad["hint"]
    assert states["full lr=0.001"]["state"] == states["zero_shot"]["state"] == "finished"


def test_the_table_has_the_figures_of_the_runs(ablation):
    content = json.loads(ablation["second"][1])
    result = json.loads((ablation["out"] / FULL / "full" / "result.json").read_text())
    variants = {variant["name"]: variant for variant in content["variants"]}
    found = variants["full lr=0.001"]["figures"]["text_to_image"]["r@10"]["mean"]
    assert found == result["after"]["text_to_image"]["r@10"]
    assert variants["full lr=0.001"]["trainable_parameters"] > 1_000_000
    assert variants["full lr=0.001"]["seconds"]["mean"] > 0
    assert variants["zero_shot"]["gain"]["mean"] == 0


def test_its_page_and_json_are_written_and_can_be_made_again(ablation, tmp_path, capsys):
    out = ablation["out"]
    printed = json.loads(ablation["second"][1])
    assert json.loads((out / "report.json").read_text()) == printed
    page = (out / "report.html").read_text()
    assert printed["verdict"] in page
    for link in ("zero_shot/seed-1/zero_shot", f"{FULL}/full"):
        assert f'href="{link}/report.html"' in page and (out / link / "report.html").is_file()
    assert run(["report", str(out), "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == page
    assert len(page) < 400_000


def test_other_settings_are_refused_in_the_same_folder(ablation, tmp_path, capsys):
    where = ["--data-dir", str(ablation["catalogue"]), "--output-dir", str(ablation["out"])]
    assert run(["ablate", "--scenarios", "zero_shot", *SMALL, *where, "--epochs", "7"]) == 2
    assert "epochs 3 -> 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, message",
    [
        (["--set", "lr"], "has no values"),
        (["--set", "learn=1"], "unknown setting learn"),
        (["--seeds", "one"], "must be a whole number"),
        (["none.toml"], "cannot read the settings file"),
    ],
)
def test_wrong_usage_is_reported_before_anything_is_written(args, message, tmp_path, capsys):
    assert run(["ablate", *args, "--output-dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
