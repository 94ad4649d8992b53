"""The one settings model. Every default of clipft stands in this file and nowhere else.

Settings are frozen. Sections are base classes, so a service asks for the section it needs
(``OptimSettings``) and is handed the whole. ``settings_sources`` says where values come from.
"""

from pathlib import Path
from typing import Literal

from pydantic import field_validator

from clipft.config.fields import Section, fate_of, setting
from clipft.config.scenarios import CHECKPOINT_SUFFIX, SCENARIOS, Scenario
from clipft.core.errors import unknown_choice

MINI_TRAIN = {
    "epochs": 1,
    "effective_batch_size": 32,
    "micro_batch_size": 16,
    "max_train_pairs": 128,
    "max_val_pairs": 64,
    "num_workers": 0,
}
"""Defaults under ``--mini-train``: the whole way of a run in seconds."""

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
"""Defaults of ``clipft demo``: as much learning as two cores do in a minute."""

ZERO_SHOT_TEMPLATES = "furniture"
ZERO_SHOT_LINEAR_PAIRS = 2000
"""Of ``clipft zero-shot``: its prompts, and the training pairs of its linear classifier."""


FALLBACK_MICRO_BATCH = 64
"""Where none is set and none can be found."""

_OWN_RATES = "".join(f" ({s.name}: {s.lr:g})" for s in SCENARIOS.values() if s.lr is not None)


class StorageSettings(Section):
    title = "Storage"
    data_dir: Path = setting(
        Path("/tmp/furniture_data"),  # noqa: S108 (only read from, and the user's to set)
        "folder with the shards: train/*.tar and val/*.tar; or s3://bucket/prefix",
    )
    s3_bucket: str | None = setting(None, "bucket that holds the pairs; none: data_dir as it is")
    s3_prefix: str = setting("data/train", "prefix of the training pairs in the bucket")
    s3_val_prefix: str = setting("data/val", "prefix of the validation pairs in the bucket")
    endpoint_url: str | None = setting(None, "URL of an S3-compatible server other than AWS")
    s3_region: str | None = setting(None, "region of the bucket; none: as boto3 finds it")
    s3_profile: str | None = setting(None, "profile of the AWS configuration")
    s3_anonymous: bool = setting(False, "ask without credentials: public buckets")
    s3_addressing: Literal["auto", "path", "virtual"] = setting(
        "auto", "bucket in the path or in the host name; auto: path with --endpoint-url"
    )
    s3_requests: int = setting(16, "requests in flight", unit="requests", ge=1, le=256)
    s3_patience: float = setting(
        600, "seconds for which a failing server or network is asked again", unit="seconds", ge=0
    )
    pack: bool = setting(True, "after a sync, pack raw files into shards (once)")
    enable_s3_checkpoints: bool = setting(False, "upload each saved checkpoint to the bucket")
    s3_checkpoint_prefix: str = setting("checkpoints", "prefix of the checkpoints in the bucket")
    keep_s3_checkpoints: int = setting(
        3,
        "checkpoints of a run that stay in the bucket, besides the best",
        unit="checkpoints",
        ge=1,
    )

    @field_validator("endpoint_url")
    @classmethod
    def _without_secrets(cls, value: str | None) -> str | None:
        if value and "@" in value.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "must not hold a user or password, which would be written down with the settings: "
                "give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or with --s3-profile"
            )
        return value


