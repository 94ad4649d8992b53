"""Where the pairs come from, and how they are read."""

import math
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from clipft.config.fields import Section, names_in, setting
from clipft.core.common import processors

MOST_WORKERS = 12
"""The most workers that are started unless the user sets a number. Each of them takes memory."""


def _weighted(part: str) -> tuple[str, float]:
    """Split ``name:0.5``; without a number after the last colon, the weight is 1, and a weight of
    0 stands for one that is not a number."""
    name, colon, weight = part.rpartition(":")
    if not colon:
        return part, 1.0
    try:
        return name.strip(), float(weight)
    except ValueError:
        return name.strip(), 0.0


class StorageSettings(Section):
    title = "Storage"
    data_dir: Path = setting(
        Path("/tmp/furniture_data"),  # noqa: S108 (only read from, and the user's to set)
        "Folder of the shards (train/*.tar and val/*.tar), or s3://bucket/prefix.",
    )
    s3_bucket: str | None = setting(None, "S3 bucket to sync from. Default: use data_dir as it is.")
    s3_prefix: str = setting("data/train", "Prefix of the training pairs in the bucket.")
    s3_val_prefix: str = setting("data/val", "Prefix of the validation pairs in the bucket.")
    s3_test_prefix: str = setting("data/test", "Prefix of the test pairs, if there are any.")
    endpoint_url: str | None = setting(None, "URL of an S3-compatible server. Default: Amazon S3.")
    s3_region: str | None = setting(
        None, "Region of the bucket. Default: the one boto3 is configured with."
    )
    s3_profile: str | None = setting(
        None, "Profile of the AWS configuration. Default: the one boto3 is configured with."
    )
    s3_anonymous: bool = setting(False, "Send requests without credentials, for public buckets.")
    s3_addressing: Literal["auto", "path", "virtual"] = setting(
        "auto",
        "Where a URL names the bucket. path: in the path; virtual: in the host name; auto: in the "
        "path with --endpoint-url, otherwise as boto3 chooses.",
    )
    s3_requests: int = setting(
        16, "Maximum number of concurrent requests.", unit="requests", ge=1, le=256
    )
    s3_retry_timeout: float = setting(
        600,
        "How long to retry when the server or the network fails, in seconds.",
        unit="seconds",
        formerly="s3_patience",
        ge=0,
    )
    pack: bool = setting(
        True, "Pack raw files into shards after a sync, unless the same files are packed already."
    )
    enable_s3_checkpoints: bool = setting(False, "Upload each saved checkpoint to the bucket.")
    s3_checkpoint_prefix: str = setting("checkpoints", "Prefix of the checkpoints in the bucket.")
    keep_s3_checkpoints: int = setting(
        3,
        "How many checkpoints of a run to keep in the bucket, in addition to the best one.",
        unit="checkpoints",
        ge=1,
    )

    @field_validator("endpoint_url")
    @classmethod
    def _without_secrets(cls, value: str | None) -> str | None:
        if value and "@" in value.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "must not contain a user name or a password, because settings are saved with the "
                "run; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use --s3-profile"
            )
        return value


