"""Makes exported towers smaller and faster, and measures the loss of quality.

fp16 takes half the space. A tower stays fp32 if fp16 changes its embeddings too much. int8 takes a
quarter of the space, and each runtime has its own method.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from clipft.core.errors import ModelError
from clipft.export.runtime import Runtime
from clipft.export.towers import TOWERS, Encoder, TowerInputs
from clipft.metrics.relevance import Identities
from clipft.metrics.retrieval import EvaluationOptions, evaluate
from clipft.models.pretrained import ModelInputs

LEAST_COSINE = 0.999
"""A tower stays fp32 if any embedding in fp16 has a lower cosine to its embedding in fp32."""
_RESAMPLES, _SEED = 1000, 0
_MEMORY = 256 << 20


@dataclass
class ReducedTower:
    """A tower before and after: megabytes (10^6 bytes), and milliseconds per input, which are None
    if the runtime itself was not run.

    ``cosine`` is the smallest cosine of an embedding to its embedding in fp32. ``file`` is the path
    in the exported folder.
    """

    precision: str
    file: str
    megabytes: tuple[float, float]
    milliseconds: tuple[float, float] | None
    cosine: float


@dataclass(frozen=True)
class Reduced:
    """Both towers, and their R@10 over ``pairs`` pairs.

    ``recall`` is the mean of both directions in points: before, after, the difference and its 95%
    interval. It is None if the towers were not compared on pairs.
    """

    towers: dict[str, ReducedTower]
    pairs: int
    recall: dict[str, float] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Measured:
    """Collects the embeddings [N, D] of one encoder and measures its time."""

    encoder: Encoder
    rows: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    def run(self, inputs: Tensor) -> None:
        if not self.rows:
            self.encoder(inputs)  # the first run also allocates memory, and is not timed
        began = time.perf_counter()
        self.rows.append(self.encoder(inputs))
        self.seconds += time.perf_counter() - began

    @property
    def milliseconds(self) -> float:
        return 1000 * self.seconds / sum(map(len, self.rows))


def reduce_towers(
    runtime: Runtime,
    folder: Path,
    precision: str,
    batches: Iterable[TowerInputs],
    inputs: ModelInputs,
    note: Callable[[str], None],
    are_pairs: bool,
) -> Reduced:
    """Replace the fp32 towers in ``folder`` by smaller ones.

    Args:
        runtime: the runtime that wrote the towers.
        folder: the exported folder.
        precision: ``fp16`` or ``int8``.
        batches: the inputs of the comparison. With ``are_pairs``, each text belongs to its image.
        inputs: the normalization of pixels for the image tower.
        note: called with sentences for the user.
        are_pairs: whether to measure recall on the batches.

    Raises:
        ModelError: the runtime cannot convert or run a tower.
        OSError: the disk is full or refuses to write.
    """
    paths = {kind: folder / file for kind, file in runtime.files.items()}
    small = {kind: runtime.reduced_path(path, precision) for kind, path in paths.items()}
    measured = {}
    for kind in TOWERS:
        runtime.convert(paths[kind], precision, small[kind])
        both = (runtime.open(paths[kind]), runtime.open(small[kind]))
        measured[kind] = (_Measured(both[0]), _Measured(both[1]))
    for batch in batches:
        for kind, tensor in batch.by_tower(inputs).items():
            for encoder in measured[kind]:
                encoder.run(tensor)
    found, embedded = {}, {}
    for kind, (full, reduced) in measured.items():
        before, after = torch.cat(full.rows), torch.cat(reduced.rows)
        cosine = float(cosine_similarity(before, after).nan_to_num(nan=-1).min())
        kept, path = precision, small[kind]
        if precision == "fp16" and cosine < LEAST_COSINE:
            note(f"The {kind} tower stays fp32: in fp16 its cosine to fp32 falls to {cosine:.4f}.")
            kept, path, reduced, after = "fp32", paths[kind], full, before
        sizes = (runtime.bytes_of(paths[kind]) / 1e6, runtime.bytes_of(path) / 1e6)
        times = (full.milliseconds, reduced.milliseconds) if not runtime.stand_in else None
        runtime.remove(small[kind] if kept == "fp32" else paths[kind])
        file = path.relative_to(folder).as_posix()
        found[kind] = ReducedTower(kept, file, sizes, times, cosine)
        embedded[kind] = (before, after)
    recall = _recall(embedded["images"], embedded["texts"]) if are_pairs else None
    return Reduced(found, len(embedded["images"][0]), recall)


def check_loss(reduced: Reduced, most: float | None) -> None:
    """Check that the towers lost at most ``most`` points of R@10.

    Raises:
        ModelError: the loss is larger.
    """
    recall = reduced.recall
    if most is None or recall is None or -recall["difference"] <= most:
        return
    raise ModelError(
        f"R@10 falls from {recall['before']:.1f} to {recall['after']:.1f} points, by more than "
        f"--max-loss {most:g}: nothing was exported",
        "use --precision fp16 or fp32, or raise --max-loss",
    )


def _recall(images: tuple[Tensor, Tensor], texts: tuple[Tensor, Tensor]) -> dict[str, float]:
    own = np.arange(len(images[0]))
    options = EvaluationOptions(_MEMORY, _RESAMPLES, _SEED)
    before, after = (
        evaluate(i, t, Identities(own, own), [None] * len(own), options)
        for i, t in zip(images, texts, strict=True)
    )

    def of(found: Any) -> tuple[float, "np.ndarray[Any, Any]"]:
        parts = list(found.parts["paired"].values())
        points = [100 * np.mean([part.means["r@10"] for part in parts])]
        return float(points[0]), 100 * np.mean([part.resampled["r@10"] for part in parts], axis=0)

    (old, old_drawn), (new, new_drawn) = of(before), of(after)
    low, high = np.percentile(new_drawn - old_drawn, (2.5, 97.5))
    return {
        "before": old,
        "after": new,
        "difference": new - old,
        "low": float(low),
        "high": float(high),
    }
