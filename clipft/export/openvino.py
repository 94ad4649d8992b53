"""Writes both towers for OpenVINO, which is fast on Intel's processors, GPUs and NPUs.

The inputs and outputs are the same as for ONNX. By default, OpenVINO rounds to bf16 on processors
with AMX. All comparisons here set ``INFERENCE_PRECISION_HINT`` to f32 instead.
"""

import functools
import importlib
import io
import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipft.export.runtime import Runtime
from clipft.export.towers import Encoder, plain_attention, towers_of
from clipft.models.huggingface import write_processors
from clipft.models.pretrained import PretrainedModel


class OpenVino(Runtime):
    name, program = "openvino", "OpenVINO"
    files = {"images": "openvino/vision_model.xml", "texts": "openvino/text_model.xml"}  # noqa: RUF012
    other_versions = "use other versions of torch and openvino, or another --format"

    def write(self, clip: Any, base: PretrainedModel, folder: Path) -> None:
        openvino = _library("openvino")
        inputs = base.inputs
        side, end = inputs.image_size, int(inputs.tokenizer.eos_token_id)
        batch = torch.export.Dim("batch")
        length = torch.export.Dim("length", max=inputs.context_length)
        examples = {
            "images": (torch.zeros(2, 3, side, side), {0: batch}),
            "texts": (torch.full((2, 8), end), {0: batch, 1: length}),
        }
        names = {"images": ("pixel_values", "image_embeds"), "texts": ("input_ids", "text_embeds")}
        for kind, tower in towers_of(clip, base).items():
            example, dynamic = examples[kind]
            with self.errors("convert the model"), plain_attention():
                program = torch.export.export(tower, (example,), dynamic_shapes=(dynamic,))
                model = openvino.convert_model(program)
                for port, name in zip((model.input(0), model.output(0)), names[kind], strict=True):
                    port.get_tensor().set_names({name})
            self._save(model, folder / self.files[kind], compress_to_fp16=False)
        clip.config.save_pretrained(str(folder))
        write_processors(base, folder)

    def open(self, path: Path) -> Encoder:
        with self.errors(f"open {path.name}"):
            hint = {"INFERENCE_PRECISION_HINT": "f32"}
            compiled = core().compile_model(str(path), "CPU", hint)

        def encode(inputs: Tensor) -> Tensor:
            with self.errors(f"run {path.name}"):
                return torch.from_numpy(compiled(inputs.numpy())[0].copy())

        return encode

    def convert(self, path: Path, precision: str, target: Path) -> None:
        with self.errors(f"convert {path.name} to {precision}"):
            model = core().read_model(str(path))
            if precision == "int8":
                model = _quantized(model)
        self._save(model, target, compress_to_fp16=precision == "fp16")

    def _save(self, model: Any, path: Path, compress_to_fp16: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _library("openvino").save_model(model, str(path), compress_to_fp16=compress_to_fp16)

    def parts(self, path: Path) -> list[Path]:
        return [path, path.with_suffix(".bin")]


@functools.cache
def core() -> Any:
    """Return the only OpenVINO core of this process.

    Each core sets its own stack for signals, and later restores the earlier one, which may no
    longer exist. The next signal would then cause a segmentation fault, for example when a
    worker process ends.
    """
    return _library("openvino").Core()


def _quantized(model: Any) -> Any:
    # nncf imports torch's tools for CUDA, which warn if CUDA is missing
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    nncf = _library("nncf")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()):  # progress bars
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)


def _library(name: str) -> Any:
    """Import ``openvino`` or ``nncf`` without the telemetry that each would send on import."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module(name)
