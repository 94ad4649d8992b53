"""The labels and prompts of a zero-shot classification, checked against the labels in the data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from clipft.config.prompts import lines_of, prompt_templates
from clipft.core.common import counted
from clipft.core.errors import UsageError, did_you_mean, sentences
from clipft.core.files import did_you_mean_path
from clipft.core.text import folded

_MISSPELLED = 0.8
"""A label that no pair has is a typo if its similarity (0 to 1) to a label in the data is higher.

A list may have labels that no pair has: ``armchair`` if the catalogue has ``chair``.
"""
_LISTED = 5


@dataclass(frozen=True)
class ChosenLabels:
    """Labels and prompt templates, and remarks for the user about the labels."""

    labels: tuple[str, ...]
    templates: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {folded(label): number for number, label in enumerate(self.labels)}

    def number(self, label: str | None) -> int | None:
        """Return the position of a pair's label, or None if it is not one of these."""
        return self._numbers.get(folded(label)) if label else None


def choose_labels(
    labels: str | None, templates: str, found: Sequence[str | None], field: str
) -> ChosenLabels | None:
    """Choose the labels to classify by, and the templates of their prompts.

    Two labels are the same if they differ only in case or in how an accent is encoded.

    Args:
        labels: labels separated by commas, or a file with one per line; None takes those in the
            data.
        templates: a name in ``TEMPLATES``, a template with {}, or a file with one per line.
        found: the label of each pair, None where it has none.
        field: the metadata field that ``found`` comes from, for messages.

    Returns:
        None if no labels are given and no pair has one.

    Raises:
        UsageError: there is no such file, no pair has one of the labels, one of them is
            misspelled, or a template has no {}.
    """
    prompts = prompt_templates("--templates", templates)
    in_data = _by_folded(sorted({name for name in found if name}))
    if not labels:
        return ChosenLabels(tuple(in_data.values()), prompts) if in_data else None
    chosen = _by_folded(_labels(labels, in_data))
    if not in_data:
        raise UsageError(
            f"--labels cannot be used: no pair has a label in its metadata field {field!r}",
            "name the field that holds the labels with --label-field",
        )
    missing = [label for key, label in chosen.items() if key not in in_data]
    unnamed = [label for key, label in in_data.items() if key not in chosen]
    for label in missing:
        meant = did_you_mean(label, unnamed, cutoff=_MISSPELLED)
        if meant or len(missing) == len(chosen):
            meant = meant or did_you_mean(label, unnamed)
            raise UsageError(
                f"--labels: no pair has the label {label!r} in its metadata field {field!r}",
                sentences(meant, f"the labels in the data are {_listed(list(in_data.values()))}"),
            )
    notes = []
    if missing:
        notes.append(
            f"{len(missing)} of {counted(len(chosen), 'label')} were not found on any pair: "
            f"{_listed(missing)}"
        )
    if unnamed:
        left_out = sum(folded(name) not in chosen for name in found if name)
        notes.append(
            f"{counted(left_out, 'pair')} with other labels ({_listed(unnamed)}) are left out"
        )
    return ChosenLabels(tuple(chosen.values()), prompts, tuple(notes))


def _labels(given: str, in_data: dict[str, str]) -> list[str]:
    """Read ``--labels``. Text without a comma is a file name, unless it is the label of a pair."""
    if (lines := lines_of("--labels", given)) is not None:
        return lines
    labels = [label.strip() for label in given.replace(",", "\n").splitlines() if label.strip()]
    if len(labels) == 1 and folded(labels[0]) not in in_data:
        meant = did_you_mean_path(Path(given)) or did_you_mean(given, in_data.values())
        raise UsageError(
            f"--labels {given}: there is no such file, and no pair has this label",
            sentences(meant, "give labels separated by commas, or a file with one label per line"),
        )
    return labels


def _by_folded(labels: Iterable[str]) -> dict[str, str]:
    """Map the key of each label to the first of its spellings."""
    found: dict[str, str] = {}
    for label in labels:
        found.setdefault(folded(label), label)
    return found


def _listed(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _LISTED:,} more" if len(labels) > _LISTED else ""
    return ", ".join(labels[:_LISTED]) + more