class DataSettings(Section):
    title = "Data"
    caption: str = setting(
        "{caption}",
        "a pair's text: {caption} is its .txt, other names are fields of its .json, as in "
        "'{type}, {color}. {name}'; || between several, of which each epoch draws one",
        "fixed",
    )
    group_field: str | None = setting(
        None,
        "metadata field whose equal values belong together, as of one product: in evaluation, "
        "and in training with --positives group",
        "fixed",
    )
    augmentation: Literal["none", "simple", "advanced"] = setting(
        "simple",
        "the model's own preprocessing; flip and padded random crop; "
        "TrivialAugmentWide and random erasing 0.2",
        "fixed",
    )
    stream: bool = setting(
        False, "read the training shards in sequence: for slow disks and network folders", "fixed"
    )
    shuffle_buffer: int = setting(
        4096, "pairs that are shuffled among each other, with --stream", "fixed", unit="pairs", ge=1
    )
    feature_cache: bool = setting(
        True, "keep what a tower that does not train makes of unchanging inputs in the cache folder"
    )
    num_workers: int = setting(
        4, "processes that decode images; 0: none besides the main", unit="processes", ge=0
    )
    worker_timeout: float = setting(
        300,
        "seconds without a batch after which a decoding process is taken for hung; 0: never",
        unit="seconds",
        ge=0,
    )
    max_train_pairs: int = setting(
        0, "train on the first so many pairs; 0: all", "fixed", unit="pairs", ge=0
    )
    max_val_pairs: int = setting(
        0, "validate on the first so many pairs; 0: all", "fixed", unit="pairs", ge=0
    )
    max_bad: float = setting(
        0.01, "share of unreadable pairs above which a run stops", unit="share", ge=0, le=1
    )

    def too_many_bad(self, bad: int, pairs: int) -> bool:
        """More than ``max_bad`` of the pairs, and more than one: one never stops a small run."""
        return bad > max(1.0, self.max_bad * pairs)


class ModelSettings(Section):
    title = "Model"
    model: str = setting(
        "openai/clip-vit-base-patch32",
        "CLIP checkpoint: hub id, local folder, or 'tiny' (carried by the package)",
        "fixed",
    )
    scenario: str = setting(
        "dual_lora",
        "; ".join(f"{s.name}: {s.summary}" for s in SCENARIOS.values()),
        "fixed",
    )
    lora_r: int = setting(16, "rank of the LoRA adapters", "fixed", ge=1)
    lora_alpha: float = setting(32, "LoRA scale: alpha / r", "fixed", gt=0)
    lora_dropout: float = setting(0.05, "dropout before the adapters", "fixed", ge=0, lt=1)
    lora_targets: Literal["qv", "qkvo", "mlp", "all"] = setting(
        "qv", "adapted maps: of attention two or all four, of the MLP, or both", "fixed"
    )
    lora_rslora: bool = setting(False, "LoRA scale alpha / sqrt(r) (Kalajdzievski 2023)", "fixed")
    lora_dora: bool = setting(False, "magnitudes apart from directions (Liu et al. 2024)", "fixed")
    lora_init: Literal["default", "gaussian", "orthogonal", "olora", "pissa"] = setting(
        "default", "first values of the adapters; olora and pissa change the base weights", "fixed"
    )

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
        "softmax over the batch; sigmoid of each image with each text; "
        "auto is the one that the checkpoint was made with",
        "fixed",
    )
    positives: Literal["pair", "caption", "group"] = setting(
        "pair",
        "what is no negative of a row: nothing but itself; rows with the same caption; rows "
        "with the same group_field",
        "fixed",
    )
    positives_mode: Literal["soft", "mask"] = setting(
        "soft",
        "such rows are positives, with equal shares; or are left out of the comparison",
        "fixed",
    )
    logit_scale: Literal["auto", "frozen", "trained"] = setting(
        "auto",
        "the temperature (and the bias of siglip); auto trains them in scenario "
        "full, and where siglip meets a checkpoint without a bias",
        "fixed",
    )


class AdaptSettings(ModelSettings, LossSettings):
    """What decides a trainable model."""


