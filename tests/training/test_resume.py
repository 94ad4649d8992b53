"""A run that is resumed keeps what it decided when it began: on other hardware, and with a newer
clipft."""

import json
from pathlib import Path

import pytest
import torch

from clipft.cli.app import run
from clipft.data.order import EpochPlan
from clipft.embedding.look_alikes import LookAlikeSearch
from clipft.models import device as devices
from clipft.runs import checkpoint_format
from clipft.runs.checkpoint import load_checkpoint, save_checkpoint
from clipft.training import prepare as training_prepare
from clipft.training import run as training_run
from tests.conftest import write_shard

NAME = "dual_lora_checkpoint.pt"
SMALL = [
    *("--model", "tiny", "--effective-batch-size", "12", "--micro-batch-size", "5"),
    *("--num-workers", "0", "--stop-on", "never", "--epochs", "2", "--device", "cpu"),
]


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """26 pairs: at 12 a step, two are left over, which is less than a quarter of a step."""
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "train" / "00000.tar", range(26))
    write_shard(folder / "val" / "00000.tar", range(1000, 1008))
    return folder


def train(data: Path, out: Path, *more: str) -> int:
    return run(["train", *SMALL, "--data-dir", str(data), "--output-dir", str(out), *more])


def resume(out: Path) -> int:
    return run(["resume", "--output-dir", str(out)])


def kill_after(step: int, data: Path, out: Path, monkeypatch, *more: str) -> None:
    all_batches = training_run.step_batches

    def some(setup, state, *given):
        for batch in all_batches(setup, state, *given):
            if state.step == step:
                raise Killed
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "step_batches", some)
        with pytest.raises(Killed):
            train(data, out, "--checkpoint-every", "1", *more)
    assert load_checkpoint(out / NAME)["step"] == step


def pairs_of_steps(out: Path) -> list[int]:
    lines = (out / "dual_lora" / "metrics.jsonl").read_text().splitlines()
    return [line["pairs"] for line in map(json.loads, lines) if line["kind"] == "step"]


def epoch_losses(out: Path) -> list[float]:
    lines = (out / "dual_lora" / "metrics.jsonl").read_text().splitlines()
    return [line["train_loss"] for line in map(json.loads, lines) if line["kind"] == "epoch"][1:]


def same_bits(one: Path, other: Path) -> bool:
    ours, theirs = (load_checkpoint(out / NAME)["model_state_dict"] for out in (one, other))
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def write_as_format_2(path: Path, monkeypatch) -> None:
    content = load_checkpoint(path)
    content["epoch_loss_sum"] /= content.pop("epoch_pairs") / content["step_in_epoch"]
    del content["choices"]
    monkeypatch.setattr(checkpoint_format, "FORMAT_VERSION", 2)
    save_checkpoint(path, content)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2])
def test_a_run_of_an_older_version_goes_on_with_its_own_steps(step, data, tmp_path, monkeypatch):
    """It cut an epoch into steps of 12, 12 and 2 pairs; a new run makes that 12 and 14."""
    whole, old, new = (tmp_path / name for name in ("whole", "old", "new"))
    precise = ("--precision", "fp32")
    with monkeypatch.context() as patch:
        patch.setattr(EpochPlan, "smallest_step", property(lambda plan: 2))
        assert train(data, whole, *precise) == 0
        kill_after(step, data, old, patch, *precise)
        write_as_format_2(old / NAME, patch)
    assert resume(old) == 0
    assert pairs_of_steps(old) == pairs_of_steps(whole) == [12, 12, 2] * 2
    assert same_bits(old, whole)
    assert epoch_losses(old) == pytest.approx(epoch_losses(whole), rel=1e-6)
    assert load_checkpoint(old / NAME)["choices"]["smallest_step"] == 2

    assert train(data, new, *precise) == 0
    assert pairs_of_steps(new) == [12, 14] * 2
    assert load_checkpoint(new / NAME)["choices"]["smallest_step"] == 3


