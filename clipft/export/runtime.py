"""What an export must know of a program that runs the towers without torch."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from clipft.core.errors import ClipftError, ModelError, first_line
from clipft.export.towers import Encoder, TowerCheck, TowerInputs, compare_towers
from clipft.models.pretrained import PretrainedModel

TOLERANCE = 1e-4
"""The most by which a component of an embedding in fp32 may differ from torch's."""


class Unconvertible(ModelError):
    """The program cannot convert or run a tower."""


class Runtime:
    """A format that such a program opens. Each subclass writes and opens one.

    ``program`` is how messages call it, and ``files`` are the paths of the towers in an exported
    folder. A tower in a lower precision has a suffix in its name, as transformers.js has it.
    """

    name: ClassVar[str]
    program: ClassVar[str]
    files: ClassVar[Mapping[str, str]]
    other_versions: ClassVar[str]
    """The hint where the program fails."""
    stand_in: ClassVar[str] = ""
    """What ``open`` runs a tower with in place of the program, so that its time means nothing."""

    def write(self, clip: Any, base: PretrainedModel, folder: Path) -> None:
        """Write both towers of a merged model in fp32, with the tokenizer and the image processor.

        Raises:
            OSError: the disk is full or refuses.
            Unconvertible: the program cannot convert the model.
        """
        raise NotImplementedError

    def open(self, path: Path) -> Encoder:
        """Open a tower.

        Raises:
            Unconvertible: the program cannot read it; or later, when it is called, cannot run it.
        """
        raise NotImplementedError

    def convert(self, path: Path, precision: str, target: Path) -> None:
        """Write the tower at ``path`` to ``target`` in ``fp16`` or ``int8``."""
        raise NotImplementedError

    def parts(self, path: Path) -> list[Path]:
        """Return the files that a tower consists of, whether they exist or not."""
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
        """Turn what the program raises, which may be of any type, into one line."""
        try:
            yield
        except (ClipftError, OSError):
            raise
        except Exception as error:
            raise Unconvertible(
                f"{self.program} cannot {what}: {first_line(error)}", self.other_versions
            ) from error
