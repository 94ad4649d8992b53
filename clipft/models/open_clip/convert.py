"""Converts checkpoints of open_clip and OpenAI to folders of transformers.

A converted model is kept in the cache, and loaded from there like any other model. So no other part
of the program depends on where a model comes from.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipft.core.cache import cache_folder, mark_used
from clipft.core.errors import ModelError, first_line
from clipft.core.files import read_json, replacing
from clipft.models.complete import check_finite, check_weights
from clipft.models.open_clip.config import (
    OPENAI_MEAN,
    OPENAI_STD,
    Target,
    UnmappableError,
    image_side,
    openai_config,
    target_of,
    unsupported,
)
from clipft.models.open_clip.names import CONFIG_FILE, REGISTRY
from clipft.models.open_clip.sources import Source, find_source, open_clip_installed
from clipft.models.open_clip.tensors import fold_layer_scale, to_open_clip, to_transformers
from clipft.models.open_clip.tokenizer import load_tokenizer
from clipft.models.open_clip.weights import Weights, disk_errors, read_weights, write_weights

REPORT = "open_clip.json"
_VERSION = 2
"""The version of the conversion. A cached model of another version is converted again."""
_RESAMPLE = {"bicubic": 3, "bilinear": 2, "random": 3}
"""Pillow's numbers. With ``random``, open_clip draws one in training, and else uses bicubic."""


@dataclass(frozen=True)
class Report:
    """What was read from a checkpoint.

    ``difference`` is the largest difference of a component between our unit embeddings and
    open_clip's; None if they were not compared.
    """

    name: str
    used: int
    tensors: int
    difference: float | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        compared = (
            "not compared with open_clip, which is not installed"
            if self.difference is None
            else f"largest difference from open_clip's own encoders {self.difference:.0e}"
        )
        return "; ".join([f"{self.used} of {self.tensors} tensors used, {compared}", *self.notes])


def converted_folder(name: str) -> Path:
    """Return the folder of a converted checkpoint, and convert it if this was not done before.

    Raises:
        ModelError: the checkpoint is missing, damaged, or holds code, or transformers has no such
            model.
        StorageError: the cache cannot be written.
    """
    source = find_source(name)
    folder = cache_folder() / "open_clip" / _key(source)
    if not (folder / REPORT).is_file():
        with replacing(folder, shared=True) as temporary, _conversion_errors(name):
            _convert(source, temporary)
    mark_used(folder)
    return folder


@contextmanager
def _conversion_errors(name: str) -> Iterator[None]:
    """Raise errors of open_clip and timm as ``ModelError``, or ``replacing`` would take them for
    disk errors."""
    try:
        yield
    except RuntimeError as error:
        raise ModelError(
            f"cannot convert {name}: {first_line(error)}",
            "check its configuration; --debug shows where it failed",
        ) from error


def read_report(folder: Path) -> Report | None:
    """Return the report of a converted model, None for any other folder."""
    found = read_json(folder / REPORT)
    return Report(**{**found, "notes": tuple(found["notes"])}) if found else None


