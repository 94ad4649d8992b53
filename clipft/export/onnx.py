"""Writes both towers as ONNX, which onnxruntime, transformers.js and others run.

``onnx/vision_model.onnx``: pixel_values float32 [batch, 3, S, S], normalized as by the image
processor -> image_embeds float32 [batch, D]. ``onnx/text_model.onnx``: input_ids int64
[batch, length] -> text_embeds float32 [batch, D]. Embeddings have unit length. No attention mask is
needed, because tokens after the first end token have no effect: tokens in CLIP's text tower attend
only to earlier ones, and SigLIP's text tower was trained with its padding. transformers.js expects
these names of files, inputs and outputs, beside the configuration, the tokenizer and the image
processor.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipft.export.runtime import Runtime
from clipft.export.towers import Encoder, towers_of
from clipft.models.huggingface import write_processors
from clipft.models.pretrained import PretrainedModel

OPSET = 18
"""torch's exporter writes this version without a conversion, and runtimes read it since 2023."""

PROTOBUF_LIMIT = 1_900_000_000
"""Most bytes of weights in the file itself. protobuf limits the file to 2 GiB."""


class Onnx(Runtime):
    name, program = "onnx", "onnxruntime"
    files = {"images": "onnx/vision_model.onnx", "texts": "onnx/text_model.onnx"}  # noqa: RUF012
    other_versions = "use other versions of torch, onnxscript or onnxruntime, or another --format"

    def write(self, clip: Any, base: PretrainedModel, folder: Path) -> None:
        inputs, towers = base.inputs, towers_of(clip, base)
        side, end = inputs.image_size, int(inputs.tokenizer.eos_token_id)
        batch = torch.export.Dim("batch")
        length = torch.export.Dim("length", max=inputs.context_length)
        # Two rows and eight ids, because the exporter treats a dimension of 1 as constant
        pixels, ids = torch.zeros(2, 3, side, side), torch.full((2, 8), end)
        images, texts = (folder / self.files[kind] for kind in ("images", "texts"))
        images.parent.mkdir(parents=True, exist_ok=True)
        _trace(towers["images"], pixels, {0: batch}, "image_embeds", images)
        _trace(towers["texts"], ids, {0: batch, 1: length}, "text_embeds", texts)
        clip.config.save_pretrained(str(folder))
        write_processors(base, folder)

    def open(self, path: Path) -> Encoder:
        import onnxruntime

        with self.errors(f"open {path.name}"):
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            name = session.get_inputs()[0].name

        def encode(inputs: Tensor) -> Tensor:
            with self.errors(f"run {path.name}"):
                return torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])

        return encode

    def convert(self, path: Path, precision: str, target: Path) -> None:
        large = self.bytes_of(path) > PROTOBUF_LIMIT
        with self.errors(f"convert {path.name} to {precision}"):
            if precision == "fp16":
                _write_fp16(path, target, large)
            else:
                _write_int8(path, target, large)

    def parts(self, path: Path) -> list[Path]:
        return [path, path.with_name(f"{path.name}.data")]


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
            tower,
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


def _write_fp16(path: Path, target: Path, large: bool) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(path), keep_io_types=True)
    onnx.save(model, target, save_as_external_data=large, location=f"{target.name}.data")


def _write_int8(path: Path, target: Path, large: bool) -> None:
    """Quantize the weights now, and activations at run time (dynamic quantization)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().addFilter(_no_advice)  # it logs to the root
    try:
        quantize_dynamic(
            str(path),
            str(target),
            per_channel=True,
            weight_type=QuantType.QInt8,
            # Gather is for the token and position embeddings, which are half of a text tower
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            use_external_data_format=large,
        )
    finally:
        logging.getLogger().removeFilter(_no_advice)


def _no_advice(record: logging.LogRecord) -> bool:
    return "pre-processing" not in record.getMessage()
