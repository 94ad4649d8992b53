"""Names and captions are shown as they are: no markup is read, and no terminal obeys them."""

import io
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from clipft.cli.app import run
from clipft.cli.console import Output, _Console, print_error
from clipft.core.errors import UsageError
from tests.data.packing.pack_helpers import write_pair

ODD = "cat [v2] [/v1] [bold]x[/] :smile: \x1b[31mred\x1b]0;title\x07 \x9b1m \udcfc \u202eend"
SHOWN = "cat [v2] [/v1] [bold]x[/] :smile: \u241b[31mred\u241b]0;title"


def terminal_output() -> tuple[Output, io.StringIO]:
    """Return an output as on a terminal without colors, and what is printed to it."""
    out, printed = Output(as_json=False), io.StringIO()
    out.err = out._out = _Console(
        file=printed, force_terminal=True, color_system=None, width=200, force_interactive=True
    )
    return out, printed


@pytest.mark.parametrize("wrap", [str, Text])
def test_tables_titles_and_notes_show_text_as_it_is(wrap):
    out, printed = terminal_output()
    table = Table(title=wrap(ODD))
    table.add_column(wrap(ODD))
    table.add_row(wrap(ODD))
    out.result({}, table, ODD)
    out.note(ODD)
    shown = printed.getvalue()
    assert shown.count(SHOWN) == 5
    assert not set("\x1b\x07\x9b\udcfc\u202e") & set(shown)


def test_a_progress_bar_may_name_any_folder():
    out, printed = terminal_output()
    with out.progress(f"Packing {ODD}") as report:
        report(1, 2)
    shown = printed.getvalue()
    assert "cat [v2] [/v1] [bold]x[/]" in shown
    assert "\x1b[31m" not in shown and "\x1b]0;" not in shown


def test_errors_show_text_as_it_is(capsys):
    print_error(UsageError(ODD, ODD), as_json=True)
    printed = capsys.readouterr()
    assert printed.err.count(SHOWN) == 2
    assert "\x1b" not in printed.err
    assert json.loads(printed.out)["error"]["message"] == ODD


@given(st.text(st.characters()))
def test_json_is_exact_but_harmless(text):
    from clipft.cli.console import _json

    printed = _json({"caption": text})
    assert json.loads(printed) == {"caption": text}
    printed.encode("utf-8")  # raises for a lone surrogate
    assert not set("\x1b\x9b\u202e") & set(printed)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_terminal_without_unicode_gets_every_character_as_an_escape(more):
    args = [sys.executable, "-m", "clipft", "settings", "--caption", "St\xfchle \u957f", *more]
    ended = subprocess.run(
        args, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=True
    )
    printed = ended.stdout.decode("ascii")
    if more:
        assert json.loads(printed)["settings"]["caption"] == "St\xfchle \u957f"
    else:
        assert "St\\xfchle \\u957f" in printed


def test_folders_with_brackets_are_packed_and_named_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("[bold]table", "chair [red]", "lamp[]", "x[\\]")):
        write_pair(tmp_path / "photos" / f"{name}.png", number, f"[/red] number {number}")
    assert run(["pack", "photos", "a[/v1]/cat [v2]", "--near", "-1"]) == 0
    printed = capsys.readouterr()
    assert "Shards in a[/v1]/cat [v2]" in printed.out
    assert "Next: clipft inspect 'a[/v1]/cat [v2]'" in printed.err
