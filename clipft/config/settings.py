"""The settings model, with the default of every setting.

Settings are frozen. Each section is a base class of ``Settings``, so a service can ask for the
section it needs (``OptimSettings``) and accept the whole. ``clipft.config.sources`` decides where
the values come from.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import field_validator

from clipft.config.fields import Section, extra_of, setting
from clipft.config.scenarios import CHECKPOINT_SUFFIX, SCENARIOS, Scenario
from clipft.core.common import expand_home, processors
from clipft.core.errors import unknown_choice

TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio")
"""The names that ``track`` may have."""

FOLLOWING = ("effective_batch_size", "epochs", "patience", "lr")
"""Settings that follow the catalogue and the base model where the user has set nothing."""

LABELS = {"positives": "label", "stop_on": "accuracy"}
"""Defaults under ``--label-prompts``: images of one label belong together, and accuracy counts."""

MINI_TRAIN = {
    "epochs": 1,
    "effective_batch_size": 32,
    "micro_batch_size": 16,
    "max_train_pairs": 128,
    "max_val_pairs": 64,
    "num_workers": 0,
}
"""Defaults under ``--mini-train``: every stage of a run, in seconds."""

DEMO = {
    "model": "tiny",
    "output_dir": "./clipft-demo",
    "epochs": 3,
    "effective_batch_size": 128,
    "micro_batch_size": 128,
    "lr": 4e-3,
    "precision": "fp32",
    "num_workers": 2,
}
"""Defaults of ``clipft demo``: as much as two CPU cores can learn in about a minute."""

FALLBACK_MICRO_BATCH = 64
"""Micro-batch size if none is set and none can be measured."""

MOST_WORKERS = 12
"""The most workers that are started unless the user sets a number. Each of them takes memory."""

_SCENARIO_RATES = " and ".join(
    f"{s.lr:g} for scenario {s.name}" for s in SCENARIOS.values() if s.lr
)


def _names(value: str) -> list[str]:
    return [name for part in value.split(",") if (name := part.strip())]


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
        "Cache on disk what frozen encoders compute from inputs that are the same in every epoch.",
    )
    cache_limit: float | None = setting(
        None,
        "Largest size of what is computed and cached, in GiB. When a command ends, what was last "
        "used longest ago is removed. Default: no limit; see `clipft cache`.",
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
        "Train on this many pairs at most, from the first one on. 0: on all.",
        "fixed",
        unit="pairs",
        ge=0,
    )
    max_val_pairs: int = setting(
        0,
        "Validate on this many pairs at most, from the first one on. 0: on all.",
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
        for part in _names(value):
            name, weight = _weighted(part)
            if not name or not 0 < weight < math.inf:
                raise ValueError(
                    f"{part!r} is not a field and a weight above 0; write it as name:1"
                )
        return value

    @property
    def weighted_fields(self) -> dict[str, float]:
        """The fields that captions are drawn from, with their weights; empty without ``fields``."""
        return dict(map(_weighted, _names(self.fields)))

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


class InputSizes(NamedTuple):
    """The most tokens of a text, and pixels along a side of an image; 0 keeps the model's own."""

    context_length: int = 0
    image_size: int = 0


OWN_SIZES = InputSizes()


