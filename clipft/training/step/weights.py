"""How processes hold the trainable weights of a run: whole on each process, or sharded.

``fsdp.hold_weights`` chooses once, and the code of a step calls these methods in both cases.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clipft.data.batch import Batch
from clipft.distributed.step_channel import StepChannel
from clipft.embedding.towers import Towers
from clipft.models.device import Precision
from clipft.models.trainable import TrainableModel

T = TypeVar("T")


class Weights:
    """The usual case: every process holds all weights.

    ``fsdp.ShardedWeights`` overrides these methods for sharded weights. Then all processes must
    call the same methods in the same order, and each call may raise ``ProcessError`` if another
    process has ended.
    """

    sharded = False

    def own(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the part of ``parameter`` that this process holds and its optimizer changes."""
        return parameter

    def fewest(self, count: int) -> int:
        """Return the smallest count of all processes that must do the same."""
        return count

    def even_out(self, micro_batches: list[Batch]) -> list[Batch]:
        """Add empty micro-batches if all processes must have the same number."""
        return micro_batches

    def wrap_towers(self, towers: Towers) -> Towers:
        """Return the towers, which run equally often on all processes if that is necessary."""
        return towers

    def sum_gradients(
        self,
        model: TrainableModel,
        channel: StepChannel,
        complete: Sequence[nn.Parameter] = (),
        figures: Sequence[float] = (),
    ) -> list[float]:
        """Add up the gradients and ``figures`` of all processes, after a step's backward passes.

        The gradients are left in the parameters that ``own`` returns. The gradients of ``complete``
        are already the sum on every process.
        """
        return channel.sum([p for _, p in model.trainable()], complete, figures)

    def clip(self, owned: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients down to a total norm of ``max_norm``; return the norm before."""
        return nn.utils.clip_grad_norm_(owned, max_norm)

    def make_scaler(self, precision: Precision) -> "torch.amp.GradScaler":
        """The loss scaler of a precision; disabled unless it is fp16."""
        return precision.make_scaler()

    def model_state(self, model: TrainableModel) -> dict[str, Tensor]:
        """Trainable weights by name, whole and on the CPU of rank zero."""
        return model.trainable_state()

    def load_model_state(self, model: TrainableModel, state: dict[str, Tensor]) -> None:
        """Load what ``model_state`` returned.

        Raises:
            ModelError: the state belongs to another model or scenario.
        """
        model.load_trainable_state(state)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's ``state_dict``, whole on rank zero."""
        return optimizer.state_dict()

    def own_optimizer_state(
        self, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> dict[str, Any]:
        """Return this process's part of a whole ``state_dict``."""
        return state

    def gather_if_sharded(self, make: Callable[[], T]) -> Callable[[], T]:
        """Prepare a state that only rank zero will use.

        All processes must take part in gathering sharded weights, so ``make`` is called here on
        each of them. For whole weights, ``make`` itself is returned, and rank zero calls it.
        """
        return make


WHOLE_WEIGHTS = Weights()
