"""LoRA with less work: PEFT's layers, whose forward pass is replaced by an equal one.

PEFT computes ``base(x) + B(A(dropout(x))) * scaling`` and writes the product, the scaled product
and the sum to memory. Here the scaling is part of the small matrix B, and the product is added to
``base(x)`` while it is computed.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipft.models.dropout import RowDropout, RowMasks


def use_fast_adapters(tower: nn.Module, p: float, device: torch.device) -> RowMasks | None:
    """Replace the forward pass of a tower's adapters, and their dropout by ``RowDropout``.

    Returns:
        The masks of those dropouts, or None if nothing is dropped.
    """
    layers: list[Any] = [layer for layer in tower.modules() if hasattr(layer, "lora_dropout")]
    masks = RowMasks(p, device) if p and layers else None
    for layer in layers:
        (name,) = layer.lora_A
        if masks:
            layer.lora_dropout[name] = RowDropout(layer.in_features, masks)
        if not layer.lora_variant:  # DoRA needs PEFT's own forward pass
            layer.forward = partial(_adapted, layer, type(layer).forward, name)
    return masks


def _adapted(layer: Any, original: Any, name: str, x: Tensor) -> Tensor:
    if layer.disable_adapters or layer.merged:
        plain: Tensor = original(layer, x)
        return plain
    out, scaling = layer.base_layer(x), layer.scaling[name]
    dropout = layer.lora_dropout[name]
    if layer.training and isinstance(dropout, RowDropout):
        x, scaling = dropout.zero(x), scaling * dropout.masks.scale
    reduced = functional.linear(x, layer.lora_A[name].weight)
    up = layer.lora_B[name].weight * scaling
    sum_: Tensor = torch.addmm(out.flatten(0, -2), reduced.flatten(0, -2), up.T)
    return sum_.view_as(out)
