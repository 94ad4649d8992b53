"""Both towers as ONNX, each checked against torch before it is handed out.

``image_encoder.onnx``: pixel_values float32 [batch, 3, S, S], normalised as the image processor
does -> image_embeds float32 [batch, D]. ``text_encoder.onnx``: input_ids int64 [batch, length]
-> text_embeds float32 [batch, D]. Both of unit length. There is no attention mask: the text
tower is causal and pools at the first end token, so padding after it changes nothing.
"""

import importlib.util
import logging
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipft.errors import ModelError, UsageError
from clipft.modelling.base import ModelInputs
from clipft.modelling.export import write_processors

OPSET = 18
"""What torch's exporter writes natively: no conversion, and read by runtimes since 2023."""

TOLERANCE = 1e-4
IMAGE_FILE, TEXT_FILE = "image_encoder.onnx", "text_encoder.onnx"

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_PROTOBUF_LIMIT = 1_900_000_000
"""Bytes of weights that still fit in the one file, whose limit is 2 GiB."""


@dataclass(frozen=True)
class OnnxInputs:
    """``pixel_values`` uint8 [B, 3, S, S] and ``input_ids`` int64 [B, T] to check with."""

    pixel_values: Tensor
    input_ids: Tensor


@dataclass(frozen=True)
class OnnxCheck:
    """The greatest differences between onnxruntime and torch over all components."""

    pairs: int
    image_difference: float
    text_difference: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _ImageTower(nn.Module):
    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.clip.get_image_features(pixel_values=pixel_values)
        return functional.normalize(features.pooler_output, dim=-1)


class _TextTower(nn.Module):
    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, input_ids: Tensor) -> Tensor:
        features = self.clip.get_text_features(input_ids=input_ids)
        return functional.normalize(features.pooler_output, dim=-1)


def check_onnx_installed() -> None:
    """
    Raises:
        UsageError: a package that export or check need is missing.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--format onnx needs {' and '.join(missing)}",
            "install them: pip install 'clipft[onnx]', or pipx inject clipft " + " ".join(missing),
        )


def write_onnx(clip: Any, base: str, inputs: ModelInputs, folder: Path) -> None:
    """Both towers of a merged fp32 model, with tokenizer and image processor.

    Raises:
        OSError: the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    side, end = inputs.image_size, int(inputs.tokenizer.eos_token_id)
    batch = torch.export.Dim("batch")
    length = torch.export.Dim("length", max=inputs.context_length)
    # Two rows and eight ids: a dimension of one would be taken for fixed
    pixels, ids = torch.zeros(2, 3, side, side), torch.full((2, 8), end)
    _trace(_ImageTower(clip), pixels, {0: batch}, "image_embeds", folder / IMAGE_FILE)
    _trace(_TextTower(clip), ids, {0: batch, 1: length}, "text_embeds", folder / TEXT_FILE)
    write_processors(base, folder)


def _trace(
    tower: nn.Module, example: Tensor, dynamic: dict[int, Any], output: str, path: Path
) -> None:
    name = "pixel_values" if example.is_floating_point() else "input_ids"
    size = sum(weight.numel() * weight.element_size() for weight in tower.parameters())
    for logger in ("torch.onnx", "onnxscript"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            tower.eval(),
            (example,),
            input_names=[name],
            output_names=[output],
            dynamic_shapes={name: dynamic},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with this machine's paths
    program.save(str(path), external_data=size > _PROTOBUF_LIMIT)


@torch.inference_mode()
def check_onnx(
    folder: Path, clip: Any, inputs: ModelInputs, batches: Iterable[OnnxInputs]
) -> OnnxCheck:
    """Run onnxruntime and torch on the same inputs.

    Raises:
        ModelError: they differ by more than ``TOLERANCE``.
    """
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    image_session = onnxruntime.InferenceSession(str(folder / IMAGE_FILE), providers=providers)
    text_session = onnxruntime.InferenceSession(str(folder / TEXT_FILE), providers=providers)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (inputs.mean, inputs.std))
    pairs, image_difference, text_difference = 0, 0.0, 0.0
    for batch in batches:
        pixels = (batch.pixel_values.float() / 255 - mean) / std
        images = image_session.run(None, {"pixel_values": pixels.numpy()})[0]
        texts = text_session.run(None, {"input_ids": batch.input_ids.numpy()})[0]
        image_difference = max(image_difference, _difference(images, _ImageTower(clip)(pixels)))
        text_difference = max(
            text_difference, _difference(texts, _TextTower(clip)(batch.input_ids))
        )
        pairs += len(pixels)
    check = OnnxCheck(pairs, image_difference, text_difference)
    if not max(image_difference, text_difference) <= TOLERANCE:
        raise ModelError(
            f"onnxruntime differs from torch by {max(image_difference, text_difference):.1e}, "
            f"more than {TOLERANCE:g}: nothing was exported",
            "use other versions of torch, onnxscript or onnxruntime, or --format transformers",
        )
    return check


def _difference(theirs: Any, ours: Tensor) -> float:
    return float((torch.from_numpy(theirs) - ours).abs().max())


def made_up_inputs(inputs: ModelInputs) -> list[OnnxInputs]:
    """Noise and random words, in batches and lengths of several sizes, the greatest included."""
    generator = torch.Generator().manual_seed(0)
    words, end = _words(inputs.tokenizer), int(inputs.tokenizer.eos_token_id)
    batches = []
    for rows, length in ((1, 3), (3, 16), (2, inputs.context_length)):
        shape = (rows, 3, inputs.image_size, inputs.image_size)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        ids = words[torch.randint(len(words), (rows, length), generator=generator)]
        ids[:, 0] = int(inputs.tokenizer.bos_token_id or ids[0, 0])
        ids[:, -1] = end
        ids[0, length // 2 + 1 :] = end  # a padded row
        batches.append(OnnxInputs(pixels, ids))
    return batches


def _words(tokenizer: Any) -> Tensor:
    special = set(tokenizer.all_special_ids)
    return torch.tensor([i for i in range(len(tokenizer)) if i not in special])
