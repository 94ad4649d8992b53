"""What is in a catalogue, and what is wrong with it, before anyone trains on it."""

import hashlib
import io
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from PIL import Image

from clipft.core.common import processors
from clipft.data.captions.template import DEFAULT_TEMPLATE, BadCaption, CaptionTemplate
from clipft.data.duplicates import Groups, PerceptualHash, near_duplicates, perceptual_hash
from clipft.data.images import BadImage, decode_image
from clipft.data.shards.dataset import PairDataset, parse_metadata

_EXAMPLES = 5
_LISTED = 12
LABEL_FIELDS = ("category", "type", "label", "class")
"""Fields of the metadata that may name what is shown, the likeliest first."""


@dataclass(frozen=True)
class PairFacts:
    """One pair. ``photo`` is the SHA-256 of its bytes, ``size`` (width, height) upright,
    ``stored`` the bytes of picture and caption, ``labels`` those of ``LABEL_FIELDS``;
    ``broken`` and ``bad_caption`` say why it cannot be used, or ""."""

    key: str
    split: str = ""
    number: int = 0
    stored: int = 0
    labels: tuple[str, ...] = ()
    caption: str = ""
    bad_caption: str = ""
    photo: str = ""
    kind: str = ""
    size: tuple[int, int] = (0, 0)
    perceptual_hash: PerceptualHash | None = None
    broken: str = ""

    @property
    def words(self) -> str:
        """The caption as it is compared: without case."""
        return self.caption.casefold()

    @property
    def usable(self) -> bool:
        return not self.broken and not self.bad_caption

    @property
    def place(self) -> str:
        return f"{self.split}/{self.key}" if self.split else self.key


