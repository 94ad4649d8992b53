import inspect
import json
import os
import subprocess
import sys
from typing import get_args

import pytest

from clipft.cli.app import COMMANDS, command_of, run
from clipft.config.settings import Settings
from clipft.core.errors import ClipftError
from tests.cli.forks import in_forks

NAMES = list(COMMANDS)
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "wandb",
    "boto3",
    "webdataset",
    "jinja2",
    "torchvision",
    "PIL",
    "numpy",
    "huggingface_hub",
)


def clipft(*args: str, **more) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "clipft", *args], capture_output=True, text=True, **more
    )


def test_every_command_of_the_promise_is_there():
    promised = {"sync", "pack", "find-batch-size", "train", "resume", "evaluate", "zero-shot"}
    assert promised | {"demo", "settings"} <= set(NAMES)


def test_help_has_examples_and_loads_nothing_heavy(tmp_path):
    lines = [[name, "--help"] for name in NAMES]
    for name, ended in zip(NAMES, in_forks(lines, HEAVY, tmp_path), strict=True):
        assert (ended.code, ended.imported) == (0, []), name
        for part in ("Examples", "--json", "--debug"):
            assert part in ended.output, name


@pytest.mark.parametrize("name", NAMES)
def test_examples_name_options_that_exist(name, capsys, monkeypatch):
    """Each option in an example stands in the help of its command."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    lines = [line.strip() for line in (command_of(name).__doc__ or "").splitlines()]
    examples = [line for line in lines if "clipft" in line and line.split("clipft")[0].isupper()]
    examples += [line for line in lines if line.startswith("clipft ")]
    assert examples
    helps = {}
    for example in examples:
        words = example[example.index("clipft ") :].split()
        if words[1] not in helps:
            assert run([words[1], "--help"]) == 0
            helps[words[1]] = capsys.readouterr().out
        for word in words[2:]:
            if word.startswith("--"):
                assert f" {word} " in helps[words[1]], f"{word} in {example!r}"


@pytest.mark.parametrize("name", NAMES)
def test_help_fits_80_columns(name, capsys, monkeypatch):
    """Nothing is dropped as markup, examples can be copied as they stand."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    command = command_of(name)
    assert run([name, "--help"]) == 0
    told = capsys.readouterr().out
    examples = [line for line in (command.__doc__ or "").splitlines() if line.startswith("    ")]
    assert examples and all(line.strip() in told for line in examples)
    assert "<bool>" not in told
    whole = "".join(told.replace("│", " ").split())
    for parameter in inspect.signature(command.function).parameters.values():
        shown = next(iter(get_args(parameter.annotation)[1:]), None)
        if shown and not getattr(shown, "hidden", False):
            assert "".join((shown.help or "").rpartition("[default")[1:]).replace(" ", "") in whole


def test_the_list_of_commands_says_what_each_says_in_one_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(["--help"]) == 0
    lines = [" ".join(line.strip("│ ").split()) for line in capsys.readouterr().out.splitlines()]
    for name, summary in COMMANDS.items():
        assert (command_of(name).__doc__ or "").splitlines()[0] == summary
        assert f"{name} {summary}" in lines


def test_no_command_shows_the_help(capsys):
    assert run([]) == 2
    out = capsys.readouterr()
    assert "Usage" in out.out
    assert "error" not in out.err


def test_unknown_options_and_commands_are_refused_with_the_nearest(capsys):
    assert run(["train", "--epoch", "1"]) == 2
    assert "--epochs" in capsys.readouterr().err
    assert run(["trian"]) == 2
    assert "train" in capsys.readouterr().err


def test_underscores_are_dashes(capsys):
    assert run(["settings", "--s3_bucket", "my-bucket", "--mini_train", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["settings"]["s3_bucket"] == "my-bucket"
    assert body["origins"]["s3_bucket"] == "flag"
    assert body["settings"]["mini_train"] is True


def test_a_switch_of_a_file_can_be_turned_off(tmp_path, capsys):
    file = tmp_path / "a.toml"
    file.write_text("mini_train = true\n")
    assert run(["settings", "--config", str(file), "--no-mini-train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["mini_train"] is False


def test_every_setting_is_an_option_of_train(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text


def test_help_is_readable_in_40_columns_and_without_colour(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 40


def test_a_reader_that_goes_away_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m clipft settings | head -1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("# clipft settings")


def test_version():
    assert clipft("--version").stdout.strip().count(".") == 2


def test_each_kind_of_error_has_a_code_of_its_own():
    codes = [kind.exit_code for kind in ClipftError.__subclasses__()]
    assert len(codes) == len(set(codes))


def completions(typed: str, monkeypatch, capsys) -> list[str]:
    """What the shell is offered for the last word of ``typed``."""
    monkeypatch.setenv("_CLIPFT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    with pytest.raises(SystemExit) as ended:
        run([])
    assert not ended.value.code
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("clipft tra", "train"),
        ("clipft train --scen", "--scenario"),
        ("clipft train --scenario vis", "vision_lora"),
        ("clipft train --precision b", "bf16"),
        ("clipft export --format onn", "onnx"),
    ],
)
def test_the_shell_completes_commands_options_and_values(typed, offered, monkeypatch, capsys):
    assert offered in completions(typed, monkeypatch, capsys)


def test_the_shell_completes_folders(tmp_path, monkeypatch, capsys):
    (tmp_path / "catalogue").mkdir()
    offered = completions(f"clipft train --data-dir {tmp_path}/cat", monkeypatch, capsys)
    assert offered == [f"{tmp_path}/catalogue/"]


def test_a_shell_asks_the_installed_program():
    words = {"COMP_WORDS": "clipft tra", "COMP_CWORD": "1", "_CLIPFT_COMPLETE": "complete_bash"}
    assert clipft(env={**os.environ, **words}).stdout.split() == ["train"]
