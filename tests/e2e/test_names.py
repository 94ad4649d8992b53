"""A name that is not there is refused, with its option and the nearest name that there is."""

from pathlib import Path
from typing import get_args

import pytest

from clipft.cli.app import COMMANDS, command_of, run
from clipft.config.fields import Section, choices_of, value_type
from clipft.config.sources import option_of
from tests.conftest import write_shard
from tests.e2e.test_bad_input import one_error
from tests.tiny_run import TINY

FAST = ("--num-workers", "0", "--device", "cpu", "--precision", "fp32")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, catalogue) -> Path:
    """A catalogue, a finished run, a file of labels and a file of settings, to be misspelled."""
    home = tmp_path_factory.mktemp("names")
    (home / "catalogue").symlink_to(catalogue)
    (home / "labels.txt").write_text("chair\ntable\n")
    (home / "clipft.toml").write_text("lr = 1e-3\n")
    (home / "table.toml").write_text("[ablat]\nseeds = [1]\n")
    (home / "photo.jpg").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPFT_CACHE", str(home / "cache"))
        options = ("--data-dir", str(catalogue), "--output-dir", str(home / "checkpoints"))
        assert run(["train", *TINY, "--resamples", "0", *options]) == 0
    return home


TRAIN = ("train", *TINY, "--data-dir", "catalogue")
EVALUATE = ("evaluate", "checkpoints/dual_lora", "--data-dir", "catalogue", *FAST)
ZERO_SHOT = ("zero-shot", "tiny", "--data-dir", "catalogue", *FAST)
INSPECT = ("inspect", "catalogue", "--model", "tiny", *FAST[:2])
SEARCH = ("search", "tiny", "catalogue", "a chair", *FAST)

