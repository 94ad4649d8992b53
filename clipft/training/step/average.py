"""The moving average of the trained weights that ``--ema`` keeps (Polyak & Juditsky 1992).

The optimizer continues from the weights themselves. A run validates, saves as its best epoch,
evaluates and exports the averages.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Averages of the trained weights. This base class keeps none, and the weights are used."""

    kept = False

    def update(self, step: int) -> None:
        """Update the averages with the weights after optimizer step ``step``, counted from 0."""

    def restart(self) -> None:
        """Start again from the current weights."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages into the model during the block, and restore the weights afterwards."""
        yield


NO_AVERAGE = WeightAverage()


class MovingAverage(WeightAverage):
    """An exponential moving average of ``parameters``, with torch's own update.

    The decay is (1 + step) / (10 + step) but at most ``decay``, so that a run of few steps forgets
    its first weights too. Before the first step, the averages are the weights.
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
        """Exchange weights and averages one after the other, which takes hardly any memory."""
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            held = parameter.clone()
            parameter.copy_(average)
            average.copy_(held)
