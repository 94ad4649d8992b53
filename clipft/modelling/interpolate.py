"""Between the untouched weights (0) and the tuned ones (1), as in WiSE-FT (Wortsman et al.,
arXiv 2109.01903): tuning costs a model some of what it could do before, and a point in between
often keeps most of both.

A LoRA adapter's change of a weight is scale * B A: its B is multiplied by alpha, its A is the
tuned one, so the change itself is interpolated. All other weights are interpolated as they are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from clipft.core.errors import ModelError

_LORA_OUT = ("lora_B", "lora_embedding_B")
_LORA_IN = ("lora_A", "lora_embedding_A")

State = dict[str, Tensor]


@dataclass(frozen=True)
class Interpolation:
    """Two ``TrainableModel.trainable_state`` of one scenario, on the CPU.

    Raises:
        ModelError: nothing was trained, or the two are not of one scenario, or the untouched
            adapters already change the model, so that no scale of the tuned ones undoes it.
    """

    untouched: State
    tuned: State

    def __post_init__(self) -> None:
        if not self.tuned:
            raise ModelError("nothing was trained: there is nothing to interpolate", _HINT)
        if self.untouched.keys() != self.tuned.keys():
            raise ModelError("the weights are not those of the model's scenario", _HINT)
        changing = [name for name, w in self.untouched.items() if _is(name, _LORA_OUT) and w.any()]
        if changing:
            raise ModelError(
                f"the adapters change the model before training ({changing[0]} is not 0): "
                "their scale does not lead back to the untouched model",
                _HINT,
            )

    def at(self, alpha: float) -> State:
        """For ``TrainableModel.load_trainable_state``; exact at both ends."""
        return {name: self._weight(name, alpha) for name in self.tuned}

    def _weight(self, name: str, alpha: float) -> Tensor:
        start, end = self.untouched[name], self.tuned[name]
        if _is(name, _LORA_IN):
            return end
        return torch.lerp(start.float(), end.float(), alpha).to(end.dtype)


_HINT = "name a run that trained something"


def _is(name: str, kinds: tuple[str, ...]) -> bool:
    return any(part in kinds for part in name.split("."))
