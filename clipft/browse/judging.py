"""Blind comparisons: the user judges which list of images is better without knowing the models."""

import random
import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from clipft.browse.comparison import Comparison, Found, ListedImage
from clipft.core.errors import UsageError
from clipft.runs.judgments import Judgment, Outcome, Tally, append_judgment, read_judgments
from clipft.search.images import ImagePart

HELD_OUT = ("val", "test")
"""The folders of a data set that are not used for training."""
_MOST_OPEN = 1000
"""Most trials that wait for a verdict. A new one then replaces the oldest."""
_MOST_DRAWS = 100
"""Most captions that are tried to find one for which the models differ."""

Side = Literal["fine_tuned", "pretrained"]


@dataclass(frozen=True)
class Trial:
    """A comparison without a verdict yet. ``order`` has the models of list A and list B."""

    found: Found
    order: tuple[Side, Side]

    @property
    def lists(self) -> list[Sequence[ListedImage]]:
        """The lists A and B."""
        return [getattr(self.found, side) for side in self.order]

    def outcome(self, choice: str) -> Outcome:
        """Return the outcome for the choice ``a``, ``b``, ``same`` or ``neither``.

        Raises:
            UsageError: The choice is another word.
        """
        first, second = self.order
        chosen: dict[str, Outcome] = {
            **{"a": first, "b": second},
            **{"same": "same", "neither": "neither"},
        }
        if choice not in chosen:
            raise UsageError("a verdict is one of a, b, same, neither", "choose one of them")
        return chosen[choice]


class Judging:
    """Makes trials, and stores their verdicts in the run folder.

    It is safe to use from several threads. ``draws_from`` are the numbers of the images whose
    captions are drawn as queries.
    """

    def __init__(
        self, comparison: Comparison, path: Path, epoch: int, data: Path, draws_from: Sequence[int]
    ) -> None:
        self._comparison, self._path, self._epoch, self._data = comparison, path, epoch, data
        self._judged = read_judgments(path, epoch)
        self._shown = set[str]()
        self._trials: OrderedDict[str, Trial] = OrderedDict()
        self._lock = threading.Lock()
        # Without a fixed seed, so that the next session has other captions
        self._to_draw = iter(random.Random().sample(draws_from, len(draws_from)))  # noqa: S311

    @property
    def tally(self) -> Tally:
        with self._lock:
            return Tally.of(self._judged)

    def shown(self, found: Found) -> None:
        """Remember a query whose lists were shown with the names of the models."""
        with self._lock:
            self._shown.add(found.query.name)

    def start(self, found: Found) -> tuple[str, Trial]:
        """Make a trial; return its name and the trial.

        Raises:
            UsageError: Both lists are equal, or were already shown with the names of the models.
        """
        with self._lock:
            if found.query.name in self._shown:
                raise UsageError(
                    "the lists of this query were already shown with the names of the models",
                    "judge another query",
                )
            if found.same:
                raise UsageError(
                    "both models find the same images in the same order",
                    "there is nothing to judge: try another query",
                )
            orders: tuple[tuple[Side, Side], ...] = (
                ("fine_tuned", "pretrained"),
                ("pretrained", "fine_tuned"),
            )
            trial = Trial(found, secrets.choice(orders))
            name = secrets.token_urlsafe(9)
            self._trials[name] = trial
            if len(self._trials) > _MOST_OPEN:
                self._trials.popitem(last=False)
            return name, trial

    def draw(self) -> tuple[str, Trial]:
        """Make a trial with a random caption that has not been judged.

        Captions for which both models find the same images are skipped.

        Raises:
            UsageError: No such caption was found in ``_MOST_DRAWS`` tries, or none is left.
            DataError: An image was changed or removed in the meantime.
        """
        for _ in range(_MOST_DRAWS):
            with self._lock:
                number = next(self._to_draw, None)
                known = self._judged.keys() | self._shown
            if number is None:
                break
            caption = self._comparison.caption(number)
            if not caption or caption in known:
                continue
            found = self._comparison.by_words(caption, own=number)
            if not found.same:
                return self.start(found)
        raise UsageError(
            "found no other caption for which the models give different results", "type a query"
        )

    def judge(self, name: str, choice: str) -> Trial:
        """Record the verdict of a trial, and return the trial.

        Raises:
            UsageError: There is no such trial, it was already judged, or there is no such verdict.
            StorageError: The verdict cannot be written; the trial can be judged again.
        """
        with self._lock:
            trial = self._trials.get(name)
            if trial is None:
                raise UsageError(
                    "this comparison was already judged, or is no longer available",
                    "start another one",
                )
            outcome, query = trial.outcome(choice), trial.found.query
            judgment = Judgment(
                query=query.name,
                outcome=outcome,
                epoch=self._epoch,
                first=trial.order[0],
                shown={
                    side: [image.key for image in images]
                    for side, images in zip(trial.order, trial.lists, strict=True)
                },
                data=str(self._data),
                time=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            append_judgment(self._path, judgment)
            del self._trials[name]
            self._judged[query.name] = outcome
            self._shown.add(query.name)
            return trial


def held_out_numbers(parts: Sequence[ImagePart], data: Path) -> list[int]:
    """Return the numbers of the images that are not used for training: those in val/ and test/ of
    ``data``, or all images if ``data`` itself is such a folder."""
    if data.resolve().name in HELD_OUT:
        return list(range(sum(part.count for part in parts)))
    numbers, start = list[int](), 0
    for part in parts:
        if part.split in HELD_OUT:
            numbers += range(start, start + part.count)
        start += part.count
    return numbers
