"""How to pack: apart from the packing, because the command's help shows these defaults."""

from dataclasses import dataclass

NEAR_BITS = 4
"""Usual ``near`` of ``likeness.near_photos``."""


@dataclass(frozen=True)
class PackOptions:
    """``val_share`` counts only where the source has no train/ and val/ folders; ``check``
    decodes every picture in full, not only its header; ``size`` 0 keeps pictures as they
    are; ``group_field`` of the metadata names what may not stand on both sides; the columns
    are those of a table, guessed where they are empty."""

    shard_pairs: int = 1000
    val_share: float = 0.1
    seed: int = 42
    check: bool = False
    overwrite: bool = False
    size: int = 0
    quality: int = 92
    group_field: str = ""
    image_column: str = ""
    caption_column: str = ""
    threads: int = 0
    """0: one per processor."""
