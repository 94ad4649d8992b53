"""Which candidates are right for a query, and which queries depend on each other.

Each distinct text and image counts once: equal captions are one text, equal files one image.
An image is right for a text if any pair joins them, or if a group (one product, say) holds both.
Texts and images that are joined, directly or in several steps, form a cluster. Clusters are the
unit of the bootstrap, because their queries are not independent of each other.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import numpy as np

from clipft.core.common import counted
from clipft.core.errors import UsageError
from clipft.metrics.definitions import Floats, Integers

_MOST_EDGES = 50_000_000


@dataclass(frozen=True)
class Identities:
    """What N pairs with T captions have in common, as int64.

    ``captions`` [T] and ``images`` [N] hold equal numbers for equal captions and images. ``groups``
    [N] numbers the groups, with -1 for a pair that is in none, and is None if there are no groups.
    ``owners`` [T] is the pair of each caption, ascending; each pair has at least one. By default
    caption i is that of pair i. ``grades``, float64 [N], says how relevant the image of a pair is
    to its captions, 0 if it is not; None if that is not known.
    """

    captions: Integers
    images: Integers
    groups: Integers | None = None
    owners: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    grades: Floats | None = None

    def __post_init__(self) -> None:
        if not len(self.owners):
            object.__setattr__(self, "owners", np.arange(len(self.captions)))

    def of(self, pairs: Integers) -> "Identities":
        """Keep these pairs, which are ascending, and number them from 0."""
        kept = np.isin(self.owners, pairs)
        groups = None if self.groups is None else self.groups[pairs]
        owners = np.searchsorted(pairs, self.owners[kept])
        grades = None if self.grades is None else self.grades[pairs]
        return Identities(self.captions[kept], self.images[pairs], groups, owners, grades)


@dataclass(frozen=True)
class Relevance:
    """Distinct texts [T] and images [P], and which of them belong together.

    ``text_rows`` [T] holds the first caption that is that text, and ``text_pairs`` [T] and
    ``image_pairs`` [P] the first pair with that text or image. Text ``edge_texts[e]`` and image
    ``edge_images[e]`` are right for each other, sorted by text. ``clusters`` [N] holds each pair's
    cluster, numbered from 0. All are int64.
    """

    text_rows: Integers
    text_pairs: Integers
    image_pairs: Integers
    edge_texts: Integers
    edge_images: Integers
    clusters: Integers


def numbered(values: Iterable[Hashable]) -> Integers:
    """Give equal values equal numbers, from 0 in order of appearance; None becomes -1."""
    known: dict[Hashable, int] = {}
    return np.array(
        [-1 if value is None else known.setdefault(value, len(known)) for value in values],
        np.int64,
    )


def relevance(identities: Identities) -> Relevance:
    """Find the distinct texts and images, their edges and their clusters.

    Raises:
        UsageError: the groups are so large that their edges would not fit in memory.
    """
    text_rows, texts = distinct(identities.captions)
    image_pairs, images = distinct(identities.images)
    owners = identities.owners
    edges = [np.stack([texts, images[owners]])]
    if identities.groups is not None:
        groups = identities.groups[owners]  # of each caption
        order = np.argsort(groups, kind="stable")
        cuts = np.flatnonzero(np.diff(groups[order])) + 1
        members = [m for m in np.split(order, cuts) if len(m) > 1 and groups[m[0]] >= 0]
        if sum(len(m) * len(np.unique(owners[m])) for m in members) > _MOST_EDGES:
            largest = counted(max(len(np.unique(owners[m])) for m in members), "pair")
            raise UsageError(
                f"the groups are too large: the largest holds {largest}",
                "choose a field that tells products apart with --group-field",
            )
        for m in members:  # every text of a group with every image of it
            t, p = np.unique(texts[m]), np.unique(images[owners[m]])
            edges.append(np.stack([np.repeat(t, len(p)), np.tile(p, len(t))]))
    joined = np.unique(np.concatenate(edges, axis=1), axis=1)
    edge_texts, edge_images = map(np.ascontiguousarray, joined)
    # The cluster of each text: the lowest number spreads along the edges until nothing changes
    label, of_image = np.arange(len(text_rows)), np.full(len(image_pairs), len(text_rows))
    while True:
        np.minimum.at(of_image, edge_images, label[edge_texts])
        spread = label.copy()
        np.minimum.at(spread, edge_texts, of_image[edge_images])
        spread = spread[spread]  # pointer jumping: halves the length of long chains
        if np.array_equal(spread, label):
            break
        label = spread
    clusters = np.unique(label, return_inverse=True)[1].astype(np.int64)
    # All captions of a pair are in one cluster, because they share its image
    of_pair = clusters[texts[np.flatnonzero(np.diff(owners, prepend=-1))]]
    pairs = owners[text_rows]
    return Relevance(text_rows, pairs, image_pairs, edge_texts, edge_images, of_pair)


def distinct(values: Integers) -> tuple[Integers, Integers]:
    """Return the first position of each distinct value in order of appearance, and each value's
    number in that order."""
    _, first, number = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[number]
