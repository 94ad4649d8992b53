"""Checks the content of an ``open_clip_config.json`` before it is used."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from clipft.core.errors import ModelError
from clipft.core.files import read_json

_Triple = Annotated[list[float], Field(min_length=3, max_length=3)]


class _Part(BaseModel):
    # The file is used without conversion, so "12" must not pass for a number
    model_config = ConfigDict(strict=True, extra="allow")


class _Tower(_Part):
    width: PositiveInt = 512
    mlp_ratio: PositiveFloat = 4.0
    norm_kwargs: dict[str, Any] | None = None
    act_kwargs: dict[str, Any] | None = None


class _Vision(_Tower):
    layers: PositiveInt | list[PositiveInt] = 12
    head_width: PositiveInt = 64
    patch_size: PositiveInt | None = 16  # a ResNet has none
    image_size: PositiveInt | Annotated[list[PositiveInt], Field(min_length=1)] = 224
    timm_model_name: str | None = None


class _Text(_Tower):
    layers: PositiveInt = 12
    heads: PositiveInt = 8
    context_length: PositiveInt = 77
    vocab_size: PositiveInt = 49408
    hf_tokenizer_name: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None


class _Model(_Part):
    embed_dim: PositiveInt
    vision_cfg: _Vision
    text_cfg: _Text


class _Preprocess(_Part):
    mean: _Triple | None = None
    std: _Triple | None = None
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"


class _File(_Part):
    model_cfg: _Model
    preprocess_cfg: _Preprocess | None = None


def read_config(path: Path) -> dict[str, Any]:
    """Read an ``open_clip_config.json``.

    Raises:
        ModelError: it is missing, is not JSON, or does not describe a model.
    """
    if not path.exists():
        raise _refused(f"{path} is missing")
    config = read_json(path)
    if config is None:
        raise _refused(f"{path} does not describe a model of open_clip: it is not a JSON object")
    try:
        _File.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        # If a value may have several types, the location also contains the type that was tried
        place = ".".join(str(part) for part in first["loc"][:3] if isinstance(part, str))
        problem = first["msg"].lower().partition(" or instance")[0]
        raise _refused(
            f"{path} does not describe a model of open_clip: {place}: {problem}"
        ) from error
    return config


def _refused(message: str) -> ModelError:
    return ModelError(
        message,
        "it must hold a model_cfg with embed_dim, vision_cfg and text_cfg, as open_clip writes it",
    )
