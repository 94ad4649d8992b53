"""Chooses how the pairs of a run are embedded: the preprocessing in the loader, and the towers."""

from dataclasses import dataclass, replace

import torch

from clipft.config.settings import Settings
from clipft.core.common import Note, Progress, counted, silent
from clipft.core.errors import DataError, StorageError
from clipft.data.captions.fields import fields_hint, known_fields
from clipft.data.captions.metadata import check_fields
from clipft.data.captions.table import CaptionSource, CaptionTable, LiveCaptions, caption_table
from clipft.data.captions.template import CaptionTemplate
from clipft.data.captions.tokenizer import CaptionEncoder
from clipft.data.decoding import Preprocessing
from clipft.data.loader import LoaderOptions, Pairs
from clipft.data.overlap import shared_captions, shared_images
from clipft.data.shards.dataset import PairDataset
from clipft.embedding.feature_cache import CacheForecast, caption_features, image_features
from clipft.embedding.load import LoadedModel
from clipft.embedding.towers import (
    Shapes,
    Towers,
    choose_shapes,
    make_towers,
    with_image_features,
    with_text_features,
)
from clipft.models.pretrained import ModelInputs

_NOTICEABLE = 20_000
"""From this number of pairs on, tokenizing the captions is slow, and the user is told."""


_BATCH = {"cpu": 64, "cuda": 256}
"""Pairs per forward pass without gradients, if no micro-batch size is set."""


@dataclass(frozen=True)
class Encoding:
    """How one model encodes one set of pairs."""

    preprocessing: Preprocessing
    towers: Towers


def evaluation_batch(settings: Settings, device: torch.device) -> int:
    """The number of pairs that pass through the towers together without gradients."""
    return settings.micro_batch_size or _BATCH.get(device.type, _BATCH["cpu"])


def live_encoding(
    loaded: LoadedModel,
    preprocessing: Preprocessing,
    settings: Settings,
    shapes: Shapes | None = None,
) -> Encoding:
    """Return an encoding in which both towers always run.

    Chunks have ``shapes`` or, if it is None, the shapes for batches of ``evaluation_batch`` pairs.
    """
    if shapes is None:
        at_once = evaluation_batch(settings, loaded.precision.device)
        shapes = choose_shapes(loaded, settings.compile, at_once, at_once)
    pad_token_id = preprocessing.captions.pad_token_id
    towers = make_towers(loaded, settings.seed, pad_token_id, shapes, settings.compile)
    return Encoding(preprocessing, towers)


def open_encoding(
    loaded: LoadedModel,
    pairs: Pairs,
    preprocessing: Preprocessing,
    settings: Settings,
    note: Note,
    shapes: Shapes | None = None,
    progress: Progress = silent,
    forecast: CacheForecast | None = None,
) -> Encoding:
    """Return an encoding in which cached features replace each tower whose output never changes.

    With a ``forecast``, features that are not in the cache may be replaced by a sample. If the
    cache cannot be written, the user is told and both towers run, as in ``live_encoding``.
    """
    live = live_encoding(loaded, preprocessing, settings, shapes)
    if not settings.feature_cache:
        return live
    model, captions, encoding = loaded.model, preprocessing.captions, live
    options = LoaderOptions.from_settings(settings, loaded.precision.device)
    try:
        if not model.text_tower_trainable and isinstance(captions, CaptionTable):
            features = caption_features(loaded, captions, progress, forecast)
            towers = with_text_features(live.towers, model, features, captions.pad_token_id)
            encoding = replace(encoding, towers=towers)
        unchanging = preprocessing.augmentation == "none" and not model.vision_tower_trainable
        if unchanging and isinstance(pairs, PairDataset):
            features = image_features(loaded, pairs, options, progress, forecast)
            encoding = Encoding(
                replace(preprocessing, read_images=False, bad=features.bad),
                with_image_features(encoding.towers, model, features),
            )
    except StorageError as error:
        note(
            "warning: features cannot be cached, so each epoch computes them again: "
            f"{error.message}"
        )
        return live
    return encoding


