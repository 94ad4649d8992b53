"""The token ids of a pair's caption: made when asked for, or once for all pairs.

Where a pair has several captions, training draws one per epoch, as a function of (seed,
epoch, pair) alone; validation takes the first.
"""

from dataclasses import dataclass
from typing import Protocol

from clipft.data.captions.template import CaptionTemplate
from clipft.data.order import derived_seed
from clipft.data.shards.dataset import RawPair
from clipft.data.captions.tokenizer import CaptionEncoder

_CAPTION = 1
"""Keeps the draw of the caption apart from that of the augmentation."""


class CaptionSource(Protocol):
    """``end`` is the id that ends a text, for padding."""

    @property
    def end(self) -> int: ...

    def ids(self, pair: RawPair, epoch: int) -> list[int]:
        """
        Raises:
            BadCaption: the pair has no text.
        """


def drawn(captions: int, seed: int | None, epoch: int, number: int) -> int:
    """Which of ``captions`` a pair has in ``epoch``; seed None: the first."""
    if captions == 1 or seed is None:
        return 0
    return derived_seed(seed, epoch, number, _CAPTION) % captions


@dataclass(frozen=True)
class LiveCaptions:
    """Tokenised each time: for streams, whose captions come with the pictures."""

    template: CaptionTemplate
    encoder: CaptionEncoder
    seed: int | None = None

    @property
    def end(self) -> int:
        return self.encoder.end

    def ids(self, pair: RawPair, epoch: int) -> list[int]:
        texts = self.template.captions(pair.caption, pair.metadata)
        text = texts[drawn(len(texts), self.seed, epoch, pair.number)]
        return self.encoder([text])[0].ids


@dataclass(frozen=True)
class NoCaptions:
    """Where the pictures alone matter."""

    end: int = 0

    def ids(self, pair: RawPair, epoch: int) -> list[int]:
        return [self.end]
