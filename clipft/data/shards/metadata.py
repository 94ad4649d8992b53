"""Parses the metadata of a pair: the ``.json`` beside its image."""

import json
from typing import Any

from clipft.core.text import NotText, decode


def parse_metadata(data: bytes) -> dict[str, Any]:
    """Parse the ``.json`` of a pair; empty if it is not a JSON object."""
    try:
        return read_metadata(data)
    except ValueError:
        return {}


def metadata_fault(data: bytes) -> str:
    """Return why the ``.json`` of a pair cannot be used, or "" if it can."""
    try:
        read_metadata(data)
    except ValueError as error:
        return f"the metadata is {error}"
    return ""


def read_metadata(data: bytes) -> dict[str, Any]:
    """Parse the ``.json`` of a pair; empty if there is none, or if it is not an object.

    Raises:
        ValueError: It is not JSON. The message completes "the metadata is".
    """
    if not data:
        return {}
    try:
        value = json.loads(decode(data))
    except NotText:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    return value if isinstance(value, dict) else {}
