"""How to pack: apart from the packing, because the command's help shows these defaults."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PackOptions:
    """``val_share`` counts only where the source has no train/ and val/ folders; ``check``
    decodes every picture in full, not only its header."""

    shard_pairs: int = 1000
    val_share: float = 0.1
    seed: int = 42
    check: bool = False
    overwrite: bool = False
