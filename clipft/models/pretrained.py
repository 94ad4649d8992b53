"""Loads a pretrained CLIP or SigLIP: its weights, its tokenizer and its image preprocessing."""

import hashlib
import json
import logging
import math
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from clipft.config.settings import OWN_SIZES, InputSizes
from clipft.core.errors import ClipftError, ModelError, first_line
from clipft.core.files import read_json
from clipft.models.adapters import base_of_adapter, merge_adapter
from clipft.models.architectures import ARCHITECTURES, Architecture
from clipft.models.complete import (
    check_finite,
    check_normalization,
    check_tokenizer,
    check_weights,
)
from clipft.models.open_clip.names import is_open_clip
from clipft.models.positions import resize_inputs

TINY = "tiny"
"""Name of the small CLIP that the package carries."""
_TINY_FOLDER = Path(__file__).parent / "tiny"
_LFS_POINTER = b"version https://git-lfs"


def quiet_libraries() -> None:
    """Silence warnings of the model libraries. Call it before the first of them is imported."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # It warns of each of its tries to reach the hub; the last one ends in an error of ours
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@dataclass(frozen=True)
class ModelInputs:
    """What a model expects of texts and images.

    Images are squares with a side of ``image_size`` pixels. ``mean`` and ``std`` normalize pixel
    values in 0..1, per channel. If ``squashed``, an image of any shape is resized to the square;
    otherwise the square is cropped from it. Texts have at most ``context_length`` tokens.
    """

    tokenizer: Any
    context_length: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    squashed: bool = False


@dataclass(frozen=True)
class PretrainedModel:
    """A pretrained CLIP: ``model`` is transformers' ``CLIPModel`` or ``SiglipModel``, in fp32.

    ``conversion`` says how it was made from a checkpoint of open_clip; it is "" for any other.
    """

    name: str
    model: Any
    inputs: ModelInputs
    parameters_count: int
    sizes: InputSizes = OWN_SIZES
    conversion: str = ""

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.model.config.model_type]

    def fingerprint(self) -> str:
        """Hash the shape of the model and every weight: equal for equal models."""
        # Only what does not differ between versions of transformers
        shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        vision, text = self.model.config.vision_config, self.model.config.text_config
        config = {
            "vision": [
                getattr(vision, key) for key in (*shape, "image_size", "patch_size", "hidden_act")
            ],
            "text": [getattr(text, key) for key in (*shape, "vocab_size", "hidden_act")],
        }
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps(config, sort_keys=True).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()


def load_pretrained(name: str, sizes: InputSizes = OWN_SIZES) -> PretrainedModel:
    """Load the model of a hub id, of a local folder, or ``tiny``, in fp32 on the CPU.

    A folder or hub id may also hold a PEFT adapter, which is merged into its base model. ``sizes``
    change the lengths of texts and the size of images that it takes.

    Raises:
        ModelError: it is missing, broken, incomplete, not a CLIP, or cannot be downloaded.
        UsageError: it cannot take images of that size.
    """
    inputs = load_inputs(name, sizes)
    with loading_errors(name):
        source = model_source(name)
        model, found = _find_architecture(name, source).load(source)
        check_weights(name, found)
        if _base_of(name):
            model = merge_adapter(model, name)
        check_finite(name, model.named_parameters())
    # Pool a text where its tokenizer ends it, and pad it as its tokenizer does. Configurations
    # cannot be trusted there: early CLIPs say that the end is 2, for which transformers pools at
    # the highest id instead, and SigLIP's name ids beyond its vocabulary.
    tokenizer, config = inputs.tokenizer, model.config.text_config
    end = tokenizer.eos_token_id
    config.eos_token_id = model.text_model.eos_token_id = end
    config.pad_token_id = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    resize_inputs(model, sizes)
    parameters = sum(p.numel() for p in model.parameters())
    conversion = _conversion(source)
    return PretrainedModel(name, model.eval(), inputs, parameters, sizes, conversion)


def load_inputs(name: str, sizes: InputSizes = OWN_SIZES) -> ModelInputs:
    """Load only the tokenizer and the image preprocessing of a model, without its weights.

    Raises:
        ModelError: as for ``load_pretrained``; or the model does not take square images.
    """
    quiet_libraries()
    from transformers import AutoTokenizer, CLIPImageProcessor

    with loading_errors(name):
        _check_hub_is_known(name)
        source = model_source(name)
        architecture = _find_architecture(name, source)
        _check_image_processor(name, source)
        config = architecture.read_config(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        processor, _ = CLIPImageProcessor.get_image_processor_dict(source)
        check_normalization(name, processor)
        vocab_size = config.text_config.vocab_size
        check_tokenizer(name, tokenizer, vocab_size, pools_at_end=not architecture.pads_texts)
    sides = config.vision_config.image_size
    different = {sides} if isinstance(sides, int) else set(sides)
    if len(different) != 1:
        raise ModelError(
            f"{name} takes images of {sides} pixels, which are not square", "choose another model"
        )
    # Image processors have a size by shortest_edge, which crops, or by height and width
    size, defaults = processor.get("size"), architecture.image_defaults
    return ModelInputs(
        tokenizer=tokenizer,
        context_length=sizes.context_length or int(config.text_config.max_position_embeddings),
        image_size=sizes.image_size or different.pop(),
        mean=tuple(processor.get("image_mean", defaults.mean)),
        std=tuple(processor.get("image_std", defaults.std)),
        squashed="height" in size if isinstance(size, dict) else defaults.squashed,
    )


def model_source(name: str) -> str:
    """Return what ``from_pretrained`` needs to find a model; for an adapter, its base model.

    Raises:
        ModelError: there is no model in the folder, or more than one.
    """
    source = _base_of(name) or name
    if source == TINY:
        return str(_TINY_FOLDER)
    if is_open_clip(source):
        from clipft.models.open_clip.convert import converted_folder

        return str(converted_folder(source))
    folder = Path(source)
    if looks_local(source) and not (folder / "config.json").is_file():
        hint = "name a folder written by transformers' save_pretrained or by open_clip, or a hub id"
        raise ModelError(f"no model in {source}: config.json is missing", hint)
    return source


def _check_hub_is_known(name: str) -> None:
    """Notice at once that there is no network; the hub's own client tries for a minute.

    Raises:
        OSError: the hub's name cannot be resolved, and the model is not in the local cache.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    local = name == TINY or looks_local(name) or is_open_clip(name)
    if local or constants.HF_HUB_OFFLINE or getproxies():
        return
    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)


