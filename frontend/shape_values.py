"""Evaluating small ONNX operators in numpy: constant folding and shape arithmetic.

Exporters compute the targets of Reshape, Expand and Slice by chains of Shape, Gather, Concat and integer arithmetic.
The functions here run such chains on known values: to fold what is constant, to learn a target under given sizes of
the graph's inputs, and, after pruning, to see whether a target has followed the sizes by itself.

An operator without an evaluator in the table (`rules.operators`) has no known value.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from liar_opt.frontend.rules.numbers import Array, Attributes, Inputs
from liar_opt.frontend.rules.operators import operator
from liar_opt.frontend.rules.table import Trait

FOLD_LIMIT = 1 << 20
"""Nothing with more elements than this is computed, unless it is no larger than its largest input."""
MOST_ELEMENTS = 1 << 31
"""A constant that constants make may not have more elements: ONNX Runtime makes it as well, while it loads the model."""


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
    return _broadcast(*(i.shape for i in inputs if i is not None)) if operator("", op).traits & Trait.BROADCASTS else 0


def _integers(values: Any) -> list[int]:
    return [int(v) for v in np.ravel(values)]


def _broadcast(*shapes: Sequence[int]) -> int:
    rank = max(map(len, shapes))
    aligned = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return math.prod(max(sizes) if min(sizes) else 0 for sizes in zip(*aligned, strict=True))


def evaluate(op: str, inputs: Inputs, attributes: Attributes) -> list[Array] | None:
    """Returns the outputs of a standard operator on known inputs, or None where it cannot be evaluated here.

    What has more than `FOLD_LIMIT` elements, and more than all that it reads, is not made.
    """
    evaluator = operator("", op).evaluate
    largest = max((np.size(i) for i in inputs if i is not None), default=0)
    if evaluator is None or result_elements(op, inputs, attributes) > max(FOLD_LIMIT, largest):
        return None
    try:
        return [np.asarray(o) for o in evaluator(inputs, attributes)]
    except (ValueError, IndexError, TypeError, KeyError, ZeroDivisionError, FloatingPointError, OverflowError):
        return None
