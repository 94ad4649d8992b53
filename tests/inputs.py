"""The preprocessing of the tiny model."""

from functools import cache

from clipft.data.captions.table import LiveCaptions
from clipft.data.captions.template import DEFAULT_TEMPLATE
from clipft.data.captions.tokenizer import CaptionEncoder
from clipft.data.decoding import Preprocessing
from clipft.models.pretrained import ModelInputs, load_inputs


@cache
def tiny() -> ModelInputs:
    return load_inputs("tiny")


def encoder(context: int = 77) -> CaptionEncoder:
    return CaptionEncoder(tiny().tokenizer, context)


def preprocessing(augmentation: str = "simple", side: int = 0, seed: int = 5) -> Preprocessing:
    captions = LiveCaptions(DEFAULT_TEMPLATE, encoder())
    return Preprocessing(captions, side or tiny().image_size, augmentation, seed)