class ModelSettings(Section):
    title = "Model"
    model: str = setting(
        "openai/clip-vit-base-patch32",
        "Pretrained CLIP model: a Hugging Face Hub id, a local folder, a model of open_clip "
        "(open_clip:NAME/PRETRAINED, hf-hub:ID, local-dir:PATH, or a file), or 'tiny' (included in "
        "the package).",
        "fixed",
    )
    context_length: int = setting(
        0,
        "Tokens of a caption that are read; the rest is cut off. 0: as many as the model was "
        "published with. Where that is less, its position embeddings are stretched.",
        "fixed",
        unit="tokens",
        ge=0,
        le=4096,
    )
    image_size: int = setting(
        0,
        "Side of the images that the model sees. 0: as the model was published; otherwise its "
        "position embeddings are resampled.",
        "fixed",
        unit="pixels",
        ge=0,
        le=1024,
    )
    scenario: str = setting(
        "dual_lora",
        f"What to train. {'; '.join(f'{s.name}: {s.summary}' for s in SCENARIOS.values())}.",
        "fixed",
        choices=tuple(SCENARIOS),
    )
    lora_r: int = setting(16, "Rank of the LoRA adapters.", "fixed", ge=1)
    lora_alpha: float = setting(
        32, "LoRA alpha: adapter outputs are scaled by alpha / r.", "fixed", gt=0
    )
    lora_dropout: float = setting(0.05, "Dropout before the adapters.", "fixed", ge=0, lt=1)
    lora_targets: Literal["qv", "qkvo", "mlp", "all"] = setting(
        "qv",
        "Layers that get adapters. qv: query and value of attention; qkvo: all four projections "
        "of attention; mlp: the MLP; all: attention and MLP.",
        "fixed",
    )
    lora_rslora: bool = setting(
        False, "Use the scale alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023).", "fixed"
    )
    lora_dora: bool = setting(
        False, "Train magnitudes separately from directions (DoRA, Liu et al. 2024).", "fixed"
    )
    lora_init: Literal["default", "gaussian", "orthogonal", "olora", "pissa"] = setting(
        "default",
        "Initial values of the adapters: default, gaussian, orthogonal, olora or pissa. olora and "
        "pissa also change the base weights.",
        "fixed",
    )

    @property
    def input_sizes(self) -> InputSizes:
        """The sizes of texts and images."""
        return InputSizes(self.context_length, self.image_size)

    @field_validator("model")
    @classmethod
    def _expand_home(cls, value: str) -> str:
        return str(expand_home(value)) if value.startswith("~") else value

    @field_validator("scenario")
    @classmethod
    def _known_scenario(cls, value: str) -> str:
        if value not in SCENARIOS:
            raise ValueError(unknown_choice(value, SCENARIOS))
        return value


