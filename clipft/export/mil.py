"""Runs a program of Core ML (MIL) with torch, to check it on systems without Core ML.

Only the operations in the towers are implemented. A program with another operation is refused,
because it could not be checked.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_FLOATS = {"fp16": torch.float16, "fp32": torch.float32, "bool": torch.bool}
"""The dtypes of results. All other results are integers, which become int64 for torch."""
_GELU = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}


def run(function: Any, inputs: Tensor) -> Tensor:
    """Compute a function of a program.

    Args:
        function: a function of ``coremltools`` with one input and one output.
        inputs: its input.

    Returns:
        Its output in float32.

    Raises:
        ValueError: the function has an operation that is not implemented here.
    """
    from coremltools.converters.mil.mil.types import builtin_to_string

    (given,) = function.inputs.values()
    values: dict[str, Any] = {given.name: inputs}
    for operation in function.operations:
        (returned,) = operation.outputs
        if operation.op_type == "const":
            values[returned.name] = _constant(returned.val)
            continue
        compute = _OPERATIONS.get(operation.op_type)
        if compute is None:
            raise ValueError(f"clipft does not know its operation {operation.op_type}")
        named = {n: _value(v, values) for n, v in operation.inputs.items() if v is not None}
        dtype = _FLOATS.get(builtin_to_string(returned.dtype), torch.int64)
        values[returned.name] = compute(**named).to(dtype)
    found: Tensor = values[function.outputs[0].name]
    return found.float()


def _value(variable: Any, values: dict[str, Any]) -> Any:
    if isinstance(variable, list | tuple):
        return [_value(each, values) for each in variable]
    return values[variable.name]


def _constant(value: Any) -> Any:
    """Turn an array into a tensor; return a number or a string unchanged."""
    if not isinstance(value, np.ndarray):
        return value.item() if isinstance(value, np.generic) else value
    tensor = torch.from_numpy(np.ascontiguousarray(value))
    return tensor.long() if tensor.dtype in (torch.int32, torch.int16) else tensor


def _layer_norm(
    x: Tensor, axes: Tensor, epsilon: float, gamma: Tensor | None = None, beta: Tensor | None = None
) -> Tensor:
    shape = [x.shape[axis] for axis in axes.tolist()]
    return functional.layer_norm(x, shape, gamma, beta, epsilon)


def _convolution(
    x: Tensor,
    weight: Tensor,
    strides: Tensor,
    pad_type: str,
    pad: Tensor,
    dilations: Tensor,
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    if pad_type != "valid":
        raise ValueError(f"a convolution with padding {pad_type} is not known")
    return functional.conv2d(
        x, weight, bias, strides.tolist(), dilation=dilations.tolist(), groups=groups
    )


def _matrix_product(
    x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False
) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _slice(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    def given(mask: Tensor | None, axis: int) -> bool:
        return mask is not None and bool(mask[axis])

    where: list[Any] = []
    for axis in range(x.ndim):
        first, last = int(begin[axis]), int(end[axis])
        if given(squeeze_mask, axis):
            where.append(first)
        else:
            step = 1 if stride is None else int(stride[axis])
            where.append(
                slice(
                    None if given(begin_mask, axis) else first,
                    None if given(end_mask, axis) else last,
                    step,
                )
            )
    chosen: Tensor = x[tuple(where)]
    return chosen


def _gather(x: Tensor, indices: Any, axis: int = 0, **others: Any) -> Tensor:
    if others.get("batch_dims"):
        raise ValueError("a gather with batch_dims is not known")
    chosen: Tensor = torch.as_tensor(indices).long()
    shape = (*x.shape[:axis], *chosen.shape, *x.shape[axis + 1 :])
    return x.index_select(axis, chosen.flatten()).reshape(shape)


def _expanded(x: Any, axes: list[int]) -> Tensor:
    expanded: Tensor = torch.as_tensor(x)
    rank = expanded.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        expanded = expanded.unsqueeze(axis)
    return expanded


def _dequantized(quantized_data: Tensor, zero_point: Any, scale: Any, axis: int) -> Tensor:
    def along(value: Any) -> Tensor:
        tensor: Tensor = torch.as_tensor(value).float()
        shape = [-1 if dim == axis else 1 for dim in range(quantized_data.ndim)]
        return tensor.reshape(shape) if tensor.ndim else tensor

    return (quantized_data.float() - along(zero_point)) * along(scale)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "maximum": lambda x, y: torch.maximum(torch.as_tensor(x), torch.as_tensor(y)),
    "minimum": lambda x, y: torch.minimum(torch.as_tensor(x), torch.as_tensor(y)),
    "equal": lambda x, y: x == y,
    "not_equal": lambda x, y: x != y,
    "greater": lambda x, y: x > y,
    "greater_equal": lambda x, y: x >= y,
    "less": lambda x, y: x < y,
    "less_equal": lambda x, y: x <= y,
    "logical_and": lambda x, y: x & y,
    "logical_not": lambda x: ~x,
    "select": lambda cond, a, b: torch.where(cond, a, b),
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta),
    "sqrt": lambda x: x.sqrt(),
    "sigmoid": lambda x: x.sigmoid(),
    "gelu": lambda x, mode: functional.gelu(x, approximate=_GELU[mode]),
    "softmax": lambda x, axis: x.softmax(axis),
    "layer_norm": _layer_norm,
    "linear": lambda x, weight, bias=None: functional.linear(x, weight, bias),
    "matmul": _matrix_product,
    "conv": _convolution,
    "reduce_sum": lambda x, axes, keep_dims: x.sum(axes.tolist(), keepdim=keep_dims),
    "reduce_argmax": lambda x, axis, keep_dims, **_: x.argmax(axis, keepdim=keep_dims),
    "reduce_l2_norm": lambda x, axes, keep_dims: x.norm(dim=axes.tolist(), keepdim=keep_dims),
    "cumsum": lambda x, axis, **_: x.cumsum(axis),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
    "transpose": lambda x, perm: x.permute(perm.tolist()),
    "expand_dims": lambda x, axes: _expanded(x, axes.tolist()),
    "squeeze": lambda x, axes: x.squeeze(tuple(axes.tolist())),
    "tile": lambda x, reps: x.tile(tuple(reps.tolist())),
    "concat": lambda values, axis, **_: torch.cat([torch.as_tensor(v) for v in values], axis),
    "slice_by_index": _slice,
    "gather": _gather,
    "gather_along_axis": lambda x, indices, axis, **_: x.gather(axis, indices.long()),
    "cast": lambda x, dtype: torch.as_tensor(x),  # ``run`` casts every result
    "identity": lambda x: x,
    "constexpr_affine_dequantize": _dequantized,
}