class OptimSettings(Section):
    title = "Optimisation"
    epochs: int = setting(10, "passes over the training pairs", "fixed", unit="epochs", ge=1)
    effective_batch_size: int = setting(
        1024,
        "pairs per optimizer step; the loss is taken over all of them",
        "fixed",
        unit="pairs",
        ge=2,
    )
    micro_batch_size: int = setting(
        0,
        f"pairs per forward pass; 0: find it ({FALLBACK_MICRO_BATCH} where nothing can be found)",
        unit="pairs",
        ge=0,
    )
    graph_memory: float | None = setting(
        None,
        "GiB for graphs of micro-batches kept for the backward pass rather than computed twice; "
        "none: what is free",
        unit="GiB",
        ge=0,
    )
    gradient_checkpointing: bool = setting(
        False, "run encoder layers again in the backward pass instead of keeping their values"
    )
    accumulation: Literal["exact", "local"] = setting(
        "exact",
        "loss over the whole effective batch in the memory of a micro-batch; "
        "or over each micro-batch alone, as most scripts do",
        "fixed",
    )
    lr: float = setting(1e-4, f"highest learning rate{_OWN_RATES}", "fixed", ge=0)
    lr_projections: float | None = setting(
        None, "that of projections which a scenario trains; none: as lr", "fixed", ge=0
    )
    lr_scale: float | None = setting(
        None, "that of the temperature, where it trains; none: as lr", "fixed", ge=0
    )
    layer_decay: float = setting(
        1.0,
        "each encoder layer's learning rate is that of the one above times this, for scenario "
        "full; 1: all the same",
        "fixed",
        gt=0,
        le=1,
    )
    wd: float = setting(0.1, "weight decay; none on norms, biases and logit scale", "fixed", ge=0)
    warmup_steps: int = setting(
        100, "optimizer steps of warm-up, at most a tenth of all steps", "fixed", unit="steps", ge=0
    )
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no clipping", "fixed", ge=0)
    optimizer: Literal["auto", "adamw", "adamw8bit"] = setting(
        "auto", "auto is AdamW8bit on a GPU where it saves memory, else fused AdamW", "fixed"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "auto is bf16 where the hardware has it, fp16 on older GPUs, else fp32", "fixed"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to compute")
    stop_on: Literal["loss", "recall", "never"] = setting(
        "loss", "validation figure of early stopping and of the best epoch", "fixed"
    )
    patience: int = setting(
        2, "epochs without improvement before stopping", "fixed", unit="epochs", ge=1
    )
    min_delta: float = setting(0.001, "least change that counts as improvement", "fixed", ge=0)


class RunSettings(Section):
    title = "Run"
    output_dir: Path = setting(Path("./checkpoints"), "folder of the runs, one per scenario")
    mini_train: bool = setting(
        False, "smoke test: a few steps on a few pairs; other settings still win", "fixed"
    )
    seed: int = setting(42, "decides order, augmentation, initialisation, dropout", "fixed", ge=0)
    processes: int = setting(
        1,
        "processes that train together on this machine: one per GPU, or shares of its cores",
        unit="processes",
        ge=1,
    )
    shard_weights: bool = setting(
        False,
        "for scenario full on several processes: each holds a part of weights, gradients and "
        "optimizer states (FSDP), and fetches a layer's others while it works",
    )
    process_timeout: float = setting(
        10,
        "minutes after which a process that is not heard of is taken for lost",
        unit="minutes",
        gt=0,
    )
    checkpoint_every: int = setting(
        100,
        "optimizer steps between checkpoints, besides each epoch's end; 0: none",
        unit="steps",
        ge=0,
    )
    resume_from_checkpoint: bool = setting(
        False, "go on from the checkpoint in output_dir if there is one"
    )


class EvaluationSettings(Section):
    title = "Evaluation"
    label_field: str = setting(
        "category", "metadata field with a pair's label: figures per label, and classification"
    )
    resamples: int = setting(
        1000,
        "bootstrap resamples behind the 95 % intervals; 0: no intervals",
        unit="resamples",
        ge=0,
        le=100_000,
    )
    evaluation_memory: int = setting(
        256,
        "MiB that the comparing of all with all may take, besides the embeddings",
        unit="MiB",
        ge=1,
    )

    @property
    def evaluation_bytes(self) -> int:
        return self.evaluation_memory << 20


class TrackingSettings(Section):
    title = "Tracking"
    wandb: Literal["disabled", "offline", "online"] = setting(
        "disabled", "Weights & Biases; metrics.jsonl is always written"
    )
    wandb_project: str = setting("clip-furniture-finetune", "project of the runs in W&B")


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
    """Everything that can be set."""

    @property
    def declared_scenario(self) -> Scenario:
        return SCENARIOS[self.scenario]

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.scenario

    @property
    def checkpoint_path(self) -> Path:
        return self.output_dir / f"{self.scenario}{CHECKPOINT_SUFFIX}"


def fixed_on_resume() -> list[str]:
    """Names of the settings that decide the weights and so must not change on resume."""
    return [name for name, field in Settings.model_fields.items() if fate_of(field) == "fixed"]
