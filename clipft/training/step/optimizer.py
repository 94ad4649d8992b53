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
from clipft.training.step.weights import WHOLE_WEIGHTS, Weights

# AdamW8bit saves 6 bytes of state per weight, which matters from this many trainable weights on
EIGHT_BIT_PAYS_FROM = 20_000_000

MAX_SKIPPED_STEPS = 10
"""With this many steps in a row whose gradient is not finite, training has diverged."""


def warmup_steps(asked: int, total_steps: int) -> int:
    """Steps of rising learning rate: those asked for, but at most a tenth of the run."""
    steps = min(asked, total_steps // 10)
    return steps if steps >= 2 else 0  # OneCycleLR cannot draw a rise of a single step


def choose_optimizer(
    settings: OptimSettings, device: torch.device, trainable: int, sharded: bool = False
) -> str:
    """``adamw`` or ``adamw8bit``; the latter works on whole weights only."""
    if settings.optimizer != "auto":
        return settings.optimizer
    pays = device.type == "cuda" and trainable >= EIGHT_BIT_PAYS_FROM
    return "adamw8bit" if pays and not sharded else "adamw"


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
    """The optimizer that ``choose_optimizer`` named.

    Raises:
        UsageError: bitsandbytes, which has the 8-bit one, cannot be loaded.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=device.type in {"cpu", "cuda"})
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(
            f"--optimizer adamw8bit: bitsandbytes cannot be loaded: {error}",
            "use --optimizer adamw, or repair the installation of bitsandbytes",
        ) from error
    eight_bit: torch.optim.Optimizer = AdamW8bit(groups)
    return eight_bit


def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int, warmup: int) -> OneCycleLR:
    """Raise each group to its learning rate over the warm-up, then lower it along a cosine.

    One cycle as in Smith & Topin (2018).
    """
    length = total_steps + 1  # at the end of the cycle the rate is 0: the last step comes before
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=length,
        pct_start=warmup / length,
        cycle_momentum=False,
    )


@dataclass(frozen=True)
class Update:
    """What came of one step's gradient: its norm before clipping, and whether it was applied.

    ``lr`` is the rate of the first group: that of encoders or adapters where these train.
    """

    grad_norm: float
    lr: float
    applied: bool


class Optimizer:
    """Turns the gradients in the parameters into one step; nothing else changes the weights.

    ``adamw`` is torch's optimizer, or the 8-bit one. ``grad_clip`` 0 switches clipping off.
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

    def update(self) -> Update:
        """Unscale and clip the gradients, step, advance the learning rate, clear the gradients.

        A gradient that is not finite is not applied.

        Raises:
            DivergedError: the gradients of ``MAX_SKIPPED_STEPS`` steps in a row were not finite.
        """
        lr = float(self.adamw.param_groups[0]["lr"])
        self.scaler.unscale_(self.adamw)
        norm = self.weights.clip(self._parameters, self._max_norm)
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
        return Update(norm, lr, applied)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; whole on rank zero."""
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
            raise ModelError(
                "the checkpoint has the optimizer state of the other AdamW: `auto` chooses "
                "adamw8bit on a GPU, and adamw with --shard-weights",
                "resume with or without --shard-weights as before; a run that is started with "
                "--optimizer adamw can change between them",
            )
        try:
            self.adamw.load_state_dict(self.weights.own_optimizer_state(self.adamw, saved))
        except ValueError as error:
            raise _other_groups(str(error)) from error
        self.scheduler.load_state_dict(state["scheduler_state_dict"])
        rates = [group["lr"] for group in self.adamw.param_groups]
        if rates != self.scheduler.get_last_lr():
            raise _other_groups(f"learning rates {rates} and {self.scheduler.get_last_lr()}")
        self.scaler.load_state_dict(state["scaler_state_dict"])
        self._skipped_in_a_row = state["skipped_in_a_row"]


def _other_groups(why: str) -> ModelError:
    return ModelError(
        f"the optimizer state in the checkpoint does not fit: {why}",
        "resume with the version of clipft and the settings that wrote it, or start a new run",
    )
