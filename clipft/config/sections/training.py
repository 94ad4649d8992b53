"""How the model is trained, and how a run is kept."""

from pathlib import Path
from typing import Literal

from clipft.config.fields import Section, setting
from clipft.config.scenarios import SCENARIOS

FALLBACK_MICRO_BATCH = 64
"""Micro-batch size if none is set and none can be measured."""

_SCENARIO_RATES = " and ".join(
    f"{s.lr:g} for scenario {s.name}" for s in SCENARIOS.values() if s.lr
)


class OptimSettings(Section):
    title = "Optimization"
    epochs: int = setting(
        10,
        "Passes over the training pairs. If not set, more for a small catalogue: a run needs about "
        "300 steps.",
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
        False,
        "Recompute the encoder layers in the backward pass. This saves memory but takes longer.",
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
        f"Peak learning rate. If not set, {_SCENARIO_RATES}; a base model may set its own in the "
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
        "older GPUs, otherwise fp32; on a CPU also fp32 for a model as small as tiny.",
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
