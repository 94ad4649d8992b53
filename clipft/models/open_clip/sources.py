"""Finds the files of a checkpoint given in open_clip's notation, and downloads them."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipft.core.common import expand_home
from clipft.core.errors import ModelError, did_you_mean, first_line, sentences
from clipft.core.files import did_you_mean_path
from clipft.models.open_clip.config import check_supported
from clipft.models.open_clip.names import CONFIG_FILE, FOLDER, HUB, REGISTRY, WEIGHT_FILES
from clipft.models.open_clip.schema import read_config
from clipft.models.open_clip.weights import is_archive
from clipft.models.source import hub_refusal

_PREFERRED = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
"""Names of weights, in the order in which open_clip looks for them."""
_ON_HUB = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Source:
    """The files of a checkpoint.

    ``config`` is open_clip's ``model_cfg``, or None if it is derived from OpenAI's weights.
    ``preprocess`` is its ``preprocess_cfg``. ``tokenizer`` is the folder or hub id of a tokenizer
    of transformers, "" for CLIP's own.
    """

    name: str
    weights: Path
    config: dict[str, Any] | None = None
    preprocess: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = ""


def find_source(name: str) -> Source:
    """Find the files of a model, and download them if it is not local.

    Raises:
        ModelError: there is no such model, it is gated, or its files are incomplete.
    """
    if name in (REGISTRY, HUB, FOLDER):
        raise ModelError(
            f"{name} is not followed by a name",
            f"write {REGISTRY}NAME/PRETRAINED, {HUB}ID or {FOLDER}PATH",
        )
    if name.startswith(HUB):
        return _on_hub(name, name.removeprefix(HUB))
    if name.startswith(REGISTRY):
        model, _, pretrained = name.removeprefix(REGISTRY).partition("/")
        return _registered(name, model, pretrained)
    path = expand_home(name.removeprefix(FOLDER))
    if path.is_dir():
        return _in_folder(name, path)
    if name.startswith(FOLDER) or not path.is_file():  # reading a pipe could wait forever
        hint = did_you_mean_path(path) or "check the path"
        raise ModelError(f"there is no model {path}", hint)
    return _single_file(name, path)


def open_clip_installed() -> bool:
    return importlib.util.find_spec("open_clip") is not None


def _in_folder(name: str, folder: Path) -> Source:
    found = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_FILES and p.suffix != ".pt")
    found.sort(key=lambda path: path.suffix != ".safetensors")
    preferred = [folder / file for file in _PREFERRED if (folder / file) in found]
    config = read_config(folder / CONFIG_FILE)
    if not found:
        raise ModelError(
            f"no weights in {folder}", f"put {_ON_HUB[0]} beside {CONFIG_FILE}, as open_clip does"
        )
    return _described(name, (preferred or found)[0], config, str(folder))


def _single_file(name: str, path: Path) -> Source:
    if (path.parent / CONFIG_FILE).is_file():
        return _described(name, path, read_config(path.parent / CONFIG_FILE), str(path.parent))
    if is_archive(path):  # OpenAI's
        return Source(name, path)
    raise ModelError(
        f"{path} does not say which model it is: weights alone do not tell the activation or "
        "the number of heads",
        f"name the model, as in {REGISTRY}ViT-B-32/{path}, or put its {CONFIG_FILE} beside it",
    )


def _on_hub(name: str, repo: str) -> Source:
    config = read_config(_download(name, repo, CONFIG_FILE))
    check_supported(name, config["model_cfg"])
    return _described(name, _download(name, repo, *_ON_HUB), config, repo)


def _registered(name: str, model: str, pretrained: str) -> Source:
    if not open_clip_installed():
        raise ModelError(
            f"{name} needs open_clip, which knows where its models are",
            "pip install 'clipft[open_clip]', or pipx inject clipft open_clip_torch",
        )
    import open_clip
    from open_clip.pretrained import list_pretrained_tags_by_model

    config = open_clip.get_model_config(model)
    if config is None:
        hint = did_you_mean(model, open_clip.list_models())
        raise ModelError(
            f"open_clip has no model {model!r}",
            hint or "open_clip.list_models() lists the names",
        )
    check_supported(name, config)
    tokenizer = config["text_cfg"].get("hf_tokenizer_name") or ""
    if expand_home(pretrained).is_file():
        return Source(name, expand_home(pretrained), config, {}, tokenizer)
    tags = list_pretrained_tags_by_model(model)
    found = open_clip.get_pretrained_cfg(model, pretrained)
    if not found:
        known = f"it has {', '.join(tags)}" if tags else f"name a file: {REGISTRY}{model}/FILE"
        raise ModelError(
            f"open_clip has no pretrained weights {pretrained!r} for {model}",
            sentences(did_you_mean(pretrained, tags), known),
        )
    # Models pretrained with QuickGELU give other embeddings without it. open_clip only warns then
    config["quick_gelu"] = bool(found.get("quick_gelu") or config.get("quick_gelu"))
    return Source(name, _download_registered(name, found), config, found, tokenizer)


def _download_registered(name: str, found: Mapping[str, Any]) -> Path:
    if found.get("hf_hub"):
        repo, _, file = found["hf_hub"].rpartition("/")
        return _download(name, repo, *([file] if file else _ON_HUB))
    from open_clip.pretrained import download_pretrained_from_url

    try:
        return Path(download_pretrained_from_url(found["url"]))
    except Exception as error:  # of urllib, sockets, and open_clip's own
        raise ModelError(
            f"cannot download {name} from {found['url']}: {first_line(error)}", "check the network"
        ) from error


def _described(name: str, weights: Path, config: Mapping[str, Any], place: str) -> Source:
    model = dict(config["model_cfg"])
    tokenizer = place if model["text_cfg"].get("hf_tokenizer_name") else ""
    return Source(name, weights, model, dict(config.get("preprocess_cfg") or {}), tokenizer)


def _download(name: str, repo: str, *files: str) -> Path:
    """Download the first of ``files`` that is in a repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _hub_errors(name, repo):
        for file in files:
            try:
                return Path(hf_hub_download(repo, file))
            except LocalEntryNotFoundError:
                if file == files[-1]:
                    raise
            except EntryNotFoundError:
                continue
    raise ModelError(
        f"{repo} has no {' and no '.join(files)}: it is not a checkpoint of open_clip",
        f"if it is one of transformers, name it without {HUB}",
    )


@contextmanager
def _hub_errors(name: str, repo: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the hub, of httpx and sockets, or because of the offline mode
        if refused := hub_refusal(repo, error):
            raise refused from error
        raise ModelError(
            f"cannot get model {name}: {type(error).__name__}: {first_line(error)}",
            "check the network (HF_HUB_OFFLINE, HF_ENDPOINT, proxies), or name a local folder or "
            "file",
        ) from error
