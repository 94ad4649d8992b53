"""Blind judgments that compare a run's two models, and their counts.

``clipft browse`` appends a line to ``judgments.jsonl`` in the run folder for each judgment.
"""

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from clipft.core.common import counted
from clipft.core.files import disk_error, json_lines
from clipft.metrics.proportions import sign_test, wilson_interval

Outcome = Literal["fine_tuned", "pretrained", "same", "neither"]
"""Which model found the better images; ``neither`` means that both lists were useless."""
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True)
class Judgment:
    """One judgment: the query, what was shown, and the verdict.

    Attributes:
        query: The words, or ``image:`` and a hash of the image that was searched with.
        outcome: The verdict.
        epoch: The epoch whose weights were compared with the pretrained model.
        first: Which model's list was shown as A.
        shown: The keys of the images that each model found.
        data: The folder that was searched.
        time: When it was judged, in UTC.
    """

    query: str
    outcome: Outcome
    epoch: int
    first: str
    shown: Mapping[str, list[str]]
    data: str
    time: str


def append_judgment(path: Path, judgment: Judgment) -> None:
    """Append a judgment to the file, and wait until it is on the disk.

    A kill or a full disk can cut off only the last line. The next judgment then starts on a new
    line, so no other judgment is lost.

    Raises:
        StorageError: The disk is full or refuses to write.
    """
    line = json.dumps(vars(judgment)).encode() + b"\n"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise disk_error(path, error) from error


def read_judgments(path: Path, epoch: int) -> dict[str, Outcome]:
    """Return query -> verdict for the weights of an epoch; the last verdict on a query counts."""
    return {
        str(line["query"]): line["outcome"]
        for line in json_lines(path)
        if line.get("epoch") == epoch and "query" in line and line.get("outcome") in OUTCOMES
    }


@dataclass(frozen=True)
class Tally:
    """How often each verdict was given."""

    fine_tuned: int = 0
    pretrained: int = 0
    same: int = 0
    neither: int = 0

    @classmethod
    def of(cls, judged: Mapping[str, Outcome]) -> "Tally":
        """Count the verdicts of ``read_judgments``."""
        verdicts = list(judged.values())
        return cls(*(verdicts.count(outcome) for outcome in OUTCOMES))

    @property
    def judged(self) -> int:
        return self.decided + self.same + self.neither

    @property
    def decided(self) -> int:
        """The judgments that preferred one of the models."""
        return self.fine_tuned + self.pretrained

    def to_dict(self) -> dict[str, Any]:
        """Return the counts; the share of the decided ones that preferred the fine-tuned model
        with its 95% interval, in 0..1; and the p-value of the sign test. None without any."""
        low, high = wilson_interval(self.fine_tuned, self.decided)
        any_decided = bool(self.decided)
        return {
            **vars(self),
            "judged": self.judged,
            "decided": self.decided,
            "share": self.fine_tuned / self.decided if any_decided else None,
            "low": low if any_decided else None,
            "high": high if any_decided else None,
            "p": sign_test(self.fine_tuned, self.pretrained) if any_decided else None,
            "sentence": self.sentence(),
        }

    def sentence(self) -> str:
        """Say in a sentence or two how the models compare."""
        if not self.judged:
            return "Nothing has been judged yet."
        if not self.decided:
            return f"No model was preferred in {counted(self.judged, 'blind judgment')}."
        low, high = wilson_interval(self.fine_tuned, self.decided)
        p = sign_test(self.fine_tuned, self.pretrained)
        clear = "" if p < 0.05 else " This may be chance."
        return (
            f"The fine-tuned model was preferred in {self.fine_tuned} of {self.decided} decided "
            f"blind judgments: {100 * self.fine_tuned / self.decided:.0f}%, 95% interval "
            f"{100 * low:.0f}% to {100 * high:.0f}%, sign test p {_p_value(p)}.{clear}"
        )


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
