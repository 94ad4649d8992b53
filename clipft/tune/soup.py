"""The last candidate of a search: a soup, the mean of the weights of its best runs."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipft.config.settings import Settings
from clipft.core.common import Note, counted
from clipft.core.errors import UsageError
from clipft.core.files import read_json, write_json
from clipft.tune.confirm import ConfirmingRun
from clipft.tune.search import Search

if TYPE_CHECKING:
    from clipft.evaluation.soup.mixing import Member

FOLDER = "soup"
_STATE = "souped.json"
_MOST_MEMBERS = 6

MakeSoup = Callable[[Sequence[Path], Path, Settings, Note], Mapping[str, Any] | None]
"""Averages runs into a folder, as ``greedy_soup`` does."""


def souped(
    search: Search, runs: Sequence[ConfirmingRun], variant: str, make: MakeSoup
) -> dict[str, Any] | None:
    """Average the runs with the chosen settings and the next best trials.

    The result is stored, so that nothing is measured twice.

    Args:
        search: the search whose trials are averaged.
        runs: the confirming runs that have ended.
        variant: the variant that was chosen.
        make: makes the soup.

    Returns:
        The content of soup.json with its ``folder``; None if no run improves the best one.
    """
    search.check_stop()
    members, state = _members(search, runs, variant), search.study.folder / _STATE
    key = [str(member) for member in members]
    saved = read_json(state)
    if saved and saved.get("of") == key:
        return saved["found"]  # type: ignore[no-any-return]
    target = search.study.folder / FOLDER
    shutil.rmtree(target, ignore_errors=True)  # from a search with a smaller budget
    made = make(members, target, search.space.base.values, search.note)
    found = {**made, "folder": str(target)} if made else None
    write_json(state, {"of": key, "found": found}, indent=1)
    return found


def _members(search: Search, runs: Sequence[ConfirmingRun], variant: str) -> list[Path]:
    """Return the folders of the runs to average. The first one has the chosen settings."""
    chosen = [run.folder for run in runs if run.variant == variant and not run.failed]
    finished = [trial for trial in search.study.trials() if trial.state == "finished"]
    finished.sort(key=lambda trial: (-(trial.recall or 0.0), trial.number))
    others = [
        search.study.home(trial.number) / search.space.settings(trial.changes).values.scenario
        for trial in finished
    ]
    known = {folder.resolve() for folder in chosen}
    return [*chosen, *(each for each in others if each.resolve() not in known)][:_MOST_MEMBERS]


def greedy_soup(
    folders: Sequence[Path], target: Path, settings: Settings, note: Note
) -> dict[str, Any] | None:
    """Average the runs that have the same base model and kind of weights as the first one.

    Args:
        folders: the folders of the runs.
        target: the folder that receives the soup.
        settings: the settings with which all runs are measured.
        note: receives a sentence.

    Returns:
        The content of soup.json; None if no run improves the best one.

    Raises:
        ClipftError: a checkpoint or the pairs cannot be read, or the disk is full.
    """
    from clipft.evaluation.soup.make import make_soup

    members = _mixable(folders, settings)
    if len(members) < 2:
        return None
    note(f"averaging the weights of up to {counted(len(members), 'run')} ...")
    soup = make_soup(members, uniform=False, note=lambda text: None)
    if len(soup.kept) < 2:
        return None
    soup.write(target)
    return soup.to_dict()


def _mixable(folders: Sequence[Path], settings: Settings) -> "list[Member]":
    from clipft.evaluation.soup.mixing import Member, check_mixable
    from clipft.runs.checkpoint import check_checkpoint
    from clipft.runs.places import find_checkpoint

    members, contents = list[Member](), list[dict[str, Any]]()
    for folder in folders:
        checkpoint = find_checkpoint(folder, settings)
        content = check_checkpoint(checkpoint)
        # A trial may add captions in training, but all trials are measured with the user's captions
        own = Settings(**{**content["settings"], "caption": settings.caption})
        member = Member(folder, checkpoint, own)
        try:
            check_mixable([*members, member], [*contents, content])
        except UsageError:
            continue  # other weights, such as those of `full`
        members.append(member)
        contents.append(content)
    return members
