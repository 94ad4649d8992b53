"""Read every tar of a folder as a shard, and compare its members with what ``tarfile`` finds.

    python -m tests.corpora.tars FOLDER [--list] [--seconds 60]

Such files are in the tests of tar-rs (tests/archives), node-tar (test/fixtures), libarchive
(libarchive/test/*.tar.uu, which are decoded), cpython (Lib/test/archivetestdata) and Go
(src/archive/tar/testdata). A tar is read with the names and bytes that ``tarfile`` reads, or
refused with a reason.
"""

import argparse
import binascii
import os
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.corpora.isolated import Outcome, outcomes, show

GOOD = {"read, plain", "read", "refused"}


def compare(path: Path) -> tuple[str, str]:
    """Read a tar as clipft does, and with ``tarfile``."""
    from clipft.core.errors import DataError
    from clipft.data.shards.index import index_shard
    from clipft.data.shards.tar import plain_members, read_members

    if path.suffix == ".uu":
        with tempfile.TemporaryDirectory() as folder:
            return compare(_decoded(path, Path(folder)))
    try:
        index_shard(path)
    except DataError as error:
        return "refused", error.message.partition(": ")[2] or error.message
    theirs = _files(path)
    data = path.read_bytes()
    ours = [
        (member.name, data[member.offset : member.offset + member.size])
        for member in read_members(path)
        if member.kind == "file"
    ]
    # tarfile stops at the end of the first of several tars that were joined
    if ours[: len(theirs)] != theirs:
        return "differs", f"{len(ours)} files, tarfile has {len(theirs)}"
    file = os.open(path, os.O_RDONLY)
    try:
        plain = plain_members(file) is not None
    finally:
        os.close(file)
    joined = f"{len(ours) - len(theirs)} more from a joined tar" if len(ours) > len(theirs) else ""
    return "read, plain" if plain else "read", joined


def _files(path: Path) -> list[tuple[str, bytes]]:
    found = []
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            if info.isreg() and not info.issparse():
                content = tar.extractfile(info)
                assert content
                found.append((info.name, content.read()))
    return found


def _decoded(path: Path, folder: Path) -> Path:
    """Undo uuencode, in which libarchive keeps its files."""
    out, inside = bytearray(), False
    for line in path.read_bytes().splitlines():
        if line.startswith(b"begin "):
            inside = True
        elif line == b"end":
            inside = False
        elif inside and line:
            length = ((line[0] - 32) & 63) * 4 // 3 + 4  # some writers pad the lines
            out += binascii.a2b_uu(line[: length - length % 4 + 1])
    decoded = folder / path.stem
    decoded.write_bytes(out)
    return decoded


def check(folder: Path, seconds: float) -> Sequence[Outcome]:
    paths = sorted(p for p in folder.rglob("*") if p.name.endswith((".tar", ".tar.uu")))
    return list(outcomes("tests.corpora.tars:compare", paths, seconds))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--list", action="store_true", help="print the outcome of every tar")
    parser.add_argument("--seconds", type=float, default=60, help="time for a process of 64 files")
    options = parser.parse_args()
    found = check(options.folder, options.seconds)
    for path, word, remark in found:
        if word not in GOOD or options.list:
            print(f"{path.relative_to(options.folder)}: {word}: {remark}")
    show(found)
    return int(any(word not in GOOD for _, word, _ in found))


if __name__ == "__main__":
    raise SystemExit(main())
