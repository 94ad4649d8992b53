"""What a command does before its work: it refuses what can be refused without torch, then imports
torch.

The import takes seconds, and nobody should wait that long to hear of a mistyped path. The checks
are those of the work itself, which makes them again: other files may be there by then.
"""

import gc
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from clipft.cli.launch import one_of_several
from clipft.cli.s3_checkpoints import check_bucket_named
from clipft.cli.s3_data import in_bucket
from clipft.config.settings import EVALUATION_OVERRIDES, Settings
from clipft.config.sources import LoadedSettings
from clipft.data.captions.metadata import (
    check_chosen_fields,
    check_fields,
    check_label_options,
    check_products,
    describe,
)
from clipft.data.captions.template import CaptionTemplate
from clipft.data.few_shot import training_pairs
from clipft.data.shards.dataset import PairDataset
from clipft.data.shards.folders import evaluation_pairs, general_pairs, open_pairs, shard_paths
from clipft.evaluation.labels import choose_labels
from clipft.evaluation.request import Request, general_settings
from clipft.models.source import check_model, quiet_libraries
from clipft.runs.checkpoint import (
    check_checkpoint,
    check_unchanged,
    checkpoint_exists,
    load_newest,
)
from clipft.runs.folder import RunPaths, check_unlocked
from clipft.runs.places import (
    find_checkpoint,
    named_checkpoint,
    pretrained_settings,
    saved_settings,
)

_ON_PAIRS = (
    *("data_dir", "stream", "caption", "caption_lines", "fields", "label_prompts"),
    *("group_field", "label_field", "photo_pairs", "hard_negatives", "hard_negatives_by"),
    *("scenario", "shots", "seed"),
)
"""Settings that decide what is checked of the pairs of a run."""


def check_training(
    settings: Settings, following: Collection[str] = (), only_plan: bool = False
) -> None:
    """Check what a run needs: its folder, its checkpoint, its pairs and its model.

    A resumed run keeps the values that it began with of the settings named in ``following``. With
    ``only_plan``, another run may be in progress in the folder.

    One of several processes checks nothing here, because the others would wait for it in vain.

    Raises:
        ClipftError: as the training would raise it.
    """
    if one_of_several():
        return
    check_bucket_named(settings)
    paths = RunPaths(settings.run_dir)
    if not only_plan:
        check_unlocked(paths.folder)
    if settings.resume_from_checkpoint and checkpoint_exists(paths.checkpoint):
        whole = load_newest(paths.checkpoint, check_checkpoint)
        began = (whole.content or {}).get("settings", {})
        kept = {name: began[name] for name in following if name in began}
        check_unchanged(whole, settings.model_copy(update=kept))
        if whole.content.get("finished"):  # it needs neither pairs nor a model
            return
    if not settings.s3_bucket:
        check_training_pairs(settings)
    general_pairs(settings)
    check_model(settings.model)


def check_ablation(folder: Path, runs: Sequence[Settings]) -> None:
    """Check what the unfinished runs of an ablation in ``folder`` need; equal needs only once.

    Raises:
        ClipftError: as one of the runs would raise it.
    """
    check_unlocked(folder)
    of_pairs = {tuple(str(getattr(run, name)) for name in _ON_PAIRS): run for run in runs}
    for run in of_pairs.values():
        if not run.s3_bucket:
            check_training_pairs(run)
    for run in runs:
        general_pairs(run)
    for model in sorted({run.model for run in runs}):
        check_model(model)


def check_training_pairs(settings: Settings) -> None:
    """Check the training and validation pairs, and the fields that settings name.

    Raises:
        DataError: there are no pairs, or a shard cannot be read.
        UsageError: no pair has one of the fields.
    """
    check_label_options(settings)
    train, template = settings.data_dir / "train", _template(settings)
    if settings.stream:  # may have too many shards to open them all
        check_products(settings, None)
        shard_paths(train)
    else:
        pairs = training_pairs(settings)
        check_fields(template, pairs)
        check_products(settings, pairs)
    validation = open_pairs(settings.data_dir / "val", settings.max_val_pairs)
    check_fields(template.for_evaluation(), validation)
    check_chosen_fields(settings, validation)


def check_evaluation(place: Path | None, loaded: LoadedSettings, request: Request) -> None:
    """Check a checkpoint, its pretrained model, and the pairs to evaluate them on.

    Raises:
        ClipftError: as the evaluation would raise it.
    """
    content = check_checkpoint(find_checkpoint(place, loaded.values))
    if not content:
        return
    settings = saved_settings(content, loaded, (*EVALUATION_OVERRIDES, "model"))
    check_evaluation_pairs(settings, request.split)
    if request.keep:
        check_evaluation_pairs(general_settings(settings, request.keep))
    for run in request.frontier:
        check_checkpoint(find_checkpoint(run, loaded.values))
    check_model(settings.model)


def check_labels(labels: str | None, templates: str, settings: Settings, split: str) -> None:
    """Check the pairs to classify, and the labels and prompts; ``labels`` as in ``choose_labels``.

    Raises:
        DataError: as for ``check_evaluation_pairs``.
        UsageError: as for ``choose_labels``.
    """
    pairs = check_evaluation_pairs(settings, split)
    found: list[str | None] = []
    if labels and pairs:  # the metadata of all pairs are read to tell
        template = _template(settings).for_evaluation()
        found = [d.label for d in describe(pairs, template, settings.label_field, None)]
    if pairs or not labels:
        choose_labels(labels, templates, found, settings.label_field)


def check_evaluation_pairs(settings: Settings, split: str = "auto") -> PairDataset | None:
    """Check the pairs of an evaluation, and the fields that settings name.

    Returns the pairs; None if they are in a bucket.

    Raises:
        DataError: there are no pairs, or a shard cannot be read.
        UsageError: no pair has one of the fields.
    """
    if in_bucket(settings):
        return None
    _, pairs = evaluation_pairs(settings, split)
    check_fields(_template(settings).for_evaluation(), pairs)
    check_chosen_fields(settings, pairs)
    return pairs


def check_place(
    place: str | None, loaded: LoadedSettings, anew: Collection[str]
) -> Settings | None:
    """Check a checkpoint or a pretrained model; the arguments are those of ``open_model``.

    Returns the settings that it will be opened with; None if only torch can read the checkpoint.

    Raises:
        ModelError: as ``open_model`` would raise it.
    """
    checkpoint = named_checkpoint(place, loaded.values)
    if checkpoint is None:
        return pretrained_settings(place, loaded)
    content = check_checkpoint(checkpoint)
    if not content:
        return None
    settings = saved_settings(content, loaded, anew)
    check_model(settings.model)
    return settings


def _template(settings: Settings) -> CaptionTemplate:
    return CaptionTemplate.of(settings)


def import_libraries(*classes: str) -> None:
    """Import torch and classes of transformers, by default the model, which takes seconds.

    No garbage is collected meanwhile: modules make millions of objects but hardly any garbage, and
    looking through them again and again would take a fifth of the time.
    """
    if "torch" in sys.modules:
        return
    quiet_libraries()
    gc.disable()
    try:
        import torch  # noqa: F401
        import transformers

        for name in classes or ("AutoTokenizer", "CLIPModel"):
            getattr(transformers, name)
    finally:
        gc.enable()
