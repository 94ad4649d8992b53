"""How the pairs of a run become embeddings: what the loader prepares, and what the towers do.

A tower that does not train runs once over inputs that do not change (``feature_cache``).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from clipft.data.caption_table import CaptionTable
from clipft.data.loader import Pairs, Preprocessing
from clipft.data.shards import PairDataset
from clipft.errors import StorageError
from clipft.training.feature_cache import FeatureCache
from clipft.training.loaded import LoadedModel
from clipft.training.sides import Sides, make_sides, with_image_features, with_text_features


@dataclass(frozen=True)
class Encoding:
    """Belongs to one model and one set of pairs."""

    preprocessing: Preprocessing
    sides: Sides


def live_encoding(loaded: LoadedModel, preprocessing: Preprocessing, seed: int) -> Encoding:
    """Both towers run, each time."""
    return Encoding(preprocessing, make_sides(loaded, seed, preprocessing.captions.end))


def encoding(
    live: Encoding, pairs: Pairs, cache: FeatureCache, note: Callable[[str], None]
) -> Encoding:
    """``live``, with features in the place of each tower that would always give the same.

    A cache that cannot be written is said and done without.
    """
    model, preprocessing, sides = cache.loaded.model, live.preprocessing, live.sides
    captions, fill = preprocessing.captions, preprocessing.captions.end
    try:
        if not model.text_tower_learns and isinstance(captions, CaptionTable):
            features = cache.of_captions(captions, fill)
            sides = with_text_features(sides, model, features, fill)
        unchanged = isinstance(pairs, PairDataset) and preprocessing.augmentation == "none"
        if not model.vision_tower_learns and unchanged:
            assert isinstance(pairs, PairDataset)
            features = cache.of_images(pairs)
            sides = with_image_features(sides, model, features)
            preprocessing = replace(preprocessing, pictures=False, bad=features.bad)
    except StorageError as error:
        note(f"warning: features are not kept and each epoch computes them anew: {error.message}")
    return Encoding(preprocessing, sides)
