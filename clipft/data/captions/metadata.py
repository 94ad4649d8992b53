"""The caption, label and group of each pair, as an evaluation needs them."""

import math
import unicodedata
from dataclasses import dataclass
from typing import Any

from clipft.config.settings import Settings
from clipft.core.errors import UsageError
from clipft.data.captions.fields import (
    WithMetadata,
    check_field,
    field_value,
    fields_hint,
    known_fields,
)
from clipft.data.captions.template import BadCaption, CaptionTemplate, clean_text
from clipft.data.shards.dataset import PairDataset
from clipft.data.shards.metadata import parse_metadata

_DEFAULT_LABEL_FIELD = Settings.model_fields["label_field"].default


def check_fields(template: CaptionTemplate, pairs: WithMetadata) -> None:
    """Check that the fields named by a template exist.

    Raises:
        UsageError: No pair has one of the fields.
    """
    for field in template.fields:
        check_field(f"{template.option} {template.source!r}", field, pairs)


def check_chosen_fields(settings: Settings, pairs: WithMetadata) -> None:
    """Check the fields of groups, grades and labels, before anything is made or measured.

    Raises:
        UsageError: No pair has ``group_field``, ``grade_field``, or a ``label_field`` that is not
            the default.
    """
    if settings.group_field:
        check_field("--group-field", settings.group_field, pairs)
    if settings.grade_field:
        check_field("--grade-field", settings.grade_field, pairs)
    if settings.label_field != _DEFAULT_LABEL_FIELD:
        check_field("--label-field", settings.label_field, pairs)


def check_label_options(settings: Settings) -> None:
    """Check the settings that need labels, before any label is read.

    Raises:
        UsageError: ``stop_on`` is accuracy but there are no prompts, or ``shots`` is used with a
            stream.
    """
    if settings.stop_on == "accuracy" and not settings.label_prompts:
        raise UsageError(
            "--stop-on accuracy needs --label-prompts: accuracy is measured by prompts of labels",
            "add --label-prompts general, or use --stop-on recall",
        )
    if settings.shots and settings.stream:
        raise UsageError(
            "--shots cannot be used with --stream: labels are looked up by pair", "remove --stream"
        )


def check_group_field(option: str, field: str | None, pairs: WithMetadata) -> str:
    """Check and return the field by which an option tells products apart.

    Raises:
        UsageError: No field is given, or no pair has it.
    """
    if not field:
        hint = f"name the field that tells products apart; {fields_hint('', known_fields(pairs))}"
        raise UsageError(f"{option} needs --group-field", hint)
    check_field("--group-field", field, pairs)
    return field


def check_products(settings: Settings, pairs: WithMetadata | None) -> None:
    """Check the settings ``photo_pairs`` and ``hard_negatives``.

    Both need pairs with a field that tells products apart. ``photo_pairs``, and ``hard_negatives``
    by the current model, need a scenario that trains images. ``pairs`` is None for a stream.

    Raises:
        UsageError: The settings, the scenario and the pairs do not fit together.
    """
    scenario = settings.declared_scenario
    current = settings.hard_negatives_by == "current"
    if current and not settings.hard_negatives:
        raise UsageError(
            "--hard-negatives-by current has no effect without a number of look-alikes",
            "add --hard-negatives 3, for example",
        )
    option = "--photo-pairs" if settings.photo_pairs else "--hard-negatives"
    if not (settings.photo_pairs or settings.hard_negatives) or not scenario.trains:
        return
    on_images = "--photo-pairs" if settings.photo_pairs else "--hard-negatives-by current"
    if (settings.photo_pairs or current) and not scenario.trains_images:
        raise UsageError(
            f"{on_images} changes nothing in scenario {scenario.name}, which trains "
            f"{scenario.summary}",
            "use a scenario that trains the vision encoder or its projection, such as dual_lora",
        )
    if pairs is None:
        raise UsageError(
            f"{option} cannot be used with --stream: the photos of a product are looked up",
            "remove --stream",
        )
    check_group_field(option, settings.group_field, pairs)


@dataclass(frozen=True)
class Description:
    """The captions of a pair, and three fields of its metadata.

    A pair without a caption, which is skipped, has the single caption "".
    """

    captions: tuple[str, ...]
    label: str | None
    group: str | None
    grade: float = 0.0


def describe(
    pairs: PairDataset,
    template: CaptionTemplate,
    label_field: str,
    group_field: str | None,
    grade_field: str | None = None,
) -> list[Description]:
    """Describe every pair, in order.

    Raises:
        UsageError: No pair has ``group_field``, or a number above 0 in ``grade_field``.
    """
    found = []
    for number in range(len(pairs)):
        caption, metadata = pairs.caption_and_metadata(number)
        fields = parse_metadata(metadata)
        try:
            texts = tuple(template.captions(caption, metadata))
        except BadCaption:
            texts = ("",)
        label = as_name(field_value(fields, label_field))
        group = as_name(field_value(fields, group_field)) if group_field else None
        grade = _grade(field_value(fields, grade_field)) if grade_field else 0.0
        found.append(Description(texts, label, group, grade))
    if group_field and not any(d.group for d in found):
        _refuse("--group-field", group_field, pairs)
    if grade_field and not any(d.grade for d in found):
        check_field("--grade-field", grade_field, pairs)
        raise UsageError(
            f"--grade-field {grade_field}: no pair has a number above 0 in this field",
            "choose the field that says how relevant an image is to its caption",
        )
    return found


def _grade(value: Any) -> float:
    """Return the value of a field as a number, or 0 if it is not a number above 0."""
    try:
        grade = 0.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return 0.0
    return grade if 0 < grade < math.inf else 0.0


def check_label_field(field: str, said: list[Description], pairs: PairDataset) -> None:
    """Check that pairs have labels in the field that the user chose.

    The default field is not checked: pairs without labels are normal.

    Raises:
        UsageError: No pair has a label in a field other than the default.
    """
    if field != _DEFAULT_LABEL_FIELD and not any(d.label for d in said):
        _refuse("--label-field", field, pairs)


def as_name(value: Any) -> str | None:
    """Return a label or a group as text; None for a value that cannot be one, such as a list."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return None
    # NFC, so that composed and decomposed accents give the same label
    return unicodedata.normalize("NFC", clean_text(str(value))) or None


def _refuse(option: str, field: str, pairs: WithMetadata) -> None:
    check_field(option, field, pairs)
    raise UsageError(
        f"{option} {field}: no pair has a text or a number in this field",
        "choose another field; lists, true or false, and empty values cannot be used",
    )
