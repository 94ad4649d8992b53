"""A faster, equivalent forward pass for PEFT's LoRA layers.

PEFT computes ``base(x) + B(A(dropout(x))) * scaling`` and writes the product, the scaled product
and the sum to memory. Here the small matrix B is scaled instead, and the product is added to
``base(x)`` while it is computed.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipft.models.dropout import RowDropout, RowMasks


def use_fast_adapters(tower: nn.Module, p: float, device: torch.device) -> RowMasks | None:
    """Replace the forward pass of a tower's adapters, and replace their dropout by ``RowDropout``.

    Returns:
        The masks of all these dropouts, or None if nothing is dropped.
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
    # Flatten the rows first: adding in place to a view would make autograd copy it
    out, scaling = layer.base_layer(x.flatten(0, -2)), layer.scaling[name]
    dropout, kept = layer.lora_dropout[name], x
    if layer.training and isinstance(dropout, RowDropout):
        kept, scaling = dropout.zero(x), scaling * dropout.masks.scale
    reduced = functional.linear(kept.flatten(0, -2), layer.lora_A[name].weight)
    up = layer.lora_B[name].weight * scaling
    added: Tensor = out.addmm_(reduced, up.T.to(out.dtype))  # autocast does not cast here
    return added.view(*x.shape[:-1], -1)
