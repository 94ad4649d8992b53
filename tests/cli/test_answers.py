"""Every answer fits a screen of 24 lines and 80 columns, and no width breaks a word."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from clipft.ablation.summary import ablation_content
from clipft.cli.answers import FigureOptions, ablation_answer, comparison_answer, footnotes
from clipft.cli.commands import ablate, evaluate
from clipft.cli.console import Output, say
from clipft.cli.plain_table import FigureTable, rows_table
from clipft.cli.running import _show_result
from clipft.config.settings import Settings
from clipft.core.files import write_json
from clipft.metrics.figures import MAIN_FIGURES, figure_tables, main_rows, verdict
from clipft.report.overview import main_figures
from clipft.runs.records import EpochResult
from clipft.training.state import TrainResult
from tests.ablation.test_summary import a_run, figures
from tests.evaluations import evaluation_json

SHORT, ALL = FigureOptions(), FigureOptions(all=True, definitions=True)
WIDTHS = (60, 80, 140)
SCENARIOS = ("zero_shot", "linear_probe", "dual_lora", "vision_lora", "text_lora", "full")
CLASSIFIED = {
    "images": 120, "labels": 12, "templates": ["a {}"] * 7, "top1": 0.442, "top5": 0.8,
    "top1_interval": {"low": 0.36, "high": 0.52}, "mean_per_class_recall": 0.401,
    "linear": None,
    "confused": [{"label": "side table", "taken_for": "stool", "images": 3, "share": 0.2}] * 9,
}  # fmt: skip


def ablation(names=SCENARIOS) -> dict:
    runs = [
        a_run(name, seed, None if name == "zero_shot" else 0.3 + at / 50 + seed * at / 200)
        for at, name in enumerate(names)
        for seed in ((1,) if name == "zero_shot" else (1, 2, 3))
    ]
    return ablation_content("./x", {"runs": runs, "settings": []})


def compared(options, **more):
    found = evaluation_json(**more)
    general = None if found["after"] is None else found
    yield from comparison_answer("Validation", found, options, general)
    yield from footnotes(found, options)


def zero_shot(options):
    found = evaluation_json(after=None)
    settings = Settings(label_field="type")
    options = evaluate.ZeroShotOptions(**options.model_dump())
    return evaluate._single_model("Test", found, CLASSIFIED, settings, options)


def rows(options):
    wide = [["a label of several words", "1,234,567", "unbreakable-but-short", "some more words"]]
    yield rows_table("Title", ["pairs", "file", "reason"], wide * 3, texts={1, 2})


ANSWERS = {
    "gain": compared,
    "loss": lambda options: compared(options, before=1.0, after=0.3),
    "no difference": lambda options: compared(options, before=0.3, after=0.31),
    "one model": lambda options: compared(options, after=None),
    "zero-shot": zero_shot,
    "ablation": lambda options: ablation_answer(ablation(), options),
    "grid": lambda options: ablation_answer(
        ablation([f"dual_lora lr=0.000{n} lora_r=16" for n in range(1, 9)]), options
    ),
    "rows": rows,
}


def shown(answer, width: int) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    for part in answer:
        say(console, part) if isinstance(part, str) else console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("options", [SHORT, ALL], ids=["short", "all"])
def test_no_word_is_broken_at_any_width(name, options):
    whole = set(shown(ANSWERS[name](options), 1000).split())
    for width in WIDTHS:
        text = shown(ANSWERS[name](options), width)
        assert max(map(len, text.splitlines())) <= width
        broken = {word for word in text.split() if set(word) != {"─"}} - whole
        assert not broken, f"at {width} columns"


@pytest.mark.parametrize("name", ANSWERS)
def test_every_answer_leaves_room_for_its_closing_lines(name):
    """More, Made and Next take five lines on a terminal of 80 columns, or a few more."""
    assert len(shown(ANSWERS[name](SHORT), 80).splitlines()) <= 19


@pytest.fixture
def terminal(monkeypatch, capsys, tmp_path):
    """Let the program believe that it prints to a terminal of 80 columns; return its lines."""
    for name, value in (("FORCE_COLOR", "1"), ("NO_COLOR", "1"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.chdir(tmp_path)  # paths as users type them, not those of pytest

    def lines() -> list[str]:
        captured = capsys.readouterr()
        return [*captured.out.splitlines(), *captured.err.splitlines()]

    return lines


def epoch(number: int, recall: float) -> EpochResult:
    return EpochResult(number, number * 10, 3.0, 2.5, figures(recall), improved=number > 0)


def finished_run(after: float) -> TrainResult:
    folder = Path("checkpoints", "dual_lora")
    folder.mkdir(parents=True)
    (folder / "report.html").touch()
    checkpoint = folder.with_name("dual_lora_checkpoint.pt")
    checkpoint.touch()
    write_json(folder / "evaluation.json", evaluation_json(after=after))
    return TrainResult(
        before=epoch(0, 0.2),
        best=epoch(12, 0.2 if after < 0.3 else 0.4),
        steps=300,
        stopped_early=True,
        skipped_pairs=3,
        folder=folder,
        checkpoint=checkpoint,
    )


@pytest.mark.parametrize("after", [1.0, 0.2], ids=["gain", "loss"])
def test_train_ends_with_one_screen(terminal, after):
    result = finished_run(after)
    _show_result(result, Settings(data_dir=Path("catalogue")), Output(False), SHORT)
    lines = terminal()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80, lines
    text = "\n".join(lines)
    start = "Fine-tuning helped: mean recall rose" if after == 1 else "Fine-tuning hurt"
    assert lines[0].startswith(start)
    assert "Best epoch: 12" in text and "skipped 3 bad pairs" in text
    assert "Next: clipft evaluate checkpoints/dual_lora --data-dir catalogue" in text
    assert ("note: no clear gain" in text) == (after < 1)


def test_train_shows_every_figure_and_what_it_means_if_asked(terminal):
    result = finished_run(1.0)
    _show_result(result, Settings(), Output(False), ALL)
    text = "\n".join(terminal())
    assert "nDCG@10" in text and "Definitions" in text and "More:" in text


def test_ablate_ends_with_one_screen(terminal):
    ablate._show(ablation(), Path("ablation"), SHORT, Output(False))
    lines = terminal()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80, lines
    assert lines[0].startswith("full is best: mean recall rose from 20.0% to ")
    assert any(line.startswith("Next: clipft evaluate") for line in lines)


def test_a_large_grid_names_how_many_variants_it_does_not_show():
    text = shown(ANSWERS["grid"](SHORT), 80)
    assert "4 more variants: --all" in text
    assert "more variant" not in shown(ANSWERS["grid"](ALL), 80)


def test_the_terminal_and_the_report_show_the_same_figures_in_the_same_words():
    """The names are pinned here: whoever changes one changes it everywhere."""
    tables = figure_tables([], evaluation_json())
    chosen = main_rows(tables)
    assert [row["name"] for row in chosen] == [
        "mean recall",
        "text → image R@1",
        "text → image R@10",
        "text → image median rank",
        "image → text R@1",
        "image → text R@10",
    ]
    assert tuple(row["key"] for row in chosen) == MAIN_FIGURES
    page = main_figures(tables, None)
    assert [row.name for row in page.rows] == [
        row["name"] for row in chosen if row["unit"] == "percent"
    ]
    text = shown(compared(SHORT), 80)
    for words in ("mean recall", "R@1", "R@10", "median rank", "pretrained", "fine-tuned"):
        assert words in text
    glossary = Path(__file__).parents[2].joinpath("docs", "faq.md").read_text(encoding="utf-8")
    headings = {line[4:].lower() for line in glossary.splitlines() if line.startswith("### ")}
    assert {"fine-tuned, pretrained", "upper bound", "mean recall", "recall at k"} <= headings
    assert {"difference", "general set", "median rank", "interval"} <= headings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": 0.1, "low": 0.02, "high": 0.2, "clear": True}, "Fine-tuning helped: "),
        ({"value": -0.1, "low": -0.2, "high": -0.02, "clear": True}, "Fine-tuning hurt: "),
        ({"value": 0.1, "low": -0.1, "high": 0.2, "clear": False}, "No clear difference: "),
        ({"value": 0.1}, "Mean recall went from 20.0% to 30.0% (+10.0 points)."),
    ],
)
def test_a_verdict_says_only_what_the_interval_allows(change, words):
    row = {"before": {"value": 0.2}, "after": {"value": 0.3}, "change": change}
    assert verdict(row).startswith(words)
    assert verdict({**row, "after": None}) == "Mean recall is 20.0%."


def test_user_text_is_neither_markup_nor_broken_at_brackets():
    table = rows_table("Found", ["path"], [["a [b] [/c]", "x [1] y"]], texts={0})
    assert "a [b] [/c]" in shown([table], 40) and "x [1] y" in shown([table], 40)


def test_a_word_that_is_longer_than_the_terminal_is_broken_rather_than_lost():
    table = FigureTable("Paths", "file", "size")
    table.add_row("/" + "x" * 90, "7 MiB")
    text = shown([table], 60)
    assert text.count("x") == 90 and max(map(len, text.splitlines())) <= 60


def test_more_is_not_said_where_everything_is_shown(capsys):
    from clipft.cli.answers import say_more

    say_more(SimpleNamespace(note=print), ALL)
    assert capsys.readouterr().out == ""
