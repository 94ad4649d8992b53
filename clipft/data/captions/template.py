"""Caption templates: which text a pair is trained with, made from its ``.txt`` and ``.json``.

``{type}, {color}. {name}``   fields of the metadata; ``{size.width}`` reaches into objects
``{caption}``                 the ``.txt``
``{type}[ in {color}]``       the part in square brackets is dropped if a field in it is empty
``{title} || {caption}``      several captions: training draws one in each epoch
``{{ }} [[ ]]``               these characters themselves

The punctuation around an empty field is removed with it. A field that holds a list gives several
captions if it is the whole template, and otherwise its values separated by commas. ``{caption}``
always gives as many captions as the pair has, whatever text is around it.
"""

import json
import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from clipft.config.prompts import prompt_templates
from clipft.config.settings import Settings
from clipft.core.errors import UsageError
from clipft.core.text import NotText, decode
from clipft.data.captions.fields import field_value
from clipft.data.captions.lines import Lines, split_lines
from clipft.data.shards.metadata import parse_metadata

CAPTION_FIELD = "caption"
"""Means the ``.txt`` of a pair, or the metadata's field of this name if there is no ``.txt``."""

_EMPTY = "\0"  # marks the place of an empty field until its punctuation is removed
_DASHES = "/|·&+\u2013\u2014-"
_SEPARATOR = rf"[\s,;:.!?{_DASHES}]"
_EMPTY_BRACKETS = re.compile(
    rf"\((?:{_SEPARATOR}|{_EMPTY})*{_EMPTY}(?:{_SEPARATOR}|{_EMPTY})*\)|\"\s*{_EMPTY}\s*\""
)
_GAP = re.compile(rf"({_SEPARATOR}*){_EMPTY}(?:{_SEPARATOR}*{_EMPTY})*({_SEPARATOR}*)")
_BY_STRENGTH = (".!?", ";:", ",", _DASHES)
_TOKEN = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{([^{}]*)\}|[{}\[\]]")


class BadCaption(Exception):
    """A pair has no text to be trained with; the message says why the pair is skipped."""


_SPACES = re.compile("[\t-\r ]+")


def clean_caption(data: bytes) -> str:
    """Decode one caption.

    Raises:
        BadCaption: It is not text, or no text is left.
    """
    try:
        text = clean_text(decode(data))
    except NotText as error:
        raise BadCaption(f"the caption is {error}") from error
    if not text:
        raise BadCaption("empty caption")
    return text


def split_captions(data: bytes, lines: Lines = "separate") -> list[str]:
    """Decode the captions of a ``.txt``, as ``clean_text`` returns them; none is empty.

    Raises:
        BadCaption: It is not text.
    """
    try:
        texts = split_lines(decode(data), lines)
    except NotText as error:
        raise BadCaption(f"the caption is {error}") from error
    return [text for text in map(clean_text, texts) if text]


def clean_text(text: str) -> str:
    """Remove a byte-order mark and NULs, and turn each run of white space into one space.

    Only white space of ASCII counts, except for a text that has nothing else. The other kinds can
    be part of a letter in a text whose encoding was mistaken, which the tokenizer repairs.
    """
    bare = text.removeprefix("\ufeff").replace("\x00", "")
    joined = _SPACES.sub(" ", bare).strip(" ")
    return "" if joined.isspace() else joined


class _Field(NamedTuple):
    name: str

    def value(self, metadata: dict[str, Any]) -> Any:
        return field_value(metadata, self.name)


class _Optional(NamedTuple):
    """A part in square brackets."""

    parts: tuple["str | _Field", ...]


