"""Text that users bring: how bytes become text, when two texts are the same, how text is shown.

Every caption, metadata file, table, settings file and list of labels is decoded here, by one rule:
a byte-order mark names the encoding (UTF-8, UTF-16 or UTF-32) and is not part of the text; without
one, the text is in the encoding that the user named, or else in UTF-8. Bytes that do not fit are
refused. A guess would turn some texts into others without telling anyone.
"""

import codecs
import unicodedata
from pathlib import Path

_MARKS = (  # that of UTF-32 first: it begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_FIRST_BYTES = frozenset(mark[0] for mark, _ in _MARKS)

# One character for one, so that columns stay aligned and styles stay in their places
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_VISIBLE[0x7F] = 0x2421
# C1 controls (some terminals read U+009B as the start of an escape) and bidirectional controls,
# which reorder what stands beside them
_HIDDEN = (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_VISIBLE |= dict.fromkeys(_HIDDEN, 0xFFFD)
_VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)  # a byte of a name that is not UTF-8


class NotText(ValueError):
    """Bytes that are not text in the expected encoding; the message says which that was."""


def marked_encoding(data: bytes) -> tuple[str, int] | None:
    """Return the encoding that a byte-order mark at the start of ``data`` names, and the length of
    the mark in bytes; None if there is no mark."""
    if data[:1] and data[0] in _FIRST_BYTES:
        for mark, encoding in _MARKS:
            if data.startswith(mark):
                return encoding, len(mark)
    return None


def decode(data: bytes, encoding: str | None = None) -> str:
    """Decode text by its byte-order mark, or else from ``encoding``; None means UTF-8.

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
    """Return UTF-8, or UTF-16 if every other byte of the first ones is NUL.

    Some programs write UTF-16 without a mark. Read as UTF-8, it would be text with NULs.
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
        NotText: It is not text in UTF-8 and has no byte-order mark.
        OSError: It cannot be read.
    """
    return decode(path.read_bytes())


def folded(text: str) -> str:
    """Return the form in which names and captions are compared.

    Upper and lower case, composed and decomposed letters, and the kind and number of spaces do not
    matter.
    """
    if not text.isascii():
        # Twice, because folding can leave letters decomposed
        text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
        return " ".join(text.split())
    return " ".join(text.casefold().split())


def is_unicode(name: object) -> bool:
    """Return False for a path with bytes that are not UTF-8, which no settings file can hold."""
    try:
        str(name).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def visible(text: str) -> str:
    """Replace what a terminal would obey rather than show: escapes and other control characters.

    Tabs and line feeds stay. The result has as many characters as ``text``.
    """
    if text.isascii() and text.isprintable():
        return text
    return text.translate(_VISIBLE)
