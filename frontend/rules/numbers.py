"""What operators compute, in numpy, and how their arguments are read.

A function takes the inputs as arrays (None for an omitted one) and the attributes, and returns the outputs. Semantics
follow the ONNX operator specification, opset 13 and later; the attribute forms of older opsets are accepted (axes, starts,
ends).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

Array = NDArray[Any]
Attributes = Mapping[str, Any]
Inputs = Sequence[Array | None]
Evaluator = Callable[[Inputs, Attributes], Sequence[Array]]
FOREVER = 1 << 62
"""Slices of ATen end at about this number where they go to the end."""
VALUE_LIMIT = 4096
"""Tensors with more elements than this are data, not shape arithmetic."""


def tensor_attribute(value: Any) -> Array:
    """Returns the array of a tensor attribute, whether graphsurgeon holds it as a constant or onnx as a proto."""
    return np.asarray(value.values if hasattr(value, "values") else onnx.numpy_helper.to_array(value))


def axes_of(inputs: Inputs, attributes: Attributes, position: int) -> list[int] | None:
    """Returns the ``axes`` of an operator, given as attribute (old opsets) or as the input at ``position``."""
    if "axes" in attributes:
        return [int(a) for a in attributes["axes"]]
    if len(inputs) > position and inputs[position] is not None:
        return [int(a) for a in np.atleast_1d(inputs[position])]  # type: ignore[arg-type]
    return None


def slices(
    rank: int, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None, steps: Sequence[int] | None
) -> list[slice]:
    """Returns one python slice per axis for the Slice operator's starts, ends, axes and steps."""
    result = [slice(None)] * rank
    axes = list(range(len(starts))) if axes is None else list(axes)
    steps = [1] * len(starts) if steps is None else list(steps)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        result[axis] = slice(int(start), None if step < 0 and end < -(2**31) else int(end), int(step))
    return result


def slice_arguments(
    inputs: Inputs, attributes: Attributes
) -> tuple[list[int], list[int], list[int] | None, list[int] | None] | None:
    """Returns starts, ends, axes and steps of a Slice node, or None where one of them is not known."""
    if "starts" in attributes:
        axes = attributes.get("axes")
        return list(attributes["starts"]), list(attributes["ends"]), None if axes is None else list(axes), None
    padded = [*inputs, None, None, None]
    if padded[1] is None or padded[2] is None:
        return None
    lists = [None if a is None else [int(v) for v in np.atleast_1d(a)] for a in padded[1:5]]
    return lists[0] or [], lists[1] or [], lists[2], lists[3]


def slice_bounds(attributes: Attributes) -> slice:
    """Returns what ATen's slice, or its narrow, takes."""
    first, last = int(attributes.get("start") or 0), attributes.get("end")
    if "length" in attributes:
        last = first + int(attributes["length"])
    return slice(first, FOREVER if last is None else int(last), int(attributes.get("step", 1)))


def resolve_reshape(target: Sequence[int], shape: Sequence[int], allow_zero: bool = False) -> list[int] | None:
    """Returns the output shape of Reshape, or None where the target does not fit the input's shape."""
    dims = [shape[i] if d == 0 and not allow_zero and i < len(shape) else int(d) for i, d in enumerate(target)]
    total = int(np.prod(shape, dtype=np.int64))
    if dims.count(-1) > 1:
        return None
    if -1 in dims:
        rest = int(np.prod([d for d in dims if d != -1], dtype=np.int64))
        if rest == 0 or total % rest:
            return None
        dims[dims.index(-1)] = total // rest
    return dims if int(np.prod(dims, dtype=np.int64)) == total else None


