"""From gradients to new weights: AdamW, one-cycle learning rate, clipping, loss scaling."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from clipft.errors import DivergedError, UsageError
from clipft.settings import OptimSettings

EIGHT_BIT_PAYS_FROM = 20_000_000
"""Trainable weights from which AdamW8bit's smaller state (6 bytes less per weight) matters."""

MAX_SKIPPED_STEPS = 10
"""So many steps in a row without a finite gradient, and training has diverged."""


def warmup_steps(asked: int, total_steps: int) -> int:
    """Steps of rising learning rate: those asked for, at most a tenth of the run.

    OneCycleLR cannot draw a rise of a single step; that becomes none.
    """
    steps = min(asked, total_steps // 10)
    return steps if steps >= 2 else 0


def choose_optimizer(settings: OptimSettings, device: torch.device, trainable: int) -> str:
    """``adamw`` or ``adamw8bit``."""
    if settings.optimizer != "auto":
        return settings.optimizer
    pays = device.type == "cuda" and trainable >= EIGHT_BIT_PAYS_FROM
    return "adamw8bit" if pays else "adamw"


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Weights decay; vectors and scalars (norms, biases, logit scale) do not."""
    parameters = [parameter for _, parameter in named]
    decaying = [p for p in parameters if p.ndim >= 2]
    steady = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": steady, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    name: str, groups: list[dict[str, Any]], lr: float, device: torch.device
) -> torch.optim.Optimizer:
    """
    Raises:
        UsageError: bitsandbytes cannot be loaded.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=device.type in {"cpu", "cuda"})
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(
            f"--optimizer adamw8bit: bitsandbytes does not load: {error}",
            "use --optimizer adamw, or mend the installation of bitsandbytes",
        ) from error
    eight_bit: torch.optim.Optimizer = AdamW8bit(groups, lr=lr)
    return eight_bit


def one_cycle(
    optimizer: torch.optim.Optimizer, lr: float, total_steps: int, warmup: int
) -> OneCycleLR:
    """Rise to ``lr`` over the warm-up, then fall as a cosine (Smith & Topin 2018).

    The cycle is laid over one step more than there are, so the last step still learns.
    """
    length = total_steps + 1
    return OneCycleLR(
        optimizer,
        max_lr=lr,
        total_steps=length,
        pct_start=warmup / length,
        cycle_momentum=False,
    )


@dataclass(frozen=True)
class Update:
    """What came of one step's gradient: its norm before clipping, and whether it was used."""

    grad_norm: float
    lr: float
    applied: bool


class Optimiser:
    """Turns the gradients in the parameters into one step; the only thing that changes them."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: OneCycleLR,
        scaler: "torch.amp.GradScaler",
        grad_clip: float,
    ) -> None:
        self.optimizer, self.scheduler, self.scaler = optimizer, scheduler, scaler
        self._max_norm = grad_clip or math.inf
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._skipped_in_a_row = 0

    def update(self) -> Update:
        """Unscale, clip, step, move the learning rate on, clear the gradients.

        A gradient that is not finite is not applied.

        Raises:
            DivergedError: ``MAX_SKIPPED_STEPS`` in a row were not.
        """
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._max_norm))
        applied = math.isfinite(norm)
        if applied or self.scaler.is_enabled():  # the scaler skips, and lowers its scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        with warnings.catch_warnings():  # a skipped first step is no misuse
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._count(applied)
        return Update(norm, lr, applied)

    def _count(self, applied: bool) -> None:
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise DivergedError(
                f"the gradient was not finite for {MAX_SKIPPED_STEPS} steps in a row",
                "lower --lr, or use --precision fp32 or bf16; the last checkpoint is whole",
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer_state_dict"])
        self.scheduler.load_state_dict(state["scheduler_state_dict"])
        self.scaler.load_state_dict(state["scaler_state_dict"])
        self._skipped_in_a_row = state["skipped_in_a_row"]
