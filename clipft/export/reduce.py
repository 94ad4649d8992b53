"""Makes exported ONNX towers smaller and faster, and measures what that costs.

fp16 takes half the space; a tower whose embeddings change too much stays fp32. int8 quantizes the
weights of all matrix products and tables, and activations while they are computed (dynamic
quantization of onnxruntime). The suffixes of the files are those that transformers.js looks for.
"""

import logging
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
from clipft.export.onnx import IMAGE_FILE, PROTOBUF_LIMIT, TEXT_FILE, OnnxInputs, open_session
from clipft.metrics.relevance import Identities
from clipft.metrics.retrieval import EvaluationOptions, evaluate

SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8"}
LEAST_COSINE = 0.999
"""Below this similarity of any embedding to that of fp32, a tower is not kept in fp16."""
_RESAMPLES, _SEED = 1000, 0
_MEMORY = 256 << 20
_TOWERS = {"images": IMAGE_FILE, "texts": TEXT_FILE}


@dataclass
class ReducedTower:
    """A tower before and after: megabytes (10^6), milliseconds for an input, and the smallest
    cosine of an embedding to that of the tower in fp32."""

    precision: str
    megabytes: tuple[float, float] = (0.0, 0.0)
    milliseconds: tuple[float, float] = (0.0, 0.0)
    cosine: float = 1.0


@dataclass(frozen=True)
class Reduced:
    """Both towers; and R@10 over ``pairs`` pairs, the mean of both directions, in points: before,
    after, their difference and its 95% interval. It is None where there were no pairs."""

    towers: dict[str, ReducedTower]
    pairs: int
    recall: dict[str, float] | None

    def files(self) -> dict[str, str]:
        """Map the names that the files have in fp32 to those that they have here."""
        return {
            _TOWERS[kind]: str(_reduced_path(Path(_TOWERS[kind]), tower.precision))
            for kind, tower in self.towers.items()
        }

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Pair:
    """The fp32 and the reduced session of one tower, their embeddings and the seconds they took."""

    sessions: tuple[Any, Any]
    rows: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def run(self, inputs: Tensor) -> None:
        for which, session in enumerate(self.sessions):
            began = time.perf_counter()
            name = session.get_inputs()[0].name
            found = session.run(None, {name: inputs.numpy()})[0]
            self.seconds[which] += time.perf_counter() - began
            self.rows[which].append(torch.from_numpy(found))

    def joined(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self.rows[0]), torch.cat(self.rows[1])


def reduce_towers(
    folder: Path,
    precision: str,
    batches: Iterable[OnnxInputs],
    normalized: Callable[[Tensor], Tensor],
    note: Callable[[str], None],
    are_pairs: bool,
) -> Reduced:
    """Replace the fp32 towers in ``folder`` by smaller ones.

    Args:
        folder: what ``write_onnx`` wrote.
        precision: ``fp16`` or ``int8``.
        batches: what to compare on. With ``are_pairs`` each text belongs to its image.
        normalized: maps uint8 pixels to what the image tower takes.
        note: called with what the user should know.
        are_pairs: whether recall means something on the batches.

    Raises:
        ModelError: onnxruntime cannot convert or run a tower.
        OSError: the disk is full or refuses.
    """
    small = {kind: _write_reduced(folder / file, precision) for kind, file in _TOWERS.items()}
    towers = {
        kind: _Pair((open_session(folder / file), open_session(small[kind])))
        for kind, file in _TOWERS.items()
    }
    for batch in batches:
        towers["images"].run(normalized(batch.pixel_values))
        towers["texts"].run(batch.input_ids)
    found, embedded = {}, {}
    for kind, tower in towers.items():
        full, reduced = tower.joined()
        cosine = float(cosine_similarity(full, reduced).nan_to_num(nan=-1).min())
        paths = (folder / _TOWERS[kind], small[kind])
        kept = precision
        if precision == "fp16" and cosine < LEAST_COSINE:
            note(f"The {kind} tower stays fp32: in fp16 its cosine to fp32 falls to {cosine:.4f}.")
            kept, reduced, paths = "fp32", full, (paths[0], paths[0])
            _unlink(small[kind])
        sizes = tuple(_bytes_of(path) / 1e6 for path in paths)
        times = tuple(1000 * seconds / len(full) for seconds in tower.seconds)
        if kept == "fp32":
            times = (times[0], times[0])
        else:
            _unlink(paths[0])
        found[kind] = ReducedTower(kept, (sizes[0], sizes[1]), (times[0], times[1]), cosine)
        embedded[kind] = (full, reduced)
    pairs = len(embedded["images"][0])
    recall = _recall(embedded["images"], embedded["texts"]) if are_pairs else None
    return Reduced(found, pairs, recall)


def check_loss(reduced: Reduced, most: float | None) -> None:
    """Refuse towers that lost more than ``most`` points of R@10.

    Raises:
        ModelError: they did.
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


def _write_reduced(path: Path, precision: str) -> Path:
    """Write a tower in another precision beside it."""
    target = _reduced_path(path, precision)
    large = _bytes_of(path) > PROTOBUF_LIMIT
    try:
        if precision == "fp16":
            _write_fp16(path, target, large)
        else:
            _write_int8(path, target, large)
    except OSError:
        raise
    except Exception as error:  # onnx and onnxruntime raise errors of any type
        raise ModelError(
            f"onnxruntime cannot convert {path.name} to {precision}: {error}",
            "use another --precision, or other versions of onnx and onnxruntime",
        ) from error
    return target


def _write_fp16(path: Path, target: Path, large: bool) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(path), keep_io_types=True)
    onnx.save(model, target, save_as_external_data=large, location=f"{target.name}.data")


def _write_int8(path: Path, target: Path, large: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().addFilter(_no_advice)  # it logs to the root
    try:
        quantize_dynamic(
            str(path),
            str(target),
            per_channel=True,
            weight_type=QuantType.QInt8,
            # Also the tables of tokens and positions, which are half of a text tower
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            use_external_data_format=large,
        )
    finally:
        logging.getLogger().removeFilter(_no_advice)


def _no_advice(record: logging.LogRecord) -> bool:
    return "pre-processing" not in record.getMessage()


def _reduced_path(path: Path, precision: str) -> Path:
    return path.with_name(f"{path.stem}{SUFFIXES[precision]}{path.suffix}")


def _bytes_of(path: Path) -> int:
    return sum(p.stat().st_size for p in (path, _data_of(path)) if p.exists())


def _data_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def _unlink(path: Path) -> None:
    for part in (path, _data_of(path)):
        part.unlink(missing_ok=True)
