"""Look-alikes against a plain loop over the embeddings of the pretrained model."""

import numpy as np
import torch

from clipft.config.sources import load_settings
from clipft.core.common import silent
from clipft.data.positives import product_ids
from clipft.data.shards.dataset import open_pairs
from clipft.embedding.embed import embed_pairs
from clipft.embedding.encoding import live_encoding, validation_preprocessing
from clipft.embedding.load import load_model
from clipft.embedding.look_alikes import look_alikes
from tests.conftest import write_shard


def test_they_are_the_nearest_images_of_other_products(tmp_path):
    write_shard(tmp_path / "train" / "00000.tar", range(40), bad=(7,))
    given = {"model": "tiny", "data_dir": tmp_path, "device": "cpu", "precision": "fp32"}
    given |= {"num_workers": 0, "group_field": "type", "hard_negatives": 2, "max_bad": 0.2}
    settings = load_settings(given, environ={}).values
    pairs = open_pairs(tmp_path / "train")
    products = product_ids(settings, pairs, lambda note: None)
    found = look_alikes(settings, pairs, products, silent)
    assert found.shape == (40, 6) and found[7].tolist() == [-1] * 6

    loaded = load_model(settings, pretrained=True)
    preprocessing = validation_preprocessing(loaded.base.inputs, pairs, settings)
    encoding = live_encoding(loaded, preprocessing, settings)
    embedded = embed_pairs(loaded, pairs, encoding, settings)
    numbers = np.array(embedded.numbers)
    scores = embedded.images @ embedded.images.T
    for row, number in enumerate(numbers):
        others = [i for i, n in enumerate(numbers) if products[n] != products[number]]
        nearest = sorted(others, key=lambda i: -float(scores[row, i]))[:6]
        ours = [float(scores[row, list(numbers).index(n)]) for n in found[number].tolist()]
        torch.testing.assert_close(ours, [float(scores[row, i]) for i in nearest])
        assert all(products[n] != products[number] for n in found[number].tolist())
