"""Look-alikes: for each training image the nearest images of other products."""

import numpy as np
import torch
from torch import Tensor

from clipft.config.settings import Settings
from clipft.core.common import Progress
from clipft.data.loader import LoaderOptions
from clipft.data.shards.dataset import PairDataset
from clipft.embedding.feature_cache import image_features
from clipft.embedding.load import load_model
from clipft.metrics.ranking import score_blocks

_CANDIDATES = 3
"""Look-alikes that are kept for each one that is wanted: others may have taken the nearest."""
_BLOCK_SCORES = 1 << 24


@torch.inference_mode()
def look_alikes(
    settings: Settings, pairs: PairDataset, products: Tensor, progress: Progress
) -> Tensor:
    """Find look-alikes with the pretrained model, by its embeddings of the images as they are.

    Args:
        settings: the model, and ``hard_negatives``.
        pairs: the training pairs.
        products: int64 [pairs], equal for photos of one product.
        progress: shows the work.

    Returns:
        int32 [pairs, three times ``hard_negatives`` or fewer], the nearest first. -1 stands for
        none, and images that cannot be read have none and are none.

    Raises:
        DataError: a shard was changed or removed.
        StorageError: the cache folder is full or cannot be written to.
    """
    loaded = load_model(settings, pretrained=True)
    device = loaded.precision.device
    options = LoaderOptions.from_settings(settings, device)
    features = image_features(loaded, pairs, options, progress)
    usable = np.array([n for n in range(len(pairs)) if n not in features.bad])
    rows = features.rows(usable.astype(np.uint64)).to(device)
    with loaded.precision.autocast():
        images = loaded.model.project_images(rows).float()
    own = products[usable].to(device)
    wanted = min(_CANDIDATES * settings.hard_negatives, max(0, len(usable) - 1))
    found = torch.full((len(pairs), wanted), -1, dtype=torch.int32)
    numbers = torch.from_numpy(usable)
    for start, end, scores in score_blocks(images, images, _BLOCK_SCORES // max(1, len(images))):
        others = scores.masked_fill(own[start:end, None] == own, -torch.inf)
        best = others.topk(wanted, dim=1)
        near = numbers[best.indices.cpu()].to(torch.int32)
        found[numbers[start:end]] = near.where(best.values.cpu().isfinite(), -1)
    return found
