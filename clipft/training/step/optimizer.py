"""From gradients to new weights: AdamW, one-cycle learning rate, clipping, loss scaling."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from clipft.config.scenarios import TEXTUAL, VISUAL
from clipft.config.settings import OptimSettings
from clipft.core.errors import DivergedError, ModelError, UsageError
from clipft.models.trainable import TrainableModel
from clipft.training.step.weights import WHOLE, Weights

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


def choose_optimizer(
    settings: OptimSettings, device: torch.device, trainable: int, sharded: bool = False
) -> str:
    """``adamw`` or ``adamw8bit``, which needs whole weights."""
    if settings.optimizer != "auto":
        return settings.optimizer
    if sharded:
        return "adamw"
    pays = device.type == "cuda" and trainable >= EIGHT_BIT_PAYS_FROM
    return "adamw8bit" if pays else "adamw"


def parameter_groups(model: TrainableModel, settings: OptimSettings) -> list[dict[str, Any]]:
    """One group per learning rate and weight decay, the first with ``settings.lr`` if any does,
    and the most weights.

    Weights decay; vectors and scalars (norms, biases, temperature) do not. ``layer_decay`` as
    in BEiT (Bao et al. 2021): a layer's rate falls with the layers above it.
    """
    rates = {
        VISUAL: settings.lr_projections,
        TEXTUAL: settings.lr_projections,
        "scale": settings.lr_scale,
    }
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.trainable():
        own = rates.get(model.part_of(name))
        rate = settings.lr if own is None else own
        rate *= settings.layer_decay ** model.layers_above(name)
        decay = settings.wd if parameter.ndim >= 2 else 0.0
        found.setdefault((rate, decay), []).append(parameter)
    weights = {key: sum(p.numel() for p in members) for key, members in found.items()}
    order = sorted(found, key=lambda key: (key[0] != settings.lr, -weights[key]))
    return [{"params": found[key], "lr": key[0], "weight_decay": key[1]} for key in order]


def make_optimizer(
    name: str, groups: list[dict[str, Any]], device: torch.device
) -> torch.optim.Optimizer:
    """
    Raises:
        UsageError: bitsandbytes cannot be loaded.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=device.type in {"cpu", "cuda"})
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(
            f"--optimizer adamw8bit: bitsandbytes does not load: {error}",
            "use --optimizer adamw, or mend the installation of bitsandbytes",
        ) from error
    eight_bit: torch.optim.Optimizer = AdamW8bit(groups)
    return eight_bit


def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int, warmup: int) -> OneCycleLR:
    """Each group rises to its rate over the warm-up, then falls as a cosine (Smith & Topin
    2018).

    The cycle is laid over one step more than there are, so the last step still trainable.
    """
    length = total_steps + 1
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=length,
        pct_start=warmup / length,
        cycle_momentum=False,
    )


@dataclass(frozen=True)
class Update:
    """What came of one step's gradient: its norm before clipping, and whether it was used.

    ``lr`` is the first group's: that of encoders or adapters where they learn.
    """

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
        weights: Weights = WHOLE,
    ) -> None:
        self.optimizer, self.scheduler, self.scaler = optimizer, scheduler, scaler
        self.weights = weights
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
        norm = self.weights.clip(self._parameters, self._max_norm)
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
            "optimizer_state_dict": self.weights.optimizer_state(self.optimizer),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ModelError: it is the state of another optimizer or of other parameter groups, or lost
                its learning rates.
        """
        saved = state["optimizer_state_dict"]
        kept = next(iter(saved["state"].values()), None)
        if kept and ("exp_avg" in kept) != isinstance(self.optimizer, torch.optim.AdamW):
            raise ModelError(
                "the optimizer state in the checkpoint is that of the other AdamW: `auto` chooses "
                "adamw8bit on a GPU, and adamw with --shard-weights",
                "resume with or without --shard-weights as it was; started with --optimizer adamw "
                "a run can change between them",
            )
        try:
            self.optimizer.load_state_dict(self.weights.own_optimizer_state(self.optimizer, saved))
        except ValueError as error:
            raise _other_groups(str(error)) from error
        self.scheduler.load_state_dict(state["scheduler_state_dict"])
        rates = [group["lr"] for group in self.optimizer.param_groups]
        if rates != self.scheduler.get_last_lr():
            raise _other_groups(f"learning rates {rates} and {self.scheduler.get_last_lr()}")
        self.scaler.load_state_dict(state["scaler_state_dict"])
        self._skipped_in_a_row = state["skipped_in_a_row"]


def _other_groups(why: str) -> ModelError:
    return ModelError(
        f"the optimizer state in the checkpoint does not fit: {why}",
        "resume with the clipft and the settings it was written by, or start a new run",
    )
