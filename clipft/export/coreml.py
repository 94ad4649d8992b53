"""Writes both towers for Core ML, which runs on Apple's devices.

The Neural Engine needs fixed shapes, so the input is one image, or one text padded to the context
length. Tokens after the first end token have no effect. coremltools converts on any system, but
Core ML runs only on Apple's. Therefore the written files are checked with ``mil``, which computes
their operations on every system.
"""

import io
import logging
import shutil
import warnings
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clipft.export import mil
from clipft.export.runtime import Runtime
from clipft.export.towers import Encoder, plain_attention, towers_of
from clipft.models.huggingface import write_processors
from clipft.models.pretrained import PretrainedModel


class CoreMl(Runtime):
    name, program = "coreml", "coremltools"
    files = {  # noqa: RUF012
        "images": "coreml/vision_model.mlpackage",
        "texts": "coreml/text_model.mlpackage",
    }
    other_versions = "use other versions of torch and coremltools, or --format onnx"
    stand_in = "torch, which computed the operations in the files; Core ML itself was not run"

    def write(self, clip: Any, base: PretrainedModel, folder: Path) -> None:
        ct, inputs = _coremltools(), base.inputs
        side, end = inputs.image_size, int(inputs.tokenizer.eos_token_id)
        examples = {
            "images": ("pixel_values", torch.zeros(1, 3, side, side), np.float32),
            "texts": ("input_ids", torch.full((1, inputs.context_length), end), np.int32),
        }
        returned = {"images": "image_embeds", "texts": "text_embeds"}
        for kind, tower in towers_of(clip, base).items():
            name, example, dtype = examples[kind]
            with (
                self.errors("convert the model"),
                plain_attention(),
                torch.no_grad(),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                trace: Any = torch.jit.trace
                traced = trace(tower, example, check_trace=False)
                model = _converted(
                    traced,
                    ct.precision.FLOAT32,
                    inputs=[ct.TensorType(name=name, shape=example.shape, dtype=dtype)],
                    outputs=[ct.TensorType(name=returned[kind], dtype=np.float32)],
                )
            (folder / self.files[kind]).parent.mkdir(parents=True, exist_ok=True)
            _save(model, folder / self.files[kind])
        clip.config.save_pretrained(str(folder))
        write_processors(base, folder)

    def open(self, path: Path) -> Encoder:
        from transformers import AutoTokenizer

        with self.errors(f"open {path.name}"):
            function = _program(path).functions["main"]
            (shape,) = (given.shape for given in function.inputs.values())
            padding = AutoTokenizer.from_pretrained(path.parents[1]).pad_token_id

        def encode(inputs: Tensor) -> Tensor:
            if inputs.ndim == 2:
                missing = shape[1] - inputs.shape[1]
                inputs = functional.pad(inputs, (0, missing), value=padding)
            with self.errors(f"write {path.name} so that clipft can check it"):
                return torch.cat([mil.run(function, row[None]) for row in inputs])

        return encode

    def convert(self, path: Path, precision: str, target: Path) -> None:
        """Write the tower in fp16, or with int8 weights whose products are computed in fp16."""
        ct = _coremltools()
        with self.errors(f"convert {path.name} to {precision}"):
            model = _converted(_program(path), ct.precision.FLOAT16)
            if precision == "int8":
                model = _quantized(model)
        _save(model, target)

    def parts(self, path: Path) -> list[Path]:
        return [part for part in path.rglob("*") if part.is_file()]

    def remove(self, path: Path) -> None:
        shutil.rmtree(path)


def _save(model: Any, path: Path) -> None:
    model.save(str(path))
    file, folder = (path / "Manifest.json").stat().st_mode, path.parent.stat().st_mode
    for part in path.rglob("*"):  # some are only readable by their owner
        part.chmod(folder if part.is_dir() else file)


def _converted(model: Any, precision: Any, **more: Any) -> Any:
    ct = _coremltools()
    try:
        with redirect_stderr(io.StringIO()):  # progress bars
            return ct.convert(
                model,
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS17,
                compute_precision=precision,
                skip_model_load=True,
                **more,
            )
    except RuntimeError as error:
        if "FileWriter" in str(error):  # the temporary file of the weights
            raise OSError(str(error)) from error
        raise


def _quantized(model: Any) -> Any:
    from coremltools.optimize import coreml as optimize

    how = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")
    with redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about channels of zeros
        return optimize.linear_quantize_weights(
            model, optimize.OptimizationConfig(global_config=how)
        )


def _program(path: Path) -> Any:
    """Read the program of a file, with its weights."""
    from coremltools.converters.mil.frontend.milproto.load import load

    model = _coremltools().models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    return load(spec, spec.specificationVersion, model.weights_dir)


@cache
def _coremltools() -> Any:
    """Import coremltools without its warnings about newer versions of torch and a missing Core ML.

    Its conversion of a constant to ``int`` is replaced, because it passes an array of shape [1],
    which numpy 2.4 and later refuse.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with redirect_stderr(io.StringIO()):
        import coremltools
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.frontend.torch import torch_op_registry as registry

    own = registry._TORCH_OPS_REGISTRY.get_func("int")

    def to_int(context: Any, node: Any) -> None:
        given = context[node.inputs[0]].val
        if given is None:
            own(context, node)
        else:
            number = int(np.asarray(given).item())
            context.add(Builder.const(val=number, name=node.name), node.name)

    registry.register_torch_op(to_int, torch_alias=["int"], override=True)
    return coremltools
