"""How the pairs of a run become embeddings: what the loader prepares, and what the towers do.

A tower that does not train runs once over inputs that do not change (``feature_cache``).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from clipft.config.settings import Settings
from clipft.core.common import Progress, counted, silent
from clipft.core.errors import DataError, StorageError
from clipft.data.captions.metadata import check_fields, known_fields
from clipft.data.captions.table import (
    CaptionFigures,
    CaptionSource,
    CaptionTable,
    LiveCaptions,
    caption_table,
)
from clipft.data.captions.template import CaptionTemplate
from clipft.data.captions.tokenizer import CaptionEncoder
from clipft.data.loader import LoaderOptions, Pairs, Preprocessing
from clipft.data.overlap import shared_captions, shared_images
from clipft.data.shards.dataset import PairDataset
from clipft.embedding.feature_cache import FeatureCache
from clipft.embedding.load import LoadedModel
from clipft.embedding.towers import Towers, make_towers, with_image_features, with_text_features
from clipft.models.pretrained import ModelInputs


@dataclass(frozen=True)
class Encoding:
    """Belongs to one model and one set of pairs."""

    preprocessing: Preprocessing
    towers: Towers


def live_encoding(loaded: LoadedModel, preprocessing: Preprocessing, seed: int) -> Encoding:
    """Both towers run, each time."""
    return Encoding(preprocessing, make_towers(loaded, seed, preprocessing.captions.pad_token_id))


def open_encoding(
    loaded: LoadedModel,
    pairs: Pairs,
    preprocessing: Preprocessing,
    settings: Settings,
    note: Callable[[str], None],
    progress: Progress = silent,
) -> Encoding:
    """Features in the place of each tower that would always give the same.

    A cache that cannot be written is said and done without.
    """
    live = live_encoding(loaded, preprocessing, settings.seed)
    if not settings.feature_cache:
        return live
    options = LoaderOptions.from_settings(settings, loaded.precision.device)
    cache = FeatureCache(loaded, options, progress)
    try:
        return _with_images(_with_texts(live, cache), pairs, cache)
    except StorageError as error:
        note(f"warning: features are not kept, each epoch computes them anew: {error.message}")
        return live


def _with_texts(live: Encoding, cache: FeatureCache) -> Encoding:
    captions, model = live.preprocessing.captions, cache.loaded.model
    if model.text_tower_trainable or not isinstance(captions, CaptionTable):
        return live
    features = cache.of_captions(captions, captions.pad_token_id)
    return replace(
        live, towers=with_text_features(live.towers, model, features, captions.pad_token_id)
    )


def _with_images(live: Encoding, pairs: Pairs, cache: FeatureCache) -> Encoding:
    model, unchanging = cache.loaded.model, live.preprocessing.augmentation == "none"
    if model.vision_tower_trainable or not unchanging or not isinstance(pairs, PairDataset):
        return live
    features = cache.of_images(pairs)
    preprocessing = replace(live.preprocessing, read_images=False, bad=features.bad)
    return Encoding(preprocessing, with_image_features(live.towers, model, features))


_MANY = 20_000
"""Captions whose tokenising a user notices."""


def training_preprocessing(
    model: ModelInputs, pairs: Pairs, settings: Settings, note: Callable[[str], None]
) -> Preprocessing:
    """Augmented pictures; a pair with several captions has another one in each epoch.

    Raises:
        UsageError: the caption template is wrong, or names a field that no pair has.
        DataError: too many pairs have no text.
    """
    captions = _captions(model, pairs, settings, settings.seed, note)
    return Preprocessing(
        captions, model.image_size, settings.augmentation, settings.seed, model.squashed
    )


def validation_preprocessing(
    model: ModelInputs, pairs: PairDataset, settings: Settings
) -> Preprocessing:
    """The model's own preprocessing and the first caption of each pair."""
    captions = _captions(model, pairs, settings, None, lambda note: None)
    return Preprocessing(captions, model.image_size, "none", settings.seed, model.squashed)


def _captions(
    model: ModelInputs,
    pairs: Pairs,
    settings: Settings,
    seed: int | None,
    note: Callable[[str], None],
) -> CaptionSource:
    template = CaptionTemplate.parse(settings.caption)
    encoder = CaptionEncoder(model.tokenizer, model.context_length)
    if not isinstance(pairs, PairDataset):
        return LiveCaptions(template, encoder, seed)
    check_fields(template, pairs)

    def building() -> None:
        if len(pairs) > _MANY:
            note(f"Tokenising the captions of {counted(len(pairs), 'pair')} (done once) ...")

    table = caption_table(pairs, template, encoder, seed, building)
    _check_texts(table, pairs, settings)
    return table


def _check_texts(table: CaptionTable, pairs: PairDataset, settings: Settings) -> None:
    """
    Raises:
        DataError: more pairs without text than ``max_bad`` allows, and more than one.
    """
    without = table.figures.none
    if settings.too_many_bad(without, len(pairs)):
        fields = ", ".join(sorted(known_fields(pairs)))
        raise DataError(
            f"{without} of {len(pairs)} pairs in {pairs.shards[0].path.parent} have no text "
            f"under --caption {settings.caption!r}, more than --max-bad {settings.max_bad:g}",
            (f"their metadata has {fields}: name them in --caption, " if fields else "")
            + "mend the captions, or raise --max-bad",
        )


def data_remarks(
    train: Pairs, val: PairDataset, captions: tuple[CaptionSource, CaptionSource], context: int
) -> list[str]:
    """What a user should know of the pairs before a run; ``captions`` of train and val."""
    remarks = []
    for name, skipped in (("train", train.skipped), ("val", val.skipped)):
        if skipped:
            remarks.append(
                f"left out {counted(len(skipped), 'member')} of the {name} shards: no pairs"
            )
    ours, theirs = captions
    if isinstance(ours, CaptionTable):
        remarks += _caption_remarks(ours.figures, len(train), context)
    shared = {}
    if isinstance(train, PairDataset):
        shared["photo"] = shared_images(val, train)
    if isinstance(ours, CaptionTable) and isinstance(theirs, CaptionTable):
        shared["caption"] = shared_captions(theirs, ours)
    listed = " and ".join(f"the {what} of {count:,}" for what, count in shared.items() if count)
    if listed:
        remarks.append(
            f"training also has {listed} of {counted(len(val), 'validation pair')}, which flatters "
            f"the figures: see `clipft inspect`"
        )
    return remarks


def _caption_remarks(figures: CaptionFigures, pairs: int, context: int) -> list[str]:
    remarks = []
    if figures.captions + figures.none > pairs:
        captions = counted(figures.captions, "caption")
        remarks.append(f"{captions} for {counted(pairs, 'pair')}: each epoch draws one")
    if figures.cut:
        remarks.append(
            f"cut {counted(figures.cut, 'caption')} at a word: the model takes {context} tokens, "
            f"the longest has {figures.most_tokens:,}"
        )
    return remarks
