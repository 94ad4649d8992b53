"""How the weights that learn lie in the processes of a run, and what follows from that.

``WholeWeights``: each process has all of them; ``sharding.ShardedWeights``: each has a part. Which
it is, is chosen once, and a step does not ask.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from clipft.distributed.collectives import Processes
from clipft.embedding.towers import Towers
from clipft.models.device import Precision
from clipft.models.trainable import TrainableModel

T = TypeVar("T")


class Weights(Protocol):
    """Of one model. Where they are sharded, all processes call the same things in the same
    order.

    Raises (where they are sharded):
        ProcessError: another process ended.
    """

    @property
    def sharded(self) -> bool: ...

    def own(self, parameter: nn.Parameter) -> nn.Parameter:
        """What this process holds of a parameter, and its optimizer changes."""

    def agreed(self, flag: bool) -> bool:
        """Whether it is so for all that must do the same."""

    def towers(self, towers: Towers) -> Towers:
        """The same towers, passed through as often as all must."""

    def sum_gradients(
        self, model: TrainableModel, processes: Processes, complete: Sequence[nn.Parameter]
    ) -> None:
        """After all backward passes of a step: the sum over the processes, in what each owns.
        Gradients of ``complete`` are whole on each process already."""

    def clip(self, owned: Sequence[nn.Parameter], most: float) -> float:
        """Scale gradients down to a norm of ``most`` over all weights; the norm before."""

    def make_scaler(self, precision: Precision) -> "torch.amp.GradScaler": ...

    def model_state(self, model: TrainableModel) -> dict[str, Tensor]:
        """``trainable_state``: whole on the first process."""

    def load_model_state(self, model: TrainableModel, state: dict[str, Tensor]) -> None:
        """
        Raises:
            ModelError: it is another model's.
        """

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Its ``state_dict``: whole on the first process."""

    def own_optimizer_state(
        self, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> dict[str, Any]:
        """The part of a whole state that is this process's."""

    def now(self, make: Callable[[], T]) -> Callable[[], T]:
        """``make``, for the first process to call; it is called here where it takes all."""


class WholeWeights:
    """Each process has all of them."""

    sharded = False

    def own(self, parameter: nn.Parameter) -> nn.Parameter:
        return parameter

    def agreed(self, flag: bool) -> bool:
        return flag

    def towers(self, towers: Towers) -> Towers:
        return towers

    def sum_gradients(
        self, model: TrainableModel, processes: Processes, complete: Sequence[nn.Parameter]
    ) -> None:
        processes.sum_gradients([p for _, p in model.trainable()], complete)

    def clip(self, owned: Sequence[nn.Parameter], most: float) -> float:
        return float(nn.utils.clip_grad_norm_(owned, most))

    def make_scaler(self, precision: Precision) -> "torch.amp.GradScaler":
        return precision.make_scaler()

    def model_state(self, model: TrainableModel) -> dict[str, Tensor]:
        return model.trainable_state()

    def load_model_state(self, model: TrainableModel, state: dict[str, Tensor]) -> None:
        model.load_trainable_state(state)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def own_optimizer_state(
        self, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> dict[str, Any]:
        return state

    def now(self, make: Callable[[], T]) -> Callable[[], T]:
        return make


WHOLE = WholeWeights()
