"""The part of a computation that one of several processes does."""

from dataclasses import dataclass

from clipft.core.errors import UsageError


@dataclass(frozen=True)
class Part:
    """Every ``of``-th piece, starting with the piece at index ``number`` - 1."""

    number: int = 1
    of: int = 1

    @staticmethod
    def parse(text: str) -> "Part":
        """Parse a text such as ``2/4``. An empty text means all pieces.

        Raises:
            UsageError: The text is not I/N with 1 <= I <= N.
        """
        if not text:
            return Part()
        number, _, of = text.partition("/")
        if number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of):
            return Part(int(number), int(of))
        raise UsageError(f"--part {text} is not I/N", "name the parts 1/4, 2/4, 3/4 and 4/4")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def suffix(self) -> str:
        """The suffix of this part's own files, "" for all pieces."""
        return f"-{self.number}-of-{self.of}" if self.of > 1 else ""

    def has(self, piece: int) -> bool:
        return piece % self.of == self.number - 1


ALL = Part()
