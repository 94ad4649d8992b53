"""Every command that clipft suggests can be copied: a shell and clipft's own parser take it."""

import ast
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.exceptions import Exit, TyperException

import clipft
from clipft.cli.app import COMMANDS, app_with, run
from clipft.cli.console import Output, end, say_command
from clipft.cli.options import flags_given
from clipft.core.common import shell_command
from clipft.runs.folder import RunPaths
from clipft.training.signals import StopRequest
from tests.conftest import write_shard
from tests.loaded_settings import loaded_settings

PACKAGE = Path(clipft.__file__).parent
SUGGESTED = re.compile(r"(?<!`)`(clipft\b[^`]*)`(?!`)")
INSERTED = "\0"


def parsed(words: list[str]) -> dict[str, object]:
    """Parse a command line as ``clipft`` does, without running it."""
    assert words[0] == "clipft"
    group = typer.main.get_command(app_with(set(words[1:2])))
    context = group.make_context("clipft", [], resilient_parsing=True)
    name, command, rest = group.resolve_command(context, words[1:])
    return dict(command.make_context(name, rest, parent=context).params)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a module, with a NUL where an f-string inserts a value."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(part) for part in node.values}
            inner = (p.value if isinstance(p, ast.Constant) else INSERTED for p in node.values)
            yield node.lineno, "".join(map(str, inner))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value


def suggestions() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for line, text in texts(path):
            for found in SUGGESTED.finditer(" ".join(text.split())):
                yield f"{path.relative_to(PACKAGE)}:{line}", found[1]


@pytest.mark.parametrize(("place", "command"), sorted(set(suggestions())))
def test_a_command_in_a_message_can_be_typed(place, command):
    assert INSERTED not in command, "insert words with shell_command(), which quotes them"
    words = shlex.split(command)
    assert len(words) > 1 and words[1] in COMMANDS, place
    try:
        parsed(words)
    except Exit:  # --help
        pass
    except TyperException as error:  # `clipft pack` alone is the name of a command
        assert "Missing argument" in error.format_message(), f"{place}: {error.format_message()}"


def printed(words, width: int | None) -> str:
    terminal = {"force_terminal": True, "color_system": None, "width": width} if width else {}
    console = Console(file=io.StringIO(), highlight=False, **terminal)
    say_command(console, "Next: ", words)
    return console.file.getvalue().removeprefix("Next: ").replace("\\\n", "")


names = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z")) | st.just(" "), min_size=1
)


@settings(deadline=None, max_examples=60)
@given(name=names.filter(lambda name: "/" not in name and name.strip(". ")), narrow=st.booleans())
def test_a_path_of_any_letters_is_read_back_as_it_is(name, narrow):
    words = shlex.split(
        printed(("inspect", Path(name), "--against", Path(name)), 30 if narrow else 0)
    )
    given = parsed(words)
    assert given["data"] == Path(name)
    assert Path(str(given["against"])) == Path(name)


@pytest.mark.parametrize(
    "name", ["~/x", "-x", "--json", "a b", "it's", 'a"b', "$HOME", "a[b]", "a;b"]
)
def test_paths_that_mean_something_to_a_shell_are_quoted(name):
    words = shlex.split(printed(("inspect", Path(name)), None))
    assert parsed(words)["data"] == Path(name)


@pytest.mark.parametrize("value", ["-x", "--json", "a b", "{type}, it's {color}", ""])
def test_the_flags_of_one_command_are_those_of_the_next(value):
    loaded = loaded_settings(caption=value or "x", s3_prefix=value, lr="1e-3", mini_train=True)
    words = shlex.split(printed(("train", *flags_given(loaded), "--plan"), 40))
    read = parsed(words)
    assert (read["caption"], read["s3_prefix"], read["lr"]) == (value or "x", value, "0.001")
    assert read["mini_train"] and read["plan"]


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "K\udcfcche", "a\u202eb"])
def test_a_path_that_cannot_be_typed_is_not_suggested(name, capsys):
    end(Output(as_json=False), {}, ("inspect", Path(name)))
    assert "Next:" not in capsys.readouterr().err


def test_resume_is_suggested_with_the_path_as_a_shell_needs_it(tmp_path):
    checkpoint = RunPaths(tmp_path / "my runs" / "dual_lora").checkpoint
    with pytest.raises(clipft.ClipftError) as caught:
        StopRequest("SIGTERM").check("after step 3", checkpoint)
    words = shlex.split(caught.value.hint.split("`")[1])
    assert parsed(words)["checkpoint"] == checkpoint
    assert shell_command("resume", checkpoint) == f"clipft resume '{checkpoint}'"


def test_two_spaces_in_a_path_stay_two_in_an_error(tmp_path, capsys):
    assert run(["report", str(tmp_path / "two  spaces")]) == 2
    assert "two  spaces" in capsys.readouterr().err


def test_nothing_is_suggested_that_needs_what_is_not_there(tmp_path, capsys, monkeypatch):
    """No search without images, no training without a training split."""
    monkeypatch.setenv("CLIPFT_DATA_DIR", str(tmp_path / "none"))
    assert run(["export", "tiny", str(tmp_path / "clip")]) == 0
    assert "Next:" not in capsys.readouterr().err
    write_shard(tmp_path / "flat" / "0.tar", range(12))
    fast = ("--num-workers", "0", "--device", "cpu", "--resamples", "0")
    assert run(["zero-shot", "tiny", "--data-dir", str(tmp_path / "flat"), *fast]) == 0
    assert "Next:" not in capsys.readouterr().err
