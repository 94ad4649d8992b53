"""Copies tensors to the device while the device computes with other tensors."""

from typing import Any

import torch
from torch import Tensor

_MOST = 4
"""The most copies that are kept until they are taken. A step needs fewer at a time, so an older
copy belongs to a step that was repeated in smaller chunks."""


class Transfer:
    """The copies of a run. On CUDA they are made on a separate stream.

    Call ``start`` as early as possible, and ``take`` when the copy is needed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._under_way = dict[int, tuple[Tensor, Tensor]]()

    def start(self, tensor: Tensor) -> None:
        """Start to copy a tensor. This only helps if the tensor is in pinned memory."""
        if self._stream is None or id(tensor) in self._under_way:
            return
        with torch.cuda.stream(self._stream):
            copy = tensor.to(self._device, non_blocking=True)
        self._under_way[id(tensor)] = (tensor, copy)  # keeping the tensor keeps its id unique
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
        copy.record_stream(current)  # so that its memory is not reused too early
        return copy
