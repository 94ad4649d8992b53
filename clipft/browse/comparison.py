"""Searches the same images with the pretrained and the fine-tuned model of a run."""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from torch import Tensor

from clipft.core.common import Progress, counted
from clipft.core.errors import DataError, UsageError
from clipft.data.captions.template import BadCaption, CaptionTemplate, clean_text
from clipft.data.captions.tokenizer import CaptionEncoder
from clipft.data.images.decode import decode_image
from clipft.data.images.formats import BadImage
from clipft.data.loader import LoaderOptions
from clipft.data.shards.dataset import RawPair
from clipft.embedding.embed import embed_texts
from clipft.embedding.load import load_model
from clipft.report.html import thumbnail
from clipft.runs.load import OpenedModel
from clipft.search.images import ImagePart
from clipft.search.index import ImageIndex, open_index
from clipft.search.vectors import Vectors, embed_image

THUMBNAIL_SIDE = 240
"""Longer side in pixels of an image on the page."""
_KEPT_THUMBNAILS = 4096
"""Thumbnails in memory, about 40 MB. Others are made again when needed."""
_EXAMPLES = 4


@dataclass(frozen=True)
class ListedImage:
    """An image in the results of a model. Ranks count from 1; ``other_rank`` is that of the other
    model."""

    number: int
    rank: int
    other_rank: int
    score: float
    key: str
    source: str
    caption: str


@dataclass(frozen=True)
class Query:
    """A query by words or by an image.

    Attributes:
        name: The words, or ``image:`` and a hash; equal for equal queries.
        words: The words; "" for an image.
        image: A small JPEG of the image; b"" for words.
        note: A remark for the user, such as that the words were truncated.
        own: The number of the image whose caption the words are, or None.
    """

    name: str
    words: str = ""
    image: bytes = b""
    note: str = ""
    own: int | None = None


@dataclass(frozen=True)
class Found:
    """The best images of both models, best first."""

    query: Query
    pretrained: Sequence[ListedImage]
    fine_tuned: Sequence[ListedImage]

    @cached_property
    def same(self) -> bool:
        """True if both models found the same images in the same order."""
        return [i.number for i in self.pretrained] == [i.number for i in self.fine_tuned]

    def summary(self) -> str:
        """Return a sentence on how much the two lists differ."""
        if self.same:
            return "Both models find the same images in the same order."
        shared = {i.number for i in self.pretrained} & {i.number for i in self.fine_tuned}
        only = len(self.fine_tuned) - len(shared)
        if not only:
            return "Both models find the same images, in a different order."
        return f"{only} of {counted(len(self.fine_tuned), 'image')} are found by only one model."


@dataclass(frozen=True)
class SearchedModel:
    """A model with the index of the image embeddings that it computed."""

    opened: OpenedModel
    index: ImageIndex


