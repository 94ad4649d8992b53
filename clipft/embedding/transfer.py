"""Copies tensors to the device while the device still computes with others."""

from typing import Any

import torch
from torch import Tensor

_MOST = 4
"""The most copies that are kept until they are taken. A step needs fewer at a time, so an older one
belongs to a step that was repeated in other chunks."""


class Transfer:
    """Copies of one run. On CUDA they are made on a stream of their own.

    ``start`` a copy as early as possible, and ``take`` it when it is needed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._under_way = dict[int, tuple[Tensor, Tensor]]()

    def start(self, tensor: Tensor) -> None:
        """Start to copy a tensor, which must be in pinned memory for this to be any use."""
        if self._stream is None or id(tensor) in self._under_way:
            return
        with torch.cuda.stream(self._stream):
            copy = tensor.to(self._device, non_blocking=True)
        self._under_way[id(tensor)] = (tensor, copy)  # while it is here, its id is no other's
        if len(self._under_way) > _MOST:
            del self._under_way[next(iter(self._under_way))]

    def take(self, tensor: Tensor) -> Tensor:
        """Return the copy of a tensor, for use on the current stream."""
        if self._stream is None:
            return tensor.to(self._device)
        self.start(tensor)
        _, copy = self._under_way.pop(id(tensor))
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        copy.record_stream(current)  # its memory is not given to others before it is used
        return copy
