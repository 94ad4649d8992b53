"""Loading a CLIP checkpoint: the model, its tokenizer, and what it wants of pictures."""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipft.core.errors import ModelError, first_line
from clipft.models.architectures import ARCHITECTURES, Architecture


def quiet_libraries() -> None:
    """Before the first of them is imported; loads none itself."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


TINY = "tiny"
"""Name of the small CLIP that the package carries."""

_TINY_FOLDER = Path(__file__).parent / "tiny"


@dataclass(frozen=True)
class ModelInputs:
    """What a CLIP wants of texts and pictures: a side of ``image_size`` pixels, at most
    ``context_length`` ids; ``mean`` and ``std`` normalise pixels in 0..1, per channel;
    ``squashed`` pictures are brought to the square whole, others are cropped to it."""

    tokenizer: Any
    context_length: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    squashed: bool = False


@dataclass(frozen=True)
class BaseModel:
    """An untouched CLIP."""

    name: str
    model: Any
    """``transformers.CLIPModel`` or ``SiglipModel``."""
    inputs: ModelInputs
    parameters_count: int

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.model.config.model_type]

    def fingerprint(self) -> str:
        """A hash over configuration and every weight: equal for equal models."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps(_shape_of(self.model.config), sort_keys=True).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()


def load_base(name: str) -> BaseModel:
    """Load a hub id, a local folder, or ``tiny``, in fp32.

    Raises:
        ModelError: it cannot be had (missing, no network, no CLIP, broken files).
    """
    inputs = load_inputs(name)
    import transformers

    with _telling_of(name):
        kind = _architecture(name).model_class
        loader = getattr(transformers, kind)
        # sdpa: ``lean.encode_pooled`` calls layers without a mask
        how = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        model = loader.from_pretrained(_source(name), **how)
    _read_texts_as(inputs.tokenizer, model)
    parameters = sum(p.numel() for p in model.parameters())
    return BaseModel(name, model.eval(), inputs, parameters)


def load_inputs(name: str) -> ModelInputs:
    """Tokenizer and preprocessing of a model, without its weights.

    Raises:
        ModelError: as ``load_base``.
    """
    quiet_libraries()
    from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor

    source = _source(name)
    if name != TINY:
        _check_local(name)
    with _telling_of(name):
        defaults = _architecture(name).picture
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        processor, _ = CLIPImageProcessor.get_image_processor_dict(source)
    return ModelInputs(
        tokenizer=tokenizer,
        context_length=int(config.text_config.max_position_embeddings),
        image_size=_side(name, config.vision_config.image_size),
        mean=tuple(processor.get("image_mean", defaults.mean)),
        std=tuple(processor.get("image_std", defaults.std)),
        squashed=_squashed(processor.get("size"), defaults.squashed),
    )


def _side(name: str, size: int | list[int] | tuple[int, ...]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ModelError(f"{name} takes pictures of {size}, not square", "choose another model")
    return sides.pop()


def _squashed(size: Any, default: bool) -> bool:
    """``size`` as image processors have it: ``shortest_edge``, or ``height`` and ``width``."""
    return "height" in size if isinstance(size, dict) else default


def _read_texts_as(tokenizer: Any, model: Any) -> None:
    """Pool a text where its tokenizer ends it, and fill it as its tokenizer does.

    Configurations are not to be trusted there: early CLIPs say end 2, with which transformers
    pools at the highest id instead, and SigLIP's name ids beyond its vocabulary.
    """
    config, end = model.config.text_config, tokenizer.eos_token_id
    config.eos_token_id = model.text_model.eos_token_id = end
    config.pad_token_id = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@dataclass(frozen=True)
class Processors:
    """As their files say, to be written out again: nothing has changed their state."""

    tokenizer: Any
    image_processor: Any


def load_processors(name: str) -> Processors:
    """Tokenizer and image processor of a model that ``load_base`` takes.

    Raises:
        ModelError: as ``load_base``.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    source = _source(name)
    with _telling_of(name):
        tokenizer = AutoTokenizer.from_pretrained(source)
        for where_from in ("is_local", "local_files_only"):  # of this loading, not of the files
            tokenizer.init_kwargs.pop(where_from, None)
        return Processors(tokenizer, AutoImageProcessor.from_pretrained(source))


def _source(name: str) -> str:
    return str(_TINY_FOLDER) if name == TINY else name


@contextmanager
def _telling_of(name: str) -> Iterator[None]:
    """The loaders' errors, which share no base class, as ours."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise _cannot_load(name, error) from error


def looks_local(name: str) -> bool:
    """A folder, rather than a model of the hub?"""
    return name.startswith((".", "/", "~")) or Path(name).exists()


def _check_local(name: str) -> None:
    if looks_local(name) and not (Path(name) / "config.json").is_file():
        raise ModelError(
            f"no model in {name}: config.json is missing",
            "name a folder written by transformers' save_pretrained, or a hub id",
        )


def _architecture(name: str) -> Architecture:
    """
    Raises:
        ModelError: none that can be trained here.
        OSError: no configuration.
    """
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(_source(name))
    if not config:
        raise OSError("no config.json found")
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{name} is a {kind} model, not CLIP",
            "choose a CLIP or SigLIP checkpoint, such as openai/clip-vit-base-patch32",
        )
    if config.get("vision_config", {}).get("vision_use_head") is False:
        raise ModelError(f"{name} has no head to pool pictures", "choose a whole checkpoint")
    return ARCHITECTURES[kind]


def _cannot_load(name: str, error: Exception) -> ModelError:
    if isinstance(error, OSError):
        return ModelError(
            f"cannot get model {name}: looked in the local cache and on the hub "
            f"({type(error).__name__}: {first_line(error)})",
            "check the name and the network, or point --model at a local folder "
            "(one written by save_pretrained); --model tiny needs neither",
        )
    if isinstance(error, ImportError) and "sentencepiece" in str(error).lower():
        return ModelError(
            f"the tokenizer of {name} needs sentencepiece", "pip install 'clipft[siglip]'"
        )
    return ModelError(
        f"cannot load model {name}: {type(error).__name__}: {first_line(error)}",
        "the folder may be incomplete or torch, torchvision and transformers may not fit "
        "together; --debug shows where it failed",
    )


def _shape_of(config: Any) -> dict[str, Any]:
    """The configuration without what differs between versions of transformers."""
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    vision, text = config.vision_config, config.text_config
    return {
        "vision": [getattr(vision, k) for k in (*kept, "image_size", "patch_size", "hidden_act")],
        "text": [getattr(text, k) for k in (*kept, "vocab_size", "hidden_act")],
    }
