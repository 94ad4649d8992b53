"""What a tower that does not train makes of inputs that do not change, computed once.

Kept in the cache folder under a hash of all that decides it: the base model's weights, the
pairs, the preprocessing, the numbers computed in. Files: ``values``, float32 [rows, W] as they
were computed, mapped and not read at once; ``keys``, uint64 [rows], ascending, and ``places``,
the row of each; ``about.json``, the width and the pictures that cannot be used.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipft.core.common import Progress, cache_folder, counted
from clipft.core.files import replacing_folder
from clipft.data.captions.table import CaptionTable, NoCaptions
from clipft.data.captions.tokenizer import Keys, caption_keys, padded, stacked
from clipft.data.loader import LoaderOptions, Preprocessing, evaluation_batches
from clipft.data.shards.dataset import PairDataset
from clipft.embedding.load import LoadedModel

_FORMAT = "1"
_BATCH = 64
"""Rows per forward pass: always the same, so that features made again are the same bits."""


@dataclass(frozen=True)
class Features:
    """Rows of features by key. ``bad``: numbers of pairs that have none, and why."""

    keys: Keys
    places: "np.ndarray[Any, np.dtype[np.int64]]"
    values: "np.ndarray[Any, np.dtype[np.float32]]"
    bad: dict[int, str]

    def rows(self, keys: Keys) -> Tensor:
        """float32 [len(keys), W]."""
        places = self.places[np.searchsorted(self.keys, keys)]
        return torch.from_numpy(np.take(self.values, places, axis=0))


@dataclass(frozen=True)
class FeatureCache:
    """Makes and finds the features of one model."""

    loaded: LoadedModel
    options: LoaderOptions
    progress: Progress

    def of_images(self, pairs: PairDataset) -> Features:
        """[pairs, W] by the pair's number, pictures without augmentation.

        Raises:
            DataError: a shard was changed or removed.
            StorageError: the cache folder has no room for them.
        """
        inputs = self.loaded.base.inputs
        how = f"{inputs.image_size} {inputs.squashed} {inputs.mean} {inputs.std}"
        wordless = Preprocessing(NoCaptions(), inputs.image_size, "none", 0, inputs.squashed)
        bad: dict[int, str] = {}

        def rows() -> Iterator[tuple[Keys, Tensor]]:
            done = 0
            for batch in evaluation_batches(pairs, wordless, _BATCH, self.options):
                numbers = set(range(done, min(done + _BATCH, len(pairs))))
                reasons = iter(batch.skipped)  # in the order of the pairs, as the rest is
                bad.update((n, next(reasons).reason) for n in sorted(numbers - {*batch.numbers}))
                done += _BATCH
                if len(batch):
                    pixels = batch.pixel_values.to(self.loaded.precision.device)
                    yield np.array(batch.numbers, np.uint64), self._images(pixels)

        title = f"Image features of {counted(len(pairs), 'pair')}"
        return self._kept("images", (pairs.state(), how), rows(), _Made(title, len(pairs), bad))

    def of_captions(self, table: CaptionTable, pad_token_id: int) -> Features:
        """[captions, W] by ``caption_keys``, each different caption once.

        Raises:
            StorageError: the cache folder has no room for them.
        """
        different = {ids for captions in table.by_pair() for ids in captions}
        width = table.ids_of_all.dtype
        captions = sorted((np.frombuffer(ids, width).tolist() for ids in different), key=len)
        model, inputs = self.loaded.model, self.loaded.base.inputs
        filled = inputs.context_length if model.architecture.pads_texts else 0
        digest = hashlib.sha256(b"\0".join(sorted(different))).hexdigest()

        def rows() -> Iterator[tuple[Keys, Tensor]]:
            for start in range(0, len(captions), _BATCH):
                ids = stacked(
                    [padded(captions[start : start + _BATCH], pad_token_id)], pad_token_id, filled
                )
                yield (
                    caption_keys(ids, pad_token_id),
                    self._texts(ids.to(self.loaded.precision.device)),
                )

        title = f"Text features of {counted(len(captions), 'caption')}"
        made = _Made(title, len(captions), {})
        features = self._kept("texts", (digest, str(pad_token_id), str(width)), rows(), made)
        assert len(features.keys) == len(captions), "two captions with one key"
        return features

    @torch.no_grad()
    def _images(self, pixels: Tensor) -> Tensor:
        with self.loaded.precision.autocast():
            return self.loaded.model.image_features(pixels)

    @torch.no_grad()
    def _texts(self, ids: Tensor) -> Tensor:
        with self.loaded.precision.autocast():
            return self.loaded.model.text_features(ids)

    def _kept(
        self,
        tower: str,
        of: tuple[str, ...],
        rows: Iterable[tuple[Keys, Tensor]],
        made: "_Made",
    ) -> Features:
        precision = self.loaded.precision
        parts = (_FORMAT, self.loaded.fingerprint, precision.name, precision.device.type, *of)
        name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
        folder = cache_folder() / "features" / f"{tower}-{name}"
        try:
            return _load(folder)
        except (OSError, ValueError, KeyError):
            self.loaded.model.eval()  # whoever trains or measures sets the mode it needs
        # Another run may make the same: whole folders take each other's place
        with replacing_folder(folder, shared=True) as temporary, self.progress(made.title) as tell:
            _write(temporary, rows, made, lambda done: tell(done, made.rows))
        return _load(folder)


@dataclass(frozen=True)
class _Made:
    """What is being made: its heading, how many rows, and the bad ones once known."""

    title: str
    rows: int
    bad: dict[int, str]


def _write(
    folder: Path, rows: Iterable[tuple[Keys, Tensor]], made: _Made, tell: Callable[[int], None]
) -> None:
    keys, width, done = [np.empty(0, np.uint64)], 0, 0
    folder.mkdir(parents=True)
    with (folder / "values").open("wb") as file:
        for some_keys, some in rows:
            keys.append(some_keys)
            done, width = done + len(some), some.shape[1]
            file.write(some.float().cpu().numpy().tobytes())
            tell(done)
    unsorted = np.concatenate(keys)
    order = np.argsort(unsorted)
    np.save(folder / "keys.npy", unsorted[order])
    np.save(folder / "places.npy", order)
    about = {"width": width, "bad": made.bad}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _load(folder: Path) -> Features:
    """
    Raises:
        OSError, ValueError, KeyError: no features, or broken ones.
    """
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    keys, places = (np.load(folder / f"{name}.npy") for name in ("keys", "places"))
    values = np.empty((0, 1), np.float32)
    if len(keys):
        mapped = np.memmap(folder / "values", np.float32, mode="r")
        values = np.asarray(mapped).reshape(len(keys), about["width"])
    return Features(keys, places, values, {int(n): str(why) for n, why in about["bad"].items()})
