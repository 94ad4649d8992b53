"""Features of labeled training images, for classifiers that are fitted to them."""

import numpy as np
import torch

from clipft.config.settings import Settings
from clipft.data.captions.metadata import describe
from clipft.data.captions.template import CaptionTemplate
from clipft.data.few_shot import training_pairs
from clipft.data.shards.dataset import ChosenPairs
from clipft.embedding.embed import embed_pairs
from clipft.embedding.encoding import live_encoding, validation_preprocessing
from clipft.embedding.load import LoadedModel
from clipft.evaluation.labels import ChosenLabels
from clipft.metrics.classification import Labelled


def training_features(
    loaded: LoadedModel, settings: Settings, chosen: ChosenLabels, most: int
) -> Labelled | None:
    """Embed at most ``most`` of the training images that have one of the labels.

    Returns None if there are none.
    """
    pairs = training_pairs(settings)
    said = describe(pairs, CaptionTemplate.of(settings), settings.label_field, None)
    targets = [chosen.number(description.label) for description in said]
    rows = [i for i, target in enumerate(targets) if target is not None]
    if not rows:
        return None
    drawn = np.random.default_rng(settings.seed).permutation(rows)[:most]
    preprocessing = validation_preprocessing(loaded.base.inputs, pairs, settings)
    numbers = sorted(drawn.tolist())
    # Not cached, because a random choice of pairs is hardly ever used again
    encoding = live_encoding(loaded, preprocessing, settings)
    embedded = embed_pairs(loaded, ChosenPairs(pairs, numbers), encoding, settings)
    return Labelled(embedded.images, torch.tensor([targets[n] for n in embedded.numbers]))
