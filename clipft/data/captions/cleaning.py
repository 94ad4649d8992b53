"""Cleans captions as CLIP's own tokenizer does, so that a model reads what it was trained to read.

OpenAI's tokenizer, and open_clip's after it, repair text with ftfy, replace HTML entities twice and
put the text into lower case. The tokenizers of transformers leave that out.
"""

import html
from functools import cache
from importlib.metadata import version
from typing import Any


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


@cache
def _ftfy() -> tuple[Any, Any]:
    from ftfy import TextFixerConfig, fix_text

    return fix_text, TextFixerConfig(explain=False)
