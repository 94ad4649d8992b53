"""One file that holds all a run needs to go on, and only what the run changes.

A checkpoint is a ``torch.save`` zip of plain values and tensors, read with
``weights_only=True``: nothing in it is executed. Keys:

epoch                  epochs that are done
model_state_dict       the weights that train, by name
optimizer_state_dict   and scheduler_state_dict, scaler_state_dict, skipped_in_a_row
loss                   training loss of the last step
step                   optimizer steps done
step_in_epoch          of them in the epoch under way
settings               every setting of the run, as JSON values
base_model             name and fingerprint of the untouched model
data                   identity of the training pairs: names and counts of the shards
train_pairs            how many they are
early_stopping         best value, epochs waited
before, best           figures of the untouched model and of the best epoch
finished               True once there is nothing left to do
format_version         of this list

No random state is kept: everything random is a function of the seed and the position.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch

from clipft.errors import ModelError
from clipft.files import replacing

FORMAT_VERSION = 1
_REQUIRED = frozenset({"epoch", "model_state_dict", "settings", "base_model", "format_version"})


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` so that ``path`` is at every moment the old file or the new one.

    Raises:
        StorageError: the disk is full or refuses; the old file is untouched.
    """
    with replacing(path) as temporary:
        torch.save({**content, "format_version": FORMAT_VERSION}, temporary)


class _Counted(io.RawIOBase):
    """Takes bytes and keeps their number alone."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        written = memoryview(data).nbytes
        self.size += written
        return written


def checkpoint_size(content: dict[str, Any]) -> int:
    """Bytes that ``save_checkpoint`` would write; nothing is written."""
    counted = _Counted()
    torch.save({**content, "format_version": FORMAT_VERSION}, cast(IO[bytes], counted))
    return counted.size


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read and check a checkpoint, onto the CPU.

    Raises:
        ModelError: missing, truncated, altered, of another program or a newer clipft, or
            holding anything but plain values and tensors.
    """
    if not path.is_file():
        raise ModelError(f"no checkpoint {path}", "check the path, or start with `clipft train`")
    try:
        _check_bytes(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, f"is damaged: {' '.join(str(error).split())}") from error
    except pickle.UnpicklingError as error:
        raise _unreadable(path, "holds code, not only weights; it was not run") from error
    if not isinstance(content, dict) or not content.keys() >= _REQUIRED:
        raise _unreadable(path, "is not a checkpoint of clipft")
    if content["format_version"] > FORMAT_VERSION:
        raise _unreadable(path, "was written by a newer clipft")
    return content


def _check_bytes(path: Path) -> None:
    """Every record's CRC-32: torch itself reads flipped bits without a word."""
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken:
        raise zipfile.BadZipFile(f"checksum of {broken} does not match")


def _unreadable(path: Path, why: str) -> ModelError:
    return ModelError(f"{path} {why}", "use another checkpoint, or train again")
