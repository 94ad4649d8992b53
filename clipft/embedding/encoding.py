"""How the pairs of a run become embeddings: what the loader prepares, and what the towers do.

A tower that does not train runs once over inputs that do not change (``feature_cache``).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from clipft.data.captions.table import CaptionTable
from clipft.data.loader import LoaderOptions, Pairs, Preprocessing
from clipft.data.shards.dataset import PairDataset
from clipft.core.errors import StorageError
from clipft.config.settings import Settings
from clipft.embedding.feature_cache import FeatureCache, Progress, silent
from clipft.embedding.load import LoadedModel
from clipft.embedding.towers import Sides, make_sides, with_image_features, with_text_features


@dataclass(frozen=True)
class Encoding:
    """Belongs to one model and one set of pairs."""

    preprocessing: Preprocessing
    sides: Sides


def live_encoding(loaded: LoadedModel, preprocessing: Preprocessing, seed: int) -> Encoding:
    """Both towers run, each time."""
    return Encoding(preprocessing, make_sides(loaded, seed, preprocessing.captions.end))


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
    options = LoaderOptions.of(settings, loaded.precision.device)
    cache = FeatureCache(loaded, options, progress)
    try:
        return _with_images(_with_texts(live, cache), pairs, cache)
    except StorageError as error:
        note(f"warning: features are not kept, each epoch computes them anew: {error.message}")
        return live


def _with_texts(live: Encoding, cache: FeatureCache) -> Encoding:
    captions, model = live.preprocessing.captions, cache.loaded.model
    if model.text_tower_learns or not isinstance(captions, CaptionTable):
        return live
    features = cache.of_captions(captions, captions.end)
    return replace(live, sides=with_text_features(live.sides, model, features, captions.end))


def _with_images(live: Encoding, pairs: Pairs, cache: FeatureCache) -> Encoding:
    model, unchanging = cache.loaded.model, live.preprocessing.augmentation == "none"
    if model.vision_tower_learns or not unchanging or not isinstance(pairs, PairDataset):
        return live
    features = cache.of_images(pairs)
    preprocessing = replace(live.preprocessing, pictures=False, bad=features.bad)
    return Encoding(preprocessing, with_image_features(live.sides, model, features))
