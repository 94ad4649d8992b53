"""Look-alikes: for each training image the nearest images of other products.

They are stored as int32 [pairs, at most three times ``hard_negatives``], the nearest first, with -1
for none. Images that cannot be read have no look-alikes and are no look-alikes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clipft.config.settings import Settings
from clipft.core.common import Progress
from clipft.data.loader import LoaderOptions
from clipft.data.shards.dataset import PairDataset
from clipft.distributed.collectives import Processes
from clipft.distributed.rank_zero import on_rank_zero
from clipft.embedding.embed import embed_images
from clipft.embedding.encoding import Encoding
from clipft.embedding.feature_cache import CacheForecast, image_features
from clipft.embedding.load import LoadedModel, load_model
from clipft.metrics.ranking import score_blocks

_CANDIDATES = 3
"""Look-alikes that are stored for each one wanted: the nearest may already be in another block."""
_BLOCK_SCORES = 1 << 24


@torch.inference_mode()
def look_alikes(
    settings: Settings,
    pairs: PairDataset,
    products: Tensor,
    progress: Progress,
    forecast: CacheForecast | None = None,
) -> Tensor:
    """Find look-alikes by the pretrained model's embeddings of the images without augmentation.

    With a ``forecast``, for which some features are missing, no image has look-alikes.

    Args:
        settings: the model, and ``hard_negatives``.
        pairs: the training pairs.
        products: int64 [pairs], equal for photos of one product.
        progress: shows the progress.

    Raises:
        DataError: a shard was changed or removed.
        StorageError: the cache folder is full or cannot be written to.
    """
    loaded = load_model(settings, pretrained=True)
    device = loaded.precision.device
    options = LoaderOptions.from_settings(settings, device)
    features = image_features(loaded, pairs, options, progress, forecast)
    if forecast:
        return torch.full((len(pairs), 0), -1, dtype=torch.int32)
    usable = np.array([n for n in range(len(pairs)) if n not in features.bad], np.int64)
    rows = features.rows(usable.astype(np.uint64)).to(device)
    with loaded.precision.autocast():
        images = loaded.model.project_images(rows).float()
    return nearest_of_others(images, torch.from_numpy(usable), products, settings.hard_negatives)


@dataclass(frozen=True)
class LookAlikeSearch:
    """Finds look-alikes with the current weights of a model in training.

    ``how`` encodes the images of ``pairs`` without augmentation, ``batch_size`` of them at a time.
    ``products``, int64 [pairs], is equal for photos of one product.
    """

    loaded: LoadedModel
    pairs: PairDataset
    how: Encoding
    products: Tensor
    settings: Settings
    batch_size: int = 0

    def on_some(self, most: int) -> "LookAlikeSearch":
        """Return a search among the first ``most`` pairs only. The others have no look-alikes."""
        return replace(self, pairs=self.pairs.first(most))

    def find(self, processes: Processes, check: Callable[[], None] = lambda: None) -> Tensor:
        """Embed all images and find their look-alikes. Each process embeds its share, and all get
        the same result.

        ``check`` is called before each batch and may stop the search by raising a ``ClipftError``.

        Raises:
            DataError: a shard was changed or removed.
        """
        images, numbers = embed_images(
            self.loaded, self.pairs, self.how, self.settings, processes, check, self.batch_size
        )
        if not numbers:  # the first step will report what is wrong with the images
            return torch.full((len(self.products), 0), -1, dtype=torch.int32)

        def compare() -> Tensor:
            device, most = self.loaded.precision.device, self.settings.hard_negatives
            # Ignore embeddings that are not finite; training skips their steps as well
            usable = images.isfinite().all(1)
            chosen = torch.tensor(numbers)[usable]
            return nearest_of_others(images[usable].to(device), chosen, self.products, most)

        return on_rank_zero(processes, compare)


@torch.inference_mode()
def nearest_of_others(images: Tensor, numbers: Tensor, products: Tensor, most: int) -> Tensor:
    """Find the nearest images of other products.

    Args:
        images: float32 [N, D] of unit length.
        numbers: int64 [N] on the CPU, the numbers of their pairs.
        products: int64 [pairs] on the CPU, equal for photos of one product.
        most: the number of look-alikes that are wanted for an image.
    """
    own = products[numbers].to(images.device)
    wanted = min(_CANDIDATES * most, max(0, len(images) - 1))
    found = torch.full((len(products), wanted), -1, dtype=torch.int32)
    for start, end, scores in score_blocks(images, images, _BLOCK_SCORES // max(1, len(images))):
        others = scores.masked_fill(own[start:end, None] == own, -torch.inf)
        best = others.topk(wanted, dim=1)
        near = numbers[best.indices.cpu()].to(torch.int32)
        found[numbers[start:end]] = near.where(best.values.cpu().isfinite(), -1)
    return found
