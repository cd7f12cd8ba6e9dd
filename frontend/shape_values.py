"""Evaluating small ONNX operators in numpy: constant folding and shape arithmetic.

Exporters compute the targets of Reshape, Expand and Slice by chains of Shape, Gather, Concat and integer arithmetic.
The functions here run such chains on known values: to fold what is constant, to learn a target under given sizes of
the graph's inputs, and, after pruning, to see whether a target has followed the sizes by itself.

Each function takes the inputs as arrays (None for an omitted one) and the attributes, and returns the outputs. An
operator that is not in :data:`EVALUATORS` has no known value. Semantics follow the ONNX operator specification,
opset 13 and later, with the attribute forms of older opsets accepted where they differ (axes, starts, ends).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

Array = NDArray[Any]
Attributes = Mapping[str, Any]
Inputs = Sequence[Array | None]
Evaluator = Callable[[Inputs, Attributes], Sequence[Array]]
FOLD_LIMIT = 1 << 20
"""Nothing with more elements than this is computed, unless it is no larger than its largest input."""
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


def _cast(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    dtype = (
        onnx.helper.tensor_dtype_to_np_dtype(int(attributes["to"]))
        if not isinstance(attributes["to"], type)
        else (np.dtype(attributes["to"]))
    )
    return [np.asarray(inputs[0]).astype(dtype)]


def _squeeze(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    axes = axes_of(inputs, attributes, 1)
    return [np.squeeze(np.asarray(inputs[0]), None if axes is None else tuple(axes))]


def _unsqueeze(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    return [np.expand_dims(np.asarray(inputs[0]), tuple(axes_of(inputs, attributes, 1) or ()))]


def _slice(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    arguments = slice_arguments(inputs, attributes)
    data = np.asarray(inputs[0])
    if arguments is None:
        raise ValueError("unknown bounds")
    return [data[tuple(slices(data.ndim, *arguments))]]


def _reshape(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    data, target = np.asarray(inputs[0]), np.asarray(inputs[1])
    dims = resolve_reshape([int(d) for d in target], data.shape, bool(attributes.get("allowzero", 0)))
    if dims is None:
        raise ValueError("target does not fit")
    return [data.reshape(dims)]


def _divide(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    a, b = np.asarray(inputs[0]), np.asarray(inputs[1])
    if np.issubdtype(a.dtype, np.integer):
        if not np.all(b):
            raise ZeroDivisionError
        quotient = a // b  # rounds down; ONNX rounds towards zero
        return [np.asarray(quotient + ((quotient < 0) & (quotient * b != a)), a.dtype)]
    return [np.divide(a, b).astype(a.dtype)]


def _split(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    data, axis = np.asarray(inputs[0]), int(attributes.get("axis", 0))
    sizes = attributes.get("split")
    if sizes is None and len(inputs) > 1 and inputs[1] is not None:
        sizes = inputs[1]
    if sizes is None:
        raise ValueError("unknown split")
    return np.split(data, np.cumsum(np.asarray(sizes))[:-1], axis)


def _constant_of_shape(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    value = tensor_attribute(attributes["value"]) if "value" in attributes else np.zeros(1, np.float32)
    return [np.full([int(d) for d in np.asarray(inputs[0])], value.reshape(-1)[0], value.dtype)]


def _one_hot(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    indices, values = np.asarray(inputs[0]).astype(np.int64), np.asarray(inputs[2])
    depth, rank = int(np.asarray(inputs[1]).reshape(-1)[0]), np.asarray(inputs[0]).ndim + 1
    hot = np.arange(depth) == np.where(indices < 0, indices + depth, indices)[..., None]
    return [np.moveaxis(np.where(hot, values[1], values[0]), -1, int(attributes.get("axis", -1)) % rank)]


def _range(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    start, limit, delta = (np.asarray(i) for i in inputs[:3])
    return [np.arange(start.item(), limit.item(), delta.item()).astype(start.dtype)]


def _reduce(function: Callable[..., Array]) -> Evaluator:
    def evaluate(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
        data, axes = np.asarray(inputs[0]), axes_of(inputs, attributes, 1)
        keep = bool(attributes.get("keepdims", 1))
        if not axes:
            if attributes.get("noop_with_empty_axes", 0):
                return [data]
            axes = None
        return [np.asarray(function(data, axis=None if axes is None else tuple(axes), keepdims=keep), data.dtype)]

    return evaluate


def _expand(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
    data, target = np.asarray(inputs[0]), tuple(int(d) for d in np.asarray(inputs[1]))
    return [np.broadcast_to(data, np.broadcast_shapes(data.shape, target))]


def _elementwise(function: Callable[..., Any]) -> Evaluator:
    def evaluate(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
        return [np.asarray(function(*inputs))]

    return evaluate


def _same_type(function: Callable[..., Any]) -> Evaluator:
    def evaluate(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
        return [np.asarray(function(*inputs)).astype(np.asarray(inputs[0]).dtype)]

    return evaluate


def _fold(function: Callable[..., Any]) -> Evaluator:
    def evaluate(inputs: Inputs, attributes: Attributes) -> Sequence[Array]:
        result = np.asarray(inputs[0])
        for operand in inputs[1:]:
            result = np.asarray(function(result, operand))
        return [result]

    return evaluate


EVALUATORS: dict[str, Evaluator] = {
    "Identity": _elementwise(lambda x: x),
    "Cast": _cast,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Slice": _slice,
    "Reshape": _reshape,
    "Split": _split,
    "OneHot": _one_hot,
    "Range": _range,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Gather": lambda i, a: [np.take(np.asarray(i[0]), np.asarray(i[1]), axis=int(a.get("axis", 0)))],
    "Concat": lambda i, a: [np.concatenate([np.asarray(x) for x in i], axis=int(a["axis"]))],
    "Transpose": lambda i, a: [np.transpose(np.asarray(i[0]), a.get("perm"))],
    "Flatten": lambda i, a: [
        np.asarray(i[0]).reshape(int(np.prod(np.asarray(i[0]).shape[: int(a.get("axis", 1))], dtype=np.int64)), -1)
    ],
    "Tile": lambda i, a: [np.tile(np.asarray(i[0]), tuple(int(r) for r in np.asarray(i[1])))],
    "Where": _elementwise(np.where),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "Add": _same_type(np.add),
    "Sub": _same_type(np.subtract),
    "Mul": _same_type(np.multiply),
    "Div": _divide,
    "Mod": lambda i, a: [(np.fmod if a.get("fmod", 0) else np.mod)(np.asarray(i[0]), np.asarray(i[1]))],
    "Pow": _same_type(np.power),
    "Sqrt": _same_type(np.sqrt),
    "Reciprocal": _same_type(np.reciprocal),
    "Neg": _same_type(np.negative),
    "Abs": _same_type(np.abs),
    "Floor": _same_type(np.floor),
    "Ceil": _same_type(np.ceil),
    "Min": _fold(np.minimum),
    "Max": _fold(np.maximum),
    "Equal": _elementwise(np.equal),
    "Greater": _elementwise(np.greater),
    "GreaterOrEqual": _elementwise(np.greater_equal),
    "Less": _elementwise(np.less),
    "LessOrEqual": _elementwise(np.less_equal),
    "And": _elementwise(np.logical_and),
    "Or": _elementwise(np.logical_or),
    "Not": _elementwise(np.logical_not),
}


def result_elements(op: str, inputs: Inputs, attributes: Attributes) -> int:
    """Returns how many elements the results of an operator on known inputs have, at the most; nothing is computed.

    A few numbers can ask for more memory than there is: by ConstantOfShape, Expand, Tile, Range, OneHot, Pad and Resize,
    by a Gather of many rows, by a product, and by any two operands that are broadcast. What does not fit together counts
    as nothing: it has no result.
    """
    given = [np.asarray(i) for i in inputs if i is not None]
    largest = max((i.size for i in given), default=0)
    try:
        return max(largest, _grown(op, [None if i is None else np.asarray(i) for i in inputs], attributes))
    except (ValueError, IndexError, TypeError, KeyError, ZeroDivisionError):
        return largest
    except OverflowError:  # an infinite number of steps
        return 1 << 62


def _grown(op: str, inputs: Sequence[Any], attributes: Attributes) -> int:
    """Returns the elements of the result of an operator that may be larger than all it reads; 0 for the others."""
    first = inputs[0]
    if op == "ConstantOfShape":
        return math.prod(_integers(first))
    if op == "Expand":
        return _broadcast(first.shape, _integers(inputs[1]))
    if op == "Tile":
        return int(first.size) * math.prod(_integers(inputs[1]))
    if op == "Range":
        start, limit, delta = (i.item() for i in inputs[:3])
        return int(max(0, math.ceil((limit - start) / delta)))
    if op == "OneHot":
        return int(first.size) * int(inputs[1].reshape(-1)[0])
    if op == "Gather":
        return int(int(first.size) // max(1, first.shape[int(attributes.get("axis", 0))]) * int(inputs[1].size))
    if op == "Pad":
        pads = _integers(attributes["pads"] if "pads" in attributes else inputs[1])
        axes = range(first.ndim) if len(inputs) < 4 or inputs[3] is None else _integers(inputs[3])
        added = dict.fromkeys(range(first.ndim), 0)
        for i, axis in enumerate(axes):
            added[axis % first.ndim] = pads[i] + pads[i + len(pads) // 2]
        return math.prod(max(0, n + added[axis]) for axis, n in enumerate(first.shape))
    if op in ("Resize", "Upsample"):
        sizes = _integers(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else []
        scales = attributes.get("scales", inputs[-1] if not sizes else [])
        return math.prod(sizes) if sizes else math.ceil(int(first.size) * math.prod(float(s) for s in np.ravel(scales)))
    if op == "Concat":
        return sum(int(i.size) for i in inputs)
    if op == "MatMul" and min(first.ndim, inputs[1].ndim) > 1:
        return int(
            _broadcast((*first.shape[:-2], 1, 1), (*inputs[1].shape[:-2], 1, 1)) * first.shape[-2] * inputs[1].shape[-1]
        )
    if op == "Gemm":
        return int(first.shape[attributes.get("transA", 0)]) * int(inputs[1].shape[1 - attributes.get("transB", 0)])
    return _broadcast(*(i.shape for i in inputs if i is not None)) if op in POINTWISE else 0


def _integers(values: Any) -> list[int]:
    return [int(v) for v in np.ravel(values)]


def _broadcast(*shapes: Sequence[int]) -> int:
    rank = max(map(len, shapes))
    aligned = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return math.prod(max(sizes) if min(sizes) else 0 for sizes in zip(*aligned, strict=True))


POINTWISE = frozenset(
    "Where Add Sub Mul Div Mod Pow Min Max Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor PRelu".split()
)
"""Operators whose operands are broadcast."""


def evaluate(op: str, inputs: Inputs, attributes: Attributes) -> list[Array] | None:
    """Returns the outputs of a standard operator on known inputs, or None where it cannot be evaluated here.

    What has more than `FOLD_LIMIT` elements, and more than all that it reads, is not made.
    """
    evaluator = EVALUATORS.get(op)
    largest = max((np.size(i) for i in inputs if i is not None), default=0)
    if evaluator is None or result_elements(op, inputs, attributes) > max(FOLD_LIMIT, largest):
        return None
    try:
        return [np.asarray(o) for o in evaluator(inputs, attributes)]
    except (ValueError, IndexError, TypeError, KeyError, ZeroDivisionError, FloatingPointError, OverflowError):
        return None