def training_preprocessing(
    model: ModelInputs, pairs: Pairs, settings: Settings, note: Note
) -> Preprocessing:
    """Return preprocessing with augmented images. If a pair has several captions, one is drawn in
    each epoch.

    Raises:
        UsageError: the caption template is invalid, or names a field that no pair has.
        DataError: too many pairs have no text.
    """
    template = CaptionTemplate.of(settings)
    captions = _captions(model, pairs, settings, template, settings.seed, note)
    return _preprocessing(model, captions, settings.augmentation, settings)


def validation_preprocessing(
    model: ModelInputs, pairs: PairDataset, settings: Settings
) -> Preprocessing:
    """Return the model's own preprocessing, with the first caption of each pair.

    The caption table has all captions with which the pairs are evaluated.

    Raises:
        UsageError, DataError: as for ``training_preprocessing``.
    """
    template = CaptionTemplate.of(settings).for_evaluation()
    captions = _captions(model, pairs, settings, template, None, lambda note: None)
    return _preprocessing(model, captions, "none", settings)


def _preprocessing(
    model: ModelInputs, captions: CaptionSource, augmentation: str, settings: Settings
) -> Preprocessing:
    return Preprocessing(
        captions,
        model.image_size,
        augmentation,
        settings.seed,
        model.squashed,
        patches=model.patches,
    )


def _captions(
    model: ModelInputs,
    pairs: Pairs,
    settings: Settings,
    template: CaptionTemplate,
    seed: int | None,
    note: Note,
) -> CaptionSource:
    encoder = CaptionEncoder(model.tokenizer, model.context_length)
    if not isinstance(pairs, PairDataset):  # the captions of a stream are not known beforehand
        return LiveCaptions(template, encoder, seed)
    check_fields(template, pairs)

    def on_build() -> None:
        if len(pairs) > _NOTICEABLE:
            note(f"Tokenizing the captions of {counted(len(pairs), 'pair')} (done once) ...")

    table = caption_table(pairs, template, encoder, seed, on_build)
    without = table.figures.none
    if settings.too_many_bad(without, len(pairs)):
        known = known_fields(pairs)
        raise DataError(
            f"{without} of {len(pairs)} pairs in {pairs.shards[0].path.parent} have no text "
            f"with {template.option} {template.source!r}, more than --max-bad {settings.max_bad:g}",
            (f"{fields_hint('', known)}: name them in {template.option}, " if known else "")
            + "fix the captions, or raise --max-bad",
        )
    return table


def data_remarks(
    train: Pairs, val: PairDataset, captions: tuple[CaptionSource, CaptionSource], context: int
) -> list[str]:
    """Return remarks for the user about the pairs, before a run.

    ``captions`` are those of ``train`` and of ``val``; ``context`` is the model's context length in
    tokens.
    """
    remarks = []
    for name, skipped in (("train", train.skipped), ("val", val.skipped)):
        if skipped:
            members = counted(len(skipped), "member")
            remarks.append(f"skipped {members} of the {name} shards that are not pairs")
    train_captions, val_captions = captions
    if isinstance(train_captions, CaptionTable):
        figures = train_captions.figures
        if figures.captions + figures.none > len(train):
            total = counted(figures.captions, "caption")
            remarks.append(f"{total} for {counted(len(train), 'pair')}: each epoch draws one")
        if figures.cut:
            remarks.append(
                f"truncated {counted(figures.cut, 'caption')} to the {context} tokens that the "
                f"model takes: {figures.lost_share:.0%} of their tokens are lost, and the longest "
                f"has {figures.most_tokens:,}"
            )
    shared = dict[str, int | None]()
    if isinstance(train, PairDataset):
        shared["image"] = shared_images(val, train)
    if isinstance(train_captions, CaptionTable) and isinstance(val_captions, CaptionTable):
        shared["caption"] = shared_captions(val_captions, train_captions)
    listed = " and ".join(f"the {what} of {count:,}" for what, count in shared.items() if count)
    if listed:
        remarks.append(
            f"training also has {listed} of {counted(len(val), 'validation pair')}, which makes "
            f"the figures too good: see `clipft inspect`"
        )
    if None in shared.values():
        remarks.append(
            "clipft did not count the validation images that are also in training, because it "
            "would have to read too many images: see `clipft inspect`"
        )
    return remarks
