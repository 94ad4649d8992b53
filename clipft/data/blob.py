"""Where some bytes lie: a whole file, or a member of a tar that is never extracted."""

import os
import stat
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Blob:
    """``size`` bytes of ``path`` from ``offset``; -1: all up to its end. A catalogue has
    millions of these: the path is text, a fifth of a ``Path``."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self, limit: int = -1) -> bytes:
        """The bytes.

        Raises:
            OSError: they cannot be read, are more than ``limit``, or fewer than ``size``.
        """
        # Opening a pipe would wait for its writer
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise OSError(None, "not a regular file")
        with open(self.path, "rb", buffering=0) as file:
            size = self.size if self.size >= 0 else os.fstat(file.fileno()).st_size
            if 0 <= limit < size:
                raise OSError(None, f"more than {limit >> 20} MiB")
            file.seek(self.offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError(None, "became shorter while it was read")
        return data
