"""Writes both towers as ONNX and checks each against torch.

``onnx/vision_model.onnx``: pixel_values float32 [batch, 3, S, S], normalized as the image processor
does -> image_embeds float32 [batch, D]. ``onnx/text_model.onnx``: input_ids int64 [batch, length]
-> text_embeds float32 [batch, D]. Both have unit length. There is no attention mask, because what
follows the first end token changes nothing: CLIP's text tower attends backwards only, and SigLIP's
was trained with its padding. The names of files, inputs and outputs are those that transformers.js
expects beside the configuration, the tokenizer and the image processor.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipft.core.errors import ModelError, first_line
from clipft.models.architectures import Architecture
from clipft.models.huggingface import write_processors
from clipft.models.pretrained import ModelInputs, PretrainedModel

OPSET = 18
"""Torch's exporter writes it without a conversion, and runtimes have read it since 2023."""

TOLERANCE = 1e-4
IMAGE_FILE, TEXT_FILE = "onnx/vision_model.onnx", "onnx/text_model.onnx"

_OTHER_VERSIONS = "use other versions of torch, onnxscript or onnxruntime, or --format transformers"
PROTOBUF_LIMIT = 1_900_000_000
"""Bytes of weights that fit in the file itself; protobuf limits it to 2 GiB."""


@dataclass(frozen=True)
class OnnxInputs:
    """``pixel_values`` uint8 [B, 3, S, S] and ``input_ids`` int64 [B, T] to check with."""

    pixel_values: Tensor
    input_ids: Tensor


@dataclass(frozen=True)
class OnnxCheck:
    """The largest difference of a component between onnxruntime and torch over some pairs."""

    pairs: int
    image_difference: float
    text_difference: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Tower(nn.Module):
    """One tower with its projection; returns unit embeddings, float32 [batch, D]."""

    def __init__(self, clip: Any, architecture: Architecture) -> None:
        super().__init__()
        self.clip, self.architecture = clip, architecture


class _ImageTower(_Tower):
    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.architecture.image_features(self.clip, pixel_values)
        return functional.normalize(self.architecture.project_images(self.clip, features), dim=-1)


class _TextTower(_Tower):
    def forward(self, input_ids: Tensor) -> Tensor:
        features = self.architecture.text_features(self.clip, input_ids)
        return functional.normalize(self.architecture.project_texts(self.clip, features), dim=-1)


def write_onnx(clip: Any, base: PretrainedModel, folder: Path) -> None:
    """Write both towers with configuration, tokenizer and image processor.

    Args:
        clip: the merged model in fp32.
        base: the model it was fine-tuned from.
        folder: made if it does not exist.

    Raises:
        OSError: the disk is full or refuses.
    """
    (folder / IMAGE_FILE).parent.mkdir(parents=True, exist_ok=True)
    inputs, architecture = base.inputs, base.architecture
    side, end = inputs.image_size, int(inputs.tokenizer.eos_token_id)
    batch = torch.export.Dim("batch")
    length = torch.export.Dim("length", max=inputs.context_length)
    # Two rows and eight ids, because the exporter takes a dimension of 1 for a constant
    pixels, ids = torch.zeros(2, 3, side, side), torch.full((2, 8), end)
    images, texts = _ImageTower(clip, architecture), _TextTower(clip, architecture)
    _trace(images, pixels, {0: batch}, "image_embeds", folder / IMAGE_FILE)
    _trace(texts, ids, {0: batch, 1: length}, "text_embeds", folder / TEXT_FILE)
    clip.config.save_pretrained(str(folder))
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
    program.save(str(path), external_data=size > PROTOBUF_LIMIT)


def normalized(inputs: ModelInputs, pixels: Tensor) -> Tensor:
    """Turn uint8 pixels [B, 3, S, S] into what the image tower takes, float32."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (inputs.mean, inputs.std))
    return (pixels.float() / 255 - mean) / std


@torch.inference_mode()
def check_onnx(
    folder: Path, clip: Any, base: PretrainedModel, batches: Iterable[OnnxInputs]
) -> OnnxCheck:
    """Compare onnxruntime with torch on the same inputs.

    Raises:
        ModelError: onnxruntime cannot run a file, or a component differs by more than
            ``TOLERANCE``.
    """
    image_path, text_path = folder / IMAGE_FILE, folder / TEXT_FILE
    images, texts = open_session(image_path), open_session(text_path)
    image_tower = _ImageTower(clip, base.architecture)
    text_tower = _TextTower(clip, base.architecture)
    check = OnnxCheck(0, 0.0, 0.0)
    for batch in batches:
        pixels = normalized(base.inputs, batch.pixel_values)
        check = OnnxCheck(
            check.pairs + len(pixels),
            max(check.image_difference, _difference(images, image_path, image_tower, pixels)),
            max(check.text_difference, _difference(texts, text_path, text_tower, batch.input_ids)),
        )
    worst = max(check.image_difference, check.text_difference)
    if worst > TOLERANCE:
        raise ModelError(
            f"onnxruntime differs from torch by {worst:.1e}, more than {TOLERANCE:g}: nothing was "
            "exported",
            _OTHER_VERSIONS,
        )
    return check


def open_session(path: Path) -> Any:
    """Open a tower in onnxruntime.

    Raises:
        ModelError: onnxruntime cannot read it.
    """
    import onnxruntime

    with _runtime_errors(path):
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _difference(session: Any, path: Path, tower: nn.Module, inputs: Tensor) -> float:
    """The largest difference of a component between a session and ``tower``; infinite if one is
    NaN, which ``max`` would lose."""
    with _runtime_errors(path):
        name = session.get_inputs()[0].name
        theirs = session.run(None, {name: inputs.numpy()})[0]
    differences = (torch.from_numpy(theirs) - tower(inputs)).abs()
    return float(differences.nan_to_num(nan=torch.inf).max())


@contextmanager
def _runtime_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime raises its own kinds
        raise ModelError(
            f"onnxruntime cannot run {path.name}: {first_line(error)}", _OTHER_VERSIONS
        ) from error


def made_up_inputs(inputs: ModelInputs) -> list[OnnxInputs]:
    """Make noise and random words, in batches of several sizes and texts of several lengths."""
    generator = torch.Generator().manual_seed(0)
    special = set(inputs.tokenizer.all_special_ids)
    words = torch.tensor([i for i in range(len(inputs.tokenizer)) if i not in special])
    end = int(inputs.tokenizer.eos_token_id)
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
