"""Train from the command line on the packaged tiny model, then interrupt and resume runs."""

import json
import os
import shutil
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
    *("--model", "tiny", "--epochs", "3", "--effective-batch-size", "32"),
    *("--micro-batch-size", "16", "--num-workers", "0", "--precision", "fp32"),
    *("--stop-on", "never", "--checkpoint-every", "2"),
]


def train(catalogue: Path, out: Path, *more: str) -> int:
    return run(["train", *SMALL, "--data-dir", str(catalogue), "--output-dir", str(out), *more])


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model_state_dict"]


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = {"kind", "epoch", "step", "loss", "lr", "grad_norm", "val_loss", "retrieval"}
    return [{k: v for k, v in line.items() if k in timeless} for line in lines]


def assert_same_run(one: Path, other: Path, scenario: str = "dual_lora") -> None:
    for name in (f"{scenario}_checkpoint.pt", f"{scenario}/best.pt"):
        ours, theirs = weights(one / name), weights(other / name)
        assert ours.keys() == theirs.keys() and ours
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert metrics(one / scenario) == metrics(other / scenario)


@pytest.fixture(scope="module")
def whole(catalogue, tmp_path_factory) -> Path:
    """Train without interruption and return the output folder."""
    out = tmp_path_factory.mktemp("whole")
    assert train(catalogue, out) == 0
    return out


def test_a_run_writes_every_promised_file(whole):
    folder = whole / "dual_lora"
    checkpoint = torch.load(whole / "dual_lora_checkpoint.pt", weights_only=True)
    promised = {"epoch", "model_state_dict", "optimizer_state_dict", "loss"}
    assert promised <= checkpoint.keys()
    assert checkpoint["epoch"] == 3
    assert {p.name for p in folder.iterdir()} >= {
        "settings.toml",
        "metrics.jsonl",
        "best.pt",
        "adapter",
        "result.json",
    }
    assert not list(whole.rglob("*.part"))
    kinds = [line["kind"] for line in metrics(folder)]
    assert (kinds.count("step"), kinds.count("epoch")) == (9, 4)


@pytest.mark.slow
def test_the_saved_settings_start_the_same_run_again(whole, catalogue, tmp_path):
    toml = whole / "dual_lora" / "settings.toml"
    assert run(["train", "--config", str(toml), "--output-dir", str(tmp_path)]) == 0
    assert_same_run(whole, tmp_path)


def test_peft_opens_the_adapter_and_computes_the_same_features(whole):
    from peft import PeftModel

    from clipft.config.sources import load_settings
    from clipft.models.pretrained import load_pretrained
    from clipft.runs.checkpoint import load_checkpoint
    from clipft.runs.load import load_fine_tuned
    from clipft.runs.places import saved_settings

    content = load_checkpoint(whole / "dual_lora" / "best.pt")
    settings = saved_settings(content, load_settings({}, environ={}), ())
    ours = load_fine_tuned(content, settings).model.eval()
    theirs = PeftModel.from_pretrained(
        load_pretrained("tiny").model, str(whole / "dual_lora" / "adapter")
    ).eval()
    size = load_pretrained("tiny").inputs.image_size
    pixels = torch.rand(2, 3, size, size)
    with torch.no_grad():
        a = ours.clip.get_image_features(pixel_values=pixels).pooler_output
        b = theirs.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(a, b)


def test_the_number_of_workers_does_not_change_the_result(whole, catalogue, tmp_path):
    assert train(catalogue, tmp_path, "--num-workers", "3") == 0
    assert_same_run(whole, tmp_path)


def start(catalogue: Path, out: Path, *more: str) -> warm.Popen:
    args = ["train", *SMALL, "--data-dir", str(catalogue), "--output-dir", str(out), *more]
    return warm.Popen(
        [sys.executable, "-m", "clipft", *args],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "CLIPFT_CACHE": str(out / "cache")},
    )


