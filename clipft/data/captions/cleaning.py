"""Cleans captions as CLIP's own tokenizer does, so that a model reads what it was trained to read.

OpenAI's tokenizer, and open_clip's after it, repair text with ftfy, replace HTML entities twice and
put the text into lower case. The tokenizers of transformers leave that out.
"""

import html
import re
import unicodedata
from functools import cache
from importlib.metadata import version
from typing import Any

from clipft.core.text import folded, visible

_TAG = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)

# Characters that ftfy leaves alone, unless they are signs of a mistaken encoding: ASCII without &,
# Latin letters, Greek, Cyrillic, kana, Chinese characters with their punctuation, and two dashes
_ORDINARY = re.compile(
    "[ -%'-~\xa1-\xac\xae-\u0131\u0134-\u0148\u014a-\u017e\u0391-\u03c9\u0400-\u045f"
    "\u3001-\u3011\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\u2013\u2014]*"
)


def clip_rule() -> str:
    """Return a text that changes when ``clean_like_clip`` may give other results."""
    return f"clip 1, ftfy {version('ftfy')}"


def clean_like_clip(text: str) -> str:
    """Return the text that CLIP's tokenizer splits into tokens.

    Broken encodings are repaired, HTML entities replaced, ligatures, full-width letters and curly
    quotes turned into plain ones, control characters removed, and spaces joined. HTML tags stay.
    Printable ASCII without ``&`` is returned as it is: the tokenizer itself lowers its case, and
    nothing else would change.
    """
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    ordinary = _ORDINARY.fullmatch(text) and unicodedata.is_normalized("NFC", text)
    fix_text, config, is_bad = _ftfy()
    if not ordinary or is_bad(text):  # ftfy makes the same check first, but ten times as slowly
        text = html.unescape(html.unescape(fix_text(text, config)))
    # Python's lower case, not the tokenizer's, which has no final sigma
    return " ".join(text.split()).lower()


def compared(caption: str) -> str:
    """Return a caption as it is compared with others: as CLIP reads it, ignoring case."""
    return folded(clean_like_clip(caption))


def has_html(text: str) -> bool:
    """Return whether a caption has HTML tags or entities."""
    entities = "&" in text and html.unescape(text) != text
    return entities or ("<" in text and bool(_TAG.search(text)))


def has_broken_characters(text: str) -> bool:
    """Return whether a caption was once decoded with the wrong encoding.

    The signs are sequences such as ``Ã¼``, replacement characters, and control characters.
    """
    if text.isascii() and text.isprintable():
        return False
    from ftfy import fix_encoding

    return visible(text) != text or "\ufffd" in text or fix_encoding(text) != text


@cache
def _ftfy() -> tuple[Any, Any, Any]:
    from ftfy import TextFixerConfig, fix_text
    from ftfy.badness import is_bad

    return fix_text, TextFixerConfig(explain=False), is_bad