def _key(source: Source) -> str:
    """Hash everything that determines the result. Files count by path, size and time."""
    described = [_VERSION, source.config, source.preprocess, source.tokenizer]
    place = Path(source.tokenizer)
    files = [source.weights.resolve(), *(sorted(place.glob("*token*")) if place.is_dir() else ())]
    try:
        stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except OSError as error:
        raise ModelError(
            f"cannot read {source.weights}: {error.strerror}", "check the path"
        ) from error
    content = json.dumps([described, stamps], sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()


def _convert(source: Source, folder: Path) -> None:
    weights = read_weights(source.weights)
    check_finite(source.name, weights.tensors.items())
    try:
        config = _config_of(source, weights)
        tokenizer = load_tokenizer(source, config["text_cfg"])
        processor = _image_processor(source.preprocess, config)
        notes = _write_model(source, config, weights.tensors, tokenizer, folder)
    except UnmappableError as error:
        raise unsupported(source.name, error) from error
    used = len(weights.tensors) - len(notes)
    processor.save_pretrained(str(folder))
    difference = None
    if open_clip_installed():
        from clipft.models.open_clip.compare import check_difference

        difference = check_difference(source, config, weights.tensors, folder)
    if source.preprocess.get("interpolation") == "bilinear":
        notes.append("images are resized with bicubic interpolation, not bilinear")
    report = Report(source.name, used, len(weights.tensors), difference, tuple(notes))
    (folder / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")


def _write_model(
    source: Source,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
    folder: Path,
) -> list[str]:
    """Write weights, configuration and tokenizer; return a note for each tensor left out."""
    end = tokenizer.eos_token_id
    target = target_of(config, -1 if end is None else int(end))
    prepared, notes = _prepared(tensors, target.model_class)
    text = target.config["text_config"]
    text |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    write = _write_backed if target.backed else _write_transformers
    write(source, target, prepared, folder)
    tokenizer.save_pretrained(str(folder))
    return notes


def _write_backed(
    source: Source, target: Target, tensors: Mapping[str, Tensor], folder: Path
) -> None:
    """Write a model whose image tower open_clip runs."""
    from clipft.models.open_clip import backed

    backed.require_open_clip(source.name, target.backed)
    described = {**target.config, "name": source.name}
    model = backed.OpenClipModel(backed.OpenClipConfig(described))
    rules = model.rules()
    _check_fit(source, tensors, to_open_clip(model.state_dict(), rules))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    write_weights(to_transformers(tensors, rules), folder / "model.safetensors")


def _check_fit(
    source: Source, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Check that a file holds the tensors of a configuration, by their names in open_clip.

    Raises:
        ModelError: tensors are missing, unexpected, or of another shape.
    """
    found = {
        "missing_keys": expected.keys() - tensors.keys(),
        "unexpected_keys": tensors.keys() - expected.keys(),
        "mismatched_keys": [
            (name, tensors[name].shape, tensor.shape)
            for name, tensor in expected.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ],
    }
    config = "its configuration" if source.name.startswith(REGISTRY) else CONFIG_FILE
    check_weights(source.name, found, config)


def _config_of(source: Source, weights: Weights) -> dict[str, Any]:
    if source.config is not None:
        return source.config
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}
        return openai_config(shapes)
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"{source.weights} is not a CLIP of OpenAI: it has no {error}",
            "name another checkpoint",
        ) from error


def _prepared(
    tensors: Mapping[str, Tensor], model_class: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors that the model class has, and a note for each of the others."""
    prepared, notes = fold_layer_scale(tensors), list[str]()
    for name in {"logit_scale", "logit_bias"} & prepared.keys():
        prepared[name] = prepared[name].reshape(())  # some are vectors of length 1
    if model_class == "SiglipModel":
        if "text_projection.weight" not in prepared:  # SiglipModel always has a head
            width = len(prepared.get("ln_final.weight", ()))
            prepared["text_projection.weight"] = torch.eye(width)
            prepared["text_projection.bias"] = torch.zeros(width)
    elif "logit_bias" in prepared:
        bias = prepared.pop("logit_bias").item()
        notes.append(f"its bias of {bias:.4g} for the sigmoid loss cannot be stored in a CLIP")
    return prepared, notes


def _write_transformers(
    source: Source, target: Target, tensors: Mapping[str, Tensor], folder: Path
) -> None:
    import transformers

    loader = getattr(transformers, target.model_class)
    config = loader.config_class(**target.config)
    with torch.device("meta"):
        expected = to_open_clip(loader(config).state_dict(), target.rules)
    _check_fit(source, tensors, expected)
    state = to_transformers(tensors, target.rules)
    model = loader.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    with disk_errors():
        model.save_pretrained(str(folder))


def _image_processor(preprocess: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """Describe open_clip's preprocessing as an image processor of transformers."""
    from transformers import CLIPImageProcessor

    side = image_side(config["vision_cfg"])
    square, mode = {"height": side, "width": side}, preprocess.get("resize_mode", "shortest")
    if mode not in {"shortest", "squash"}:
        raise UnmappableError(f"it resizes images with {mode}")
    return CLIPImageProcessor(
        size=square if mode == "squash" else {"shortest_edge": side},
        crop_size=square,
        do_center_crop=mode != "squash",
        resample=_RESAMPLE[preprocess.get("interpolation", "bicubic")],
        image_mean=list(preprocess.get("mean") or OPENAI_MEAN),
        image_std=list(preprocess.get("std") or OPENAI_STD),
    )
