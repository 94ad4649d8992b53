"""The documents match the code and the measured figures, and their commands work."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from clipft.cli.app import COMMANDS, app_with
from clipft.config.scenarios import SCENARIOS
from clipft.config.settings import Settings
from clipft.config.sources import load_settings
from clipft.data.demo.catalogue import write_catalogue
from tests.benchmarks.write_docs import DOCS, defined, summarised, written
from tests.conftest import write_shard
from tests.documents import PAGES, ROOT, SMALL, blocks, commands, run_page
from tests.write_reference import PAGES as REFERENCE_PAGES
from tests.write_reference import REFERENCE

BY_THE_SERVER = {"s3.md"}
"""Guides whose commands need a server and are run in tests/storage."""

GUIDES = [DOCS / "tutorial.md", *sorted((DOCS / "guides").glob("*.md"))]
RUN = [page for page in GUIDES if page.name not in BY_THE_SERVER]


def has_blocks(page: Path, slow: bool) -> bool:
    return any(block.runs and block.slow == slow for block in blocks(page))


@pytest.fixture
def readers_folder(tmp_path, monkeypatch) -> Path:
    """A folder with the files of a reader of the guides: images, a table, a general data set."""
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    write_catalogue(tmp_path / "rendered", 100, 3, lambda done, total: None)
    (tmp_path / "rendered" / "train").rename(tmp_path / "photos")
    with (tmp_path / "products.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption", "product_id"])
        for text in sorted((tmp_path / "photos").glob("*.txt")):
            image = text.with_suffix(".jpg").relative_to(tmp_path)
            rows.writerow([image, text.read_text(), json.loads(read(text))["id"]])
    write_shard(tmp_path / "general" / "train" / "00000.tar", range(2100, 2130))
    write_shard(tmp_path / "general" / "val" / "00000.tar", range(2000, 2030))
    return tmp_path


def _linked(text: str) -> list[str]:
    """Return the local paths that a Markdown page links to or shows."""
    found = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'src="([^"]+)"', text)
    return [target for target in found if "://" not in target]


def read(text: Path) -> str:
    return text.with_suffix(".json").read_text()


def with_catalogue(folder: Path, page: Path) -> None:
    """Provide the packed catalogue, unless the commands of the page make it."""
    if not re.search(r"clipft pack \./photos \./catalogue\s", page.read_text(encoding="utf-8")):
        write_shard(folder / "catalogue" / "train" / "00000.tar", range(60))
        write_shard(folder / "catalogue" / "val" / "00000.tar", range(1000, 1030))


@pytest.mark.parametrize("page", [p for p in RUN if has_blocks(p, False)], ids=lambda p: p.stem)
def test_the_commands_of_a_guide_work(page, readers_folder):
    with_catalogue(readers_folder, page)
    assert run_page(page)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in RUN if has_blocks(p, True)], ids=lambda p: p.stem)
def test_the_slow_commands_of_a_guide_work(page, readers_folder):
    with_catalogue(readers_folder, page)
    assert run_page(page, slow=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_options_named_in_the_documents_exist(page):
    """This includes commands that need a GPU, a bucket or another machine."""
    group = typer.main.get_command(app_with(COMMANDS))
    for words in commands(page):
        if not words or words[0] in {"--help", "COMMAND", "--install-completion"}:
            continue
        if "[--" in " ".join(words):  # a synopsis
            continue
        context = group.commands[words[0]].make_context(words[0], list(words[1:]))
        settings = {k: v for k, v in context.params.items() if k in Settings.model_fields}
        if words[0] == "export":
            settings.pop("precision", None)  # not the setting, but an option of the export
        load_settings({k: v for k, v in settings.items() if isinstance(v, str)}, environ={})


def built_site(folder: Path) -> "subprocess.CompletedProcess[str]":
    """Build the pages in a copy below ``folder``, as ``make docs`` does."""
    shutil.copytree(DOCS, folder / "docs", dirs_exist_ok=True)
    shutil.copy(ROOT / "mkdocs.yml", folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_pages_build_without_a_warning(tmp_path):
    built = built_site(tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    page = (tmp_path / "build" / "site" / "index.html").read_text(encoding="utf-8")
    for loaded in ('<script src="http', '<link rel="stylesheet" href="http', "fonts.g"):
        assert loaded not in page, "a page must not need the network"


@pytest.mark.parametrize("target", ["gone.md", "tutorial.md#gone"])
def test_a_dead_link_fails_the_build(target, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "new.md").write_text(f"# New\n\n[dead]({target})\n")
    assert built_site(tmp_path).returncode != 0


def test_the_navigation_has_each_page_once():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r": (\S+\.md)$", text, re.M)
    there = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted(there)


OUTSIDE = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "faults" / "README.md")


@pytest.mark.parametrize("page", sorted({*PAGES, *OUTSIDE}), ids=lambda p: p.stem)
def test_the_pages_link_to_existing_files(page):
    """The build itself does not check images, and only checks the pages in docs/."""
    for target in _linked(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_benchmark_tables_match_the_figures():
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert written(page) == page, "run tests/benchmarks/write_docs.py"


def test_all_figures_are_in_the_page():
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    for file in Path(DOCS / "benchmarks").glob("*.json"):
        assert f"<!-- {file.stem} -->" in page


def test_the_documented_definitions_match_the_printed_ones():
    page = (DOCS / "guides" / "evaluate.md").read_text(encoding="utf-8")
    assert defined(page) == page, "run tests/benchmarks/write_docs.py"
    assert "`map`" in page and "`top1`" in page


@pytest.mark.parametrize("name", REFERENCE_PAGES)
def test_the_reference_matches_the_program(name):
    page = (REFERENCE / name).read_text(encoding="utf-8")
    assert page == REFERENCE_PAGES[name](), "run python -m tests.write_reference"


def test_every_command_and_setting_is_in_the_reference():
    told, settings = (REFERENCE_PAGES[name]() for name in ("commands.md", "settings.md"))
    for name in COMMANDS:
        assert f"## clipft {name}\n" in told
    for name in Settings.model_fields:
        assert f"| `{name}` |" in settings
    assert "| `--val-share X` |" in told and "| `SRC` |" in told


def test_the_readme_has_the_benchmark_figures_and_stays_short():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert summarised(page) == page, "run tests/benchmarks/write_docs.py"
    assert len(page.split()) <= 800


def _shares(page: Path) -> dict[str, str]:
    """Return the share of parameters that each scenario trains, from the table of a page."""
    rows = re.findall(r"^\| `(\w+)`[^|]*\|[^|]*\| ([\d,]+) \|", page.read_text("utf-8"), re.M)
    return dict(rows)


def test_readme_and_scenarios_page_agree_on_the_parameters():
    told = _shares(ROOT / "README.md")
    assert told == _shares(DOCS / "guides" / "scenarios.md") and told.keys() == SCENARIOS.keys()


def test_the_tests_that_the_page_on_failures_names_exist():
    page = (ROOT / "tests" / "faults" / "README.md").read_text(encoding="utf-8")
    file = ""
    for path, name in re.findall(r"`([\w/]+\.py)?(?:::(\w+))?`", page):
        file = path or file
        if path or name:
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert not name or f"def {name}(" in text, f"{file}::{name}"
