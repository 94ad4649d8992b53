"""Which text a pair is trained with: a template over its ``.txt`` and ``.json``.

``{type}, {color}. {name}``   fields of the metadata; ``{size.width}`` reaches into objects
``{caption}``                 the ``.txt``
``{type}[ in {color}]``       a part in square brackets goes when a field in it is empty
``{title} || {caption}``      several captions: training draws one per epoch
``{{ }} [[ ]]``               these characters themselves

An empty field takes the punctuation around it along. A field that is a list is several
captions where it stands alone, else its values with commas.
"""

import re
from dataclasses import dataclass
from typing import Any

from clipft.core.errors import UsageError
from clipft.data.shards.dataset import parse_metadata


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


CAPTION_FIELD = "caption"
"""The ``.txt`` of the pair, unless the metadata has a field of that name alone."""

_EMPTY = "\0"
_SHOWN = (str, int, float)
_DASHES = "/|·&+\u2013\u2014-"
_SEPARATOR = rf"[\s,;:.!?{_DASHES}]"
_EMPTIED_BRACKETS = re.compile(
    rf"\((?:{_SEPARATOR}|{_EMPTY})*{_EMPTY}(?:{_SEPARATOR}|{_EMPTY})*\)|\"\s*{_EMPTY}\s*\""
)
_GAP = re.compile(rf"({_SEPARATOR}*){_EMPTY}(?:{_SEPARATOR}*{_EMPTY})*({_SEPARATOR}*)")
_STRENGTH = (".!?", ";:", ",", _DASHES)

_TOKEN = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{([^{}]*)\}|[{}\[\]]")


@dataclass(frozen=True)
class _Literal:
    text: str


@dataclass(frozen=True)
class _Field:
    path: tuple[str, ...]

    @property
    def name(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True)
class _Optional:
    parts: tuple["_Literal | _Field", ...]


_Part = _Literal | _Field | _Optional


@dataclass(frozen=True)
class CaptionTemplate:
    """A parsed template: its alternatives, each a sequence of parts."""

    source: str
    alternatives: tuple[tuple[_Part, ...], ...]

    @classmethod
    def parse(cls, source: str) -> "CaptionTemplate":
        """
        Raises:
            UsageError: brackets that do not match, or no text at all.
        """
        parts = [_parsed(text, source) for text in re.split(r"\s*\|\|\s*", source.strip())]
        if not all(parts):
            raise _wrong(source, "an empty caption")
        return cls(source, tuple(parts))

    @property
    def fields(self) -> list[str]:
        """Names of the metadata's fields that it takes."""
        flat = [field for parts in self.alternatives for field in _fields(parts)]
        return list(dict.fromkeys(f.name for f in flat if f.name != CAPTION_FIELD))

    def captions(self, caption: bytes, metadata: bytes) -> list[str]:
        """The texts of a pair, in the order of the alternatives, none twice.

        Raises:
            BadCaption: none has any text.
        """
        own = decode_text(caption)
        values = parse_metadata(metadata) if self.fields or not own else {}
        values[CAPTION_FIELD] = own or values.get(CAPTION_FIELD)
        texts = [text for parts in self.alternatives for text in _rendered(parts, values)]
        if not texts:
            raise BadCaption("empty caption")
        return list(dict.fromkeys(texts))


def _parsed(text: str, source: str) -> tuple[_Part, ...]:
    outer: list[_Part] = []
    inner: list[_Literal | _Field] | None = None
    at = 0
    for match in _TOKEN.finditer(text):
        into = outer if inner is None else inner
        into += [_Literal(text[at : match.start()])] if match.start() > at else []
        at, found = match.end(), match.group()
        if found in {"{{", "}}", "[[", "]]"}:
            into.append(_Literal(found[0]))
        elif match.group(1) is not None:
            into.append(_field(match.group(1), source))
        elif found == "[" and inner is None:
            inner = []
        elif found == "]" and inner:
            outer.append(_Optional(tuple(inner)))
            inner = None
        else:
            raise _wrong(source, f"a {found} that has no partner")
    if inner is not None:
        raise _wrong(source, "a [ that has no partner")
    if text[at:]:
        outer.append(_Literal(text[at:]))
    return tuple(outer)


def _field(name: str, source: str) -> _Field:
    path = tuple(part.strip() for part in name.split("."))
    if not all(path):
        raise _wrong(source, f"no name in {{{name}}}")
    return _Field(path)


def _wrong(source: str, what: str) -> UsageError:
    return UsageError(
        f"--caption {source!r}: {what}",
        'write fields of the metadata in braces: --caption "{type}, {color}. {name}"',
    )


def _fields(parts: tuple[_Part, ...]) -> list[_Field]:
    found: list[_Field] = []
    for part in parts:
        if isinstance(part, _Optional):
            found += _fields(part.parts)
        elif isinstance(part, _Field):
            found.append(part)
    return found


def _rendered(parts: tuple[_Part, ...], values: dict[str, Any]) -> list[str]:
    """The texts of one alternative; none where it has fields and all are empty."""
    if len(parts) == 1 and isinstance(parts[0], _Field):
        value = _reached(parts[0], values)
        texts = value if isinstance(value, list) else [value]
        return [text for text in map(_text, texts) if text]
    fields = _fields(parts)
    if fields and not any(_text(_reached(field, values)) for field in fields):
        return []
    text = clean_text(_without_gaps("".join(_piece(part, values) for part in parts)))
    return [text] if text else []


def _piece(part: _Part, values: dict[str, Any]) -> str:
    if isinstance(part, _Literal):
        return part.text
    if isinstance(part, _Field):
        return _text(_reached(part, values)) or _EMPTY
    pieces = [_piece(inner, values) for inner in part.parts]
    return "" if _EMPTY in pieces else "".join(pieces)


def _reached(field: _Field, values: dict[str, Any]) -> Any:
    value: Any = values
    for name in field.path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _text(value: Any) -> str:
    """A value as it stands in a caption; objects, switches and nothing are empty."""
    if isinstance(value, list):
        return ", ".join(text for text in map(_text, value) if text)
    if isinstance(value, bool) or not isinstance(value, _SHOWN):
        return ""
    return clean_text(f"{value:g}" if isinstance(value, float) else str(value))


def _without_gaps(text: str) -> str:
    """Take out the marks of empty fields, with the punctuation that only they needed."""
    before = None
    while before != text:
        before, text = text, _EMPTIED_BRACKETS.sub(_EMPTY, text)
    return _GAP.sub(_closed, text)


def _closed(gap: "re.Match[str]") -> str:
    left, right = gap.groups()
    opens = gap.start() == 0 or gap.string[gap.start() - 1] == "("
    closes = gap.end() == len(gap.string) or gap.string[gap.end()] == ")"
    if opens:
        return ""
    if closes:
        return next((mark for mark in right + left if mark in ".!?"), "")
    return min(right, left, key=_rank)


def _rank(separator: str) -> int:
    ranks = [rank for rank, marks in enumerate(_STRENGTH) if set(marks) & set(separator)]
    return min(ranks, default=len(_STRENGTH) + (not separator))


DEFAULT_TEMPLATE = CaptionTemplate.parse(f"{{{CAPTION_FIELD}}}")
