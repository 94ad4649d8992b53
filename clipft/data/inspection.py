"""Describes a catalogue, and finds what is wrong with it, before anyone trains on it."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count as naturals
from typing import Any

from clipft.data.captions.tokenizer import Encoded, lost_share
from clipft.data.duplicates import (
    group_leaders,
    links_of,
    near_duplicates,
)
from clipft.data.pair_facts import LABEL_FIELDS, PairFacts
from clipft.data.shards.dataset import PairDataset

_EXAMPLES = 5
_LISTED = 12
_RANGES = 12
"""Ranges of a histogram."""


@dataclass(frozen=True)
class SplitFacts:
    """Figures of one split. ``captions`` counts those of the usable pairs.

    The ``..._counts`` are histograms: the first and last value of each range, and the count.

    ``ceiling`` is the highest R@K that paired retrieval can reach with these duplicates, with ties
    broken by the lower index: of n pairs with the same caption (or image), at most K can have their
    own partner among the first K. ``tokens_lost`` is the share of the tokens of truncated captions
    that is lost.
    """

    pairs: int
    usable: int
    captions: int
    bytes: int
    no_pairs: dict[str, int]
    broken: list[dict[str, str]]
    bad_captions: list[dict[str, str]]
    kinds: dict[str, int]
    more_than_8_bits: int
    shorter_side: dict[str, float]
    shorter_side_counts: list[list[int]]
    smaller_than_model: int
    smallest: list[str]
    captions_with_html: dict[str, Any]
    captions_with_broken_characters: dict[str, Any]
    bad_metadata: list[dict[str, str]]
    caption_tokens: dict[str, float]
    caption_token_counts: list[list[int]]
    captions_cut: int
    tokens_lost: float
    same_photo: int
    near_photo: int
    same_caption: int
    groups: int
    largest_group: int
    duplicates: list[dict[str, Any]]
    categories: dict[str, Any]
    ceiling: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Leak:
    """Counts the pairs of one split that share an image or a caption with another split.

    ``matches`` holds the first of these pairs, each with the pair that it shares most with.
    """

    same_photo: int
    near_photo: int
    same_caption: int
    examples: list[str]
    matches: list[dict[str, str]]


Links = Sequence[tuple[str, str]]
"""Near-duplicate images, as pairs of SHA-256."""


def near_images(facts: Sequence[PairFacts], near: int) -> Links:
    """Find the near-duplicates among the usable images. Identical images are compared only once."""
    once = list({fact.image_hash: fact for fact in facts if fact.usable}.values())
    hashes = [fact.perceptual_hash for fact in once if fact.perceptual_hash]
    return [(once[i].image_hash, once[j].image_hash) for i, j in near_duplicates(hashes, near)]


def split_facts(
    pairs: PairDataset,
    facts: Sequence[PairFacts],
    tokens: Sequence[Encoded],
    context: int,
    image_size: int,
    near: Links,
) -> SplitFacts:
    """Compute the figures of one split.

    Args:
        pairs: the split.
        facts: the facts about its pairs.
        tokens: the tokenized captions of the usable pairs.
        context: the context length of the model, in tokens.
        image_size: the image size of the model, in pixels.
        near: the near-duplicates in this split; may include others.
    """
    lengths = [caption.length for caption in tokens]
    usable = [fact for fact in facts if fact.usable]
    sides = [min(fact.size) for fact in usable]
    images, words = [f.image_hash for f in usable], [word for f in usable for word in f.words]
    row_of = {fact.image_hash: row for row, fact in enumerate(usable)}
    alike = [(one, other) for one, other in near if one in row_of and other in row_of]
    near_ones = {image for pair in alike for image in pair}
    links = [(row_of[one], row_of[other]) for one, other in alike]
    links += links_of(fact.words for fact in usable)
    members: dict[int, list[PairFacts]] = {}
    for row, leader in enumerate(group_leaders(len(usable), (images,), links)):
        members.setdefault(leader, []).append(usable[row])
    groups = sorted((g for g in members.values() if len(g) > 1), key=len, reverse=True)
    small = sorted((f for f in usable if min(f.size) < image_size), key=lambda f: min(f.size))
    categories: dict[str, Any] = {}
    for column, field in enumerate(LABEL_FIELDS):
        counts = Counter(fact.labels[column] for fact in usable if fact.labels[column])
        if counts:  # the first field that any pair has
            labelled = sum(counts.values())
            categories = {
                "field": field,
                "labelled": labelled,
                "counts": dict(counts.most_common()),
            }
            break
    return SplitFacts(
        pairs=len(facts),
        usable=len(usable),
        captions=sum(len(fact.captions) for fact in usable),
        bytes=sum(fact.stored for fact in facts),
        no_pairs=dict(Counter(skipped.reason for skipped in pairs.skipped)),
        broken=[{"pair": f.key, "reason": f.broken} for f in facts if f.broken],
        bad_captions=[{"pair": f.key, "reason": f.bad_caption} for f in facts if f.bad_caption],
        kinds=dict(Counter(fact.kind for fact in usable).most_common()),
        more_than_8_bits=sum(fact.is_deep for fact in usable),
        shorter_side=_spread(sides),
        shorter_side_counts=histogram(sides),
        smaller_than_model=len(small),
        smallest=[fact.place for fact in small[:_LISTED]],
        captions_with_html=_found(usable, "html"),
        captions_with_broken_characters=_found(usable, "broken_characters"),
        bad_metadata=[{"pair": f.key, "reason": f.bad_metadata} for f in facts if f.bad_metadata],
        caption_tokens=_spread(lengths),
        caption_token_counts=histogram(lengths),
        captions_cut=sum(length > context for length in lengths),
        tokens_lost=lost_share(lengths, [len(caption.ids) for caption in tokens]),
        same_photo=_repeated(images),
        near_photo=sum(image in near_ones for image in images),
        same_caption=_repeated(words),
        groups=len(groups),
        largest_group=len(groups[0]) if groups else min(1, len(usable)),
        duplicates=_listed(groups, near_ones),
        categories=categories,
        ceiling={"text_to_image": _upper_bounds(words), "image_to_text": _upper_bounds(images)},
    )


def _listed(groups: Sequence[Sequence[PairFacts]], near_ones: set[str]) -> list[dict[str, Any]]:
    """Describe the largest groups. Groups that share images come first, because they are rarer than
    groups that share only the caption."""
    by_image, by_caption = list[dict[str, Any]](), list[dict[str, Any]]()
    for group in groups:
        shares = {
            "photo": _repeated([fact.image_hash for fact in group]) > 0,
            "near photo": any(fact.image_hash in near_ones for fact in group),
            "caption": _repeated([word for fact in group for word in fact.words]) > 0,
        }
        named = [name for name, shared in shares.items() if shared]
        into = by_caption if named == ["caption"] else by_image
        places = [fact.place for fact in group[:_LISTED]]
        into.append({"size": len(group), "shares": named, "pairs": places})
    return by_image[:_LISTED] + by_caption[:_LISTED]


def leak(one: Sequence[PairFacts], other: Sequence[PairFacts], near: Links) -> Leak:
    """Find the pairs of ``one`` whose image or caption is also in ``other``. ``near`` holds the
    near-duplicates among both; it may include others."""
    ours, theirs = ([f for f in side if f.usable] for side in (one, other))
    # Reversed, so that of several pairs with one image the first is named
    images = {fact.image_hash: fact.place for fact in reversed(theirs)}
    words = {word: fact.place for fact in reversed(theirs) for word in fact.words}
    links = [link for a, b in near for link in ((a, b), (b, a))]
    near_ones = {our_image: images[image] for our_image, image in links if image in images}
    counts: Counter[str] = Counter()
    examples, matches = [], []
    for fact in ours:
        same_words = next((words[word] for word in fact.words if word in words), None)
        partners = {"photo": images.get(fact.image_hash), "caption": same_words}
        if not partners["photo"]:
            partners["near photo"] = near_ones.get(fact.image_hash)
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


def _found(facts: Sequence[PairFacts], trouble: str) -> dict[str, Any]:
    """Count the pairs with a problem, and name the first of them."""
    found = [fact.place for fact in facts if getattr(fact, trouble)]
    return {"pairs": len(found), "examples": found[:_EXAMPLES]}


def _repeated(values: Sequence[str]) -> int:
    """Count the values that repeat an earlier one."""
    return len(values) - len(set(values))


def _upper_bounds(values: Sequence[str]) -> dict[str, float]:
    counts = Counter(values).values()
    total = max(1, len(values))
    return {f"r@{k}": sum(min(k, count) for count in counts) / total for k in (1, 5, 10)}


def _spread(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def histogram(values: Sequence[int]) -> list[list[int]]:
    """Count whole numbers from 0 in at most ``_RANGES`` ranges of equal width: 1, 2 or 5 times a
    power of ten. Each range is [first, last, count]. No values give no ranges."""
    if not values:
        return []
    low, high = min(values), max(values)
    widths = (step * 10**power for power in naturals() for step in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < _RANGES)
    counts = Counter(value // width for value in values)
    ranges = range(low // width, high // width + 1)
    return [[n * width, (n + 1) * width - 1, counts[n]] for n in ranges]
