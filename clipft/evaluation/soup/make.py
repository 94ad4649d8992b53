"""Model soups: the mean of the weights of several runs (Wortsman et al. 2022, arXiv:2203.05482).

The greedy soup starts with the run of the highest validation recall and tries to add the others in
the order of their recall. A run is kept unless it makes the soup clearly worse than the best so
far, by the paired interval of the difference. Test pairs are not used for this, so the final result
on them is fair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipft.core.common import Note
from clipft.core.errors import ModelError
from clipft.core.files import write_json
from clipft.embedding.load import LoadedModel, load_model
from clipft.evaluation.evaluator import EvaluationSet
from clipft.evaluation.soup.mixing import Member, mixed_settings, mixed_state
from clipft.evaluation.wise_ft import TRAINING_KEYS
from clipft.metrics.retrieval import Evaluation, recall_difference
from clipft.runs.checkpoint import check_base_model, load_checkpoint, save_checkpoint
from clipft.runs.folder import RunPaths


@dataclass(frozen=True)
class Tried:
    """A run, its own validation recall, and the result of adding it to the soup.

    ``recall`` is that of the soup with the run, and ``change`` the difference to the best so far.
    Both are None for the first run, and if all runs are used without a choice.
    """

    member: Member
    own: float
    kept: bool
    recall: float | None = None
    change: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": str(self.member.run),
            "checkpoint": str(self.member.checkpoint),
            "recall": self.own,
            "kept": self.kept,
            "soup_recall": self.recall,
            "change": self.change,
        }


@dataclass(frozen=True)
class Soup:
    """A mixture and its figures, on the pairs of ``split``."""

    tried: list[Tried]
    split: str
    pretrained: Evaluation
    best: Evaluation
    soup: Evaluation
    uniform: bool
    content: dict[str, Any] = field(repr=False)

    @property
    def kept(self) -> list[Member]:
        return [tried.member for tried in self.tried if tried.kept]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of soup.json."""
        figures = {
            name: {"recall": found.recall(), **found.retrieval.to_dict()}
            for name, found in (
                ("pretrained", self.pretrained),
                ("best_member", self.best),
                ("soup", self.soup),
            )
        }
        return {
            "uniform": self.uniform,
            "members": [tried.to_dict() for tried in self.tried],
            "kept": [str(member.run) for member in self.kept],
            "split": self.split,
            **figures,
            "to_best_member": recall_difference(self.soup, self.best),
            "to_pretrained": recall_difference(self.soup, self.pretrained),
            "best_member_to_pretrained": recall_difference(self.best, self.pretrained),
        }

    def write(self, folder: Path) -> None:
        """Write best.pt and soup.json into a folder.

        Raises:
            StorageError: the disk is full or cannot be written to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(RunPaths(folder).best, self.content)
        write_json(RunPaths(folder).soup, self.to_dict(), indent=2, ascii_only=False)


def make_soup(members: Sequence[Member], uniform: bool, note: Note) -> Soup:
    """Average runs, and compare the result with the best member and the pretrained model.

    Args:
        members: at least two members that ``check_mixable`` accepts; their settings are those of
            the evaluation.
        uniform: use all members instead of choosing by the validation pairs.
        note: receives a sentence for each run.

    Raises:
        DataError: there are no pairs to measure on, or they cannot be read.
        ModelError: a checkpoint does not fit its pretrained model.
    """
    settings = members[0].settings
    pretrained = load_model(settings, pretrained=True)
    check_base_model(load_checkpoint(members[0].checkpoint), pretrained.identity, ModelError)
    validation = EvaluationSet.open(pretrained.base.inputs, settings, "val")
    shown = EvaluationSet.open(pretrained.base.inputs, settings)
    measured = [(validation.evaluate(_load([m])).evaluation, m) for m in members]
    measured.sort(key=lambda found: -found[0].recall())
    for evaluation, member in measured:
        note(f"{member.run}: validation recall {evaluation.recall():.1%}")
    tried = list(_take_all(measured) if uniform else choose(measured, validation, note))
    kept = [each.member for each in tried if each.kept]
    mixture = _load(kept)
    return Soup(
        tried=tried,
        split=shown.split,
        pretrained=shown.evaluate(pretrained).evaluation,
        best=shown.evaluate(_load(kept[:1])).evaluation,
        soup=shown.evaluate(mixture).evaluation,
        uniform=uniform,
        content=_content(kept, mixture),
    )


def _take_all(measured: Sequence[tuple[Evaluation, Member]]) -> Iterator[Tried]:
    for evaluation, member in measured:
        yield Tried(member, evaluation.recall(), kept=True)


def choose(
    measured: Sequence[tuple[Evaluation, Member]], validation: EvaluationSet, note: Note
) -> Iterator[Tried]:
    """Try to add each member, the best first.

    Args:
        measured: the members and their figures on the validation pairs, the best first.
        validation: the pairs on which each soup is measured.
        note: receives a sentence for each member but the first.
    """
    best, first = measured[0]
    yield Tried(first, best.recall(), kept=True)
    kept = [first]
    for own, member in measured[1:]:
        found = validation.evaluate(_load([*kept, member])).evaluation
        change = recall_difference(found, best)
        keep = change["value"] >= 0 or change.get("clear") is False
        note(f"with {member.run}: {found.recall():.1%}, {'kept' if keep else 'left out'}")
        yield Tried(member, own.recall(), keep, found.recall(), change)
        if keep:
            kept.append(member)
            best = max(best, found, key=lambda one: one.recall())


def _load(members: Sequence[Member]) -> LoadedModel:
    """Load the mean of ``members``."""
    loaded = load_model(mixed_settings(members))
    start = loaded.model.trainable_state()
    loaded.model.load_trainable_state(mixed_state(members, start))
    return loaded


def _content(members: Sequence[Member], mixture: LoadedModel) -> dict[str, Any]:
    """Return a checkpoint of the mean of ``members``: weights without a state to resume."""
    first = load_checkpoint(members[0].checkpoint)
    copied = {key: value for key, value in first.items() if key not in TRAINING_KEYS}
    changed = {
        "model_state_dict": mixture.model.trainable_state(),
        "settings": mixed_settings(members).model_dump(mode="json"),
        "soup_of": [str(member.run) for member in members],
        "best": None,  # the figures of the first run's best epoch do not apply
        "finished": True,  # there is nothing to resume
    }
    return {**copied, **changed}