def wait_for_step(out: Path, step: int, process: warm.Popen) -> None:
    path, limit = out / "dual_lora" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def test_a_run_resumed_after_sigkill_ends_bitwise_equal(whole, catalogue, tmp_path):
    process = start(catalogue, tmp_path)
    wait_for_step(tmp_path, 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = torch.load(tmp_path / "dual_lora_checkpoint.pt", weights_only=True)
    assert not killed["finished"]
    assert run(["resume", str(tmp_path / "dual_lora_checkpoint.pt")]) == 0
    assert_same_run(whole, tmp_path)


def test_sigterm_saves_exits_75_and_says_how_to_resume(whole, catalogue, tmp_path):
    process = start(catalogue, tmp_path, "--num-workers", "1")
    wait_for_step(tmp_path, 2, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "error: stopped by SIGTERM" in stderr
    assert "hint: continue with `clipft resume" in stderr
    assert "Traceback" not in stderr
    assert run(["resume", "--output-dir", str(tmp_path), "--num-workers", "0"]) == 0
    assert_same_run(whole, tmp_path)


def test_resume_writes_the_results_that_a_late_kill_prevented(whole, tmp_path, capsys):
    out = tmp_path / "killed"
    shutil.copytree(whole, out)
    folder = out / "dual_lora"
    expected = json.loads((folder / "evaluation.json").read_text())
    for name in ("result.json", "evaluation.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "adapter")
    assert run(["resume", str(out / "dual_lora_checkpoint.pt")]) == 0
    assert "finished" in capsys.readouterr().err
    assert json.loads((folder / "evaluation.json").read_text()) == expected
    assert (folder / "adapter" / "adapter_config.json").is_file()
    assert json.loads((folder / "result.json").read_text())["steps"] == 9
    assert_same_run(whole, out)


def test_a_new_run_moves_an_earlier_one_aside_unchanged(whole, catalogue, tmp_path, capsys):
    out = tmp_path / "again"
    shutil.copytree(whole, out)
    for name in ("kept.json", "interpolation.json"):  # as `clipft evaluate` writes them
        (out / "dual_lora" / name).write_text("{}")
    assert train(catalogue, out, "--max-train-pairs", "4", "--max-bad", "0", "--caption", "{no}")
    assert (out / "dual_lora" / "result.json").is_file()  # refused before it started
    for number in (1, 2):
        assert train(catalogue, out, "--epochs", "1") == 0
        assert f"is kept as {out / 'dual_lora.earlier-'}{number}." in capsys.readouterr().err
    assert not (out / "dual_lora" / "kept.json").exists()
    kept = out / "dual_lora.earlier-1"
    assert (kept / "kept.json").exists() and (kept / "adapter" / "adapter_config.json").exists()
    for name in ("best.pt", "metrics.jsonl", "result.json", "evaluation.json", "report.html"):
        assert (kept / name).read_bytes() == (whole / "dual_lora" / name).read_bytes()
    checkpoint = (whole / "dual_lora_checkpoint.pt").read_bytes()
    assert (kept / "dual_lora_checkpoint.pt").read_bytes() == checkpoint
    assert run(["evaluate", str(kept), "--data-dir", str(catalogue)]) == 0


def test_resume_of_a_finished_run_says_so(whole, capsys):
    before = (whole / "dual_lora_checkpoint.pt").read_bytes()
    assert run(["resume", "--output-dir", str(whole)]) == 0
    assert "finished" in capsys.readouterr().err
    assert (whole / "dual_lora_checkpoint.pt").read_bytes() == before


def test_resume_also_takes_a_run_folder(whole, capsys):
    assert run(["resume", str(whole / "dual_lora")]) == 0
    assert "finished" in capsys.readouterr().err


def test_resume_refuses_a_file_of_weights_alone(whole, capsys):
    assert run(["resume", str(whole / "dual_lora" / "best.pt")]) == 2
    assert "best.pt cannot be resumed" in capsys.readouterr().err


def test_the_resume_flag_without_a_checkpoint_warns_and_starts_a_run(catalogue, tmp_path, capsys):
    assert train(catalogue, tmp_path, "--resume-from-checkpoint", "--mini-train") == 0
    assert "no checkpoint" in capsys.readouterr().err


def test_a_resumed_run_refuses_other_settings_that_decide_the_weights(catalogue, tmp_path, capsys):
    assert train(catalogue, tmp_path, "--epochs", "1") == 0
    code = train(catalogue, tmp_path, "--epochs", "1", "--lr", "0.5", "--resume-from-checkpoint")
    assert code == 2
    assert "lr 0.004 -> 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "scenario", ["zero_shot", "linear_probe", "vision_lora", "text_lora", "full"]
)
def test_every_scenario_trains_and_evaluates(catalogue, tmp_path, capsys, scenario):
    more = ["--scenario", scenario, "--epochs", "1"]
    assert train(catalogue, tmp_path, *more) == 0
    capsys.readouterr()
    place = str(tmp_path / f"{scenario}_checkpoint.pt")
    assert run(["evaluate", place, "--data-dir", str(catalogue), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["pairs"] == 40
    wanted = {"r@1", "r@5", "r@10", "median_rank", "mrr"}
    assert set(figures["text_to_image"]) == set(figures["image_to_text"]) == wanted


def test_training_improves_retrieval(catalogue, tmp_path, capsys):
    more = ["--epochs", "12", "--lr", "3e-3", "--json"]
    assert train(catalogue, tmp_path, *more) == 0
    result = json.loads(capsys.readouterr().out)
    for direction in ("text_to_image", "image_to_text"):
        assert result["after"][direction]["mrr"] > result["before"][direction]["mrr"]


def test_early_stopping_ends_the_run(catalogue, tmp_path, capsys):
    more = ["--lr", "0", "--stop-on", "loss", "--patience", "1", "--json"]
    assert train(catalogue, tmp_path, *more) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["stopped_early"]
    assert result["steps"] == 6


def test_a_diverging_run_exits_6_and_keeps_its_last_good_state(catalogue, tmp_path, capsys):
    assert train(catalogue, tmp_path, "--scenario", "full", "--lr", "1e30") == 6
    said = capsys.readouterr().err
    assert "error: after epoch 1, the embedding of the image of " in said
    path = tmp_path / "full_checkpoint.pt"
    assert not path.exists() or all(w.isfinite().all() for w in weights(path).values())
