"""``clipft soup``."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipft.cli.console import Output, end
from clipft.cli.options import command
from clipft.cli.s3_data import LOCATION_SETTINGS, bring_named_data
from clipft.config.fields import Section, setting
from clipft.config.settings import EVALUATION_OVERRIDES
from clipft.config.sources import LoadedSettings
from clipft.core.errors import UsageError

if TYPE_CHECKING:
    from clipft.evaluation.soup.make import Soup
    from clipft.evaluation.soup.mixing import Member

_SHOWN = 8
"""Runs that have room on the screen."""


class SoupOptions(Section):
    title = "Soup"
    uniform: bool = setting(
        False, "Average all runs, even those that clearly lower the validation result."
    )


@command(
    *EVALUATION_OVERRIDES, *LOCATION_SETTINGS, "model", "output_dir", "seed", options=SoupOptions
)
def soup(
    loaded: LoadedSettings,
    options: SoupOptions,
    out: Output,
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Two or more run folders (their best epochs) or checkpoints."
        ),
    ],
) -> None:
    """Average the weights of several runs into one model.

    The runs are tried in the order of their mean recall on the validation pairs, and a run is kept
    unless the soup with it is clearly worse than the best so far. The result is then compared with
    the best run and with the pretrained model, on the test pairs if there are any.

    All runs must have begun with the same model and have trained on the same pairs. Whole weights
    are averaged one by one. LoRA adapters are joined: the rank of the soup is the sum of their
    ranks, and its change to the weights is exactly the mean of theirs.

    --output-dir receives best.pt and soup.json, and evaluate, search and export take it like a run.

    Examples:

        clipft soup ./seed-1/dual_lora ./seed-2/dual_lora --output-dir ./soup
        clipft soup seed-1/dual_lora seed-2/dual_lora --output-dir soup --uniform
    """
    if loaded.origins["output_dir"] == "default":
        raise UsageError("no folder for the soup", "name it with --output-dir OUT")
    target = loaded.values.output_dir
    members = _members(runs, loaded, target)
    bring_named_data(loaded, out)
    from clipft.cli.preflight import import_libraries

    import_libraries()
    from clipft.evaluation.soup.make import make_soup

    found = make_soup(members, options.uniform, out.note)
    found.write(target)
    result = found.to_dict()
    out.result({**result, "folder": str(target)}, *_answer(found, result))
    end(out, {"soup": target / "best.pt"}, ("export", target, "./my-clip"))


def _members(runs: list[Path], loaded: LoadedSettings, target: Path) -> "list[Member]":
    """Check the runs and the pairs to measure them on, without torch."""
    from clipft.cli.preflight import check_evaluation_pairs
    from clipft.core.files import check_writable
    from clipft.evaluation.soup.mixing import Member, check_mixable
    from clipft.models.source import check_model
    from clipft.runs.checkpoint import check_checkpoint
    from clipft.runs.folder import RunPaths
    from clipft.runs.places import find_checkpoint, saved_settings

    if RunPaths(target).best.exists() and not RunPaths(target).soup.exists():
        raise UsageError(
            f"{target} holds a run, whose weights the soup would replace",
            "name another folder with --output-dir",
        )
    members, contents = list[Member](), []
    for run in runs:
        checkpoint = find_checkpoint(run, loaded.values)
        content = check_checkpoint(checkpoint)
        settings = saved_settings(content, loaded, (*EVALUATION_OVERRIDES, "model", "seed"))
        if any(checkpoint.samefile(member.checkpoint) for member in members):
            raise UsageError(f"{run} is named twice", "name each run once")
        members.append(Member(run, checkpoint, settings))
        contents.append(content)
    if len(members) < 2:
        raise UsageError("a soup needs at least two runs", "name more runs")
    check_mixable(members, contents)
    for split in ("val", "auto"):
        check_evaluation_pairs(members[0].settings, split)
    check_model(members[0].settings.model)
    check_writable(RunPaths(target).soup)
    return members


def _answer(found: "Soup", result: dict[str, Any]) -> Iterator[Any]:
    from rich.text import Text

    from clipft.cli.plain_table import FigureTable
    from clipft.cli.tables import UNCLEAR, signed, value
    from clipft.evaluation.evaluator import SPLIT_TITLES
    from clipft.metrics.figures import RECALL_NAME

    pairs = SPLIT_TITLES[found.split].lower()
    chosen = found.split == "val" and not found.uniform
    which = ", on which the runs were chosen" if chosen else ""
    yield _verdict(result, f"the {pairs} pairs{which}")
    table = FigureTable(
        f"On the {pairs} pairs: {found.soup.pairs:,}",
        *("model", RECALL_NAME, "to the best run", "to pretrained"),
    )
    best, pretrained = result["best_member"]["recall"], result["pretrained"]["recall"]
    table.add_row("pretrained", value(pretrained), "", "")
    table.add_row("best run", value(best), "", signed(result["best_member_to_pretrained"]))
    changes = (signed(result["to_best_member"]), signed(result["to_pretrained"]))
    table.add_row(f"soup of {len(found.kept)}", value(result["soup"]["recall"]), *changes)
    yield table
    tried = FigureTable(
        "Choice on the validation pairs", *("run", RECALL_NAME, "soup with it", "to the best", "")
    )
    runs = [os.path.abspath(each["run"]) for each in result["members"]]
    common = os.path.commonpath(runs)
    for run, each in zip(runs[:_SHOWN], result["members"], strict=False):
        with_it = "" if each["soup_recall"] is None else value(each["soup_recall"])
        change = signed(each["change"]) if each["change"] else ""
        word = "kept" if each["kept"] else "left out"
        name = os.path.relpath(run, common)
        tried.add_row(Text(name), value(each["recall"]), with_it, change, word)
    yield tried
    yield UNCLEAR


def _verdict(result: dict[str, Any], pairs: str) -> str:
    kept, members = len(result["kept"]), len(result["members"])
    change = result["to_best_member"]
    soup, best = (100 * result[name]["recall"] for name in ("soup", "best_member"))
    if kept == 1:
        return (
            f"No other run improves the best one, so the soup is {result['kept'][0]} alone: mean "
            f"recall {best:.1f}%."
        )
    moved = f"mean recall {soup:.1f}% instead of {best:.1f}%"
    if change.get("low") is not None:
        low, high = (100 * change[end] for end in ("low", "high"))
        moved += f" ({100 * change['value']:+.1f} points, 95% interval {low:+.1f} to {high:+.1f})"
    words = {None: "is not compared with", False: "is not clearly different from"}
    clear = "is better than" if change["value"] > 0 else "is worse than"
    verdict = words.get(change.get("clear"), clear)
    return f"The soup of {kept} of {members} runs {verdict} its best run: {moved}, on {pairs}."
