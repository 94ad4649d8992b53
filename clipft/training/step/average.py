"""The moving average of the trained weights that ``--ema`` keeps (Polyak & Juditsky 1992).

The optimizer goes on from the weights themselves. What a run validates, saves as its best epoch,
evaluates and exports are the averages.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Averages of the trained weights. This base class keeps none: the weights themselves count."""

    kept = False

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step ``step``, counted from 0."""

    def restart(self) -> None:
        """Begin again with the weights as they are now."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the averages in the model during the block, and the same weights again after it."""
        yield


NO_AVERAGE = WeightAverage()


class MovingAverage(WeightAverage):
    """An exponential moving average of ``parameters``, with torch's own update.

    The decay rises to ``decay`` as (1 + step) / (10 + step), so that a run of few steps forgets its
    first weights as well. Before the first step, the averages are the weights.
    """

    kept = True

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._decay, self._parameters = decay, parameters
        self._averages = [parameter.detach().clone() for parameter in parameters]

    def update(self, step: int) -> None:
        decay = min(self._decay, (1 + step) / (10 + step))
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(self._averages, self._now(), step)

    @torch.no_grad()
    def restart(self) -> None:
        torch._foreach_copy_(self._averages, self._now())

    def _now(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self._parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange weights and averages, one after the other: that takes hardly any memory."""
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            held = parameter.clone()
            parameter.copy_(average)
            average.copy_(held)
