"""The documents say what the code and the figures say."""

from pathlib import Path

from tests.benchmarks.write_docs import DOCS, defined, written


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
