"""How to pack: apart from the packing, because the command's help shows these defaults."""

from dataclasses import dataclass

from clipft.core.errors import UsageError

NEAR_BITS = 4
"""Usual ``near`` of ``duplicates.near_duplicates``."""


@dataclass(frozen=True)
class Part:
    """The share of one of ``of`` machines that pack one catalogue: every ``of``-th shard."""

    number: int = 1
    of: int = 1

    @staticmethod
    def parse(text: str) -> "Part":
        """``2/4``; "" is the whole.

        Raises:
            UsageError: something else.
        """
        if not text:
            return Part()
        number, _, of = text.partition("/")
        if number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of):
            return Part(int(number), int(of))
        raise UsageError(f"--part {text} is not I/N", "name it like 1/4, 2/4, 3/4 and 4/4")

    @property
    def suffix(self) -> str:
        """What sets this part's own files apart from those of the others."""
        return f"-{self.number}-of-{self.of}" if self.of > 1 else ""

    def has(self, shard: int) -> bool:
        return shard % self.of == self.number - 1


@dataclass(frozen=True)
class PackOptions:
    """``val_share`` counts only where the source has no train/ and val/ folders; ``near`` -1
    leaves near-identical photos alone; ``check`` decodes every picture, not only its header;
    ``size`` 0 keeps pictures as they are; ``group_field`` of the metadata names what may not
    stand on both sides; the columns are those of a table, guessed where they are empty.

    A shard ends after ``shard_pairs`` or, where that is not 0, after some ``shard_mb`` MiB.
    """

    shard_pairs: int = 1000
    shard_mb: int = 0
    val_share: float = 0.1
    seed: int = 42
    near: int = NEAR_BITS
    check: bool = False
    overwrite: bool = False
    size: int = 0
    quality: int = 92
    group_field: str = ""
    image_column: str = ""
    caption_column: str = ""
    part: Part = Part()
    processes: int = 0
    """0: one per processor."""
