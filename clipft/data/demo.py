"""The demo's catalogue as a user would have it: raw files in train/ and val/."""

import json
from collections.abc import Callable
from pathlib import Path

from clipft.data.demo.catalogue import RenderedPair, render_pair
from clipft.core.errors import StorageError

VAL_SHARE = 0.125
_QUALITY = 92


def write_catalogue(
    folder: Path, pairs: int, seed: int, report: Callable[[int, int], None]
) -> None:
    """Render ``pairs`` products as .jpg, .txt and .json; every eighth goes to val/.

    A caption that stands in train/ is not repeated in val/: such a product is left out.
    ``report`` is told how many of how many are done.

    Raises:
        StorageError: the folder cannot be written.
    """
    seen: set[str] = set()
    every = round(1 / VAL_SHARE)
    try:
        for split in ("train", "val"):
            (folder / split).mkdir(parents=True, exist_ok=True)
        for number in range(pairs):
            pair = render_pair(seed, number)
            if pair.caption not in seen:
                split = "val" if number % every == every - 1 else "train"
                _write(folder / split / pair.key, pair)
            seen.add(pair.caption)
            report(number + 1, pairs)
    except OSError as error:
        raise StorageError(
            f"cannot write {error.filename or folder}: {error.strerror}",
            "make room or choose another --output-dir",
        ) from error


def _write(stem: Path, pair: RenderedPair) -> None:
    pair.image.save(stem.with_suffix(".jpg"), quality=_QUALITY)
    stem.with_suffix(".txt").write_text(pair.caption, encoding="utf-8")
    metadata = json.dumps(pair.metadata, ensure_ascii=False, sort_keys=True)
    stem.with_suffix(".json").write_text(metadata, encoding="utf-8")
