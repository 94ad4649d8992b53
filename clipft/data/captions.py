"""Bytes of a caption file -> text."""


class BadCaption(Exception):
    """The caption holds no text; the message says why."""


def clean_caption(data: bytes) -> str:
    """Decode and tidy one caption; bytes that are not UTF-8 become replacement characters.

    Raises:
        BadCaption: nothing is left.
    """
    text = clean_text(data.decode("utf-8", errors="replace"))
    if not text:
        raise BadCaption("empty caption")
    return text


def clean_text(text: str) -> str:
    """Without byte-order mark, NULs and runs of white space.

    ``<|`` is broken up, so no caption can hold a special token: an ``<|endoftext|>`` inside
    would end the text for the model.
    """
    bare = text.removeprefix("\ufeff").replace("\x00", " ").replace("<|", "< |")
    return " ".join(bare.split())
