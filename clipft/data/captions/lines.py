"""The rule for several captions: each line of a ``.txt`` that is not empty is a caption.

Lists of captions, as tables and annotation files have them, are stored as such lines.
"""

import re
from collections.abc import Iterable
from typing import Literal

Lines = Literal["separate", "joined"]
"""What the lines of a ``.txt`` are: captions of their own, or one caption together."""

# ASCII alone: a U+0085 can be part of a letter in a text whose encoding was mistaken
_SPACES = "\t\n\v\f\r "
_LINE_BREAKS = re.compile(rf"[{_SPACES}]*[\r\n][{_SPACES}]*")


def split_lines(text: str, lines: Lines = "separate") -> list[str]:
    """Split the content of a ``.txt`` into its captions, without blank lines."""
    text = text.strip(_SPACES)
    if "\n" not in text and "\r" not in text:  # nearly all captions
        return [text] if text else []
    return _LINE_BREAKS.split(text) if lines == "separate" else [fold_lines(text)]


def fold_lines(text: str) -> str:
    """Turn line breaks, and the white space around them, into single spaces."""
    return _LINE_BREAKS.sub(" ", text.strip(_SPACES))


def join_lines(captions: Iterable[str]) -> bytes:
    """Return the ``.txt`` of a pair with these captions, each on a line of its own.

    Lone surrogates, which JSON may hold, become question marks.
    """
    folded = filter(None, map(fold_lines, captions))
    return "\n".join(folded).encode("utf-8", "replace")
