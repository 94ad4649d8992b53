"""The options of ``clipft pack``. This module has no heavy imports because ``--help`` needs it."""

from typing import Literal

from pydantic import field_validator

from clipft.config.fields import Section, Share, setting
from clipft.core.errors import did_you_mean
from clipft.core.part import ALL

# The default of --near: images whose hashes differ in at most this many bits are near-duplicates
NEAR_BITS = 4
# Common encodings of tables, for suggestions; all other encodings of Python work too
_ENCODINGS = ("utf-8", "utf-16", "cp1252", "cp1250", "cp1251", "latin-1", "gb18030", "shift_jis")


class PackOptions(Section):
    title = "Packing"
    val_share: float = setting(
        0.1,
        "Share of pairs for validation, if SRC has no validation pairs of its own.",
        metavar="X",
        ge=0,
        le=0.9,
    )
    test_share: float = setting(
        0.0,
        "Share of pairs for a test set, if SRC has none of its own. It is not used to train or to "
        "choose; evaluate reports it.",
        metavar="X",
        ge=0,
        le=0.9,
    )
    near: int = setting(
        NEAR_BITS,
        "Keep near-duplicate images in one split. Images are near-duplicates if their 64-bit "
        "perceptual hashes differ in at most this many bits. -1: do not compare images.",
        unit="bits",
        ge=-1,
        le=8,
    )
    group_field: str = setting(
        "",
        "Metadata field, such as a product id. Pairs with the same value stay in one split.",
        metavar="NAME",
    )
    label_field: str = setting(
        "",
        "Metadata field with the label of a pair. Each label is then divided among the splits in "
        "proportion, so equal captions can be in several splits. Default: equal captions stay in "
        "one split.",
        metavar="NAME",
    )
    size: int = setting(
        0,
        "Store images as JPEG with this length of the shorter side. 0: keep images as they are.",
        unit="px",
        ge=0,
    )
    quality: int = setting(92, "JPEG quality with --size.", ge=1, le=100)
    shard_pairs: int = setting(1000, "Pairs in a shard.", ge=1)
    shard_mb: int = setting(
        0,
        "Approximate size of a shard in MiB, whatever the number of pairs. 0: use --shard-pairs.",
        ge=0,
    )
    image_column: str = setting(
        "",
        "Column of the table with image paths or URLs. Default: guessed from the names.",
        metavar="NAME",
    )
    caption_column: str = setting(
        "",
        "Column of the table with captions; or several, with commas between them. Default: guessed "
        "from the names.",
        metavar="NAME",
    )
    caption_lines: Literal["separate", "joined"] = setting(
        "separate",
        "What the lines of a .txt file are. separate: each line is a caption of the image; joined: "
        "all lines together are one caption, which is stored on one line.",
    )
    follow_links: bool = setting(
        False,
        "Follow symbolic links out of SRC, as in the cache of the Hugging Face Hub.",
    )
    caption: str = setting(
        "",
        'Template of the captions, made from metadata fields: "{name}, {color}". Default: the '
        "caption column, or the .txt files.",
        metavar="TEMPLATE",
    )
    delimiter: str = setting(
        "",
        "Character between the cells of a table, such as ; or tab. Default: found in the first "
        "line.",
        metavar="CHAR",
    )
    encoding: str = setting(
        "",
        "Encoding of the table, or of the .txt and .json files, such as cp1252. A byte-order "
        "mark in a file takes precedence. Default: UTF-8.",
        metavar="NAME",
    )
    check: bool = setting(
        False, "Decode every image, not only its header. --near decodes them in any case."
    )
    overwrite: bool = setting(False, "Replace an earlier pack.")
    seed: int = setting(42, "Seed of the split and of the order.")
    part: Share = setting(
        ALL,
        "Write only the I-th of N parts of the shards, to share the work among N machines.",
        metavar="I/N",
    )
    processes: int = setting(0, "Processes that share the work. 0: one for each processor.", ge=0)

    @field_validator("delimiter")
    @classmethod
    def _parse_delimiter(cls, text: str) -> str:
        character = {"tab": "\t", "\\t": "\t"}.get(text, text)
        if len(character) > 1 or character in {'"', "\r", "\n"}:
            raise ValueError("is not one character: write for example ; or | or tab")
        return character

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, name: str) -> str:
        try:
            "".encode(name or "utf-8")  # LookupError also for codecs that are not of text
        except LookupError:
            meant = did_you_mean(name, _ENCODINGS) or "write for example utf-8, utf-16 or cp1252"
            raise ValueError(f"is not an encoding: {meant}") from None
        return name
