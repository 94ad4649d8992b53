"""What train, evaluate, zero-shot, ablate and tune answer on one screen of 24 lines and 80 columns.

Each says its verdict in a sentence, shows the figures that matter, and names where to find more.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import RenderableType

from clipft.cli.console import Output
from clipft.config.fields import Section, setting

_VARIANTS, _LONG_VARIANTS, _LONG = 6, 4, 16
"""Variants of an ablation that have room on the screen: fewer if their names have more characters
than can stand beside three figures, which then take two lines."""

_TRIALS, _MATTERED = 6, 5
"""Trials of a search, and settings that mattered in it, that have room on the screen."""


class FigureOptions(Section):
    """What a command shows besides its main figures."""

    title = "Output"
    all: bool = setting(False, "Show every figure, not only the main ones.")
    definitions: bool = setting(False, "Explain the figures.")


def comparison_answer(
    title: str,
    compared: dict[str, Any],
    options: FigureOptions,
    general: dict[str, Any] | None = None,
    model: str = "pretrained",
) -> Iterator[RenderableType]:
    """Answer what fine-tuning did, or what a single model can do.

    Args:
        title: the name of the pairs, such as ``Validation``.
        compared: ``Comparison.to_dict``, the content of evaluation.json.
        options: which figures to show.
        general: the same on a general set.
        model: the heading of the first model, the only one if nothing was fine-tuned.
    """
    from clipft.cli.tables import (
        accuracy_table,
        category_table,
        comparison_tables,
        main_table,
    )
    from clipft.metrics.figures import GENERAL_SET, counted_pairs, figure_tables, main_rows, verdict

    other = figure_tables([], general) if general else None
    rows = main_rows(figure_tables([], compared), other)
    yield verdict(rows[0])
    accuracies = accuracy_table(compared)
    if accuracies:
        yield accuracies
    if not options.all:
        yield main_table(f"{title}: {counted_pairs(compared['before'])}", rows, model)
        return
    yield from comparison_tables(title, compared, model)
    by_category = category_table(compared)
    if by_category:
        yield by_category
    if general:
        yield from comparison_tables(GENERAL_SET.capitalize(), general)


def footnotes(compared: dict[str, Any], options: FigureOptions) -> Iterator[RenderableType]:
    """Explain the mark of unclear differences and, if asked for, every figure."""
    from clipft.cli.tables import UNCLEAR, definitions

    if compared["after"]:
        yield UNCLEAR
    if options.definitions:
        yield definitions(compared)


def ablation_answer(content: dict[str, Any], options: FigureOptions) -> Iterator[RenderableType]:
    """Answer which variant is best; ``content`` is that of the ablation's report.json."""
    from clipft.ablation.page import COSTS, EXPLANATION, FIGURES, ablation_rows, ranked
    from clipft.cli.plain_table import rows_table
    from clipft.cli.tables import UNCLEAR, UNCLEAR_AMONG_SEVERAL, variants_table

    yield content["verdict"]
    variants = ranked(content)
    most = _VARIANTS if max(len(v["name"]) for v in variants) <= _LONG else _LONG_VARIANTS
    yield variants_table(variants, None if options.all else most)
    yield UNCLEAR_AMONG_SEVERAL if len(variants) > 2 else UNCLEAR
    if options.all:
        tested = any(v["test_mean_recall"]["mean"] is not None for v in content["variants"])
        shown = [name for name in FIGURES if tested or name != "test recall"]
        figures = "Figures in %, mean ± standard deviation over the seeds"
        for title, columns in ((figures, shown), ("Costs", COSTS)):
            yield rows_table(title, columns, ablation_rows(content, columns))
    if options.definitions:
        yield EXPLANATION


def tune_answer(content: dict[str, Any], all_trials: bool) -> Iterator[RenderableType]:
    """Answer what a search found; ``content`` is that of tune.json."""
    from clipft.cli.tables import trials_heading, trials_table
    from clipft.tune.summary import ranked

    yield content["verdict"]
    yield trials_heading(content["trials"])
    yield trials_table(ranked(content["trials"]), None if all_trials else _TRIALS)
    if content["mattered"]:
        shares = [f"{name} {share:.0%}" for name, share in content["mattered"].items()]
        yield f"Most important settings (PED-ANOVA): {', '.join(shares[:_MATTERED])}."


def say_more(out: Output, options: FigureOptions, report: str = "", command: str = "") -> None:
    """Name the ways to more than the main figures.

    Args:
        out: the terminal.
        options: what has been shown already.
        report: what report.html shows; "" if there is none.
        command: the command that has the options, if it is not this one.
    """
    flags: Sequence[tuple[bool, str]] = (
        (options.all, "--all shows every figure"),
        (options.definitions, "--definitions explains them"),
    )
    more = [words for shown, words in flags if not shown]
    if more and command:
        more[0] = f"{command} {more[0]}"
    more += [f"report.html shows {report}"] if report else []
    if more:
        out.note(f"More: {'; '.join(more)}.")
