"""Shards whose pairs have several captions."""

import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from clipft.data.demo.catalogue import render_pair
from tests.conftest import add, jpeg


def captions_of(number: int, count: int) -> list[str]:
    """Return ``count`` different captions of a rendered product; every fourth is shared."""
    own = render_pair(7, number).caption
    ways = [own, f"a photo of {own}", "something for the living room", f"number {number}"]
    return [*ways, *(f"{own}, seen for the {nth}th time" for nth in range(5, 20))][:count]


def write_several(
    path: Path, numbers: Iterable[int], counts: Sequence[int] = (5,), bad: Iterable[int] = ()
) -> None:
    """Write a shard; pair i has ``counts[i % len(counts)]`` captions, one on each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            image = jpeg(render_pair(7, number))
            captions = captions_of(number, counts[number % len(counts)])
            add(tar, f"{number:05d}.jpg", image[:200] if number in set(bad) else image)
            add(tar, f"{number:05d}.txt", "\n".join(captions).encode())
