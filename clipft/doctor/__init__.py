"""Checks whether this machine is ready for a run.

Each check is a function that takes the settings and returns a ``Finding``. All checks are listed in
``examination``.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    ``error`` means that a run with these settings would fail; ``warning`` means that it would be
    slower or may fail later. ``hint`` says what to do, and is empty if nothing needs to be done.
    """

    status: Literal["ok", "warning", "error"]
    found: str
    hint: str = ""
