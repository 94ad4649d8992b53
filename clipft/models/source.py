"""Finds a pretrained model, and checks its family and its adapter without torch.

A name is ``tiny``, a local folder or a hub id. Importing torch and transformers takes seconds, so a
model that is missing or is not a CLIP is refused before that.
"""

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

from clipft.core.errors import ClipftError, ModelError, first_line
from clipft.core.files import read_json
from clipft.models.open_clip.names import is_open_clip

TINY = "tiny"
"""Name of the small CLIP that is part of the package."""
FAMILIES = (
    "clip",
    "siglip",
    "siglip2",
    "metaclip_2",
    "chinese_clip",
    "altclip",
    "open_clip",
    "open_clip_bidirectional",
)
"""Each ``model_type`` for which ``models.architectures`` has an architecture."""
ADAPTER_CONFIG = "adapter_config.json"

_TINY_FOLDER = Path(__file__).parent / "tiny"
_LFS_POINTER = b"version https://git-lfs"


def quiet_libraries() -> None:
    """Silence warnings of the model libraries. Call it before the first of them is imported."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # It warns about each attempt to reach the hub. If the last one fails, clipft raises an error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@dataclass(frozen=True)
class FoundModel:
    """A model whose files were found.

    ``source`` is the name for ``from_pretrained``, ``family`` is one of ``FAMILIES``, and
    ``image_processor`` is the configuration of the image processor as it is in the file.
    """

    source: str
    family: str
    image_processor: Any


def check_model(name: str) -> None:
    """Check a model as far as that is possible without torch and transformers.

    A model in open_clip's notation has to be converted first and is not checked here.

    Raises:
        ModelError: it is missing, cannot be downloaded, is not a CLIP, or lacks a part.
    """
    with loading_errors(name):
        _check_hub_is_known(name)
        is_converted = is_open_clip(base_of(name) or name)
    if not is_converted:
        find_model(name)


def find_model(name: str) -> FoundModel:
    """Find the files of a model, and convert those of open_clip to transformers.

    Raises:
        ModelError: as for ``check_model``, or the model cannot be converted.
    """
    with loading_errors(name):
        _check_hub_is_known(name)
        source = model_source(name)
        return FoundModel(source, _family_of(name, source), _image_processor_of(name, source))


def model_source(name: str) -> str:
    """Return the name of a model for ``from_pretrained``; for an adapter, that of its base model.

    Raises:
        ModelError: there is no model in the folder, or more than one.
    """
    source = base_of(name) or name
    if source == TINY:
        return str(_TINY_FOLDER)
    if is_open_clip(source):
        from clipft.models.open_clip.convert import converted_folder

        return str(converted_folder(source))
    folder = Path(source)
    if looks_local(source) and not (folder / "config.json").is_file():
        hint = "name a folder written by transformers' save_pretrained or by open_clip, or a hub id"
        if folder.is_file():
            raise ModelError(f"{source} is not a file of weights that clipft reads", hint)
        raise ModelError(f"no model in {source}: config.json is missing", hint)
    return source


def _check_hub_is_known(name: str) -> None:
    """Fail at once if there is no network. The hub's own client would try for a minute.

    Raises:
        OSError: the hub's name cannot be resolved, and the model is not in the local cache.
    """
    if name == TINY or looks_local(name) or is_open_clip(name) or getproxies():
        return
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        return
    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)


def looks_local(name: str) -> bool:
    """Return True for the path of a folder, False for a model of the hub."""
    return name.startswith((".", "/", "~")) or Path(name).exists()


def base_of(name: str) -> str | None:
    """Return the name of the base model of a PEFT adapter; None for a model that is no adapter.

    Raises:
        ModelError: the folder holds both an adapter and a whole model, or the adapter's
            configuration contains no base model.
    """
    missing = looks_local(name) and not Path(name).is_dir()
    if name == TINY or missing or is_open_clip(name):
        return None
    path = _find_file(name, ADAPTER_CONFIG)
    if path is None:
        return None
    if _find_file(name, "config.json"):
        raise ModelError(
            f"{name} holds a whole model and a PEFT adapter: it is not clear whether the "
            "adapter is already merged",
            f"keep {ADAPTER_CONFIG} and the adapter's weights in a folder of their own",
        )
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"the PEFT adapter in {name} does not say to which model it belongs",
            f"write the model into base_model_name_or_path of {ADAPTER_CONFIG}",
        )
    return str(base)


def own_learning_rates(name: str) -> dict[str, float]:
    """Return the learning rates by scenario in the ``clipft.json`` of a model's folder.

    A model that was not pretrained like OpenAI's CLIP may need other rates.
    """
    said = read_json((_TINY_FOLDER if name == TINY else Path(name)) / "clipft.json") or {}
    rates = said.get("learning_rates")
    if not isinstance(rates, dict):
        return {}
    return {name: float(rate) for name, rate in rates.items() if _is_rate(rate)}


def _is_rate(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < math.inf


def _find_file(source: str, file: str, required: bool = False) -> Path | None:
    """Find a file of a local folder or of a model on the hub; download it if necessary.

    Raises:
        OSError: there is no such model on the hub; or the file is ``required``, the hub cannot be
            reached, and the file is not in the cache.
    """
    if Path(source).is_dir():
        path = Path(source) / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        return Path(hf_hub_download(source, file))
    except EntryNotFoundError as error:
        if required and isinstance(error, OSError):  # without a network, the file may exist
            raise
        return None
    except HFValidationError as error:
        raise OSError(first_line(error)) from error


def _family_of(name: str, source: str) -> str:
    """Read a model's family from its configuration.

    Raises:
        ModelError: the family is not supported, or the model is quantized or lacks the head that
            pools images.
        OSError: the model has no configuration.
        ValueError: the configuration is not JSON.
    """
    path = _find_file(source, "config.json", required=True)
    config: Any = json.loads(path.read_text(encoding="utf-8")) if path else None
    if not isinstance(config, dict) or not config:
        raise OSError("no config.json found")
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(
            f"{name} is a {kind} model, not CLIP"
            if kind
            else f"{name} is not CLIP: its config.json has no model_type",
            "choose a CLIP or SigLIP checkpoint, such as openai/clip-vit-base-patch32",
        )
    if config.get("quantization_config"):
        raise ModelError(f"{name} is quantized", "choose the checkpoint with its full weights")
    if config.get("vision_config", {}).get("vision_use_head") is False:
        raise ModelError(f"{name} has no head to pool images", "choose a complete checkpoint")
    return str(kind)


def _image_processor_of(name: str, source: str) -> Any:
    """Read the configuration of an image processor, which newer models have in the configuration of
    their processor.

    Raises:
        ModelError: there is no such configuration.
        ValueError: the configuration is not JSON.
    """
    path = _find_file(source, "processor_config.json")
    nested: Any = json.loads(path.read_text(encoding="utf-8")) if path else None
    if isinstance(nested, dict) and "image_processor" in nested:
        return nested["image_processor"]
    path = _find_file(source, "preprocessor_config.json")
    if path is None:
        raise ModelError(
            f"no image processor in {name}: preprocessor_config.json is missing",
            "copy this file from the original model: it defines how images are normalized",
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _not_downloaded(name: str) -> str:
    """Return the first file of a folder that is only a Git LFS pointer; "" if there is none."""
    for path in sorted(Path(name).glob("*")) if looks_local(name) else ():
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    return path.name
    return ""


def hub_refusal(name: str, error: Exception) -> ModelError | None:
    """Return the reason why the hub refuses a model; None if ``error`` is another error."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return ModelError(
            f"{name} is a gated model", "accept its terms on the hub, then run `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return ModelError(
            f"the hub has no model {name}", "check the name; for a private model, `hf auth login`"
        )
    return None


@contextmanager
def loading_errors(name: str) -> Iterator[None]:
    """Raise the errors of model libraries, which have no common base class, as ``ModelError``."""
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
        if refused := hub_refusal(name, error):
            raise refused from error
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
