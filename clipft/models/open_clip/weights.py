"""Reads weights from files, without ever running code in a file.

OpenAI published CLIP as TorchScript archives. PyTorch's own reader can only read them by running
the code in them. But their tensors are in ``data.pkl`` and ``data/``, which can be read by a reader
that knows only tensors and containers.
"""

import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipft.core.errors import ModelError, first_line

_NOT_WEIGHTS = frozenset({"input_resolution", "context_length", "vocab_size"})
"""Numbers that OpenAI's archives hold as buffers."""
_CONSTANT = ".attn_mask"
"""A constant in each layer of the text tower in OpenAI's archives. State dicts do not have it."""


@dataclass(frozen=True)
class Weights:
    """Tensors by their names in open_clip, in float32 unless they hold integers. ``archived`` is
    true if they were in a TorchScript archive."""

    tensors: dict[str, Tensor]
    archived: bool


def read_weights(path: Path) -> Weights:
    """Read the state dict in a file: safetensors, a PyTorch checkpoint, or a TorchScript archive.

    The tensors have the names of open_clip's ``CLIP``: prefixes of wrappers (``module.``,
    ``text.``) are removed.

    Raises:
        ModelError: the file is missing, has another format, is damaged, or holds code.
    """
    kind = _kind_of(path)
    try:
        if kind == "safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        elif kind == "TorchScript":
            found = _read_archive(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickles that it then refuses
                found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than weights, and clipft runs no code from a checkpoint: "
            f"{_reason(error)}",
            "save its state dict alone, with torch.save(model.state_dict(), ...) or as safetensors",
        ) from error
    except Exception as error:  # of many types, from three readers
        raise ModelError(
            f"{path} is truncated or damaged: {first_line(error)}", "download or copy it again"
        ) from error
    tensors = _unwrapped(path, found)
    single = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    return Weights(single, kind == "TorchScript")


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise safetensors' own errors, such as that of a full disk, as ``OSError``."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors.

    Raises:
        OSError: the disk is full or cannot be written to.
    """
    from safetensors.torch import save_file

    with disk_errors():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def is_archive(path: Path) -> bool:
    """Return True for a TorchScript archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _kind_of(path: Path) -> str:
    """Return the format of a file, according to its first bytes.

    Raises:
        ModelError: the file is missing, or is not in a format for weights.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", "check the path") from error
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(
            f"{path} is a pointer of Git LFS, not the file itself",
            f"run `git lfs pull` in {path.parent}",
        )
    if start.startswith(b"PK\x03\x04"):
        return "TorchScript" if is_archive(path) else "PyTorch"
    if start[8:9] == b"{" and path.suffix == ".safetensors":
        return "safetensors"
    if start.startswith(b"\x80"):  # PyTorch's format before 1.6
        return "PyTorch"
    looks = "an HTML page" if start.lstrip().lower().startswith((b"<!doctype", b"<html")) else ""
    raise ModelError(
        f"{path} is {looks or 'not a checkpoint'}: it is neither safetensors nor a file of PyTorch",
        "download it again" if looks else "name a .safetensors or .pt file with a state dict",
    )


def _unwrapped(path: Path, found: Any) -> dict[str, Tensor]:
    content = found.get("state_dict", found) if isinstance(found, dict) else found
    tensors = isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values())
    if not tensors or not content:
        raise ModelError(
            f"{path} holds no state dict of a CLIP",
            "name a checkpoint of open_clip or OpenAI: a state dict, alone or as its `state_dict`",
        )
    if all(name.startswith("module.") for name in content):  # of DistributedDataParallel
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return {
        name.removeprefix("text."): value
        for name, value in content.items()
        if name not in _NOT_WEIGHTS
    }


def _reason(error: Exception) -> str:
    """Return which global a pickle asks for, according to torch's message or ours."""
    text = str(error)
    if asked := text.partition("GLOBAL ")[2].split(" ")[0]:
        return f"it asks for {asked}"
    # Only programmers need torch's first line, which is about a changed default
    return (
        "torch does not accept it as a state dict" if "weights_only" in text else first_line(error)
    )


class _Module:
    """Replaces any module of an archive. Its attributes are its parameters and submodules."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
"""The class of a storage in an archive, and the dtype of its tensor."""


def _read_archive(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = pickled.removesuffix("data.pkl")

        def storage(key: str, dtype: torch.dtype) -> Tensor:
            data = bytearray(archive.read(f"{folder}data/{key}"))
            return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

        with archive.open(pickled) as file:
            root = _TensorsOnly(file, storage).load()
    return dict(_tensors_in(root, ""))


def _tensors_in(module: Any, prefix: str) -> "list[tuple[str, Tensor]]":
    found = []
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and not f".{name}".endswith(_CONSTANT):
            found.append((prefix + name, value))
        elif isinstance(value, _Module):
            found += _tensors_in(value, f"{prefix}{name}.")
    return found


class _TensorsOnly(pickle.Unpickler):
    """Reads tensors, containers and attributes of modules, and refuses any other global."""

    def __init__(self, file: Any, storage: Callable[[str, torch.dtype], Tensor]) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch.jit._pickle":  # typed lists and tags of types
            return _first
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not a tensor")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, *_ = pid
        return self._storage(key, dtype)


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _first(value: Any, *_: Any) -> Any:
    return value
