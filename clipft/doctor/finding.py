"""What a check found."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from clipft.config.settings import Settings

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """``error``: a run with these settings would fail; ``warning``: it would be slower, or may
    fail later. ``hint`` says what to do and is empty where nothing is to be done."""

    status: Status
    found: str
    hint: str = ""


@dataclass(frozen=True)
class Check:
    """A question under its name. ``look`` may raise a ``ClipftError``, which is an answer too."""

    name: str
    look: Callable[[Settings], Finding]


@dataclass(frozen=True)
class Examined:
    """The answer to a check."""

    name: str
    finding: Finding

    def to_dict(self) -> dict[str, str]:
        return {"name": self.name, **asdict(self.finding)}