@dataclass(frozen=True)
class _Alternative:
    """One of the captions of a template: its parts in order, and all fields in them."""

    parts: tuple[str | _Field | _Optional, ...]
    fields: tuple[_Field, ...]

    @classmethod
    def parse(cls, text: str) -> "_Alternative":
        """Parse one caption of a template.

        Raises:
            ValueError: Brackets do not match, or the caption is empty; the message says which.
        """
        outer: list[str | _Field | _Optional] = []
        inner: list[str | _Field] | None = None  # the parts of an open square bracket
        fields: list[_Field] = []
        at = 0
        for match in _TOKEN.finditer(text):
            into = outer if inner is None else inner
            into += [text[at : match.start()]] if match.start() > at else []
            at, found = match.end(), match.group()
            if found in {"{{", "}}", "[[", "]]"}:
                into.append(found[0])
            elif match.group(1) is not None:
                parts = [part.strip() for part in match.group(1).split(".")]
                if not all(parts):
                    raise ValueError(f"{found} does not name a field")
                fields.append(_Field(".".join(parts)))
                into.append(fields[-1])
            elif found == "[" and inner is None:
                inner = []
            elif found == "]" and inner:
                outer.append(_Optional(tuple(inner)))
                inner = None
            else:
                raise ValueError(f"{found} has no matching bracket")
        if inner is not None:
            raise ValueError("[ has no matching bracket")
        outer += [text[at:]] if text[at:] else []
        if not outer:
            raise ValueError("one of the captions is empty")
        return cls(tuple(outer), tuple(fields))

    def texts(self, metadata: dict[str, Any]) -> list[str]:
        """Fill in the fields: one text or several, or none if all fields are empty."""
        if len(self.parts) == 1 and isinstance(self.parts[0], _Field):
            value = self.parts[0].value(metadata)
            texts = map(_as_text, value if isinstance(value, list) else [value])
            return [text for text in texts if text]
        several = metadata.get(CAPTION_FIELD)
        if _Field(CAPTION_FIELD) in self.fields and isinstance(several, list):
            each = ({**metadata, CAPTION_FIELD: text} for text in several or [""])
            return [text for values in each for text in self._filled(values)]
        return self._filled(metadata)

    def _filled(self, metadata: dict[str, Any]) -> list[str]:
        """Fill in the fields: one text, or none if all fields are empty."""
        filled = {field: _as_text(field.value(metadata)) or _EMPTY for field in self.fields}
        if filled and set(filled.values()) == {_EMPTY}:
            return []
        pieces = list[str]()
        for part in self.parts:
            if isinstance(part, _Optional):
                inner = [p if isinstance(p, str) else filled[p] for p in part.parts]
                pieces += [] if _EMPTY in inner else inner
            else:
                pieces.append(part if isinstance(part, str) else filled[part])
        text, before = "".join(pieces), None
        while before != text:  # removing empty brackets may leave others empty
            before, text = text, _EMPTY_BRACKETS.sub(_EMPTY, text)
        text = clean_text(_GAP.sub(_closed_gap, text))
        return [text] if text else []


def _part_as_text(part: str | _Field | _Optional) -> str:
    if isinstance(part, _Optional):
        return f"[{''.join(map(_part_as_text, part.parts))}]"
    return f"{{{part.name}}}" if isinstance(part, _Field) else part


def _as_text(value: Any) -> str:
    """A value of the metadata as it appears in a caption; "" for objects, booleans and null."""
    if isinstance(value, list):
        return ", ".join(text for text in map(_as_text, value) if text)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    return clean_text(f"{value:g}" if isinstance(value, float) else str(value))


def _listed(metadata: bytes) -> list[Any]:
    """Return the captions of a ``.json`` that is a list instead of an object."""
    try:
        value = json.loads(decode(metadata) or "[]")
    except (ValueError, RecursionError):
        return []
    found = value if isinstance(value, list) else []
    return [item.get(CAPTION_FIELD) if isinstance(item, dict) else item for item in found]


def _closed_gap(gap: "re.Match[str]") -> str:
    """Return the text that replaces an empty field and the separators on both sides of it."""
    left, right = gap.groups()
    if gap.start() == 0 or gap.string[gap.start() - 1] == "(":
        return ""
    if gap.end() == len(gap.string) or gap.string[gap.end()] == ")":
        return next((mark for mark in right + left if mark in ".!?"), "")

    # Keep the stronger of the two separators, the right one if both are equally strong
    for marks in _BY_STRENGTH:
        for separator in (right, left):
            if set(marks) & set(separator):
                return separator
    return right or left


