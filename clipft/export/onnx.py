"""Both towers as ONNX, each checked against torch before it is handed out.

``image_encoder.onnx``: pixel_values float32 [batch, 3, S, S], normalised as the image processor
does -> image_embeds float32 [batch, D]. ``text_encoder.onnx``: input_ids int64 [batch, length]
-> text_embeds float32 [batch, D]. Both of unit length. There is no attention mask: what follows
the first end token changes nothing (CLIP's text tower looks backwards only; SigLIP's is given
its own filling).
"""

import importlib.util
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

from clipft.core.errors import ModelError, UsageError, first_line
from clipft.models.architectures import Architecture
from clipft.models.huggingface import write_processors
from clipft.models.pretrained import ModelInputs, PretrainedModel

OPSET = 18
"""What torch's exporter writes natively: no conversion, and read by runtimes since 2023."""

TOLERANCE = 1e-4
IMAGE_FILE, TEXT_FILE = "image_encoder.onnx", "text_encoder.onnx"

_OTHER_VERSIONS = "use other versions of torch, onnxscript or onnxruntime, or --format transformers"
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


class _Tower(nn.Module):
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


def write_onnx(clip: Any, base: PretrainedModel, folder: Path) -> None:
    """Both towers of ``clip``, the merged fp32 model, with tokenizer and image processor.

    Raises:
        OSError: the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    inputs, architecture = base.inputs, base.architecture
    side, end = inputs.image_size, int(inputs.tokenizer.eos_token_id)
    batch = torch.export.Dim("batch")
    length = torch.export.Dim("length", max=inputs.context_length)
    # Two rows and eight ids: a dimension of one would be taken for fixed
    pixels, ids = torch.zeros(2, 3, side, side), torch.full((2, 8), end)
    images, texts = _ImageTower(clip, architecture), _TextTower(clip, architecture)
    _trace(images, pixels, {0: batch}, "image_embeds", folder / IMAGE_FILE)
    _trace(texts, ids, {0: batch, 1: length}, "text_embeds", folder / TEXT_FILE)
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
    folder: Path, clip: Any, base: PretrainedModel, batches: Iterable[OnnxInputs]
) -> OnnxCheck:
    """Run onnxruntime and torch on the same inputs.

    Raises:
        ModelError: onnxruntime cannot, or they differ by more than ``TOLERANCE``.
    """
    images = _Runtime(folder / IMAGE_FILE, _ImageTower(clip, base.architecture))
    texts = _Runtime(folder / TEXT_FILE, _TextTower(clip, base.architecture))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (base.inputs.mean, base.inputs.std))
    check = OnnxCheck(0, 0.0, 0.0)
    for batch in batches:
        pixels = (batch.pixel_values.float() / 255 - mean) / std
        check = OnnxCheck(
            check.pairs + len(pixels),
            max(check.image_difference, images.difference(pixels)),
            max(check.text_difference, texts.difference(batch.input_ids)),
        )
    worst = max(check.image_difference, check.text_difference)
    if not worst <= TOLERANCE:
        raise ModelError(
            f"onnxruntime differs from torch by {worst:.1e}, more than {TOLERANCE:g}: nothing was "
            "exported",
            _OTHER_VERSIONS,
        )
    return check


class _Runtime:
    """onnxruntime and torch side by side.

    Raises:
        ModelError: onnxruntime does not take the file, or what it is given.
    """

    def __init__(self, path: Path, tower: nn.Module) -> None:
        import onnxruntime

        self._path, self._tower = path, tower
        with self._telling():
            self._session = onnxruntime.InferenceSession(
                str(path), providers=["CPUExecutionProvider"]
            )

    def difference(self, inputs: Tensor) -> float:
        """The greatest of a component; NaN where there is one."""
        name = self._session.get_inputs()[0].name
        with self._telling():
            theirs = self._session.run(None, {name: inputs.numpy()})[0]
        return float((torch.from_numpy(theirs) - self._tower(inputs)).abs().max())

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # onnxruntime's own kinds
            raise ModelError(
                f"onnxruntime cannot run {self._path.name}: {first_line(error)}", _OTHER_VERSIONS
            ) from error


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