class Comparison:
    """The two models of a run with the same images. It is safe to use from several threads.

    ``top`` is the number of images that each model lists.
    """

    def __init__(self, pretrained: SearchedModel, fine_tuned: SearchedModel, top: int) -> None:
        self.top, self.images = top, fine_tuned.index.images
        self._models = pretrained, fine_tuned
        self._encoding = threading.Lock()
        settings = fine_tuned.opened.settings
        self._template = CaptionTemplate.of(settings)
        inputs = fine_tuned.opened.loaded.base.inputs
        self._encoder = CaptionEncoder(inputs.tokenizer, inputs.context_length)
        self.thumbnail = lru_cache(_KEPT_THUMBNAILS)(self._thumbnail)

    def by_words(self, words: str, own: int | None = None) -> Found:
        """Find the images that fit the words best.

        Raises:
            UsageError: No words are left after cleaning the text.
            DataError: An image was changed or removed in the meantime.
        """
        text = clean_text(words)
        if not text:
            raise UsageError("there are no words to search for", "type a description of an image")
        with self._encoding:  # the tokenizer is not thread-safe either
            length, note = self._encoder([text])[0].length, ""
            vectors = [embed_texts(model.opened.loaded, [text])[0] for model in self._models]
        if length > self._encoder.context:
            note = f"The models read {self._encoder.context} tokens; the rest of the query is cut."
        return self._ranked(Query(text, text, note=note, own=own), vectors)

    def by_image(self, data: bytes) -> Found:
        """Find the images that are most similar to an image.

        Raises:
            DataError: The image cannot be decoded, or one was changed or removed in the meantime.
        """
        small = self._small(data)
        name = f"image:{hashlib.sha256(data).hexdigest()[:16]}"
        with self._encoding:
            vectors = [embed_image(model.opened, data, "the image") for model in self._models]
        return self._ranked(Query(name, image=small), vectors)

    def _ranked(self, query: Query, vectors: Sequence[Tensor]) -> Found:
        before, after = (
            model.index.scores(vector) for model, vector in zip(self._models, vectors, strict=True)
        )
        return Found(query, self._listed(0, before, after), self._listed(1, after, before))

    def _listed(self, which: int, scores: Vectors, others: Vectors) -> list[ListedImage]:
        listed = []
        for rank, number in enumerate(self._models[which].index.ranked(scores, self.top), 1):
            pair, other, score = self.images.texts(number), rank_of(number, others), scores[number]
            caption = self._caption(pair)
            listed.append(
                ListedImage(number, rank, other, float(score), pair.key, pair.shard, caption)
            )
        return listed

    def caption(self, number: int) -> str:
        """Return the first caption of an image under the run's template; "" if it has none."""
        return self._caption(self.images.texts(number))

    def examples(self, numbers: Sequence[int]) -> list[str]:
        """Return some different captions of images that are evenly spread over ``numbers``."""
        spread = numbers[:: max(1, len(numbers) // _EXAMPLES)]
        captions = dict.fromkeys(self.caption(number) for number in spread)
        return [caption for caption in captions if caption][:_EXAMPLES]

    def _caption(self, pair: RawPair) -> str:
        try:
            return self._template.captions(pair.caption, pair.metadata)[0]
        except BadCaption:
            return ""

    def _thumbnail(self, number: int) -> bytes:
        """Return an image as a small JPEG.

        Raises:
            DataError: The image cannot be decoded, or was changed or removed in the meantime.
        """
        return self._small(self.images[number].image)

    @staticmethod
    def _small(data: bytes) -> bytes:
        try:
            image = decode_image(data, at_least=THUMBNAIL_SIDE)
        except BadImage as error:
            raise DataError(f"the image cannot be used: {error}", "choose another one") from error
        return thumbnail(image, THUMBNAIL_SIDE)


def rank_of(number: int, scores: Vectors) -> int:
    """Return the rank of an image, from 1. Equal scores rank by number, as in ``best``."""
    score = scores[number]
    above, before = np.count_nonzero(scores > score), np.count_nonzero(scores[:number] == score)
    return 1 + int(above) + int(before)


def open_comparison(
    fine_tuned: OpenedModel, parts: Sequence[ImagePart], top: int, progress: Progress
) -> Comparison:
    """Load the pretrained model of a fine-tuned one, and embed all images with both models.

    Embeddings are stored in the cache of ``clipft search``.

    Raises:
        DataError: An image was changed or removed in the meantime.
        ModelError: The pretrained model cannot be loaded.
        StorageError: The cache folder cannot be written to.
    """
    # All other settings are those of the fine-tuned model, so that only the weights differ
    settings = fine_tuned.settings.model_copy(update={"scenario": "zero_shot"})
    pretrained = OpenedModel(load_model(settings), settings)

    def searched(opened: OpenedModel, name: str) -> SearchedModel:
        how = LoaderOptions.from_settings(opened.settings, opened.loaded.precision.device)
        with progress(f"Embedding with the {name} model") as report:
            return SearchedModel(opened, open_index(opened, parts, how, report))

    return Comparison(searched(pretrained, "pretrained"), searched(fine_tuned, "fine-tuned"), top)
