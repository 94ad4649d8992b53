"""Bytes of a caption file -> text."""


class BadCaption(Exception):
    """The caption holds no text; the message says why."""


def clean_caption(data: bytes) -> str:
    """The text of one caption.

    Raises:
        BadCaption: nothing is left.
    """
    text = decode_text(data)
    if not text:
        raise BadCaption("empty caption")
    return text


def decode_text(data: bytes) -> str:
    """Tidied text; bytes that are not UTF-8 become replacement characters."""
    return clean_text(data.decode("utf-8", errors="replace"))


def clean_text(text: str) -> str:
    """Without byte-order mark, NULs and runs of white space.

    ``<|`` is broken up, so no caption can hold a special token: an ``<|endoftext|>`` inside
    would end the text for the model.
    """
    bare = text.removeprefix("\ufeff").replace("\x00", " ").replace("<|", "< |")
    return " ".join(bare.split())
