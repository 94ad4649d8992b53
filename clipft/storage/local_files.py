"""The files of a folder that are its user's: not clipft's own, and none behind a link."""

import os
from pathlib import Path

from clipft.storage.s3.errors import disk_error
from clipft.storage.s3.keys import OWN_PREFIX

_OWN_SUFFIX = ".clipft-index"


def local_files(folder: Path) -> list[str]:
    """Paths of files below ``folder``, with slashes, sorted; none where there is no folder.

    A link to a file counts as that file, a link to a folder is not followed.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_own(name)]
        below = os.path.relpath(parent, folder)
        for name in names:
            if not _is_own(name) and os.path.isfile(os.path.join(parent, name)):
                found.append(name if below == "." else f"{below}/{name}".replace(os.sep, "/"))
    return sorted(found)


def remove_files(folder: Path, names: list[str]) -> None:
    """Remove files and then the folders that this leaves empty; never ``folder`` itself.

    Raises:
        StorageError: the disk refuses.
    """
    for name in names:
        path = folder / name
        try:
            path.unlink(missing_ok=True)
            for parent in path.parents:
                if parent == folder or any(parent.iterdir()):
                    break
                parent.rmdir()
        except OSError as error:
            raise disk_error(error, path, 0) from error


def _is_own(name: str) -> bool:
    return name.startswith(OWN_PREFIX) or name.endswith(_OWN_SUFFIX)
