"""Where clipft keeps what it can make again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``CLIPFT_CACHE``, or ``clipft`` in the user's cache folder; not made here."""
    return Path(
        os.environ.get("CLIPFT_CACHE")
        or os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "clipft"
        )
    )