class LossSettings(Section):
    title = "Loss"
    loss: Literal["auto", "clip", "siglip"] = setting(
        "auto",
        "Contrastive loss. clip: softmax over the batch; siglip: sigmoid for each image and text; "
        "auto: the loss the model was pretrained with.",
        "fixed",
    )
    positives: Literal["pair", "caption", "group", "label"] = setting(
        "pair",
        "Which rows do not count as negatives of a pair. pair: only the pair itself; caption: rows "
        "with the same caption; group: rows with the same value of group_field; label: rows with "
        "the same value of label_field.",
        "fixed",
    )
    positives_mode: Literal["soft", "mask"] = setting(
        "soft",
        "How the rows chosen by --positives count. soft: as positives with equal shares; mask: not "
        "at all.",
        "fixed",
    )
    photo_pairs: float = setting(
        0.0,
        "Weight of a second contrastive loss, between the images alone: photos of one product, "
        "which have the same value of group_field, attract each other. Each step then holds at "
        "least two photos of a product that has several. 0: no such loss.",
        "fixed",
        ge=0,
    )
    hard_negatives: int = setting(
        0,
        "Number of look-alikes that join an image in its step: the nearest images of other "
        "products by the pretrained model. Products are told apart by group_field. 0: steps are "
        "drawn at random.",
        "fixed",
        unit="images",
        ge=0,
        le=16,
    )
    logit_scale: Literal["auto", "frozen", "trained"] = setting(
        "auto",
        "The temperature, and the bias of siglip: frozen or trained. auto: trained in scenario "
        "full, and when a model without a bias is trained with siglip; otherwise frozen.",
        "fixed",
    )
    preserve: float = setting(
        0.0,
        "Weight of a penalty on how far embeddings move away from those of the pretrained model, "
        "so that less of what it knew is forgotten. 0: no penalty.",
        "fixed",
        metavar="W",
        ge=0,
    )
    preserve_data: Path | None = setting(
        None,
        "A general set: other pairs (train/*.tar in this folder) whose embeddings --preserve "
        "holds. Default: the training pairs.",
        metavar="DATA",
    )
    matryoshka: str = setting(
        "",
        "Numbers of dimensions, such as 256,128, at which embeddings that are cut off there shall "
        "be good as well. The loss is the mean over these and all dimensions.",
        "fixed",
        metavar="N,...",
    )

    @field_validator("matryoshka")
    @classmethod
    def _numbers_of_dimensions(cls, value: str) -> str:
        for part in _names(value):
            if not part.isdecimal() or int(part) < 2:
                raise ValueError(f"{part!r} is not a number of dimensions; write it as 256,128")
        return value

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The numbers of dimensions besides the whole, the largest first."""
        return tuple(sorted({int(part) for part in _names(self.matryoshka)}, reverse=True))


class AdaptSettings(ModelSettings, LossSettings):
    """The settings that determine a trainable model."""


class OptimSettings(Section):
    title = "Optimization"
    epochs: int = setting(
        10,
        "Passes over the training pairs. If not set, more for a small catalogue, as a run needs "
        "some 300 steps.",
        "fixed",
        unit="epochs",
        ge=1,
    )
    effective_batch_size: int = setting(
        1024,
        "Pairs per optimizer step. The loss compares all of them with each other. If not set, "
        "fewer for a small catalogue, down to 32.",
        "fixed",
        unit="pairs",
        ge=2,
    )
    micro_batch_size: int = setting(
        0,
        "Pairs per forward pass. 0: find the fastest size that fits "
        f"({FALLBACK_MICRO_BATCH} if it cannot be measured).",
        unit="pairs",
        ge=0,
    )
    graph_memory: float | None = setting(
        None,
        "Memory for activations that are kept for the backward pass instead of being computed "
        "twice, in GiB. Default: the memory that is free.",
        unit="GiB",
        ge=0,
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute encoder layers in the backward pass, which saves memory and costs time."
    )
    compile: bool = setting(
        False,
        "Compile both encoders, which needs a C++ compiler. Starting takes minutes longer.",
    )
    accumulation: Literal["exact", "local"] = setting(
        "exact",
        "How the loss is computed when a step has several micro-batches. exact: one loss over the "
        "whole effective batch, in the memory of a micro-batch; local: a separate loss for each "
        "micro-batch, averaged, as in most scripts.",
        "fixed",
    )
    lr: float = setting(
        1e-4,
        f"Peak learning rate. If not set, {_SCENARIO_RATES}; a base model may bring its own in the "
        "file clipft.json of its folder.",
        "fixed",
        ge=0,
    )
    lr_projections: float | None = setting(
        None, "Learning rate of the projections. Default: same as --lr.", "fixed", ge=0
    )
    lr_scale: float | None = setting(
        None, "Learning rate of the temperature. Default: same as --lr.", "fixed", ge=0
    )
    layer_decay: float = setting(
        1.0,
        "Factor by which the learning rate falls from each encoder layer to the one below, for "
        "scenario full. 1: the same rate in all layers.",
        "fixed",
        gt=0,
        le=1,
    )
    wd: float = setting(
        0.1, "Weight decay. Norms, biases and the logit scale have none.", "fixed", ge=0
    )
    warmup_steps: int = setting(
        100,
        "Optimizer steps of warm-up, limited to a tenth of all steps.",
        "fixed",
        unit="steps",
        ge=0,
    )
    grad_clip: float = setting(1.0, "Maximum gradient norm. 0: no clipping.", "fixed", ge=0)
    ema: float = setting(
        0.0,
        "Decay of a moving average of the trained weights, such as 0.999. The averages are "
        "validated, kept as the best epoch and exported in place of the weights. 0: no averages.",
        "fixed",
        metavar="DECAY",
        ge=0,
        lt=1,
    )
    optimizer: Literal["auto", "adamw", "adamw8bit"] = setting(
        "auto",
        "adamw: fused AdamW; adamw8bit: AdamW with 8-bit states; auto: adamw, or adamw8bit on a "
        "GPU where gradients and states in 32 bits would take more than a quarter of the memory.",
        "fixed",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto",
        "Numeric precision: fp32, bf16 or fp16. auto: bf16 if the hardware supports it, fp16 on "
        "older GPUs, otherwise fp32.",
        "fixed",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting(
        "auto", "Where to compute: cpu, cuda or mps. auto: a GPU if there is one."
    )
    stop_on: Literal["loss", "recall", "accuracy", "never"] = setting(
        "recall",
        "Validation metric for early stopping and for choosing the best epoch: loss, recall, or "
        "with --label-prompts the accuracy of classification. never: do not stop early.",
        "fixed",
    )
    patience: int = setting(
        5,
        "Epochs without improvement before training stops. If not set, more for a small "
        "catalogue, whose epochs have few steps.",
        "fixed",
        unit="epochs",
        ge=1,
    )
    min_delta: float = setting(
        0.001, "Smallest change that counts as an improvement.", "fixed", ge=0
    )


class RunSettings(Section):
    title = "Run"
    output_dir: Path = setting(
        Path("./checkpoints"), "Folder for the runs, with a subfolder for each scenario."
    )
    mini_train: bool = setting(
        False,
        "Smoke test: train a few steps on a few pairs. Other settings take precedence.",
        "fixed",
    )
    seed: int = setting(
        42, "Seed of data order, augmentation, initialization and dropout.", "fixed", ge=0
    )
    processes: int = setting(
        1,
        "Number of processes that train together on this machine: one for each GPU, or several "
        "that share the CPU cores.",
        unit="processes",
        ge=1,
    )
    shard_weights: bool = setting(
        False,
        "Shard weights, gradients and optimizer states over the processes (FSDP), for scenario "
        "full.",
    )
    price_per_hour: float | None = setting(
        None,
        "Price of an hour of one GPU, or of this machine if it trains without one. The plan and "
        "the report then say what the run costs.",
        metavar="PRICE",
        ge=0,
    )
    process_timeout: float = setting(
        10,
        "How long a process may be silent before it is considered lost, in minutes.",
        unit="minutes",
        gt=0,
    )
    checkpoint_every: int = setting(
        100,
        "Optimizer steps between checkpoints, in addition to one after each epoch. 0: only after "
        "each epoch.",
        unit="steps",
        ge=0,
    )
    resume_from_checkpoint: bool = setting(
        False, "Resume from the checkpoint in output_dir if there is one."
    )


class EvaluationSettings(Section):
    title = "Evaluation"
    label_field: str = setting(
        "category",
        "Metadata field with a pair's label, for metrics by label, for classification, and for "
        "training with --label-prompts, --shots and --positives label.",
        "fixed",
    )
    grade_field: str | None = setting(
        None,
        "Metadata field with a number that says how relevant an image is to its caption, 0 if it "
        "is not. Adds nDCG@10 by grades to the figures.",
    )
    resamples: int = setting(
        1000,
        "Bootstrap resamples for the 95% intervals. 0: no intervals.",
        unit="resamples",
        ge=0,
        le=100_000,
    )
    evaluation_memory: int = setting(
        256,
        "Memory for comparing all images with all texts, in addition to the embeddings, in MiB.",
        unit="MiB",
        ge=1,
    )

    @property
    def evaluation_bytes(self) -> int:
        return self.evaluation_memory << 20


class TrackingSettings(Section):
    title = "Tracking"
    wandb: Literal["disabled", "offline", "online"] = setting(
        "disabled",
        "Logging to Weights & Biases: disabled, offline or online. metrics.jsonl is always "
        "written.",
    )
    wandb_project: str = setting("clip-furniture-finetune", "Weights & Biases project.")
    track: str = setting(
        "",
        "Trackers that also get the figures, separated by commas: wandb, tensorboard, mlflow, "
        "trackio. wandb alone is the same as --wandb online.",
        metavar="NAME,...",
    )
    track_project: str = setting(
        "clipft", "MLflow experiment, and Trackio project, that the run is added to."
    )

    @field_validator("track")
    @classmethod
    def _known_trackers(cls, value: str) -> str:
        for name in _names(value):
            if name not in TRACKERS:
                raise ValueError(unknown_choice(name, TRACKERS))
        return value

    @property
    def tracker_names(self) -> list[str]:
        """The trackers that are on, each once."""
        also = ["wandb"] if self.wandb != "disabled" else []
        return list(dict.fromkeys(also + _names(self.track)))


SECTIONS: tuple[type[Section], ...] = (
    StorageSettings,
    DataSettings,
    ModelSettings,
    LossSettings,
    OptimSettings,
    RunSettings,
    EvaluationSettings,
    TrackingSettings,
)


class Settings(
    TrackingSettings,
    EvaluationSettings,
    RunSettings,
    OptimSettings,
    AdaptSettings,
    DataSettings,
    StorageSettings,
):
    """All settings of a run."""

    @property
    def declared_scenario(self) -> Scenario:
        return SCENARIOS[self.scenario]

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.scenario

    @property
    def checkpoint_path(self) -> Path:
        return self.output_dir / f"{self.scenario}{CHECKPOINT_SUFFIX}"


EVALUATION_OVERRIDES = (
    "data_dir",
    "caption",
    "caption_lines",
    "num_workers",
    "max_val_pairs",
    "max_bad",
    "micro_batch_size",
    "precision",
    "device",
    "group_field",
    *EvaluationSettings.model_fields,
)
"""Settings that an evaluation may set; the others come from the checkpoint."""


def fixed_on_resume() -> list[str]:
    """The names of the settings that decide the weights and so must not change on resume."""
    fields = Settings.model_fields.items()
    return [name for name, field in fields if extra_of(field)["fate"] == "fixed"]


def beside_defaults(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Describe settings, dumped in JSON mode, by name, value, default, and whether they differ."""
    standard = Settings().model_dump(mode="json")
    return [
        {
            "name": name,
            "value": value,
            "default": standard[name],
            "changed": value != standard[name],
        }
        for name, value in values.items()
    ]
