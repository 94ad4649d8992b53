"""What is printed to a terminal, wide or narrow, and what goes to a file instead."""

import io
import shlex

import pytest
from rich.console import Console

from clipft.cli.console import say, say_command, wrapped
from clipft.cli.plain_table import FigureTable
from clipft.cli.progress import make_progress
from clipft.runs.records import EpochResult, Plan, StepResult

PLAN = Plan(
    *("dual_lora", "tiny", "training 81,920 parameters", 81920, 921, 1, 3, 15, 4, 64, 32),
    *("cpu", "fp32", "adamw"),
)
STEP = StepResult(2, 27, 3.5, 1e-4, 1.0, 64, 1.2, 0.1, True)
WORDS = ["clipft", "train", "--data-dir", "my catalogue", "--model", "tiny", "--no-pack", "--plan"]


def terminal(width: int, **more) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, **more)


def shown(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def plain(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width)


def drawn(width: int) -> list[str]:
    """The lines that a run prints on a terminal without colors."""
    console = terminal(width, color_system=None)
    display = make_progress(console, lambda: 2**30)
    run_two_epochs(display)
    return shown(console).splitlines()


def run_two_epochs(display) -> None:
    retrieval = {d: {"r@1": 0.04, "r@5": 0.1, "r@10": 0.2} for d in ("text_to_image",)}
    retrieval["image_to_text"] = retrieval["text_to_image"]
    display.epoch_ended(EpochResult(0, 0, None, 8.5, retrieval))
    display.epoch_ended(EpochResult(1, 15, 5.06, 4.9, retrieval, improved=True))


def test_lines_break_between_words_but_never_inside_a_command():
    text = "hint: fetch the shard again, or pack it with `clipft pack SRC OUT`, and then go on"
    lines = wrapped(text, 40)
    assert max(map(len, lines)) <= 40 and len(lines) > 2
    assert any("`clipft pack SRC OUT`," in line for line in lines)
    assert " ".join(map(str.strip, lines)) == text


def test_an_indented_line_stays_indented():
    assert wrapped("      checkpoint  runs/dual_lora_checkpoint.pt", 40) == [
        "      checkpoint",
        "        runs/dual_lora_checkpoint.pt",
    ]


def test_a_file_gets_one_line_without_control_codes():
    console = plain(40)
    say(
        console,
        "warning: [bold]brackets[/bold] and a line that is longer than forty columns are kept",
    )
    assert shown(console).splitlines() == [
        "warning: [bold]brackets[/bold] and a line that is longer than forty columns are kept"
    ]


@pytest.mark.parametrize("width", [30, 40, 60, 200])
def test_a_broken_command_can_be_copied_and_run(width):
    console = terminal(width, color_system=None)
    say_command(console, "Next: ", WORDS[1:])
    text = shown(console)
    assert shlex.split(text.removeprefix("Next: ").replace("\\\n", "")) == WORDS
    assert (text.count("\n") == 1) == (width > 80)


def test_no_color_turns_colors_off(monkeypatch):
    colored = terminal(80, color_system="standard")
    say(colored, "error: no")
    assert "\x1b[1;31m" in shown(colored)
    monkeypatch.setenv("NO_COLOR", "1")
    without = terminal(80, color_system="standard")
    say(without, "error: no")
    assert "31m" not in shown(without)


def test_epochs_are_a_table_from_80_columns_and_sentences_below():
    head, names, pretrained, first = drawn(80)
    assert max(map(len, (head, names, pretrained, first))) <= 80
    assert names.index("val") + 3 == pretrained.index("8.5000") + 6 == first.index("4.9000") + 6
    assert first.endswith("best so far") and head.count("->") == 2
    assert any(line.startswith("epoch 1/0: train loss 5.0600") for line in drawn(60))


def test_a_file_gets_each_epoch_as_one_self_explanatory_line():
    console = plain(40)
    run_two_epochs(make_progress(console, lambda: 2**30))
    pretrained, first = shown(console).splitlines()
    assert pretrained.startswith("pretrained: val loss 8.5000")
    assert "text -> image R@1 4.0%" in first


@pytest.mark.parametrize(("width", "figures"), [(60, 1), (80, 3), (140, 5)])
def test_figures_give_way_to_the_bar(width, figures):
    console = terminal(width, color_system=None)
    display = make_progress(console, lambda: 2**30)
    display.started(PLAN, 0)
    display.stepped(STEP)
    display.closed()
    last = [line for line in shown(console).splitlines() if "step 27/45" in line][-1]
    words = ("loss", "pairs/s", "wait", "GiB", "lr")
    assert sum(word in last for word in words) == figures
    assert (
        last.index("loss") - last.index("27/45") > 15 and len(last.removeprefix("\x1b[2K")) <= width
    )


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = terminal(80)
    display = make_progress(console, lambda: 2**30)
    display.started(PLAN, 0)
    display.stepped(STEP)
    display.closed()
    assert "epoch 2/3 step 27/45 loss 3.5000" in shown(console) and "\x1b[" not in shown(console)


def test_the_plan_uses_the_singular_for_one():
    console = terminal(80, color_system=None)
    display = make_progress(console, lambda: 2**30)
    display.started(PLAN, 0)
    display.closed()
    assert "1 validation pair;" in shown(console)


@pytest.mark.parametrize(("width", "lines"), [(40, 2), (120, 1)])
def test_intervals_move_below_their_values_on_a_narrow_terminal(width, lines):
    title = "Validation, paired: 228 pairs, a title that is longer than its table"
    table = FigureTable(title, "figure", "pretrained", "fine-tuned")
    table.add_row("R@10", "15.4% [10.9, 19.6]", "23.7% [18.3, 29.8]")
    console = terminal(width, color_system=None)
    console.print(table)
    rows = [line for line in shown(console).splitlines() if "%" in line or "[" in line]
    assert len(rows) == lines
    assert all("[10.9, 19.6]" in row and "[18.3, 29.8]" in row for row in rows[-1:])
