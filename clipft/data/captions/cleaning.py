"""Cleans captions as CLIP's own tokenizer does, so that a model reads what it was trained to read.

OpenAI's tokenizer, and open_clip's after it, repair text with ftfy, replace HTML entities twice and
put the text into lower case. The tokenizers of transformers leave that out.
"""

import html
import re
from functools import cache
from importlib.metadata import version
from typing import Any

from clipft.core.text import folded, visible

_TAG = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)


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
    fix_text, config = _ftfy()
    text = html.unescape(html.unescape(fix_text(text, config)))
    # Python's lower case, not the tokenizer's, which has no final sigma
    return " ".join(text.split()).lower()


def compared(caption: str) -> str:
    """Return the form in which captions of a catalogue are compared: as CLIP reads them, without
    case."""
    return folded(clean_like_clip(caption))


def has_html(text: str) -> bool:
    """Return whether a caption has HTML tags or entities."""
    entities = "&" in text and html.unescape(text) != text
    return entities or ("<" in text and bool(_TAG.search(text)))


def has_broken_characters(text: str) -> bool:
    """Return whether the encoding of a caption was mistaken somewhere on its way.

    Signs are sequences such as ``Ã¼``, replacement characters, and control characters.
    """
    if text.isascii() and text.isprintable():
        return False
    from ftfy import fix_encoding

    return visible(text) != text or "\ufffd" in text or fix_encoding(text) != text


@cache
def _ftfy() -> tuple[Any, Any]:
    from ftfy import TextFixerConfig, fix_text

    return fix_text, TextFixerConfig(explain=False)
