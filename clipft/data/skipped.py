"""Pairs that cannot be used, and why.

These are the reasons for which a run skips a pair, and the files that decide them:

====================================== ==================================== =====================
Reason                                 When                                 Where
====================================== ==================================== =====================
no image, no caption                   a shard is opened                    ``shards/index.py``
a second image, caption or metadata    a shard is opened                    ``shards/index.py``
not a regular file                     a shard is opened                    ``shards/index.py``
empty caption, the caption is not      the pair is read                     ``captions/template.py``
UTF-8 text                                                                  ``captions/table.py``
not an image, an empty file, too many  the image is decoded                 ``images/decode.py``
pixels, truncated, an unusual format                                        ``images/formats.py``
====================================== ==================================== =====================

``shards/index.py`` records its reasons in ``Shard.skipped``. The other two raise ``BadCaption`` and
``BadImage``, which ``decoding.py`` turns into a ``Skipped`` in the batch. A run appends them all to
``skipped.jsonl`` and stops if they are more than ``--max-bad`` (``SkippedPairs`` in
``training/state.py``). ``clipft pack`` skips files before they become pairs, and writes a
``skipped.jsonl`` of its own into the catalogue (``packing/scan.py``).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Skipped:
    """A pair or a member of a shard that cannot be used. ``reason`` says why, for messages."""

    shard: str
    key: str
    reason: str