MISTAKES = [
    # fields of the metadata
    ((*TRAIN, "--caption", "{colour}"), 2, "--caption '{colour}'", "did you mean color?"),
    ((*TRAIN, "--caption", "{caption}, {name.de}"), 2, "'name.de'", "did you mean name?"),
    ((*EVALUATE, "--caption", "{colour}"), 2, "--caption '{colour}'", "did you mean color?"),
    ((*ZERO_SHOT, "--caption", "{colour}"), 2, "--caption '{colour}'", "did you mean color?"),
    ((*INSPECT, "--caption", "{colour}"), 2, "--caption '{colour}'", "did you mean color?"),
    ((*SEARCH, "--caption", "{colour}"), 2, "--caption '{colour}'", "did you mean color?"),
    ((*TRAIN, "--group-field", "colour"), 2, "--group-field", "did you mean color?"),
    ((*TRAIN, "--plan", "--group-field", "colour"), 2, "--group-field", "did you mean color?"),
    ((*EVALUATE, "--group-field", "colour"), 2, "--group-field", "did you mean color?"),
    ((*ZERO_SHOT, "--group-field", "colour"), 2, "--group-field", "did you mean color?"),
    ((*TRAIN, "--label-field", "Tipe"), 2, "--label-field", "did you mean type?"),
    ((*EVALUATE, "--label-field", "tipe"), 2, "--label-field", "did you mean type?"),
    ((*ZERO_SHOT, "--label-field", "tipe"), 2, "--label-field", "did you mean type?"),
    (
        (*TRAIN, "--positives", "group", "--group-field", "colour"),
        *(2, "--group-field", "did you mean color?"),
    ),
    ((*TRAIN, "--fields", "colour:1"), 2, "--fields 'colour:1'", "did you mean color?"),
    ((*TRAIN, "--grade-field", "colour"), 2, "--grade-field", "did you mean color?"),
    ((*EVALUATE, "--grade-field", "colour"), 2, "--grade-field", "did you mean color?"),
    (
        ("pack", "catalogue", "packed", "--label-field", "tipe"),
        *(2, "--label-field", "did you mean type?"),
    ),
    # labels and templates
    ((*ZERO_SHOT, "--labels", "label.txt"), 2, "no such file", "did you mean labels.txt?"),
    (
        (*ZERO_SHOT, "--labels", "seeting,lighting"),
        *(2, "no pair has the label 'seeting'", "did you mean seating?"),
    ),
    ((*ZERO_SHOT, "--templates", "furnitur"), 2, "--templates", "did you mean furniture?"),
    (
        (*TRAIN, "--label-field", "type", "--label-prompts", "furnitur"),
        *(2, "--label-prompts furnitur", "did you mean furniture?"),
    ),
    (
        (*TRAIN, "--label-field", "type", "--label-prompts", "label.txt"),
        *(2, "--label-prompts label.txt", "did you mean labels.txt?"),
    ),
    # choices and settings
    ((*TRAIN, "--scenario", "dual-lora2"), 2, "did you mean dual_lora", ""),
    (("evaluate", "--scenario", "dual_lara"), 2, "did you mean dual_lora", ""),
    (("report", "--scenario", "dual_lara"), 2, "did you mean dual_lora", ""),
    (("ablate", "--scenarios", "full,dual_lara"), 2, "did you mean dual_lora", ""),
    (("ablate", "--set", "lora_rr=1"), 2, "lora_rr", "did you mean lora_r?"),
    (("export", "tiny", "out", "--format", "onx"), 2, "did you mean onnx", ""),
    (("tune", *TRAIN[1:], "--search", "lora_rr"), 2, "did you mean lora_r?", ""),
    # files and folders
    ((*TRAIN, "--data-dir", "catalog"), 3, "no folder catalog/train", "did you mean catalogue?"),
    (("pack", "catlogue", "out"), 3, "catlogue does not exist", "did you mean catalogue?"),
    (("inspect", "catlogue"), 3, "no folder catlogue", "did you mean catalogue?"),
    ((*INSPECT, "--against", "catalog"), 3, "no folder catalog", "did you mean catalogue?"),
    ((*EVALUATE, "--keep", "catalog"), 3, "no folder catalog", "did you mean catalogue?"),
    (("search", "tiny", "catalog", "a"), 3, "no folder catalog", "did you mean catalogue?"),
    (
        ("search", "tiny", "catalogue", "--image", "foto.jpg"),
        *(3, "cannot read foto.jpg", "did you mean photo.jpg?"),
    ),
    (
        (*TRAIN, "--preserve", "1", "--preserve-data", "catalog"),
        *(3, "no folder catalog", "did you mean catalogue?"),
    ),
    (
        (
            *EVALUATE,
            "--keep",
            "catalogue",
            "--interpolate",
            "0.5",
            "--frontier",
            "checkpoints/dual_lara",
        ),
        *(5, "checkpoints/dual_lara", "did you mean checkpoints/dual_lora?"),
    ),
    (("train", "--config", "clipf.toml"), 2, "clipf.toml", "did you mean clipft.toml?"),
    (("ablate", "table.toml"), 2, "[ablat] in table.toml", "did you mean [ablate]?"),
    (("ablate", "clipf.toml"), 2, "clipf.toml", "did you mean clipft.toml?"),
    (
        ("evaluate", "checkpoints/dual_lara"),
        *(5, "checkpoints/dual_lara", "did you mean checkpoints/dual_lora?"),
    ),
    (
        ("zero-shot", "./checkpoints/dual_lara"),
        *(5, "checkpoints/dual_lara", "did you mean checkpoints/dual_lora?"),
    ),
    (("zero-shot", "checkpoints/dual_lara"), 5, "dual_lara", "mean checkpoints/dual_lora?"),
    (
        ("resume", "checkpoints/dual_lara_checkpoint.pt"),
        *(5, "no checkpoint", "did you mean checkpoints/dual_lora_checkpoint.pt?"),
    ),
    (
        ("report", "checkpoints/dual_lara"),
        *(2, "no run in checkpoints/dual_lara", "did you mean checkpoints/dual_lora?"),
    ),
    (
        ("export", "./checkpoints/dual_lara", "out"),
        *(5, "checkpoints/dual_lara", "did you mean checkpoints/dual_lora?"),
    ),
    (
        ("search", "./checkpoints/dual_lara", "catalogue", "a"),
        *(5, "checkpoints/dual_lara", "did you mean checkpoints/dual_lora?"),
    ),
]