@pytest.mark.parametrize("there", ["bf16", "fp32"])
@pytest.mark.parametrize("here", ["bf16", "fp32"])
def test_a_run_is_resumed_on_a_machine_with_and_without_bf16(
    there, here, data, tmp_path, monkeypatch, capsys
):
    """With ``auto`` a run stays in the precision in which it began, if it can."""

    def computing_in(best: str):
        return lambda kind, name: name in {"fp32", best}

    monkeypatch.setattr(devices, "NARROW", 0)  # the tiny model is narrow: it would take fp32
    monkeypatch.setattr(devices, "computes_in", computing_in(there))
    kill_after(1, data, tmp_path, monkeypatch)
    assert load_checkpoint(tmp_path / NAME)["choices"]["precision"] == there
    monkeypatch.setattr(devices, "computes_in", computing_in(here))
    capsys.readouterr()
    assert resume(tmp_path) == 0
    said = capsys.readouterr().err
    assert load_checkpoint(tmp_path / NAME)["settings"]["precision"] == "auto"
    expected = "fp32" if "fp32" in {there, here} else "bf16"
    assert load_checkpoint(tmp_path / NAME)["choices"]["precision"] == expected
    assert ("continues with it; a new run would use bf16" in said) == (
        (there, here) == ("fp32", "bf16")
    )
    assert ("It continues with fp32" in said) == ((there, here) == ("bf16", "fp32"))


