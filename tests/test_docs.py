"""The documents say what the code and the figures say."""

from pathlib import Path

import pytest

from clipft.cli.app import COMMANDS
from clipft.settings import Settings
from tests.benchmarks.write_docs import DOCS, defined, written
from tests.write_reference import PAGES, REFERENCE


def test_the_benchmarks_tables_are_those_of_the_figures():
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert written(page) == page, "run tests/benchmarks/write_docs.py"


def test_all_figures_stand_in_the_page():
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    for file in Path(DOCS / "benchmarks").glob("*.json"):
        assert f"<!-- {file.stem} -->" in page


def test_the_definitions_in_the_documents_are_those_that_are_printed():
    page = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    assert defined(page) == page, "run tests/benchmarks/write_docs.py"
    assert "`map`" in page and "`top1`" in page


@pytest.mark.parametrize("name", PAGES)
def test_the_reference_is_what_the_program_says(name):
    page = (REFERENCE / name).read_text(encoding="utf-8")
    assert page == PAGES[name](), "run python -m tests.write_reference"


def test_every_command_and_setting_stands_in_the_reference():
    commands, settings = (PAGES[name]() for name in ("commands.md", "settings.md"))
    for command in COMMANDS:
        assert f"## clipft {command.__name__.replace('_', '-')}\n" in commands
    for name in Settings.model_fields:
        assert f"| `{name}` |" in settings
    assert "| `--val-share X` |" in commands and "| `SRC` |" in commands
