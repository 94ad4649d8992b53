"""The target that needs torch, in a module of its own: the others start without it."""

import hashlib
from contextlib import suppress

from clipft.core.errors import ModelError
from clipft.runs.checkpoint import load_checkpoint
from clipft.runs.places import saved_settings
from tests.fuzz.targets import in_a_file
from tests.loaded_settings import loaded_settings


def checkpoint(data: bytes) -> None:
    """If the first byte is odd, add a correct checksum, so that the code behind it is reached."""
    body = data[1:]
    if data[:1] and data[0] % 2 and len(body) > 22:
        whole = body[:-2] + b"\0\0"
        body = body[:-2] + b"N\0clipft sha256 " + hashlib.sha256(whole).hexdigest().encode()
    with suppress(ModelError):
        content = load_checkpoint(in_a_file(body, "c.pt"))
        saved_settings(content, loaded_settings(), ())


TARGETS = {"checkpoint": checkpoint}
