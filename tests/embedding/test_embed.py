"""Embeddings of validation pairs."""

import torch

from clipft.config.settings import Settings
from clipft.data.demo.catalogue import render_pair
from clipft.data.shards.folders import validation_pairs
from clipft.embedding.embed import embed_pairs
from clipft.embedding.encoding import open_encoding, validation_preprocessing
from clipft.embedding.load import load_model
from clipft.embedding.towers import Shapes
from tests.conftest import jpeg
from tests.faults.helpers import write_tar


def test_equal_captions_have_equal_embeddings_in_any_batch(tmp_path):
    """Otherwise rounding would break their ties, and figures would depend on the batch size."""
    members = []
    for number in range(24):
        caption = "a chair" if number % 5 == 0 else f"a {'very ' * number}long table"
        pair = render_pair(7, number)
        members += [(f"{number:02}.jpg", jpeg(pair)), (f"{number:02}.txt", caption.encode())]
    write_tar(tmp_path / "val" / "00000.tar", members)
    for size in (3, 7):
        settings = Settings(
            model="tiny",
            data_dir=tmp_path,
            micro_batch_size=size,
            num_workers=0,
            precision="fp32",
            device="cpu",
            feature_cache=False,
        )
        loaded, pairs = load_model(settings), validation_pairs(settings)
        preprocessing = validation_preprocessing(loaded.base.inputs, pairs, settings)
        how = open_encoding(loaded, pairs, preprocessing, settings, lambda note: None, Shapes())
        embedded = embed_pairs(loaded, pairs, how, settings)
        assert embedded.numbers == tuple(range(24))
        chairs = embedded.texts[::5]
        assert torch.equal(chairs, chairs[:1].expand_as(chairs))
        assert len(embedded.texts.unique(dim=0)) == 20
