"""Caches the output of frozen towers for inputs that do not change.

Features are stored in the cache folder, under a hash of everything that they depend on: the weights
of the pretrained model, the pairs, the preprocessing, the precision, the hardware, and the versions
of the libraries that compute them. Files:

    values       float32 [rows, W] in the order in which they were computed; memory-mapped
    keys.npy     uint64 [rows], in ascending order
    places.npy   int64 [rows], the row in ``values`` of each key
    about.json   W, and the pairs whose images cannot be used
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipft.core.cache import cache_folder, mark_used
from clipft.core.common import Progress, counted
from clipft.core.files import replacing
from clipft.data.captions.table import CaptionTable, NoCaptions
from clipft.data.captions.tokenizer import Keys, caption_keys, padded, stacked
from clipft.data.decoding import Preprocessing
from clipft.data.loader import LoaderOptions, evaluation_batches
from clipft.data.shards.dataset import PairDataset
from clipft.embedding.finite import check_finite_rows
from clipft.embedding.load import LoadedModel
from clipft.models.device import instruction_set

_FORMAT = "2"
_BATCH = 64
"""Rows per forward pass. The number is fixed so that recomputed features have the same bits."""
_SAMPLE, _SAMPLE_SECONDS = 8 * _BATCH, 10.0
"""A forecast stops after this many rows or this many seconds."""


@dataclass(frozen=True)
class Features:
    """Cached rows by key. ``bad`` maps the numbers of pairs without features to the reason."""

    keys: Keys
    places: "np.ndarray[Any, np.dtype[np.int64]]"
    values: "np.ndarray[Any, np.dtype[np.float32]]"
    bad: dict[int, str]

    def rows(self, keys: Keys) -> Tensor:
        """Look up float32 [len(keys), W]."""
        places = self.places[np.searchsorted(self.keys, keys)]
        return torch.from_numpy(np.take(self.values, places, axis=0))


class _SampledFeatures(Features):
    """A sample of rows that replaces all rows: looking them up takes as long, but values differ."""

    def rows(self, keys: Keys) -> Tensor:
        places = keys % np.uint64(len(self.values))
        return torch.from_numpy(np.take(self.values, places, axis=0))


@dataclass
class CacheForecast:
    """The time and space that computing the missing features would take.

    A function that gets a forecast may compute only a sample of the features that are not in the
    cache, and not cache them. This is enough to measure a run but not to train. ``seconds`` and
    ``bytes`` have a value for each such entry of the cache, by its name.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rows:
    """Rows to compute.

    ``decided_by`` names the tower and everything besides the model that its features depend on.
    ``compute`` yields all rows or a given number with their keys, and fills ``bad`` meanwhile.
    There are at most ``total`` rows.
    """

    decided_by: tuple[str, ...]
    compute: Callable[[int | None], Iterator[tuple[Keys, Tensor]]]
    bad: dict[int, str]
    total: int
    title: str


def image_features(
    loaded: LoadedModel,
    pairs: PairDataset,
    options: LoaderOptions,
    progress: Progress,
    forecast: CacheForecast | None = None,
) -> Features:
    """Return the vision tower's features of all images, unaugmented, by the pair's number.

    With a ``forecast``, only a sample of them may be computed.

    Raises:
        DataError: a shard was changed or removed.
        StorageError: the cache folder is full or cannot be written to.
        NotFiniteError: the features of an image are not numbers.
    """
    inputs, device = loaded.base.inputs, loaded.precision.device
    preprocessing = Preprocessing(
        NoCaptions(), inputs.image_size, "none", 0, inputs.squashed, patches=inputs.patches
    )
    bad: dict[int, str] = {}

    def compute(most: int | None) -> Iterator[tuple[Keys, Tensor]]:
        done, some = 0, pairs if most is None else pairs.first(most)
        for batch in evaluation_batches(some, preprocessing, _BATCH, options):
            numbers = set(range(done, min(done + _BATCH, len(some))))
            reasons = iter(batch.skipped)  # in the order of the pairs, like everything else
            bad.update((n, next(reasons).reason) for n in sorted(numbers - {*batch.numbers}))
            done += _BATCH
            if len(batch):
                with torch.no_grad(), loaded.precision.autocast():
                    features = loaded.model.image_features(batch.pixel_values.to(device))
                check_finite_rows(features, partial(_image_of, pairs, batch.numbers))
                yield np.array(batch.numbers, np.uint64), features

    title = f"Image features of {counted(len(pairs), 'pair')}"
    decided_by = ("images", pairs.state(), inputs.seen_images)
    return _cached(loaded, _Rows(decided_by, compute, bad, len(pairs), title), progress, forecast)


def _image_of(pairs: PairDataset, numbers: Sequence[int], row: int) -> str:
    pair = pairs.named(numbers[row])
    return f"the image of {pair.key} in {pair.shard}"


def _caption_of(loaded: LoadedModel, ids: Tensor, row: int) -> str:
    text = loaded.base.inputs.tokenizer.decode(ids[row], skip_special_tokens=True)
    return f"the caption {text!r}"


