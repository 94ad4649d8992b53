"""Decode every file of a folder: it becomes an RGB image, or is refused with a reason.

    python -m tests.corpora.images FOLDER [--list] [--seconds 60]

Pillow's own test images are such a folder: Tests/images of github.com/python-pillow/Pillow. No file
may crash the process, hang, raise another error or have anything printed to stderr.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tests.corpora.isolated import Outcome, outcomes, show

GOOD = {"decoded", "refused"}


def decode(path: Path) -> tuple[str, str]:
    """Decode a file in full, at a reduced scale, and as pack checks it; all must agree."""
    from clipft.data.images.decode import decode_image, open_image
    from clipft.data.images.formats import BadImage

    data, found = path.read_bytes(), []
    for at_least in (0, 224):
        try:
            image = decode_image(data, at_least)
            found.append("decoded" if image.mode == "RGB" else f"a {image.mode} image")
        except BadImage as error:
            found.append(str(error) or "no reason")
    try:
        open_image(data).verify()
    except BadImage:
        found += ["not verified"] if found[0] == "decoded" else []
    if len(set(found)) > 1:
        return "disagrees", " / ".join(found)
    return ("decoded", "") if found[0] == "decoded" else ("refused", found[0])


def check(folder: Path, seconds: float) -> Sequence[Outcome]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return list(outcomes("tests.corpora.images:decode", paths, seconds))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--list", action="store_true", help="print every file that is refused")
    parser.add_argument("--seconds", type=float, default=60, help="time for a process of 64 files")
    options = parser.parse_args()
    found = check(options.folder, options.seconds)
    for path, word, remark in found:
        if word not in GOOD or (options.list and word != "decoded"):
            print(f"{path.relative_to(options.folder)}: {word}: {remark}")
    show(found)
    return int(any(word not in GOOD for _, word, _ in found))


if __name__ == "__main__":
    raise SystemExit(main())
