"""Converts every configuration of open_clip with random weights, and writes the table of the docs.

    python -m tests.models.open_clip.parity                  # all that fit: about half an hour
    python -m tests.models.open_clip.parity ViT-B-32 ViT-L-14
    python -m tests.models.open_clip.parity --table          # only writes the table again

What was measured is kept in ``parity.json``. Encoders with many weights are
checked with two layers, and models with another tokenizer than CLIP's with a small vocabulary:
neither changes how tensors are mapped. ``--full`` leaves both as they are. ``--missing`` takes only
configurations of which nothing is known yet, the smallest first.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from safetensors.torch import save_file

from clipft.core.errors import ModelError
from clipft.models.open_clip.config import SIGLIP_TOWERS, UnmappableError, target_of
from clipft.models.open_clip.convert import converted_folder, read_report
from tests.models.open_clip.folders import describe, write_word_tokenizer

RESULTS = Path(__file__).with_name("parity.json")
PAGE = Path(__file__).parents[3] / "docs" / "reference" / "open_clip.md"
MOST_WEIGHTS = 200e6
"""Of a model that is checked with all its layers."""
MOST_IN_TIMM = 600e6
"""Of a model that is checked with all layers of timm's image tower."""
FEW = 2
WORDS = 1000
"""Size of the vocabulary of another tokenizer than CLIP's."""


def measure(name: str, full: bool) -> dict[str, Any]:
    """Convert one configuration; return a row of the table."""
    config = open_clip.get_model_config(name)
    end = _end(config["text_cfg"])
    try:
        target = target_of(config, end)
    except UnmappableError as why:
        return {"refused": str(why)}
    becomes = "open_clip" if target.backed else target.model_class
    weights, depth = _size(config)
    layers = config if full or weights < MOST_WEIGHTS else _two_layers(config)
    cut = bool(depth) and weights > MOST_IN_TIMM and not full
    with tempfile.TemporaryDirectory() as folder, _shallow_towers_of_timm(cut):
        os.environ["CLIPFT_CACHE"] = f"{folder}/cache"
        report = read_report(converted_folder(_write(Path(folder) / "model", layers, end, full)))
    assert report is not None and report.difference is not None
    return {
        "becomes": becomes,
        "weights": weights,
        "used": report.used,
        "tensors": report.tensors,
        "difference": report.difference,
        # Of unit vectors a and b: 1 - |a - b|^2 / 2
        "cosine": 1 - config["embed_dim"] * report.difference**2 / 2,
        "layers": [FEW if cut else _layers(layers, "vision", depth), _layers(layers, "text")],
        "of": [_layers(config, "vision", depth), _layers(config, "text")],
    }


def _layers(config: dict[str, Any], tower: str, depth: int = 0) -> int | None:
    number: int | None = config[f"{tower}_cfg"].get("layers", depth or None)
    return number


@contextmanager
def _shallow_towers_of_timm(cut: bool) -> Iterator[None]:
    """Let timm make transformers of two layers, and expect them of a SigLIP."""
    if not cut:
        yield
        return
    few = {size: (width, FEW, *rest) for size, (width, _, *rest) in SIGLIP_TOWERS.items()}
    shallow = partial(timm.create_model, depth=FEW)
    with mock.patch.object(timm, "create_model", shallow), mock.patch.dict(SIGLIP_TOWERS, few):
        yield


def _end(text: dict[str, Any]) -> int:
    """The end token of a tokenizer that cannot be loaded without the hub."""
    if not text.get("hf_tokenizer_name"):
        return 49407
    return int(text["eos_id"]) if text.get("pool_type") == "eos" else 1


def _make(config: dict[str, Any]) -> Any:
    settings = {name: value for name, value in config.items() if name != "custom_text"}
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    return kind(**settings)


def _size(config: dict[str, Any]) -> tuple[int, int]:
    """The number of weights, and of layers where the image tower is a transformer of timm."""
    with torch.device("meta"):
        model = _make(deepcopy(config))
    blocks = getattr(getattr(model.visual, "trunk", None), "blocks", ())  # others have stages
    return sum(weight.numel() for weight in model.parameters()), len(blocks)


def _weights(name: str) -> int:
    """The number of weights of a configuration; 0 if it is refused."""
    config = open_clip.get_model_config(name)
    try:
        target_of(config, _end(config["text_cfg"]))
    except UnmappableError:
        return 0
    return _size(config)[0]


def _two_layers(config: dict[str, Any]) -> dict[str, Any]:
    shrunk = deepcopy(config)
    for tower in ("vision_cfg", "text_cfg"):
        if "timm_model_name" not in shrunk[tower]:
            shrunk[tower]["layers"] = FEW
    return shrunk


def _write(folder: Path, config: dict[str, Any], end: int, full: bool) -> str:
    folder.mkdir()
    if config["text_cfg"].get("hf_tokenizer_name"):
        config = deepcopy(config)
        size = config["text_cfg"]["vocab_size"] if full else WORDS
        config["text_cfg"]["vocab_size"] = size
        write_word_tokenizer(folder, end, size)
    torch.manual_seed(0)
    model = _make(deepcopy(config))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    describe(folder, config)
    return f"local-dir:{folder}"


def table(results: dict[str, Any]) -> str:
    """Return the table with what it shows."""
    rows = []
    for name in sorted(results, key=str.lower):
        row = results[name]
        if "refused" in row:
            cells = ["refused", "", "", row["refused"]]
        else:
            layers = [
                f"{done} of {of} layers"
                for done, of in zip(row["layers"], row["of"], strict=True)
                if done != of
            ]
            used = f"{row['used']} of {row['tensors']}"
            difference = f"{row['difference']:.1e}"
            cells = [row["becomes"], used, difference, "; ".join(dict.fromkeys(layers))]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    measured = [row for row in results.values() if "cosine" in row]
    mapped = [row for row in measured if row["becomes"] != "open_clip"]
    lowest = min(row["cosine"] for row in measured)
    return (
        f"{len(results)} of the {len(open_clip.list_models())} configurations of open_clip 3.3 "
        f"were tried with random weights. {len(mapped)} of them were converted to models of "
        f"transformers, and {len(measured) - len(mapped)} to models whose "
        "image tower open_clip runs. The difference is the largest between a component of a unit "
        "embedding and open_clip's own, over images and texts; the lowest cosine that follows is "
        f"{lowest:.8f}. Models of more than 200 million weights were checked with two layers, and "
        "other tokenizers than CLIP's were replaced by a small one of words. Image towers of timm "
        f"have two layers if the model has more than {MOST_IN_TIMM / 1e6:.0f} million weights. "
        "`python -m tests.models.open_clip.parity` makes this table.\n\n"
        "| configuration | becomes | tensors used | largest difference | |\n"
        "| --- | --- | ---: | ---: | --- |\n" + "\n".join(rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--missing", action="store_true")
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    names = [] if given.table else given.names or open_clip.list_models()
    if given.missing:
        names = sorted(
            (name for name in names if not results.get(name, {}).keys() & {"refused", "cosine"}),
            key=_weights,
        )
    for name in names:
        try:
            results[name] = measure(name, given.full)
        except ModelError as error:
            results[name] = {"refused": error.message}
        print(name, results[name], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        shutil.rmtree(os.environ.pop("CLIPFT_CACHE", "/nowhere"), ignore_errors=True)
    start, end = "<!-- parity -->\n", "\n<!-- end parity -->"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(start)
    after = rest.partition("<!-- end parity -->")[2]
    PAGE.write_text(before + start + table(results) + end + after, encoding="utf-8")


if __name__ == "__main__":
    main()
