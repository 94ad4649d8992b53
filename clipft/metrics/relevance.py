"""What is right for which query, and which queries stand or fall together.

Texts and photos are taken once each: equal captions are one text, equal files one photo. A
photo is right for a text if any pair joins them, or if a group (of one product, say) holds
both. Texts and photos that are joined, directly or by steps, form one cluster: the unit of the
bootstrap, because its queries are not independent of each other.
"""

import unicodedata
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipft.core.common import counted
from clipft.core.errors import UsageError

_MOST_EDGES = 50_000_000

Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Identities:
    """What pair i has in common with others, int64 [N] each: equal numbers for equal captions
    and equal photos; ``groups`` None: no groups, -1: this pair is in none."""

    captions: Integers
    photos: Integers
    groups: Integers | None = None


@dataclass(frozen=True)
class Relevance:
    """``text_pairs`` [T] and ``photo_pairs`` [P]: the first pair with that text or photo.
    Text ``edge_texts[e]`` and photo ``edge_photos[e]`` are right for each other, sorted by
    text. ``clusters`` [N]: each pair's cluster, numbered from 0."""

    text_pairs: Integers
    photo_pairs: Integers
    edge_texts: Integers
    edge_photos: Integers
    clusters: Integers


def normalised(caption: str) -> str:
    """The form under which captions count as equal, as CLIP's tokenizer reads them: NFC, lower
    case, single spaces. No model tells such captions apart."""
    return " ".join(unicodedata.normalize("NFC", caption).lower().split())


def numbered(values: Iterable[Hashable]) -> Integers:
    """Equal numbers for equal values, rising in the order of first appearance; None: -1."""
    known: dict[Hashable, int] = {}
    return np.array(
        [-1 if value is None else known.setdefault(value, len(known)) for value in values],
        np.int64,
    )


def relevance(identities: Identities) -> Relevance:
    """
    Raises:
        UsageError: groups so large that their products cannot be listed.
    """
    text_pairs, texts = _first_and_number(identities.captions)
    photo_pairs, photos = _first_and_number(identities.photos)
    joined = [np.stack([texts, photos])]
    if identities.groups is not None:
        joined += _products(texts, photos, identities.groups)
    edges = np.unique(np.concatenate(joined, axis=1), axis=1)
    clusters = _clusters(edges, len(text_pairs), len(photo_pairs))
    edge_texts, edge_photos = map(np.ascontiguousarray, edges)
    return Relevance(text_pairs, photo_pairs, edge_texts, edge_photos, clusters[texts])


def _first_and_number(values: Integers) -> tuple[Integers, Integers]:
    """The first place of each value, in order of appearance, and each place's value by it."""
    _, first, number = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[number]


def _products(texts: Integers, photos: Integers, groups: Integers) -> list[Integers]:
    """All texts of a group with all its photos."""
    order = np.argsort(groups, kind="stable")
    cuts = np.flatnonzero(np.diff(groups[order])) + 1
    members = [m for m in np.split(order, cuts) if len(m) > 1 and groups[m[0]] >= 0]
    if sum(len(m) ** 2 for m in members) > _MOST_EDGES:
        largest = counted(max(map(len, members)), "pair")
        raise UsageError(
            f"the groups are too large: the largest holds {largest}",
            "name a field that tells products apart with --group-field",
        )
    sets = [(np.unique(texts[m]), np.unique(photos[m])) for m in members]
    return [np.stack([np.repeat(t, len(p)), np.tile(p, len(t))]) for t, p in sets]


def _clusters(edges: Integers, texts: int, photos: int) -> Integers:
    """The cluster of each text, from 0: the least number spreads along edges until it rests."""
    label, of_photo = np.arange(texts), np.full(photos, texts)
    while True:
        np.minimum.at(of_photo, edges[1], label[edges[0]])
        spread = label.copy()
        np.minimum.at(spread, edges[0], of_photo[edges[1]])
        spread = spread[spread]  # jump: long chains halve
        if np.array_equal(spread, label):
            return np.unique(label, return_inverse=True)[1].astype(np.int64)
        label = spread
