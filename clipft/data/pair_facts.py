"""Reads what an inspection needs to know of each pair."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from clipft.core.common import processors
from clipft.data.captions.cleaning import compared, has_broken_characters, has_html
from clipft.data.captions.template import (
    DEFAULT_TEMPLATE,
    BadCaption,
    CaptionTemplate,
    clean_text,
)
from clipft.data.duplicates import (
    PerceptualHash,
    perceptual_hash,
)
from clipft.data.images.decode import open_image
from clipft.data.images.formats import BadImage
from clipft.data.shards.dataset import PairDataset
from clipft.data.shards.metadata import metadata_fault, parse_metadata

_CHUNK = 64
"""Pairs in a task of a thread. Handing over one at a time would take as long as reading it."""
LABEL_FIELDS = ("category", "type", "label", "class")
"""Fields of the metadata that may name what is shown, the likeliest first."""


@dataclass(frozen=True, slots=True)
class PairFacts:
    """Facts about one pair.

    ``place`` is the key with its shard and split, ``stored`` the number of bytes of image and
    caption, and ``words`` holds the captions as they are compared. ``image_hash`` is the SHA-256 of
    the image's bytes, ``size`` its upright (width, height), and ``labels`` are the values of
    ``LABEL_FIELDS``. ``broken`` and ``bad_caption`` say why the pair would be skipped, and
    ``bad_metadata`` why its metadata cannot be used. ``html`` and ``broken_characters`` say whether
    a caption has any.
    """

    key: str
    split: str = ""
    number: int = 0
    place: str = ""
    stored: int = 0
    labels: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    bad_caption: str = ""
    html: bool = False
    broken_characters: bool = False
    bad_metadata: str = ""
    image_hash: str = ""
    kind: str = ""
    is_deep: bool = False
    size: tuple[int, int] = (0, 0)
    perceptual_hash: PerceptualHash | None = None
    broken: str = ""

    @property
    def usable(self) -> bool:
        return not self.broken and not self.bad_caption

    @property
    def caption(self) -> str:
        """The first caption; "" if there is none."""
        return self.captions[0] if self.captions else ""


def read_facts(
    pairs: PairDataset,
    report: Callable[[int, int], None],
    workers: int = 0,
    split: str = "",
    template: CaptionTemplate = DEFAULT_TEMPLATE,
) -> list[PairFacts]:
    """Decode every pair in ``workers`` threads, or 0 for one per processor.

    ``report`` is called with (done, all) after each few pairs.
    """
    facts, read = list[PairFacts](), partial(_fact, pairs, split, template)
    chunks = [range(len(pairs))[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
    # Threads are enough: Pillow releases the GIL while it decodes
    with ThreadPoolExecutor(workers or processors()) as threads:
        for found in threads.map(lambda numbers: list(map(read, numbers)), chunks):
            facts += found
            report(len(facts), len(pairs))
    return facts


def _fact(pairs: PairDataset, split: str, template: CaptionTemplate, number: int) -> PairFacts:
    raw = pairs[number]
    metadata, key = parse_metadata(raw.metadata), f"{raw.shard}:{raw.key}"
    bad_metadata = metadata_fault(raw.metadata)
    values = [metadata.get(field) for field in LABEL_FIELDS]
    fact = PairFacts(
        key,
        split,
        number,
        f"{split}/{key}" if split else key,
        len(raw.image) + len(raw.caption),
        tuple(clean_text(value) if isinstance(value, str) else "" for value in values),
        bad_metadata=bad_metadata,
    )
    try:
        captions = tuple(template.captions(raw.caption, raw.metadata))
        fact = replace(
            fact,
            captions=captions,
            words=tuple(dict.fromkeys(map(compared, captions))),
            html=any(map(has_html, captions)),
            broken_characters=any(map(has_broken_characters, captions)),
        )
    except BadCaption as error:
        fact = replace(fact, bad_caption=str(error))
    try:
        opened = open_image(raw.image)
        image = opened.decode()
    except BadImage as error:
        return replace(fact, broken=str(error))
    return replace(
        fact,
        image_hash=hashlib.sha256(raw.image).hexdigest(),
        kind=opened.format.lower(),
        is_deep=opened.is_deep,
        size=image.size,
        perceptual_hash=perceptual_hash(image),
    )