class DataSettings(Section):
    title = "Data"
    caption: str = setting(
        "{caption}",
        "Template of a pair's text. {caption} is the content of its .txt file; other names are "
        "fields of its .json file, as in '{type}, {color}. {name}'. Separate alternatives with "
        "||: each epoch draws one of them.",
        "fixed",
    )
    fields: str = setting(
        "",
        "Metadata fields to train on instead of --caption, each with a weight, as in "
        "name:1,description:0.5. Each epoch draws the caption of a pair from one of its fields, in "
        "proportion to the weights. An evaluation uses the first of them that a pair has.",
        "fixed",
        metavar="NAME:WEIGHT,...",
    )
    label_prompts: str = setting(
        "",
        "Train on the labels in label_field instead of captions: prompts with {} in place of the "
        "label, separated by ||, or a file with one per line, or general or furniture. Each epoch "
        "draws one. If not set otherwise, --positives is label and --stop-on is accuracy.",
        "fixed",
        metavar="PROMPTS|FILE",
    )
    shots: int = setting(
        0,
        "Train on this many pairs of each label in label_field, chosen by the seed. 0: on all.",
        "fixed",
        unit="pairs",
        ge=0,
    )
    caption_lines: Literal["separate", "joined"] = setting(
        "separate",
        "What the lines of a .txt file are. separate: each line is a caption of the image, and "
        "each epoch draws one; joined: all lines together are one caption.",
        "fixed",
    )
    group_field: str | None = setting(
        None,
        "Metadata field that identifies pairs of the same thing, such as a product id. Used in "
        "evaluation, and in training with --positives group, --photo-pairs and "
        "--hard-negatives.",
        "fixed",
    )
    augmentation: Literal["none", "simple", "advanced"] = setting(
        "simple",
        "Augmentation of training images. none: only the model's own preprocessing; simple: flip "
        "and padded random crop; advanced: TrivialAugmentWide and random erasing (0.2).",
        "fixed",
    )
    augment_on: Literal["auto", "device", "worker"] = setting(
        "auto",
        "Where the flip and the crop of --augmentation simple are computed: worker or device, with "
        "the same pixels. auto: device on a CUDA GPU, otherwise worker. The other augmentations "
        "are always computed by the workers.",
    )
    stream: bool = setting(
        False, "Read the training shards sequentially, for slow disks and network folders.", "fixed"
    )
    shuffle_buffer: int = setting(
        4096, "Number of pairs to shuffle at a time with --stream.", "fixed", unit="pairs", ge=1
    )
    feature_cache: bool = setting(
        True,
        "Cache on disk outputs of frozen encoders for inputs that are the same in every epoch.",
    )
    cache_limit: float | None = setting(
        None,
        "Largest size of the computed data in the cache, in GiB. When a command ends, the least "
        "recently used are removed. Default: no limit; see `clipft cache`.",
        unit="GiB",
        ge=0,
    )
    num_workers: int | None = setting(
        None,
        "Number of processes that decode images, for each process that trains. 0: decode in the "
        "main process. Default: one less than the processors available to it, but from 2 to "
        f"{MOST_WORKERS}.",
        unit="processes",
        ge=0,
    )
    worker_timeout: float = setting(
        300,
        "How long to wait for a batch before a decoding process is considered hung, in seconds. "
        "0: wait forever.",
        unit="seconds",
        ge=0,
    )
    max_train_pairs: int = setting(
        0,
        "Train on at most this many pairs, starting from the first. 0: all.",
        "fixed",
        unit="pairs",
        ge=0,
    )
    max_val_pairs: int = setting(
        0,
        "Validate on at most this many pairs, starting from the first. 0: all.",
        "fixed",
        unit="pairs",
        ge=0,
    )
    max_bad: float = setting(
        0.01,
        "Largest share of unreadable pairs that a run tolerates before it stops.",
        unit="share",
        ge=0,
        le=1,
    )

    @field_validator("fields")
    @classmethod
    def _weighted_fields(cls, value: str) -> str:
        for part in names_in(value):
            name, weight = _weighted(part)
            if not name or not 0 < weight < math.inf:
                raise ValueError(
                    f"{part!r} is not a field and a weight above 0; write it as name:1"
                )
        return value

    @property
    def weighted_fields(self) -> dict[str, float]:
        """The fields that captions are drawn from, with their weights; empty without ``fields``."""
        return dict(map(_weighted, names_in(self.fields)))

    def workers(self, sharers: int = 1) -> int:
        """The number of workers, where ``sharers`` processes share the processors.

        On a GPU the process that trains keeps a processor busy. On two processors both workers pay
        off, as decoding then takes longer than all else.
        """
        own = max(1, processors() // sharers)
        asked = self.num_workers
        return min(own, max(2, min(own - 1, MOST_WORKERS)) if asked is None else asked)

    def too_many_bad(self, bad: int, pairs: int) -> bool:
        """True above the share ``max_bad``. A single bad pair never stops a run, however small."""
        return bad > max(1.0, self.max_bad * pairs)
