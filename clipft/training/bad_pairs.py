"""The pairs that a run leaves out: each listed once, and a run ended when they are too many."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from clipft.core.errors import DataError
from clipft.config.settings import DataSettings
from clipft.distributed.collectives import Processes, by_first
from clipft.runs.folder import append_lines
from clipft.words import counted


class BadPairs:
    """Of one run, in ``path``; ``count`` of those to train on."""

    def __init__(
        self, path: Path, pairs: int, settings: DataSettings, processes: Processes
    ) -> None:
        self.path, self.count = path, 0
        self._pairs, self._settings, self._processes = pairs, settings, processes

    def list(self, split: str, step: int, skipped: Iterable[dict[str, str]]) -> None:
        """Note them as left out when ``step`` optimizer steps were done."""
        lines = [{"split": split, "step": step, **entry} for entry in skipped]
        by_first(self._processes, lambda: append_lines(self.path, lines))

    def met(self, epoch: int, step: int, skipped: Sequence[dict[str, str]]) -> None:
        """In a step of training. Only the first epoch counts: later ones meet the same again.

        Raises:
            DataError: they are too many by now.
        """
        if not skipped or epoch > 1:
            return
        self.count += len(skipped)
        self.list("train", step, skipped)
        last = skipped[-1]
        if self._settings.too_many_bad(self.count, self._pairs):
            raise DataError(
                f"{counted(self.count, 'pair')} could not be used, more than --max-bad "
                f"{self._settings.max_bad:g} of {self._pairs}: the last was {last['key']} in "
                f"{last['shard']} ({last['reason']})",
                f"see {self.path}; mend the data, or raise --max-bad",
            )