@dataclass(frozen=True)
class CaptionTemplate:
    """A parsed template; ``lines`` says what the lines of a ``.txt`` are.

    With ``only_first``, only the first alternative that gives a pair any captions is used. With
    ``weights``, one for each alternative, captions are drawn in proportion to them; otherwise all
    captions of a pair are equally likely. ``option`` is how the user gave the template.
    """

    source: str
    alternatives: tuple[_Alternative, ...]
    lines: Lines = "separate"
    only_first: bool = False
    weights: tuple[float, ...] | None = None
    option: str = "--caption"

    @classmethod
    def of(cls, settings: Settings) -> "CaptionTemplate":
        """Return the template that settings describe, by ``caption``, ``fields`` or
        ``label_prompts``.

        Raises:
            UsageError: As for ``parse`` and ``prompt_templates``, or several of them are given.
        """
        standard = settings.caption == DEFAULT_TEMPLATE.source
        given = {"--caption": not standard, "--fields": bool(settings.fields)}
        given["--label-prompts"] = bool(settings.label_prompts)
        options = [option for option, there in given.items() if there]
        if len(options) > 1:
            raise UsageError(
                f"{' and '.join(options)} cannot be used together",
                "each of them says which texts a pair is trained with: choose one",
            )
        if settings.label_prompts:
            return cls._of_labels(settings)
        weighted = settings.weighted_fields
        if not weighted:
            return cls.parse(settings.caption, settings.caption_lines)
        fields = tuple(_Alternative((_Field(name),), (_Field(name),)) for name in weighted)
        weights = tuple(weighted.values())
        return cls(settings.fields, fields, settings.caption_lines, False, weights, "--fields")

    @classmethod
    def parse(cls, source: str, lines: Lines = "separate") -> "CaptionTemplate":
        """Parse the values of ``--caption`` and ``--caption-lines``.

        Raises:
            UsageError: Brackets do not match, or one of the captions is empty.
        """
        try:
            parsed = [_Alternative.parse(text) for text in re.split(r"\s*\|\|\s*", source.strip())]
        except ValueError as error:
            raise UsageError(
                f"--caption {source!r}: {error}",
                'write fields of the metadata in braces: --caption "{type}, {color}. {name}"',
            ) from error
        return cls(source, tuple(parsed), lines)

    @classmethod
    def _of_labels(cls, settings: Settings) -> "CaptionTemplate":
        field = _Field(settings.label_field)
        prompts = list[_Alternative]()
        for prompt in prompt_templates("--label-prompts", settings.label_prompts):
            parts = [part for text in prompt.split("{}") for part in (text, field)][:-1]
            prompts.append(_Alternative(tuple(filter(None, parts)), (field,)))
        source, lines = settings.label_prompts, settings.caption_lines
        return cls(source, tuple(prompts), lines, option="--label-prompts")

    @property
    def state(self) -> str:
        """Everything that the captions depend on, as text."""
        parts = [self.source, self.lines, str(self.only_first)]
        if self.option != "--caption":  # the source alone names no field, and no set of prompts
            parts += [str(self.alternatives), str(self.weights)]
        return "\n".join(parts)

    def for_evaluation(self) -> "CaptionTemplate":
        """Return the template without the alternatives that only add variety to the training."""
        return replace(self, only_first=True)

    @property
    def first(self) -> str:
        """The first alternative as text, which is what an evaluation measures."""
        parts = self.alternatives[0].parts
        return "".join(map(_part_as_text, parts))

    @property
    def fields(self) -> list[str]:
        """The names of the metadata's fields in the template, without ``{caption}``."""
        flat = (f.name for part in self.alternatives for f in part.fields)
        return list(dict.fromkeys(name for name in flat if name != CAPTION_FIELD))

    def captions(self, caption: bytes, metadata: bytes) -> list[str]:
        """Return the different texts of a pair in the order of the template.

        Raises:
            BadCaption: There is no text.
        """
        return list(self.weighted_captions(caption, metadata))

    def weighted_captions(self, caption: bytes, metadata: bytes) -> dict[str, float]:
        """Return the different texts of a pair, each with its weight.

        A weight is 1, or the text's share of the weight of its alternative.

        Raises:
            BadCaption: There is no text.
        """
        own = self._own_texts(caption)
        values = parse_metadata(metadata) if self.fields or not own else {}
        if len(own) == 1:
            values[CAPTION_FIELD] = own[0]
        elif own:
            values[CAPTION_FIELD] = own
        elif not values:
            values[CAPTION_FIELD] = _listed(metadata)
        found: dict[str, float] = {}
        for nth, alternative in enumerate(self.alternatives):
            texts = alternative.texts(values)
            for text in texts:
                share = self.weights[nth] / len(texts) if self.weights else 0.0
                found[text] = found.get(text, 0.0) + share if self.weights else 1.0
            if found and self.only_first:
                break
        if not found:
            raise BadCaption("empty caption")
        return found

    def _own_texts(self, caption: bytes) -> list[str]:
        """Decode the ``.txt``.

        Raises:
            BadCaption: The template uses the ``.txt``, which is not text.
        """
        try:
            return split_captions(caption, self.lines)
        except BadCaption:
            if any(f.name == CAPTION_FIELD for part in self.alternatives for f in part.fields):
                raise
            return []


DEFAULT_TEMPLATE = CaptionTemplate.parse(f"{{{CAPTION_FIELD}}}")
