"""The base class for formats of programs that run the towers without torch."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from clipft.core.errors import ClipftError, ModelError, first_line
from clipft.export.towers import Encoder, TowerCheck, TowerInputs, compare_towers
from clipft.models.pretrained import PretrainedModel

TOLERANCE = 1e-4
"""The largest allowed difference of a component of an embedding in fp32 from torch's."""


class Unconvertible(ModelError):
    """The program cannot convert or run a tower."""


class Runtime:
    """A format for a program that runs the towers without torch.

    Each subclass writes and opens one format. ``program`` is the program's name in messages, and
    ``files`` are the paths of the towers in an exported folder. The name of a tower in a lower
    precision has a suffix, as in transformers.js.
    """

    name: ClassVar[str]
    program: ClassVar[str]
    files: ClassVar[Mapping[str, str]]
    other_versions: ClassVar[str]
    """The hint of an error if the program fails."""
    stand_in: ClassVar[str] = ""
    """The library with which ``open`` runs a tower instead of the program; "" if it does not. The
    time of such a run is not reported."""

    def write(self, clip: Any, base: PretrainedModel, folder: Path) -> None:
        """Write both towers of a merged model in fp32, with the tokenizer and the image processor.

        Raises:
            OSError: the disk is full or refuses to write.
            Unconvertible: the program cannot convert the model.
        """
        raise NotImplementedError

    def open(self, path: Path) -> Encoder:
        """Open a tower.

        Raises:
            Unconvertible: the program cannot read the tower. The encoder raises it if the program
                cannot run the tower.
        """
        raise NotImplementedError

    def convert(self, path: Path, precision: str, target: Path) -> None:
        """Write the tower at ``path`` to ``target`` in ``fp16`` or ``int8``."""
        raise NotImplementedError

    def parts(self, path: Path) -> list[Path]:
        """Return the files of a tower, whether they exist or not."""
        return [path]

    def reduced_path(self, path: Path, precision: str) -> Path:
        suffix = "" if precision == "fp32" else f"_{precision}"
        return path.with_name(f"{path.stem}{suffix}{path.suffix}")

    def bytes_of(self, path: Path) -> int:
        return sum(part.stat().st_size for part in self.parts(path) if part.exists())

    def remove(self, path: Path) -> None:
        for part in self.parts(path):
            part.unlink(missing_ok=True)

    def check(
        self, folder: Path, clip: Any, base: PretrainedModel, batches: Iterable[TowerInputs]
    ) -> TowerCheck:
        """Compare the towers in ``folder`` with torch.

        Raises:
            ModelError: the program cannot run a tower, or a component differs by more than
                ``TOLERANCE``.
        """
        encoders = {kind: self.open(folder / file) for kind, file in self.files.items()}
        check = compare_towers(encoders, clip, base, batches, self.stand_in or self.program)
        if check.worst > TOLERANCE:
            raise ModelError(
                f"{self.program} differs from torch by {check.worst:.1e}, more than "
                f"{TOLERANCE:g}: nothing was exported",
                self.other_versions,
            )
        return check

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Raise errors of the program, which may have any type, as ``Unconvertible``."""
        try:
            yield
        except (ClipftError, OSError):
            raise
        except Exception as error:
            raise Unconvertible(
                f"{self.program} cannot {what}: {first_line(error)}", self.other_versions
            ) from error