def _conversion(source: str) -> str:
    from clipft.models.open_clip.convert import read_report

    return str(read_report(Path(source)) or "")


def _base_of(name: str) -> str | None:
    missing = looks_local(name) and not Path(name).is_dir()
    if name == TINY or missing or is_open_clip(name):
        return None
    return base_of_adapter(name)


def own_learning_rates(name: str) -> dict[str, float]:
    """Return the learning rates by scenario that a model's folder has in its ``clipft.json``.

    A model that was pretrained in another way than OpenAI's CLIP may need other rates.
    """
    said = read_json((_TINY_FOLDER if name == TINY else Path(name)) / "clipft.json") or {}
    rates = said.get("learning_rates")
    if not isinstance(rates, dict):
        return {}
    return {name: float(rate) for name, rate in rates.items() if _is_rate(rate)}


def _is_rate(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < math.inf


def looks_local(name: str) -> bool:
    """Return True for the path of a folder, False for a model of the hub."""
    return name.startswith((".", "/", "~")) or Path(name).exists()


def _find_architecture(name: str, source: str) -> Architecture:
    """Read a model's family from its configuration.

    Raises:
        ModelError: it is not CLIP or SigLIP, is quantized, or lacks the head that pools images.
        OSError: it has no configuration.
    """
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(source)
    if not config:
        raise OSError("no config.json found")
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{name} is a {kind} model, not CLIP"
            if kind
            else f"{name} is not CLIP: its config.json names no model_type",
            "choose a CLIP or SigLIP checkpoint, such as openai/clip-vit-base-patch32",
        )
    if config.get("quantization_config"):
        raise ModelError(f"{name} is quantized", "choose the checkpoint with its full weights")
    if config.get("vision_config", {}).get("vision_use_head") is False:
        raise ModelError(f"{name} has no head to pool images", "choose a complete checkpoint")
    return ARCHITECTURES[kind]


def _check_image_processor(name: str, source: str) -> None:
    files = ("preprocessor_config.json", "processor_config.json")
    folder = Path(source)
    if folder.is_dir() and not any((folder / file).is_file() for file in files):
        raise ModelError(
            f"no image processor in {name}: {files[0]} is missing",
            "copy this file from the original model: it defines how images are normalized",
        )


def _not_downloaded(name: str) -> str:
    """Return the first file of a folder that is a pointer of Git LFS instead of the file itself."""
    for path in sorted(Path(name).glob("*")) if looks_local(name) else ():
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    return path.name
    return ""


@contextmanager
def loading_errors(name: str) -> Iterator[None]:
    """Raise the loaders' errors, which share no base class, as ``ModelError``."""
    try:
        yield
    except ClipftError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        if pointer := _not_downloaded(name):
            raise ModelError(
                f"{pointer} in {name} is a pointer of Git LFS, not the file itself",
                f"run `git lfs pull` in {name}",
            ) from error
        if isinstance(error, OSError) and not looks_local(name):
            raise ModelError(
                f"cannot get model {name}: looked in the local cache and on the hub ({said})",
                "check the name and the network, or point --model at a local folder "
                "(one written by save_pretrained); --model tiny needs neither",
            ) from error
        if isinstance(error, ImportError) and "sentencepiece" in str(error).lower():
            raise ModelError(
                f"the tokenizer of {name} needs sentencepiece", "pip install 'clipft[siglip]'"
            ) from error
        raise ModelError(
            f"cannot load model {name}: {said}",
            "the folder may be incomplete, or torch, torchvision and transformers may not fit "
            "together; --debug shows where it failed",
        ) from error
