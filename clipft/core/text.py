"""Decodes, compares and displays the users' texts.

Every caption, metadata file, table, settings file and list of labels is decoded here, by one rule:
a byte-order mark gives the encoding (UTF-8, UTF-16 or UTF-32) and is not part of the text. Without
a mark, the encoding is the one that the user set, or else UTF-8, or UTF-16 if many bytes are NUL.
Invalid bytes are an error, because guessing other encodings could silently change texts.
"""

import codecs
import unicodedata
from pathlib import Path

_MARKS = (  # UTF-32 comes first, because its mark begins with the mark of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_FIRST_BYTES = frozenset(mark[0] for mark, _ in _MARKS)

# Each character becomes one character, so that columns and styles keep their places
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_VISIBLE[0x7F] = 0x2421
# C1 controls (some terminals read U+009B as the start of an escape) and bidirectional controls,
# which reorder the text beside them
_HIDDEN = (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_VISIBLE |= dict.fromkeys(_HIDDEN, 0xFFFD)
_VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)  # bytes of names that are not UTF-8


class NotText(ValueError):
    """Bytes are not text in the expected encoding, which the message contains."""


def marked_encoding(data: bytes) -> tuple[str, int] | None:
    """Return the encoding of the byte-order mark at the start of ``data``, and the length of the
    mark in bytes; None if there is no mark."""
    if data[:1] and data[0] in _FIRST_BYTES:
        for mark, encoding in _MARKS:
            if data.startswith(mark):
                return encoding, len(mark)
    return None


def decode(data: bytes, encoding: str | None = None) -> str:
    """Decode text by its byte-order mark, or else from ``encoding``, or by ``unmarked_encoding``.

    Raises:
        NotText: The bytes do not fit the encoding.
    """
    marked = marked_encoding(data)
    name, start = marked or (encoding or unmarked_encoding(data), 0)
    try:
        return data[start:].decode(name)
    except UnicodeError as error:
        raise NotText(f"not {name.upper()} text") from error


def unmarked_encoding(data: bytes) -> str:
    """Return the encoding of text without a mark: UTF-16 if at its start more than half of the
    bytes at even places, or at odd places, are NUL, and none of the others; else UTF-8.

    Some programs write UTF-16 without a mark. Decoded as UTF-8, it would be text with NULs.
    """
    start = data[:64]
    if b"\0" in start and len(data) % 2 == 0:
        low, high = start[::2].count(0), start[1::2].count(0)
        if not low and 2 * high > len(start) // 2:
            return "utf-16-le"
        if not high and 2 * low > len(start) // 2:
            return "utf-16-be"
    return "utf-8"


def read_text(path: Path) -> str:
    """Read a text file; see ``decode``.

    Raises:
        NotText: The bytes do not fit the encoding.
        OSError: The file cannot be read.
    """
    return decode(path.read_bytes())


def folded(text: str) -> str:
    """Return the form of a name or caption that is used in comparisons.

    It ignores upper and lower case, composed and decomposed letters, and the kind and number of
    spaces.
    """
    if not text.isascii():
        # Twice, because folding can leave letters decomposed
        text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
        return " ".join(text.split())
    return " ".join(text.casefold().split())


def is_unicode(name: object) -> bool:
    """Return False for a path with bytes that are not UTF-8. A settings file cannot contain it."""
    try:
        str(name).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def visible(text: str) -> str:
    """Replace escapes and other control characters, which a terminal would act on.

    Tabs and line feeds are kept. The result has as many characters as ``text``.
    """
    if text.isascii() and text.isprintable():
        return text
    return text.translate(_VISIBLE)