@dataclass(frozen=True)
class SplitFacts:
    """Figures of one split. ``ceiling`` is the best R@K that paired retrieval can give with
    these duplicates, ties by lower index: of k pairs with one caption (or photo), at most K
    can have their own partner among the first K."""

    pairs: int
    usable: int
    bytes: int
    no_pairs: dict[str, int]
    broken: list[dict[str, str]]
    bad_captions: list[dict[str, str]]
    kinds: dict[str, int]
    shorter_side: dict[str, float]
    smaller_than_model: int
    smallest: list[str]
    caption_tokens: dict[str, float]
    captions_cut: int
    same_photo: int
    near_photo: int
    same_caption: int
    groups: int
    largest_group: int
    duplicates: list[dict[str, Any]]
    categories: dict[str, Any]
    ceiling: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Leak:
    """Pairs of the one side that also stand on the other, by what they share. ``matches``
    are the first of them, each beside one that it shares most with."""

    same_photo: int
    near_photo: int
    same_caption: int
    examples: list[str]
    matches: list[dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_facts(
    pairs: PairDataset,
    report: Callable[[int, int], None],
    workers: int = 0,
    split: str = "",
    template: CaptionTemplate = DEFAULT_TEMPLATE,
) -> list[PairFacts]:
    """Decode every pair in ``workers`` threads (Pillow decodes outside of the interpreter's
    lock); 0: as many as there are processors."""
    facts = []
    with ThreadPoolExecutor(workers or processors()) as threads:
        facts_of = partial(_fact, pairs, split, template)
        found = threads.map(facts_of, range(len(pairs)))
        for done, fact in enumerate(found):
            facts.append(fact)
            report(done + 1, len(pairs))
    return facts


def _fact(pairs: PairDataset, split: str, template: CaptionTemplate, number: int) -> PairFacts:
    raw = pairs[number]
    metadata = parse_metadata(raw.metadata)
    values = [metadata.get(field) for field in LABEL_FIELDS]
    fact = PairFacts(
        f"{raw.shard}:{raw.key}",
        split,
        number,
        len(raw.image) + len(raw.caption),
        tuple(value.strip() if isinstance(value, str) else "" for value in values),
    )
    try:
        fact = replace(fact, caption=template.captions(raw.caption, raw.metadata)[0])
    except BadCaption as error:
        fact = replace(fact, bad_caption=str(error))
    try:
        image = decode_image(raw.image)
    except BadImage as error:
        return replace(fact, broken=str(error))
    with Image.open(io.BytesIO(raw.image)) as header:
        kind = (header.format or "?").lower()
    photo = hashlib.sha256(raw.image).hexdigest()
    return replace(
        fact, photo=photo, kind=kind, size=image.size, perceptual_hash=perceptual_hash(image)
    )


def _alike(facts: Sequence[PairFacts], near: int) -> list[tuple[str, str]]:
    """Near-identical photos, by SHA-256: each is compared once, however often it stands."""
    once = list({fact.photo: fact for fact in facts}.values())
    looks = [fact.perceptual_hash for fact in once if fact.perceptual_hash]
    return [(once[i].photo, once[j].photo) for i, j in near_duplicates(looks, near)]


def split_facts(
    pairs: PairDataset,
    facts: Sequence[PairFacts],
    tokens: Sequence[int],
    context: int,
    image_size: int,
    near: int,
) -> SplitFacts:
    """Figures of one split; ``tokens`` are the lengths of the usable captions, uncut."""
    usable = [fact for fact in facts if fact.usable]
    photos, words = [f.photo for f in usable], [f.words for f in usable]
    alike = _alike(usable, near)
    near_ones = {photo for pair in alike for photo in pair}
    groups = _groups(usable, alike)
    small = sorted((f for f in usable if min(f.size) < image_size), key=lambda f: min(f.size))
    return SplitFacts(
        pairs=len(facts),
        usable=len(usable),
        bytes=sum(fact.stored for fact in facts),
        no_pairs=dict(Counter(skipped.reason for skipped in pairs.skipped)),
        broken=[{"pair": f.key, "reason": f.broken} for f in facts if f.broken],
        bad_captions=[{"pair": f.key, "reason": f.bad_caption} for f in facts if f.bad_caption],
        kinds=dict(Counter(fact.kind for fact in usable).most_common()),
        shorter_side=_spread([min(fact.size) for fact in usable]),
        smaller_than_model=len(small),
        smallest=[fact.place for fact in small[:_LISTED]],
        caption_tokens=_spread(tokens),
        captions_cut=sum(length > context for length in tokens),
        same_photo=_extra(photos),
        near_photo=sum(photo in near_ones for photo in photos),
        same_caption=_extra(words),
        groups=len(groups),
        largest_group=len(groups[0]) if groups else min(1, len(usable)),
        duplicates=_listed([_described(group, near_ones) for group in groups]),
        categories=_categories(usable),
        ceiling={"text_to_image": _ceiling(words), "image_to_text": _ceiling(photos)},
    )


def _groups(
    facts: Sequence[PairFacts], alike: Iterable[tuple[str, str]]
) -> list[Sequence[PairFacts]]:
    """Pairs linked, directly or through others, by photo, look or caption; largest first."""
    groups, row_of = Groups(len(facts)), {fact.photo: row for row, fact in enumerate(facts)}
    groups.join_equal([fact.photo for fact in facts])
    groups.join_equal([fact.words for fact in facts])
    for one, other in alike:
        groups.join(row_of[one], row_of[other])
    members: dict[int, list[PairFacts]] = {}
    for row, fact in enumerate(facts):
        members.setdefault(groups.find(row), []).append(fact)
    return sorted((group for group in members.values() if len(group) > 1), key=len, reverse=True)


def _described(group: Sequence[PairFacts], near_ones: set[str]) -> dict[str, Any]:
    shares = {
        "photo": _extra([fact.photo for fact in group]) > 0,
        "near photo": any(fact.photo in near_ones for fact in group),
        "caption": _extra([fact.words for fact in group]) > 0,
    }
    named = [name for name, shared in shares.items() if shared]
    return {"size": len(group), "shares": named, "pairs": [f.place for f in group[:_LISTED]]}


def _listed(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest by photo, then by caption alone: those would crowd out the rarer kind."""
    words = [group for group in groups if group["shares"] == ["caption"]]
    return [g for g in groups if g["shares"] != ["caption"]][:_LISTED] + words[:_LISTED]


def leak(one: Sequence[PairFacts], other: Sequence[PairFacts], near: int) -> Leak:
    """Pairs of ``one`` whose photo or caption also stands in ``other``."""
    ours, theirs = ([f for f in side if f.usable] for side in (one, other))
    photos = {fact.photo: fact.place for fact in reversed(theirs)}
    words = {fact.words: fact.place for fact in reversed(theirs)}
    links = [link for a, b in _alike([*ours, *theirs], near) for link in ((a, b), (b, a))]
    looks = {ours_photo: photos[photo] for ours_photo, photo in links if photo in photos}
    counts: Counter[str] = Counter()
    examples, matches = [], []
    for fact in ours:
        partners = {"photo": photos.get(fact.photo), "caption": words.get(fact.words)}
        if not partners["photo"]:
            partners["near photo"] = looks.get(fact.photo)
        found = {name: place for name, place in partners.items() if place}
        counts.update(found.keys())
        if found:
            examples.append(fact.key)
            partner = found.get("photo") or found.get("near photo") or found["caption"]
            shares = ", ".join(sorted(found, reverse=True))
            matches.append({"pair": fact.place, "other": partner, "shares": shares})
    return Leak(
        counts["photo"],
        counts["near photo"],
        counts["caption"],
        examples[:_EXAMPLES],
        matches[:_LISTED],
    )


def _categories(facts: Sequence[PairFacts]) -> dict[str, Any]:
    """Counts of the first field of ``LABEL_FIELDS`` that any pair has; empty: none has."""
    for field, values in zip(
        LABEL_FIELDS, zip(*(f.labels for f in facts), strict=True), strict=False
    ):
        counts = Counter(value for value in values if value)
        if counts:
            labelled = sum(counts.values())
            return {"field": field, "labelled": labelled, "counts": dict(counts.most_common())}
    return {}


def _extra(values: Sequence[str]) -> int:
    """How many are there beyond the first of each value."""
    return len(values) - len(set(values))


def _ceiling(values: Sequence[str]) -> dict[str, float]:
    counts = Counter(values).values()
    total = max(1, len(values))
    return {f"r@{k}": sum(min(k, count) for count in counts) / total for k in (1, 5, 10)}


def _spread(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
