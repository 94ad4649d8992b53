"""Updates the weights from gradients: AdamW, one-cycle learning rate, clipping, loss scaling."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from clipft.config.scenarios import TEXTUAL, VISUAL
from clipft.config.sections.training import OptimSettings
from clipft.core.common import Note
from clipft.core.errors import DivergedError, ModelError, UsageError, first_line
from clipft.core.memory import usable_memory
from clipft.models.trainable import TrainableModel
from clipft.training.step.weights import WHOLE_WEIGHTS, Weights

_STATE_BYTES = 12
"""Bytes for each trained weight in fp32: its gradient, and the two moments of AdamW."""
_LARGE_SHARE = 0.25
"""From this share of the memory on, ``auto`` uses 8-bit states. They halve the ``_STATE_BYTES``, so
at least an eighth of the memory becomes free. Below it, fused AdamW is the better choice: it
updates all weights in one call, whereas bitsandbytes waits for the device after each weight."""

MAX_SKIPPED_STEPS = 10
"""After this many steps in a row without a finite gradient, training has diverged."""


def warmup_steps(asked: int, total_steps: int) -> int:
    """Return the number of warm-up steps: those asked for, but at most a tenth of the run."""
    steps = min(asked, total_steps // 10)
    return steps if steps >= 2 else 0  # OneCycleLR does not support a single warm-up step


def choose_optimizer(
    settings: OptimSettings,
    device: torch.device,
    trainable: int,
    sharded: bool,
    began: str,
    note: Note,
) -> str:
    """Choose ``adamw`` or ``adamw8bit``, which is tested first.

    A resumed run continues with the optimizer that it ``began`` with ("" for a new run), because
    the two have different states. ``trainable`` is the number of trained weights. 8-bit states work
    only with whole weights, not with ``sharded`` ones.

    Raises:
        UsageError: ``adamw8bit`` was asked for, or the run began with it, and it does not run here.
    """
    auto = settings.optimizer == "auto"
    large = device.type == "cuda" and not sharded and _fills_memory(trainable, device)
    wanted = (began if auto else settings.optimizer) or ("adamw8bit" if large else "adamw")
    if wanted == "adamw":
        if auto and large:
            note(
                "note: this run began with AdamW in 32 bits and continues with it, although "
                "a new run on this device would use 8-bit states."
            )
        return wanted
    fault = "sharding would cut its states" if sharded else eight_bit_fault(device)
    if fault and auto and not began:
        note(f"note: AdamW with 8-bit states does not run here ({fault}): using 32 bits.")
        return "adamw"
    if fault:
        whose = "the adamw8bit that this run began with" if auto else "--optimizer adamw8bit"
        raise UsageError(
            f"{whose} does not run here: {fault}",
            "repair the installation of bitsandbytes, or start a run with --optimizer adamw, "
            "which can be resumed on any device",
        )
    return wanted


def _fills_memory(trainable: int, device: torch.device) -> bool:
    return trainable * _STATE_BYTES > _LARGE_SHARE * usable_memory(device)


def eight_bit_fault(device: torch.device) -> str | None:
    """Take one step with bitsandbytes' AdamW8bit on ``device``; return why it fails, or None.

    The library may be missing, or lack functions for this device, which only a step shows.
    """
    start = torch.zeros(128, 128, device=device)  # smaller weights would get 32-bit states
    weight = nn.Parameter(start.clone())
    weight.grad = torch.ones_like(weight)
    try:
        make_adamw("adamw8bit", [{"params": [weight], "lr": 1e-3}], device).step()
        changed = not torch.equal(weight, start)  # waits for the device, which may fail only now
    except Exception as error:  # its loader and its kernels raise errors of many kinds
        return f"{type(error).__name__}: {first_line(error)}"
    return None if changed else "its step changes no weight"


def parameter_groups(model: TrainableModel, settings: OptimSettings) -> list[dict[str, Any]]:
    """One group per learning rate and weight decay, for torch's optimizers.

    Matrices decay; vectors and scalars (norms, biases, temperature) do not. With ``layer_decay``
    a layer's rate falls with the layers above it, as in BEiT (Bao et al. 2021). The first group
    is one with ``settings.lr`` if there is any, and of these the one with the most weights.
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


