"""The training pairs of a run: all of them, or a few of each label."""

from collections import Counter
from dataclasses import replace

import numpy as np

from clipft.config.settings import Settings
from clipft.core.common import counted
from clipft.core.errors import DataError
from clipft.data.captions.fields import check_field, field_value
from clipft.data.captions.metadata import as_name
from clipft.data.shards.dataset import PairDataset
from clipft.data.shards.folders import open_pairs


def training_pairs(settings: Settings) -> PairDataset:
    """Open the training pairs that settings choose.

    Raises:
        DataError: There are none.
        UsageError: ``shots`` are to be chosen, but no pair has the field of the labels.
    """
    pairs = open_pairs(settings.data_dir / "train", settings.max_train_pairs)
    return few_shot(pairs, settings) if settings.shots else pairs


def few_shot(pairs: PairDataset, settings: Settings) -> PairDataset:
    """Choose ``shots`` pairs of each label, or all of a label that has fewer.

    The choice depends on the seed. With the same seed, more shots add pairs and drop none.

    Raises:
        DataError: No pair has a label.
        UsageError: No pair has the field of the labels.
    """
    field = settings.label_field
    check_field("--shots needs --label-field", field, pairs)
    labels = [as_name(field_value(pairs.metadata(number), field)) for number in range(len(pairs))]
    taken, chosen = Counter[str](), list[int]()
    for number in np.random.default_rng(settings.seed).permutation(len(pairs)).tolist():
        label = labels[number]
        if label and taken[label] < settings.shots:
            taken[label] += 1
            chosen.append(number)
    if not chosen:
        raise DataError(
            f"no training pair has a label in its metadata field {field!r}, which --shots needs",
            "name the field that holds the labels with --label-field",
        )
    return replace(pairs, chosen=tuple(sorted(chosen)))


def label_remarks(train: PairDataset, val: PairDataset, field: str) -> list[str]:
    """Return a remark if validation pairs have labels that no training pair has.

    Such a split measures labels that the run never sees. It arises if all pairs of a label share a
    caption and ``pack`` runs without ``--label-field``, because it keeps equal captions in one
    split.
    """
    known, wanted = (_labels(pairs, field) for pairs in (train, val))
    wanted = {label for label in wanted if label}
    unknown = len(wanted.difference(known))
    if not unknown:
        return []
    return [
        f"{unknown} of {counted(len(wanted), 'label')} of the validation pairs are missing from "
        f"the training pairs: pack them with --label-field {field}, which puts each label into "
        "each split"
    ]


def _labels(pairs: PairDataset, field: str) -> set[str | None]:
    numbers = range(len(pairs))
    return {as_name(field_value(pairs.metadata(number), field)) for number in numbers}