ELSEWHERE = {
    # names that other tests misspell
    "--s3-prefix": "storage/test_sync.py",
    "--s3-profile": "storage/test_sync.py",
    "--s3-bucket": "storage/test_sync.py",
    "--endpoint-url": "storage/test_faults.py",
    "--model": "e2e/test_bad_input.py",
    # a missing validation or test prefix is a note, as the split may be made later
    "--s3-val-prefix": "storage/test_sync.py",
    "--s3-test-prefix": "storage/test_sync.py",
    "--include": "storage/test_sync.py",
    # the columns and fields of pack
    "--image-column": "data/packing",
    "--caption-column": "data/packing",
    "--delimiter": "data/packing",
    "--encoding": "data/packing",
    # values with a grammar of their own, and numbers
    "--part": "data/packing",
    "--interpolate": "e2e/test_evaluate.py",
    "--seeds": "ablation/test_grid.py",
    "--matryoshka": "training/step/test_losses.py",
    "--budget": "tune/test_budget.py",
    "--track": "runs/test_trackers.py",
    **dict.fromkeys(("--encoding", "--delimiter"), "data/packing"),
    # what clipft makes itself, or what only others can check
    **dict.fromkeys(("--output-dir", "--html", "--save-classifier", "--save-interpolated"), "made"),
    **dict.fromkeys(
        ("--push", "--s3-checkpoint-prefix", "--wandb-project", "--track-project"), "made"
    ),
    **dict.fromkeys(("--s3-region", "--exclude"), "free"),
}


def options_that_take_a_name() -> set[str]:
    """Every option of every command whose value is a text or a path, and no closed list."""
    for command in COMMANDS:
        assert command_of(command).function
    sections, found = [Section], set[str]()
    while sections:
        section = sections.pop()
        sections += section.__subclasses__()
        for name, field in section.model_fields.items():
            kinds = {value_type(field), *get_args(value_type(field))}
            if kinds & {str, Path} and not choices_of(field):
                found.add(option_of(name))
    return found


def test_every_option_that_takes_a_name_is_misspelled_in_a_test():
    tried = {word for args, *_ in MISTAKES for word in args if word.startswith("--")}
    untried = options_that_take_a_name() - tried - ELSEWHERE.keys()
    assert not untried, "misspell them in MISTAKES, or say in ELSEWHERE why not"


@pytest.mark.parametrize(("args", "code", "error", "hint"), MISTAKES, ids=lambda value: str(value))
def test_a_name_that_is_not_there_is_refused(
    args, code, error, hint, workspace, capsys, monkeypatch
):
    monkeypatch.chdir(workspace)
    before = {path for path in workspace.rglob("*") if "cache" not in path.parts}
    assert run(list(args)) == code
    said = one_error(capsys)
    assert error in said[0] and hint in said[1], said
    # Nothing was begun: no folder of a run, of a page or of an export
    after = {path for path in workspace.rglob("*") if "cache" not in path.parts}
    assert after == before


def test_the_default_label_field_may_be_missing(tmp_path, workspace, capsys, monkeypatch):
    """Nobody asked for it; a general set without the labels of the catalogue can be kept, too."""
    monkeypatch.chdir(workspace)
    assert run([*ZERO_SHOT, "--resamples", "0"]) == 0
    write_shard(tmp_path / "general" / "0.tar", range(2000, 2008))
    keep = ("--keep", str(tmp_path / "general"), "--label-field", "type", "--resamples", "0")
    assert run([*EVALUATE, *keep]) == 0


def test_training_without_a_validation_split_says_how_to_make_one(tmp_path, capsys, monkeypatch):
    import shlex

    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "my data" / "train" / "0.tar", range(12))
    assert run(["train", *TINY, "--data-dir", "my data"]) == 3
    error, hint = one_error(capsys)
    assert "there is no validation split: no *.tar in my data/val" in error
    command = shlex.split(hint.split("`")[1])
    assert command[:2] == ["clipft", "pack"] and run(command[1:]) == 0
    following = shlex.split(hint.rpartition("use ")[2])
    assert run(["train", *TINY, *following, "--output-dir", str(tmp_path / "runs")]) == 0


def test_shards_that_were_never_split_are_split_by_the_command_of_the_hint(tmp_path, capsys):
    write_shard(tmp_path / "flat" / "0.tar", range(40))
    assert run(["train", *TINY, "--data-dir", str(tmp_path / "flat")]) == 3
    error, hint = one_error(capsys)
    assert "no training split" in error and f"pack {tmp_path / 'flat'} " in hint
