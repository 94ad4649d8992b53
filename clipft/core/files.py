"""Writes files atomically: the file with the final name is either the old or the new one, complete.

Everything that a user may find after a crash (checkpoints, figures, reports, exports) is written to
a temporary name in the same folder, flushed to the disk, and then renamed.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipft.core.errors import StorageError, did_you_mean

_UNCHANGED = "existing files are unchanged"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and rename it to ``path`` when the block succeeds.

    The block makes the temporary file or folder. Set ``shared`` if other processes may write to the
    same path at the same time. The temporary name then contains the process id, and the file stays
    behind if the process is killed.

    Raises:
        StorageError: The disk is full, or refuses to write or to rename.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid() if shared else 'part'}")
    shutil.rmtree(temporary, ignore_errors=True)  # a killed process may have left a folder
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for within in (*temporary.rglob("*"), temporary):
            _flush(within)
        if temporary.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # a rename cannot replace a full folder
        os.replace(temporary, path)
        _flush(path.parent)  # otherwise a power cut could undo the rename
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError
        raise disk_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        # Look first: in a read-only folder, unlink fails even if the file does not exist
        if os.path.lexists(temporary):
            temporary.unlink()


def _flush(path: Path) -> None:
    """Flush the content of a file, or the list of names of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, shared: bool = False) -> None:
    """Replace ``path`` with ``text`` in UTF-8.

    Raises:
        StorageError: The disk is full, or refuses to write.
    """
    with replacing(path, shared) as temporary:
        # The name of a file in a tar may contain bytes that are not UTF-8
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_json(
    path: Path,
    content: Any,
    indent: int | None = None,
    ascii_only: bool = True,
    shared: bool = False,
) -> None:
    """Replace ``path`` with ``content`` as JSON and a final newline.

    Raises:
        StorageError: The disk is full, or refuses to write.
    """
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=ascii_only) + "\n", shared)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in ``path``, or None if there is no such file or no object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # ValueError includes text that is not UTF-8
        return None
    return content if isinstance(content, dict) else None


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a JSONL file, an empty list if it does not exist.

    Invalid lines are skipped, because the last one may be cut off if a process was killed.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found = []
    # Not splitlines(): it also splits at U+2028 and others, which JSON allows within a string
    for line in text.split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replace infinities and NaN by None, because JSON has neither."""
    bad = (float("inf"), float("-inf"))
    return {k: None if v in bad or v != v else v for k, v in values.items()}


def settle(folder: Path, *names: str) -> None:
    """Flush files that were appended to, and then ``folder`` itself, to the disk.

    Files that do not exist are skipped.

    Raises:
        StorageError: The disk refuses to write.
    """
    for path in (*(folder / name for name in names), folder):
        try:
            _flush(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise disk_error(path, error) from error


def check_writable(path: Path) -> None:
    """Check before a long computation that its result can be written to ``path``.

    Raises:
        StorageError: The folder cannot be made or written to, or ``path`` is a folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        why = "it is a folder" if path.is_dir() else f"{path.parent} is not writable"
        raise StorageError(f"cannot write {path}: {why}", f"choose another path; {_UNCHANGED}")


def nearest_folder(path: Path) -> Path:
    """Return ``path``, or its closest parent that exists. No folder is created."""
    candidates = (path.absolute(), *path.absolute().parents)
    return next(candidate for candidate in candidates if os.path.lexists(candidate))


def did_you_mean_path(path: Path) -> str:
    """Return ``did you mean PATH?`` for a path that does not exist, or "" if nothing is close.

    Only the first part that does not exist is corrected: ``./catlogue/train`` becomes
    ``./catalogue/train``.
    """
    if path.exists():
        return ""
    missing = next((part for part in (path, *path.parents) if part.parent.is_dir()), path)
    try:
        names = [name for name in os.listdir(missing.parent) if not name.startswith(".")]
    except OSError:
        return ""
    rest = path.relative_to(missing)
    # Stems are compared, because equal suffixes make short names similar
    by_stem: dict[str, Path] = {}
    for name in sorted(names, key=lambda name: Path(name).suffix == missing.suffix):
        candidate = missing.with_name(name) / rest
        if candidate.exists():
            by_stem[Path(name).stem] = candidate
    return did_you_mean(missing.stem, by_stem, lambda stem: str(by_stem[stem]))


def disk_error(path: Path, error: OSError | RuntimeError, needed: int = 0) -> StorageError:
    """Build the error for a ``path`` that could not be written.

    ``needed`` is the size of the file in bytes, or 0 if unknown. If the disk is full, a known size
    is part of the message.
    """
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = " ".join(str(error).split())
    if needed and _may_be_full(error):
        reason += f", {needed:,} bytes were needed"
    return StorageError(f"cannot write {path}: {reason}", disk_hint(error))


def disk_hint(error: OSError | RuntimeError) -> str:
    """Return the hint for a failed write. It suggests to free space only if that can help."""
    action = (
        "free some space or choose another place" if _may_be_full(error) else "choose another place"
    )
    return f"{action}; {_UNCHANGED}"


def _may_be_full(error: OSError | RuntimeError) -> bool:
    return not isinstance(error, OSError) or error.errno in _FULL
