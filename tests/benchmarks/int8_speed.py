"""Compare speed and size of the towers from ``clipft export --precision int8`` with fp32.

The model is ViT-B/32 with random weights, because speed and size do not depend on them. Each
runtime runs its towers in turn, with its default number of threads, on 32 images of 224 x 224 and
on 32 texts of 24 tokens. The share of the bytes compares the files of a tower.

    python tests/benchmarks/int8_speed.py [--quick] [--json FILE]
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from side_by_side import Row, Work, arguments, compare, publish
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from clipft.export.onnx import Onnx
from clipft.export.openvino import OpenVino
from clipft.export.runtime import Runtime
from clipft.export.towers import Encoder
from clipft.models.pretrained import PretrainedModel, load_pretrained

RUNTIMES = (Onnx(), OpenVino())
BATCH, TOKENS = 32, 24
GOAL = 1.3


def vit_b_32() -> PretrainedModel:
    """Make the model, with the tokenizer of the packaged one."""
    torch.manual_seed(0)
    tiny, clip = load_pretrained("tiny"), CLIPModel(CLIPConfig()).eval()
    end = int(tiny.inputs.tokenizer.eos_token_id)
    clip.config.text_config.eos_token_id = clip.text_model.eos_token_id = end
    return replace(tiny, model=clip, inputs=replace(tiny.inputs, image_size=224))


def inputs_of(base: PretrainedModel) -> dict[str, Tensor]:
    ids = torch.randint(1, 2000, (BATCH, TOKENS))
    ids[:, -1] = int(base.inputs.tokenizer.eos_token_id)
    return {"images": torch.randn(BATCH, 3, 224, 224), "texts": ids}


def working(encoder: Encoder, inputs: Tensor) -> Work:
    return lambda: len(encoder(inputs))


def rows_of(runtime: Runtime, base: PretrainedModel, folder: Path, pairs: int) -> Iterator[Row]:
    runtime.write(base.model, base, folder)
    for tower, inputs in inputs_of(base).items():
        path = folder / runtime.files[tower]
        small = runtime.reduced_path(path, "int8")
        runtime.convert(path, "int8", small)
        share = runtime.bytes_of(small) / runtime.bytes_of(path)
        ours, peer = (working(runtime.open(one), inputs) for one in (small, path))
        name = f"{runtime.name} int8, {tower}: {share:.0%} of the bytes"
        yield compare(name, ours, peer, GOAL, pairs)


def main() -> None:
    wish, base = arguments(__doc__).parse_args(), vit_b_32()
    rows: list[Row] = []
    for runtime in RUNTIMES:
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(runtime, base, Path(folder), 3 if wish.quick else 9)
    publish("int8", rows, ("onnxruntime", "openvino", "nncf", "torch"), wish.json)


if __name__ == "__main__":
    main()