def caption_features(
    loaded: LoadedModel,
    captions: CaptionTable,
    progress: Progress,
    forecast: CacheForecast | None = None,
) -> Features:
    """Return the text tower's features of each different caption, by ``caption_keys``.

    With a ``forecast``, only a sample of them may be computed.

    Raises:
        StorageError: the cache folder is full or cannot be written to.
        NotFiniteError: the features of a caption are not numbers.
    """
    device, pad_token_id = loaded.precision.device, captions.pad_token_id
    dtype = captions.ids_of_all.dtype
    different = {ids for of_pair in captions.by_pair() for ids in of_pair}
    # Sorted by length, so that batches need little padding; then by tokens, because the order of a
    # set differs between processes, and the last bits of a row depend on the rows in its batch
    ordered = sorted(
        (np.frombuffer(ids, dtype).tolist() for ids in different), key=lambda ids: (len(ids), ids)
    )
    width = loaded.base.inputs.context_length if loaded.model.architecture.pads_texts else 0

    def compute(most: int | None) -> Iterator[tuple[Keys, Tensor]]:
        starts: Sequence[int] = range(0, len(ordered), _BATCH)
        if most is not None:  # of all lengths
            starts = np.random.default_rng(0).permutation(starts)[: most // _BATCH].tolist()
        for start in starts:
            batch = padded(ordered[start : start + _BATCH], pad_token_id)
            ids = stacked([batch], pad_token_id, width)
            with torch.no_grad(), loaded.precision.autocast():
                features = loaded.model.text_features(ids.to(device))
            check_finite_rows(features, partial(_caption_of, loaded, ids))
            yield caption_keys(ids, pad_token_id), features

    digest = hashlib.sha256(b"\0".join(sorted(different))).hexdigest()
    title = f"Text features of {counted(len(ordered), 'caption')}"
    decided_by = ("texts", digest, str(pad_token_id), str(dtype))
    rows = _Rows(decided_by, compute, {}, len(ordered), title)
    features = _cached(loaded, rows, progress, forecast)
    sampled = isinstance(features, _SampledFeatures)
    assert sampled or len(features.keys) == len(ordered), "two captions have the same key"
    return features


def _cached(
    loaded: LoadedModel, wanted: _Rows, progress: Progress, forecast: CacheForecast | None
) -> Features:
    """Read features from the cache. If they are missing, compute and store them first."""
    tower, *inputs = wanted.decided_by
    parts = (_FORMAT, loaded.fingerprint, *_computed_with(loaded), *inputs)
    name = hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    folder = cache_folder() / "features" / f"{tower}-{name}"
    try:
        return _read(folder)
    except (OSError, ValueError, KeyError):  # missing or broken
        loaded.model.eval()  # training and measuring set their own mode later
    few = wanted.total <= _SAMPLE  # computing all takes no longer than a sample
    if forecast and not few and (sampled := _sampled(wanted, folder.name, forecast)):
        return sampled
    keys, width, done = [np.empty(0, np.uint64)], 0, 0
    # If another run computes the same features, the last complete folder replaces the other
    with replacing(folder, shared=True) as temporary, progress(wanted.title) as report:
        temporary.mkdir(parents=True)
        with (temporary / "values").open("wb") as file:
            for batch_keys, batch in wanted.compute(None):
                keys.append(batch_keys)
                done, width = done + len(batch), batch.shape[1]
                file.write(batch.float().cpu().numpy().tobytes())
                report(done, wanted.total)
        unsorted = np.concatenate(keys)
        order = np.argsort(unsorted)
        np.save(temporary / "keys.npy", unsorted[order])
        np.save(temporary / "places.npy", order)
        about = json.dumps({"width": width, "bad": wanted.bad})
        (temporary / "about.json").write_text(about, encoding="utf-8")
    return _read(folder)


def _sampled(wanted: _Rows, name: str, forecast: CacheForecast) -> Features | None:
    """Compute some rows, and add the estimated cost of all rows to the ``forecast``. Return None if
    none of the images can be used."""
    began, batches, ends = time.perf_counter(), list[np.ndarray[Any, np.dtype[np.float32]]](), []
    with closing(wanted.compute(_SAMPLE)) as rows:  # type: ignore[type-var]
        for _, batch in rows:
            batches.append(batch.float().cpu().numpy())
            ends.append(time.perf_counter())
            if len(ends) > 1 and ends[-1] - began > _SAMPLE_SECONDS:
                break
    if not batches:
        return None
    # The first batch is not timed, because workers and libraries start
    started, counted_rows = began, sum(map(len, batches))
    if len(batches) > 1:
        started, counted_rows = ends[0], counted_rows - len(batches[0])
    values = np.concatenate(batches)
    forecast.seconds[name] = (ends[-1] - started) * wanted.total / counted_rows
    forecast.bytes[name] = wanted.total * (values[0].nbytes + 16)  # a key and a place for each
    nothing = np.empty(0, np.int64)
    return _SampledFeatures(nothing.astype(np.uint64), nothing, values, dict(wanted.bad))


def _computed_with(loaded: LoadedModel) -> list[str]:
    """Return everything besides weights and inputs that the last bits of features depend on."""
    config, precision = loaded.base.model.config, loaded.precision
    norms = [config.vision_config.layer_norm_eps, config.text_config.layer_norm_eps]
    versions = map(version, ("torch", "torchvision", "transformers", "pillow"))
    return [precision.name, instruction_set(precision.device), *map(str, norms), *versions]


def _read(folder: Path) -> Features:
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    keys, places = (np.load(folder / f"{name}.npy") for name in ("keys", "places"))
    values = np.empty((0, 1), np.float32)
    mark_used(folder)
    if len(keys):
        mapped = np.memmap(folder / "values", np.float32, mode="r")
        values = np.asarray(mapped).reshape(len(keys), about["width"])
    return Features(keys, places, values, {int(n): str(why) for n, why in about["bad"].items()})