def test_a_run_that_began_with_8_bits_is_resumed_with_them(data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(training_prepare, "choose_optimizer", lambda *given: "adamw8bit")
        kill_after(1, data, tmp_path, patch, "--precision", "fp32")
    assert load_checkpoint(tmp_path / NAME)["choices"]["optimizer"] == "adamw8bit"
    with monkeypatch.context() as patch:
        fault = "RuntimeError: no binary"
        patch.setattr("clipft.training.step.optimizer.eight_bit_fault", lambda device: fault)
        capsys.readouterr()
        assert resume(tmp_path) == 2
        assert f"this run began with does not run here: {fault}" in capsys.readouterr().err
    assert resume(tmp_path) == 0
    assert load_checkpoint(tmp_path / NAME)["choices"]["optimizer"] == "adamw8bit"


TEXTS_AND_PHOTOS = {
    "photo pairs": ("--photo-pairs", "0.5", "--group-field", "type"),
    "hard negatives": ("--hard-negatives", "2", "--group-field", "type"),
    "fields": ("--fields", "name:1,caption:0.5"),
    "labels": ("--label-prompts", "general", "--label-field", "type", "--shots", "9"),
}


@pytest.mark.parametrize("options", TEXTS_AND_PHOTOS.values(), ids=TEXTS_AND_PHOTOS)
def test_a_run_is_resumed_to_the_same_bits(options, data, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(data, whole, *options, "--precision", "fp32") == 0
    kill_after(3, data, cut, monkeypatch, *options, "--precision", "fp32")
    assert resume(cut) == 0
    assert same_bits(cut, whole)
    assert epoch_losses(cut) == epoch_losses(whole)


PHOTOS = ("--photo-pairs", "0.5", "--hard-negatives", "1", "--fields", "name:1,caption:0.5")
TOGETHER = {
    "photos and fields": (*PHOTOS, "--group-field", "type"),
    "labels and shots": TEXTS_AND_PHOTOS["labels"],
}


@pytest.mark.slow
@pytest.mark.parametrize("options", TOGETHER.values(), ids=TOGETHER)
def test_two_processes_train_alike_with_these_options(options, data, tmp_path):
    """The pairs of each step, their texts, products and labels are those of one process."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    precise = (*options, "--precision", "fp32", "--epochs", "1")
    assert train(data, alone, *precise) == 0
    assert train(data, both, *precise, "--processes", "2") == 0
    assert pairs_of_steps(both) == pairs_of_steps(alone)
    assert epoch_losses(both) == pytest.approx(epoch_losses(alone), rel=1e-4)
    evaluations = [out / "dual_lora" / "evaluation.json" for out in (alone, both)]
    expected, found = (json.loads(path.read_text()).get("classification") for path in evaluations)
    assert found == expected


REFRESHED = (
    *("--hard-negatives", "2", "--hard-negatives-by", "current", "--group-field", "type"),
    *("--lr", "1e-2", "--augmentation", "none"),  # the second epoch has other look-alikes
)
KINDS = {
    "look-alikes of each epoch": (*REFRESHED, "--ema", "0.5", "--photo-pairs", "0.5"),
    "averages": ("--ema", "0.9"),
    "held pairs": ("--preserve", "5"),
    "held general set": ("--preserve", "5", "--preserve-data", "{general}", "--ema", "0.9"),
}


def everything(out: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by their place in it."""

    def within(value, name):
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from within(inner, f"{name}.{key}")

    return dict(within(load_checkpoint(out / NAME), ""))


@pytest.mark.parametrize("kind", KINDS)
def test_the_resumed_run_has_the_same_bits(kind, data, tmp_path, monkeypatch):
    """Killed in the middle of an epoch, and with another number of workers from there on."""
    general = tmp_path / "general"
    write_shard(general / "0.tar", range(3000, 3019), bad=(3004,))
    options = [word.format(general=general) for word in KINDS[kind]]
    options += ["--precision", "fp32", "--lora-dropout", "0.2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(data, whole, *options) == 0
    kill_after(3, data, stopped, monkeypatch, *options)
    assert run(["resume", "--output-dir", str(stopped), "--num-workers", "1"]) == 0
    ours, theirs = everything(stopped), everything(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert epoch_losses(stopped) == epoch_losses(whole)


@pytest.mark.parametrize("step", [2, 3])
def test_each_epoch_finds_its_own_look_alikes(step, data, tmp_path, monkeypatch):
    """A checkpoint has those that the epoch of its last step began with."""
    options = (*REFRESHED, "--precision", "fp32")
    kill_after(step, data, tmp_path, monkeypatch, *options)
    held = load_checkpoint(tmp_path / NAME)["look_alikes"]

    searches = []
    find = LookAlikeSearch.find

    def counted(search, *given):
        searches.append(find(search, *given))
        return searches[-1]

    monkeypatch.setattr(LookAlikeSearch, "find", counted)
    assert resume(tmp_path) == 0
    final = load_checkpoint(tmp_path / NAME)["look_alikes"]
    assert len(searches) == (0 if step == 3 else 1)
    if step == 3:
        assert torch.equal(held, final)
    else:
        assert torch.equal(searches[0], final) and not torch.equal(held, final)
    lines = (tmp_path / "dual_lora" / "metrics.jsonl").read_text().splitlines()
    epochs = [line for line in map(json.loads, lines) if line["kind"] == "epoch"]
    assert "look_alike_seconds" not in epochs[0]
    if step != 3:
        assert epochs[-1]["look_alike_seconds"] > 0


def test_a_run_that_began_before_the_setting_keeps_its_look_alikes(data, tmp_path, monkeypatch):
    """Its checkpoint does not know ``hard_negatives_by``, which had the effect of its default."""
    options = ("--hard-negatives", "2", "--group-field", "type", "--precision", "fp32")
    whole, old = tmp_path / "whole", tmp_path / "old"
    assert train(data, whole, *options) == 0
    kill_after(3, data, old, monkeypatch, *options)
    content = load_checkpoint(old / NAME)
    del content["settings"]["hard_negatives_by"]
    save_checkpoint(old / NAME, content)
    resuming = ("--resume-from-checkpoint", *options)
    assert train(data, old, *resuming, "--hard-negatives-by", "current") == 2
    assert train(data, old, *resuming) == 0
    assert same_bits(old, whole)
