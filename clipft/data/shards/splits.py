"""The names that splits have in data sets, in folders, files and tables."""

import re
from pathlib import PurePath

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "restval": "train",  # Karpathy's: validation images of COCO that are trained on
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
SPLIT_COLUMN = "split"
"""The column of a table, or the metadata field, that names the split of each pair."""
_SPLIT = re.compile(rf"({'|'.join(SPLIT_NAMES)})(\d{{4}})?", re.IGNORECASE)
_SPLIT_FILE = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?=[-_.])", re.IGNORECASE)


def split_named(name: str) -> str:
    """Return the split that a name such as ``validation`` or ``val2017`` stands for, or ""."""
    found = _SPLIT.fullmatch(name.strip())
    return SPLIT_NAMES[found[1].lower()] if found else ""


def split_of(path: PurePath) -> str:
    """Return the split after which a folder in the relative path of a file is named, or ""."""
    return next((split for part in path.parts[:-1] if (split := split_named(part))), "")


def split_of_file(path: PurePath) -> str:
    """Return the split of a shard or table by its folders or by its own name, such as
    ``test-00000-of-00001.parquet`` or ``captions_val2017.json``."""
    coco = re.search(r"_([A-Za-z]+)(\d{4})?\.json$", path.name)
    own = _SPLIT_FILE.match(path.name)
    return (
        split_of(path)
        or (SPLIT_NAMES[own[1].lower()] if own else "")
        or (split_named(coco[1]) if coco else "")
    )
