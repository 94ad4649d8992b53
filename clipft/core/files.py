"""Writing so that a file under its final name is always whole: the old one or the new one."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipft.core.errors import StorageError

_UNTOUCHED = "what was there before is untouched"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well.

    ``shared``: other processes may write the same file at this moment; the temporary name is
    then this process's own, and a kill leaves it behind.

    Raises:
        StorageError: the disk is full or refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid() if shared else 'part'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError
        raise disk_error(path, error) from error
    finally:
        # A folder that cannot be written cannot be unlinked from either
        if os.path.lexists(temporary):
            temporary.unlink()


def write_text(path: Path, text: str, shared: bool = False) -> None:
    """``text`` in UTF-8 takes the place of ``path``.

    Raises:
        StorageError: as ``replacing``.
    """
    with replacing(path, shared) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing_folder(folder: Path, shared: bool = False) -> Iterator[Path]:
    """The same for a folder of files: between the two names there is only a rename."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid() if shared else 'part'}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        for within in (*temporary.rglob("*"), temporary):
            _flush(within)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        _flush(folder.parent)
    except (OSError, RuntimeError) as error:
        raise disk_error(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def settle(folder: Path, *names: str) -> None:
    """Files that grow, and their names, are on the disk when this returns; those that are not
    there are left out.

    Raises:
        StorageError: the disk refuses.
    """
    for path in (*(folder / name for name in names), folder):
        try:
            _flush(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise disk_error(path, error) from error


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file, of which a kill may have cut the last; none where there
    is no file. A line ends with a line feed alone: in JSON, other ends of lines are text."""
    found = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]


def check_writable(path: Path) -> None:
    """Before long work: could ``path`` be written at its end?

    Raises:
        StorageError: its folder cannot be made or written to, or it is a folder itself.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        why = "it is a folder" if path.is_dir() else f"{path.parent} cannot be written to"
        raise StorageError(f"cannot write {path}: {why}", f"write to another place; {_UNTOUCHED}")


def nearest_folder(path: Path) -> Path:
    """``path``, or what exists of the way to it: nothing is made."""
    way = (path.absolute(), *path.absolute().parents)
    return next(place for place in way if os.path.lexists(place))


def disk_error(path: Path, error: OSError | RuntimeError) -> StorageError:
    """What to raise where ``path`` could not be written."""
    return StorageError(f"cannot write {path}: {_reason(error)}", disk_hint(error))


def disk_hint(error: OSError | RuntimeError) -> str:
    """What to do about a disk that did not take a file: where it is not full, room is no help."""
    refused = isinstance(error, OSError) and error.errno not in _FULL
    place = "write to another place" if refused else "make room or write to another place"
    return f"{place}; {_UNTOUCHED}"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity and no not-a-number: they become null."""
    bad = (float("inf"), float("-inf"))
    return {k: None if v in bad or v != v else v for k, v in values.items()}