def cast(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    dtype = (
        onnx.helper.tensor_dtype_to_np_dtype(int(attributes["to"]))
        if not isinstance(attributes["to"], type)
        else (np.dtype(attributes["to"]))
    )
    return [np.asarray(inputs[0]).astype(dtype)]


def squeeze(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    axes = axes_of(inputs, attributes, 1)
    return [np.squeeze(np.asarray(inputs[0]), None if axes is None else tuple(axes))]


def unsqueeze(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    return [np.expand_dims(np.asarray(inputs[0]), tuple(axes_of(inputs, attributes, 1) or ()))]


def sliced(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    arguments = slice_arguments(inputs, attributes)
    data = np.asarray(inputs[0])
    if arguments is None:
        raise ValueError("unknown bounds")
    return [data[tuple(slices(data.ndim, *arguments))]]


def reshape(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    data, target = np.asarray(inputs[0]), np.asarray(inputs[1])
    dims = resolve_reshape([int(d) for d in target], data.shape, bool(attributes.get("allowzero", 0)))
    if dims is None:
        raise ValueError("target does not fit")
    return [data.reshape(dims)]


def divide(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    a, b = np.asarray(inputs[0]), np.asarray(inputs[1])
    if np.issubdtype(a.dtype, np.integer):
        if not np.all(b):
            raise ZeroDivisionError
        quotient = a // b  # rounds down; ONNX rounds towards zero
        return [np.asarray(quotient + ((quotient < 0) & (quotient * b != a)), a.dtype)]
    return [np.divide(a, b).astype(a.dtype)]


def parted(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    data, axis = np.asarray(inputs[0]), int(attributes.get("axis", 0))
    sizes = attributes.get("split")
    if sizes is None and len(inputs) > 1 and inputs[1] is not None:
        sizes = inputs[1]
    if sizes is None:
        raise ValueError("unknown split")
    return np.split(data, np.cumsum(np.asarray(sizes))[:-1], axis)


def constant_of_shape(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    value = tensor_attribute(attributes["value"]) if "value" in attributes else np.zeros(1, np.float32)
    return [np.full([int(d) for d in np.asarray(inputs[0])], value.reshape(-1)[0], value.dtype)]


def one_hot(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    indices, values = np.asarray(inputs[0]).astype(np.int64), np.asarray(inputs[2])
    depth, rank = int(np.asarray(inputs[1]).reshape(-1)[0]), np.asarray(inputs[0]).ndim + 1
    hot = np.arange(depth) == np.where(indices < 0, indices + depth, indices)[..., None]
    return [np.moveaxis(np.where(hot, values[1], values[0]), -1, int(attributes.get("axis", -1)) % rank)]


def counted(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    start, limit, delta = (np.asarray(i) for i in inputs[:3])
    return [np.arange(start.item(), limit.item(), delta.item()).astype(start.dtype)]


def reduced(function: Callable[..., Array]) -> Evaluator:
    def evaluate(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
        data, axes = np.asarray(inputs[0]), axes_of(inputs, attributes, 1)
        keep = bool(attributes.get("keepdims", 1))
        if not axes:
            if attributes.get("noop_with_empty_axes", 0):
                return [data]
            axes = None
        return [np.asarray(function(data, axis=None if axes is None else tuple(axes), keepdims=keep), data.dtype)]

    return evaluate


def expand(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    data, target = np.asarray(inputs[0]), tuple(int(d) for d in np.asarray(inputs[1]))
    return [np.broadcast_to(data, np.broadcast_shapes(data.shape, target))]


def elementwise(function: Callable[..., Any]) -> Evaluator:
    def evaluate(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
        return [np.asarray(function(*inputs))]

    return evaluate


def same_type(function: Callable[..., Any]) -> Evaluator:
    def evaluate(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
        return [np.asarray(function(*inputs)).astype(np.asarray(inputs[0]).dtype)]

    return evaluate


def folded(function: Callable[..., Any]) -> Evaluator:
    def evaluate(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
        result = np.asarray(inputs[0])
        for operand in inputs[1:]:
            result = np.asarray(function(result, operand))
        return [result]

    return evaluate


def norm(function: Callable[..., Array]) -> Evaluator:
    def evaluate(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
        data, axes = np.asarray(inputs[0]), axes_of(inputs, attributes, 1)
        if not axes and attributes.get("noop_with_empty_axes", 0):
            raise ValueError("releases differ in what that means")
        result = function(data, axis=tuple(axes) if axes else None, keepdims=bool(attributes.get("keepdims", 1)))
        return [np.asarray(result, data.dtype)]

    return evaluate


def gemm(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    a, b = np.asarray(inputs[0]), np.asarray(inputs[1])
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    result = np.asarray(attributes.get("alpha", 1.0), a.dtype) * (a @ b)
    if len(inputs) > 2 and inputs[2] is not None:
        result = result + np.asarray(attributes.get("beta", 1.0), a.dtype) * np.asarray(inputs[2])
    return [result]


def lp_normalization(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    x, axis, order = np.asarray(inputs[0]), int(attributes.get("axis", -1)), int(attributes.get("p", 2))
    length = np.linalg.norm(x, order, axis, keepdims=True) if x.ndim else np.abs(x)
    return [np.divide(x, length, out=np.zeros_like(x), where=length != 0)]


def clip(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    low, high = ([*inputs, None, None][i] for i in (1, 2))
    low, high = attributes.get("min", low), attributes.get("max", high)
    result = np.asarray(inputs[0])
    result = result if low is None else np.maximum(result, np.asarray(low, result.dtype))
    return [result if high is None else np.minimum(result, np.asarray(high, result.dtype))]


def unary(function: Callable[[Array], Array]) -> Evaluator:
    def evaluate(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
        return [np.asarray(function(np.asarray(inputs[0])))]

    return evaluate


def summed(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    return [sum((np.asarray(i) for i in inputs[1:]), np.asarray(inputs[0]))]