def make_adamw(
    name: str, groups: list[dict[str, Any]], device: torch.device
) -> torch.optim.Optimizer:
    """Make the optimizer that ``choose_optimizer`` returned."""
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=device.type in {"cpu", "cuda"})
    from bitsandbytes.optim import AdamW8bit

    eight_bit: torch.optim.Optimizer = AdamW8bit(groups)
    return eight_bit


def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int, warmup: int) -> OneCycleLR:
    """Raise each group to its learning rate over the warm-up, then lower it along a cosine.

    One cycle as in Smith & Topin (2018).
    """
    length = total_steps + 1  # the rate is 0 at the end of the cycle, which no step should use
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=length,
        pct_start=warmup / length,
        cycle_momentum=False,
    )


@dataclass(frozen=True)
class Update:
    """The result of one step: its loss, the norm of the gradient before clipping, and whether it
    was applied.

    ``lr`` is the rate of the first group: that of encoders or adapters, if they are trained.
    """

    loss: float
    grad_norm: float
    lr: float
    applied: bool


class Optimizer:
    """Updates the weights from the gradients in the parameters. Nothing else changes the weights.

    ``adamw`` is torch's optimizer or the 8-bit one. ``grad_clip`` 0 switches clipping off.
    """

    def __init__(
        self,
        adamw: torch.optim.Optimizer,
        scheduler: OneCycleLR,
        scaler: "torch.amp.GradScaler",
        grad_clip: float,
        weights: Weights = WHOLE_WEIGHTS,
    ) -> None:
        self.adamw, self.scheduler, self.scaler = adamw, scheduler, scaler
        self.weights = weights
        self._max_norm = grad_clip or math.inf
        self._parameters = [p for group in adamw.param_groups for p in group["params"]]
        self._skipped_in_a_row = 0

    def update(self, loss: Tensor) -> Update:
        """Unscale and clip the gradients, step, advance the learning rate, clear the gradients.

        A gradient that is not finite is not applied. ``loss`` is read here together with the norm,
        so that a step waits for the device only once.

        Raises:
            DivergedError: the gradients of ``MAX_SKIPPED_STEPS`` steps in a row were not finite.
        """
        lr = float(self.adamw.param_groups[0]["lr"])
        self.scaler.unscale_(self.adamw)
        norm_there = self.weights.clip(self._parameters, self._max_norm)
        loss_here, norm = torch.stack([loss.to(norm_there), norm_there]).tolist()
        applied = math.isfinite(norm)
        if applied or self.scaler.is_enabled():  # the scaler itself skips, and lowers its scale
            self.scaler.step(self.adamw)
            self.scaler.update()
        with warnings.catch_warnings():  # torch takes a skipped first step for a mistake
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step()
        self.adamw.zero_grad(set_to_none=True)
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise DivergedError(
                f"the gradient was not finite for {MAX_SKIPPED_STEPS} steps in a row",
                "lower --lr, or use --precision fp32 or bf16; the last checkpoint is good",
            )
        return Update(loss_here, norm, lr, applied)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, complete on rank zero."""
        return {
            "optimizer_state_dict": self.weights.optimizer_state(self.adamw),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned.

        Raises:
            ModelError: it is the state of another optimizer or of other parameter groups.
        """
        saved = state["optimizer_state_dict"]
        first = next(iter(saved["state"].values()), None)
        if first and ("exp_avg" in first) != isinstance(self.adamw, torch.optim.AdamW):
            raise _other_groups("it is that of the other AdamW, in 8 or in 32 bits")
        try:
            self.adamw.load_state_dict(self.weights.own_optimizer_state(self.adamw, saved))
        except ValueError as error:
            raise _other_groups(str(error)) from error
        self.scheduler.load_state_dict(state["scheduler_state_dict"])
        rates = [group["lr"] for group in self.adamw.param_groups]
        if rates != self.scheduler.get_last_lr():
            raise _other_groups(f"learning rates {rates} and {self.scheduler.get_last_lr()}")
        if state["scaler_state_dict"]:  # else the run was not in fp16: a new scaler finds its scale
            self.scaler.load_state_dict(state["scaler_state_dict"])
        self._skipped_in_a_row = state["skipped_in_a_row"]


def _other_groups(why: str) -> ModelError:
    return ModelError(
        f"the optimizer state in the checkpoint does not fit: {why}",
        "resume with the version of clipft and the settings that wrote it, or start a new run",
    )
