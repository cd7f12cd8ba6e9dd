"""Small random graphs around a residual stream, each drawn from one seed: what nobody thought of when a rule was written.

A stream of tokens [b, s, d] runs through one to three blocks, feed-forward or attention, each spelled in one of the many
ways in which exporters and people write the same algebra; within feed-forward blocks stand operators that keep, mix, cut,
pad, reduce, look up or count the channels. Widths are small and differ, so that an axis taken for another one fails. A
graph that the ONNX checker or ONNX Runtime refuses is drawn again, from the same seed: a seed is always the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

Axis = int | str  # a width, or the name of a size that is open: b, s, or a product of them
Feeds = dict[str, np.ndarray]
FeedsOf = Callable[[int, int, int], Feeds]

VOCABULARY = 11
FIXED = {"b": 3, "s": 5}  # of the graphs whose sizes are not open
ATTEMPTS = 50
SAME = 1e-5  # of the largest output: how far two ways of computing it may lie apart
OPSETS = range(11, 24)


class Tensor(NamedTuple):
    """A name in the graph, and what lies along its axes."""

    name: str
    axes: tuple[Axis, ...]

    @property
    def width(self) -> int:
        """The size of the last axis, which is never open."""
        last = self.axes[-1]
        assert isinstance(last, int)
        return last


class Drawing:
    """A graph in the making: every method that spells an operation draws which spelling."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.opset = int(rng.integers(OPSETS.start, OPSETS.stop))
        self.fixed = self.chance(0.2)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.outputs: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.mask: str | None = None
        self._names = 0

    # -- the dice

    def chance(self, probability: float) -> bool:
        """Returns true so often."""
        return bool(self.rng.random() < probability)

    def pick(self, *options: Any) -> Any:
        """Returns one of the options; one that is written twice is twice as likely."""
        return options[int(self.rng.integers(len(options)))]

    def between(self, low: int, high: int) -> int:
        """Returns an integer of the closed interval."""
        return int(self.rng.integers(low, high + 1))

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        """Returns float32 numbers of a normal distribution."""
        return np.asarray(self.rng.standard_normal(shape) * scale, np.float32)

    # -- nodes and constants

    def fresh(self, stem: str) -> str:
        """Returns a name that is not in use."""
        self._names += 1
        return f"{stem}_{self._names}"

    def nodes_of(self, op: str, *inputs: str, count: int, domain: str = "", **attributes: Any) -> list[str]:
        """Appends a node with so many outputs; returns their names."""
        outputs = [self.fresh(op.lower()) for _ in range(count)]
        self.nodes.append(helper.make_node(op, inputs, outputs, self.fresh(f"node_{op}"), domain=domain, **attributes))
        return outputs

    def node(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Appends a node with one output; returns its name."""
        return self.nodes_of(op, *inputs, count=1, domain=domain, **attributes)[0]

    def constant(self, value: Any, stem: str = "constant") -> str:
        """Returns the name of a constant: an initializer, or at times the output of a Constant node."""
        array = np.asarray(value)
        name = self.fresh(stem)
        tensor = numpy_helper.from_array(array.astype(np.float32) if array.dtype == np.float64 else array, name)
        if self.chance(0.15):
            self.nodes.append(helper.make_node("Constant", [], [name], self.fresh("node_Constant"), value=tensor))
        else:
            self.initializers.append(tensor)
        return name

    def integers(self, *values: int) -> str:
        """Returns the name of a constant vector of integers."""
        return self.constant(np.asarray(values, np.int64), "integers")

    def weight(self, rows: int, columns: int) -> str:
        """Returns a matrix; at times one that another product has already, at times one that is a graph output too."""
        same = [w.name for w in self.weights if w.axes == (rows, columns)]
        if same and self.chance(0.15):
            return str(self.pick(*same))
        name = self.constant(self.normal(rows, columns, scale=rows**-0.5), "weight")
        self.weights.append(Tensor(name, (rows, columns)))
        if self.chance(0.03):
            self.outputs.append(self.weights[-1])
        return name

    # -- operators whose spelling depends on the opset

    def transpose(self, x: Tensor, *order: int) -> Tensor:
        """Returns the tensor with its axes in another order."""
        return Tensor(self.node("Transpose", x.name, perm=order), tuple(x.axes[i] for i in order))

    def with_axes(self, op: str, x: str, axes: Sequence[int], since: int, **attributes: Any) -> str:
        """Appends an operator whose axes are an input since an opset, and an attribute before."""
        if self.opset >= since:
            return self.node(op, x, self.integers(*axes), **attributes)
        return self.node(op, x, axes=list(axes), **attributes)

    def reduced(self, op: str, x: str, axes: Sequence[int]) -> str:
        """Reduces over axes, which are kept with size one."""
        return self.with_axes(op, x, axes, 13 if op == "ReduceSum" else 18, keepdims=1)

    def unsqueezed(self, x: str, *axes: int) -> str:
        """Adds axes of size one."""
        return self.with_axes("Unsqueeze", x, axes, 13)

    def split(self, x: Tensor, axis: int, sizes: Sequence[int]) -> list[Tensor]:
        """Cuts a tensor into parts along an axis (not negative): Split with or without sizes, or Slices."""
        spelling = self.pick("sizes", "equal" if len(set(sizes)) == 1 else "sizes", "slices")
        if spelling == "slices":
            ends = np.cumsum(sizes).tolist()
            names = [self.sliced(x.name, end - size, end, axis) for end, size in zip(ends, sizes, strict=True)]
        elif spelling == "equal":
            counted: dict[str, Any] = {"num_outputs": len(sizes)} if self.opset >= 18 else {}
            names = self.nodes_of("Split", x.name, count=len(sizes), axis=axis, **counted)
        elif self.opset >= 13:
            names = self.nodes_of("Split", x.name, self.integers(*sizes), count=len(sizes), axis=axis)
        else:
            names = self.nodes_of("Split", x.name, count=len(sizes), axis=axis, split=list(sizes))
        return [Tensor(name, (*x.axes[:axis], size, *x.axes[axis + 1 :])) for name, size in zip(names, sizes, strict=True)]

    def sliced(self, x: str, start: int, end: int, axis: int, step: int = 1) -> str:
        """Returns a Slice of one axis."""
        bounds = [self.integers(start), self.integers(end), self.integers(axis)]
        return self.node("Slice", x, *bounds, *([self.integers(step)] if step != 1 else []))

    # -- sizes and reshapes

    def extent(self, x: Tensor, axis: int) -> str:
        """Returns the size of an axis as a vector of one element, read from the tensor's shape."""
        shape = self.node("Shape", x.name)
        spelling = self.pick("vector", "scalar", "slice")
        if spelling == "vector":
            return self.node("Gather", shape, self.integers(axis), axis=0)
        if spelling == "slice":
            return self.node("Slice", shape, self.integers(axis), self.integers(axis + 1))
        return self.unsqueezed(self.node("Gather", shape, self.constant(np.int64(axis)), axis=0), 0)

    def size(self, axis: Axis, sources: Sequence[Tensor]) -> str:
        """Returns a size as a vector of one element: a constant, read, or computed of a width that it divides."""
        places = [(t, i, a) for t in sources for i, a in enumerate(t.axes)]
        equal = [(t, i) for t, i, a in places if a == axis]
        if isinstance(axis, str):
            return self.extent(*self.pick(*equal))
        if equal and self.chance(0.3):
            return self.extent(*self.pick(*equal))
        related = [(t, i, a) for t, i, a in places if isinstance(a, int) and a != axis and (a % axis == 0 or axis % a == 0)]
        if related and self.chance(0.4):
            tensor, i, other = self.pick(*related)
            op, factor = ("Div", other // axis) if other > axis else ("Mul", axis // other)
            return self.node(op, self.extent(tensor, i), self.integers(factor))
        return self.integers(axis)

    def reshape(self, x: Tensor, target: Sequence[Axis | tuple[Axis, ...]], *more: Tensor) -> Tensor:
        """Returns the tensor in another shape, written with constants, 0, -1 and sizes that are computed.

        Args:
            x: what is reshaped.
            target: the axes of the result; a tuple is the product of some.
            more: tensors whose shapes may be read beside that of ``x``.
        """
        sources = (x, *more)
        inferred = self.between(0, len(target) - 1) if self.chance(0.5) else None
        parts: list[int | str] = []
        for i, part in enumerate(target):
            if i == inferred:
                parts.append(-1)
            elif i < len(x.axes) and x.axes[i] == part and self.chance(0.3):
                parts.append(0)
            elif isinstance(part, int) and self.chance(0.6):
                parts.append(part)
            elif isinstance(part, tuple):
                factors = [self.size(factor, sources) for factor in part]
                result = factors[0]
                for factor in factors[1:]:
                    result = self.node("Mul", result, factor)
                parts.append(result)
            elif self.fixed and part in FIXED:
                parts.append(FIXED[str(part)])
            else:
                parts.append(self.size(part, sources))
        axes = tuple(_product(part) if isinstance(part, tuple) else part for part in target)
        numbers = [part for part in parts if isinstance(part, int)]
        if len(numbers) == len(parts):
            return Tensor(self.node("Reshape", x.name, self.integers(*numbers)), axes)
        vectors = [self.integers(part) if isinstance(part, int) else part for part in parts]
        return Tensor(self.node("Reshape", x.name, self.node("Concat", *vectors, axis=0)), axes)

    # -- products

    def product(self, x: Tensor, width: int) -> Tensor:
        """Returns x [..., n] times a weight [n, width], in one of its spellings, often with a bias."""
        spellings = [_matmul, _matmul, _transposed_weight, _gemm, _fused]
        spellings += [_einsum] if self.opset >= 12 else []
        spellings += [_convolution, _weight_on_the_left] if len(x.axes) == 3 else []
        y = Tensor(self.pick(*spellings)(self, x, width), (*x.axes[:-1], width))
        if not self.chance(0.5):
            return y
        bias = self.constant(self.pick(self.normal(width, scale=0.3), self.normal(width, scale=0.3), self.normal(1)))
        return y._replace(name=self.node("Add", *self.pick((y.name, bias), (bias, y.name))))


def _product(axes: tuple[Axis, ...]) -> Axis:
    """Returns the axis that several make together: a width, or the name of a size that is open."""
    numbers = [a for a in axes if isinstance(a, int)]
    return prod(numbers) if len(numbers) == len(axes) else "*".join(map(str, axes))


# -- spellings of a product: x [..., n] -> [..., m]


def _matmul(g: Drawing, x: Tensor, m: int) -> str:
    return g.node("MatMul", x.name, g.weight(x.width, m))


def _transposed_weight(g: Drawing, x: Tensor, m: int) -> str:
    return g.node("MatMul", x.name, g.node("Transpose", g.weight(m, x.width), perm=[1, 0]))


def _gemm(g: Drawing, x: Tensor, m: int) -> str:
    lead = x.axes[:-1]
    flat = g.reshape(x, (lead, x.width))
    trans_a, trans_b = g.chance(0.3), g.chance(0.5)
    weight = g.weight(m, x.width) if trans_b else g.weight(x.width, m)
    left = g.transpose(flat, 1, 0).name if trans_a else flat.name
    bias = [g.constant(g.pick(g.normal(m), g.normal(1, m), g.normal(1)))] if g.chance(0.6) else []
    numbers: dict[str, Any] = {"alpha": float(g.pick(1, 1, 0.5, 2)), "beta": float(g.pick(1, 1, 0.5, 3))}
    y = g.node("Gemm", left, weight, *bias, transA=int(trans_a), transB=int(trans_b), **numbers)
    return g.reshape(Tensor(y, (flat.axes[0], m)), (*lead, m), x).name


def _fused(g: Drawing, x: Tensor, m: int) -> str:
    transposed = g.chance(0.5)
    weight = g.weight(m, x.width) if transposed else g.weight(x.width, m)
    alpha = float(g.pick(1, 0.5, 2))
    return g.node("FusedMatMul", x.name, weight, domain="com.microsoft", transB=int(transposed), alpha=alpha)


def _einsum(g: Drawing, x: Tensor, m: int) -> str:
    lead = "bstu"[: len(x.axes) - 1]
    spelling = g.pick("named", "dots", "left")
    if spelling == "named":
        return g.node("Einsum", x.name, g.weight(x.width, m), equation=f"{lead}n,nm->{lead}m")
    if spelling == "dots":
        return g.node("Einsum", x.name, g.weight(m, x.width), equation="...n,mn->...m")
    return g.node("Einsum", g.weight(x.width, m), x.name, equation=f"nm, {lead}n -> {lead}m")


def _convolution(g: Drawing, x: Tensor, m: int) -> str:
    weight = g.constant(g.normal(m, x.width, 1, scale=x.width**-0.5), "kernel")
    bias = [g.constant(g.normal(m))] if g.chance(0.5) else []
    y = g.node("Conv", g.transpose(x, 0, 2, 1).name, weight, *bias, kernel_shape=[1])
    return g.node("Transpose", y, perm=[0, 2, 1])


def _weight_on_the_left(g: Drawing, x: Tensor, m: int) -> str:
    y = g.node("MatMul", g.weight(m, x.width), g.transpose(x, 0, 2, 1).name)
    if g.chance(0.3):
        y = g.node("Add", y, g.constant(g.normal(m, 1)))
    return g.node("Transpose", y, perm=[0, 2, 1])


# -- operators between two products: x [b, s, h] -> [b, s, h']


def _activation(g: Drawing, x: Tensor) -> Tensor:
    """Acts on each number alone; Gelu and SiLU are written out."""
    kind = g.pick("Relu", "Tanh", "LeakyRelu", "Abs", "Clip", "gelu", "silu")
    if kind == "gelu":
        inside = g.node("Erf", g.node("Div", x.name, g.constant(np.float32(2**0.5))))
        doubled = g.node("Mul", x.name, g.node("Add", inside, g.constant(np.float32(1))))
        return x._replace(name=g.node("Mul", doubled, g.constant(np.full(1, 0.5, np.float32))))
    if kind == "silu":
        return x._replace(name=g.node("Mul", x.name, g.node("Sigmoid", x.name)))
    bounds = (g.constant(np.float32(-1)), g.constant(np.float32(1.5))) if kind == "Clip" else ()
    return x._replace(name=g.node(kind, x.name, *bounds))


def _scaled(g: Drawing, x: Tensor) -> Tensor:
    """Has one number of its own for each channel, or one for all."""
    numbers = g.constant(g.normal(*g.pick((x.width,), (1, 1, x.width), (1,), ())))
    return x._replace(name=g.node(g.pick("Add", "Mul", "Sub", "Max"), *g.pick((x.name, numbers), (numbers, x.name))))


def _where(g: Drawing, x: Tensor) -> Tensor:
    positive = g.node("Greater", x.name, g.constant(np.float32(0)))
    numbers = g.pick(np.float32(0.1), g.normal(x.width), None)
    other = g.node("Neg", x.name) if numbers is None else g.constant(numbers)
    return x._replace(name=g.node("Where", positive, x.name, other))


def _mixed(g: Drawing, x: Tensor) -> Tensor:
    return g.product(x, g.between(4, 13))


def _softmax(g: Drawing, x: Tensor) -> Tensor:
    return x._replace(name=g.node("Softmax", x.name, axis=-1 if g.opset < 13 else g.pick(-1, 1)))


def _cumulative(g: Drawing, x: Tensor) -> Tensor:
    return x._replace(name=g.node("CumSum", x.name, g.constant(np.int64(g.pick(1, 1, 2)))))


def _depthwise(g: Drawing, x: Tensor) -> Tensor:
    """Is a convolution over the tokens in which each channel is alone."""
    kernel = g.constant(g.normal(x.width, 1, 3), "kernel")
    attributes: dict[str, Any] = {"kernel_shape": [3], "pads": [1, 1], "group": x.width}
    y = g.node("Conv", g.transpose(x, 0, 2, 1).name, kernel, **attributes)
    return x._replace(name=g.node("Transpose", y, perm=[0, 2, 1]))


def _over_tokens(g: Drawing, x: Tensor) -> Tensor:
    """Attends to itself, without heads and without weights."""
    scores = g.node("MatMul", x.name, g.transpose(x, 0, 2, 1).name)
    likely = g.node("Softmax", g.node("Mul", scores, g.constant(np.float32(0.1))), axis=2)
    return x._replace(name=g.node("MatMul", likely, x.name))


def _cut(g: Drawing, x: Tensor) -> Tensor:
    """Leaves channels at one end, every second one, or takes them from the back."""
    width = g.between(2, x.width - 1)
    spelling = g.pick("first", "last", "stride", "back")
    if spelling == "first":
        return Tensor(g.sliced(x.name, 0, width, 2), (*x.axes[:2], width))
    if spelling == "last":
        return Tensor(g.sliced(x.name, -width, 2**63 - 1, -1), (*x.axes[:2], width))
    if spelling == "stride":
        return Tensor(g.sliced(x.name, 1, 2**31 - 1, 2, 2), (*x.axes[:2], x.width // 2))
    return x._replace(name=g.sliced(x.name, -1, -(2**31), 2, -1))


def _split_and_joined(g: Drawing, x: Tensor) -> Tensor:
    """Cuts the channels into three parts and joins some of them in another order."""
    first = g.between(1, x.width - 2)
    second = g.between(1, x.width - first - 1)
    parts = g.split(x, 2, [first, second, x.width - first - second])
    chosen = [parts[i] for i in g.rng.permutation(3)[: g.between(2, 3)]]
    joined = g.node("Concat", *(_activation(g, p).name if g.chance(0.3) else p.name for p in chosen), axis=g.pick(-1, 2))
    return Tensor(joined, (*x.axes[:2], sum(p.width for p in chosen)))


def _joined_with_itself(g: Drawing, x: Tensor) -> Tensor:
    if g.chance(0.5):
        doubled = g.node("Concat", x.name, _activation(g, x).name, axis=2)
    else:
        doubled = g.node("Tile", x.name, g.integers(1, 1, 2))
    return Tensor(doubled, (*x.axes[:2], 2 * x.width))


def _padded(g: Drawing, x: Tensor) -> Tensor:
    """Gets channels of zeros; since opset 18 the axes may be named, in any order."""
    before, after = g.between(0, 2), g.between(0, 2)
    if g.opset >= 18 and g.chance(0.6):
        axes = g.pick((2,), (2, 1), (1, 2), (-1, 0))
        pads = [(before, after) if axis in (2, -1) else (0, 0) for axis in axes]
    else:
        axes, pads = (), [(0, 0), (0, 0), (before, after)]
    flat = g.integers(*(p[0] for p in pads), *(p[1] for p in pads))
    named = ["", g.integers(*axes)] if axes else []
    return Tensor(g.node("Pad", x.name, flat, *named), (*x.axes[:2], x.width + before + after))


def _centred(g: Drawing, x: Tensor) -> Tensor:
    """Is put against its mean or largest value, over the channels or over the tokens."""
    level = g.reduced(g.pick("ReduceMean", "ReduceMax", "ReduceSum"), x.name, [g.pick(1, 1, 2, -1)])
    return x._replace(name=g.node(g.pick("Sub", "Add"), x.name, level))


def _looked_up(g: Drawing, x: Tensor) -> Tensor:
    """Takes channels by their numbers."""
    width = g.between(2, x.width + 1)
    numbers = g.rng.integers(0, x.width, width).tolist() if g.chance(0.4) else g.rng.permutation(x.width)[:width].tolist()
    return Tensor(g.node("Gather", x.name, g.integers(*numbers), axis=2), (*x.axes[:2], len(numbers)))


def _counted(g: Drawing, x: Tensor) -> Tensor:
    """Has the number of a channel, or of a place, as data."""
    kind = g.pick("argmax", "topk", "pooled", "elements")
    if kind == "pooled":
        pooled = g.nodes_of("MaxPool", g.transpose(x, 0, 2, 1).name, count=2, kernel_shape=[3], pads=[1, 1], strides=[1])
        small = g.node("Mul", g.node("Cast", pooled[1], to=TensorProto.FLOAT), g.constant(np.float32(0.01)))
        return x._replace(name=g.node("Transpose", g.node("Add", pooled[0], small), perm=[0, 2, 1]))
    if kind == "topk":
        values, numbers = g.nodes_of("TopK", x.name, g.integers(2), count=2, axis=-1)
        if g.chance(0.5):
            return Tensor(g.node("Concat", values, x.name, axis=2), (*x.axes[:2], x.width + 2))
        number = g.sliced(g.node("Cast", numbers, to=TensorProto.FLOAT), 0, 1, 2)
        return x._replace(name=g.node("Add", x.name, number))
    largest = g.node("ArgMax", x.name, axis=2, keepdims=1)
    if kind == "elements":
        return x._replace(name=g.node("Mul", x.name, g.node("GatherElements", x.name, largest, axis=2)))
    return x._replace(name=g.node("Add", x.name, g.node("Cast", largest, to=TensorProto.FLOAT)))


def _scattered(g: Drawing, x: Tensor) -> Tensor:
    """Has the smallest value over an axis replaced by the largest one."""
    axis = g.pick(1, 1, 2)
    places = g.node("ArgMin", x.name, axis=axis, keepdims=1)
    return x._replace(name=g.node("ScatterElements", x.name, places, g.reduced("ReduceMax", x.name, [axis]), axis=axis))


def _resized(g: Drawing, x: Tensor) -> Tensor:
    """Has every token twice and then the mean of both."""
    turned = g.transpose(x, 0, 2, 1)
    scales = g.constant(np.asarray([1, 1, 2], np.float32))
    nearest: dict[str, Any] = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    larger = g.node("Resize", turned.name, g.constant(np.zeros(0, np.float32)), scales, **nearest)
    mean = turned._replace(name=g.node("AveragePool", larger, kernel_shape=[2], strides=[2]))
    return g.transpose(mean, 0, 2, 1)


def _branched(g: Drawing, x: Tensor) -> Tensor:
    """Is scaled or negated by an If on the number of tokens; both branches read the graph around them."""
    few = g.node("Less", g.extent(x, 1), g.integers(3))
    if g.opset < 13:
        condition = g.node("Squeeze", few, axes=[0])
    else:
        condition = g.node("Squeeze", few, g.integers(0))
    numbers = g.constant(g.normal(x.width))
    branches = {}
    for branch, node in (("then_branch", ("Mul", [x.name, numbers])), ("else_branch", ("Neg", [x.name]))):
        out = g.fresh("branch")
        body = [helper.make_node(*node, [out], name=g.fresh("node_branch"))]
        value = helper.make_tensor_value_info(out, TensorProto.FLOAT, [None, None, None])
        branches[branch] = helper.make_graph(body, branch, [], [value])
    return x._replace(name=g.node("If", condition, **branches))


def _looped(g: Drawing, x: Tensor) -> Tensor:
    """Goes twice through a weight inside of a Loop, whose body reads the weight from the graph around it."""
    weight = g.weight(x.width, x.width)
    step, again, before, mixed, after, go_on = (g.fresh(n) for n in ("step", "again", "before", "mixed", "after", "go_on"))
    nodes = [
        helper.make_node("MatMul", [before, weight], [mixed], name=g.fresh("node_body")),
        helper.make_node("Tanh", [mixed], [after], name=g.fresh("node_body")),
        helper.make_node("Identity", [again], [go_on], name=g.fresh("node_body")),
    ]
    state = [(before, TensorProto.FLOAT, [None, None, None]), (after, TensorProto.FLOAT, [None, None, None])]
    inputs = [(step, TensorProto.INT64, []), (again, TensorProto.BOOL, []), state[0]]
    outputs = [(go_on, TensorProto.BOOL, []), state[1]]
    taken, given = ([helper.make_tensor_value_info(*v) for v in values] for values in (inputs, outputs))
    body = helper.make_graph(nodes, "body", taken, given)
    last = g.node("Loop", g.constant(np.int64(2)), g.constant(np.asarray(True)), x.name, body=body)
    return x._replace(name=g.node("Add", x.name, last))


def _normalised(g: Drawing, x: Tensor) -> Tensor:
    """Is normalised over the channels: as one operator, written out, or by the root mean square."""
    kinds = ["written", "rms"] + (["operator"] * 2 if g.opset >= 17 else [])
    kind = g.pick(*kinds)
    gain = g.constant(1 + g.normal(x.width, scale=0.2))
    bias = [g.constant(g.normal(x.width, scale=0.2))] if kind != "rms" else []
    if kind == "operator":
        return x._replace(name=g.node("LayerNormalization", x.name, gain, *bias, axis=-1))
    centred = g.node("Sub", x.name, g.reduced("ReduceMean", x.name, [-1])) if kind == "written" else x.name
    squares = g.node("Pow", centred, g.constant(np.float32(2))) if g.chance(0.5) else g.node("Mul", centred, centred)
    variance = g.node("Add", g.reduced("ReduceMean", squares, [-1]), g.constant(np.float32(1e-2)))
    scaled = g.node("Mul", g.node("Div", centred, g.node("Sqrt", variance)), gain)
    return x._replace(name=g.node("Add", scaled, *bias) if bias else scaled)


PASSING = (
    *(_activation, _activation, _scaled, _scaled, _where, _mixed, _depthwise, _over_tokens, _cumulative, _softmax),
    *(_cut, _split_and_joined, _joined_with_itself, _padded, _centred, _looked_up, _counted, _scattered, _resized),
    *(_branched, _looped, _normalised),
)


# -- blocks: x [b, s, d] -> [b, s, d]


def _feed_forward(g: Drawing, x: Tensor) -> Tensor:
    """Goes to a hidden width and back: plain, gated, or with gate and values in one packed product."""
    hidden = g.between(5, 17)
    layout = g.pick("plain", "plain", "gated", "packed")
    if layout == "packed":
        gate, y = g.split(g.product(x, 2 * hidden), 2, [hidden, hidden])
        y = y._replace(name=g.node("Mul", _activation(g, gate).name, y.name))
    elif layout == "gated":
        y = g.product(x, hidden)
        y = y._replace(name=g.node("Mul", _activation(g, g.product(x, hidden)).name, y.name))
    else:
        y = _activation(g, g.product(x, hidden))
    for _ in range(g.pick(0, 1, 1, 2, 3)):
        y = g.pick(*PASSING)(g, y) if y.width >= 4 else _activation(g, y)
    return g.product(y, x.width)


def _attention(g: Drawing, x: Tensor) -> Tensor:
    """Is attention of q heads, with as many keys and values or fewer, in one of many layouts."""
    q = g.between(1, 5)
    k = g.pick(*(n for n in range(1, q + 1) if q % n == 0)) if g.chance(0.35) else q
    inner = g.between(1, 5)
    query, key, value = _projected(g, x, q, k, inner)
    if k != q:
        key, value = (_repeated(g, t, q) for t in (key, value))
    if g.chance(0.2):
        query, key, value = (g.reshape(t, (("b", q), "s", inner)) for t in (query, key, value))
        mixed = _attended(g, query, key, value, x)
        mixed = g.reshape(mixed, ("b", q, "s", inner), x)
    else:
        mixed = _attended(g, query, key, value, x)
    if g.chance(0.15):
        numbers = g.constant(g.normal(*g.pick((q, 1, 1), (1, q, 1, inner), (inner,))))
        mixed = mixed._replace(name=g.node("Mul", mixed.name, numbers))
    together = g.transpose(mixed, 0, 2, 1, 3)
    if g.opset >= 12 and g.chance(0.1):
        out = g.constant(g.normal(q, inner, x.width, scale=(q * inner) ** -0.5), "weight")
        return x._replace(name=g.node("Einsum", together.name, out, equation="bsqe,qed->bsd"))
    return g.product(g.reshape(together, ("b", "s", q * inner), x), x.width)


def _projected(g: Drawing, x: Tensor, q: int, k: int, inner: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries [b, q, s, e], keys and values [b, k, s, e]."""
    layout = g.pick("separate", "separate", "packed", "five axes", "per head") if q == k else "separate"
    if layout == "five axes":
        packed = g.reshape(g.product(x, 3 * q * inner), ("b", "s", 3, q, inner), x)
        turned = g.transpose(packed, 2, 0, 3, 1, 4)
        parts = [g.node("Gather", turned.name, g.constant(np.int64(i)), axis=0) for i in range(3)]
        query, key, value = (Tensor(name, turned.axes[1:]) for name in parts)
        return query, key, value
    if layout == "per head":
        packed = g.transpose(g.reshape(g.product(x, 3 * q * inner), ("b", "s", q, 3 * inner), x), 0, 2, 1, 3)
        query, key, value = g.split(packed, 3, [inner] * 3)
        return query, key, value
    if layout == "packed":
        flat = g.split(g.product(x, 3 * q * inner), 2, [q * inner] * 3)
    else:
        flat = [g.product(x, n * inner) for n in (q, k, k)]
    heads = [g.reshape(t, ("b", "s", t.width // inner, inner), x) for t in flat]
    query, key, value = (g.transpose(t, 0, 2, 1, 3) for t in heads)
    return query, key, value


def _repeated(g: Drawing, x: Tensor, q: int) -> Tensor:
    """Returns [b, k, s, e] as [b, q, s, e]: each head as often as queries share it, or a single one tiled."""
    k = x.axes[1]
    assert isinstance(k, int)
    if k == 1 and g.chance(0.5):
        return Tensor(g.node("Tile", x.name, g.integers(1, q, 1, 1)), (x.axes[0], q, *x.axes[2:]))
    wide = g.unsqueezed(x.name, 2)
    shape = [g.size(axis, (x,)) for axis in x.axes]
    target = g.node("Concat", *shape[:2], g.integers(q // k), *shape[2:], axis=0)
    repeated = Tensor(g.node("Expand", wide, target), (*x.axes[:2], q // k, *x.axes[2:]))
    return g.reshape(repeated, ("b", q, "s", x.width), x)


def _attended(g: Drawing, query: Tensor, key: Tensor, value: Tensor, x: Tensor) -> Tensor:
    """Returns softmax(query key^T / sqrt(e) + mask) value; heads have an axis of their own or lie in the batch."""
    *lead, last, inner = range(len(query.axes))
    scores = g.node("MatMul", query.name, g.transpose(key, *lead, inner, last).name)
    scale = g.pick("constant", "width", "none")
    if scale == "constant":
        scores = g.node("Mul", scores, g.constant(np.float32(query.width**-0.5)))
    elif scale == "width":
        width = g.node("Cast", g.extent(query, inner), to=TensorProto.FLOAT)
        scores = g.node("Div", scores, g.node("Sqrt", width))
    if g.mask is not None and len(query.axes) == 4 and g.chance(0.7):
        seen = g.unsqueezed(g.node("Cast", g.mask, to=TensorProto.FLOAT), 1, 2)
        hidden = g.node("Mul", g.node("Sub", g.constant(np.float32(1)), seen), g.constant(np.float32(-1e4)))
        scores = g.node("Add", scores, hidden)
    if g.chance(0.25):
        length = g.node("Gather", g.node("Shape", x.name), g.constant(np.int64(1)), axis=0)
        places = g.node("Range", g.constant(np.int64(0)), length, g.constant(np.int64(1)))
        later = g.node("Less", g.unsqueezed(places, 1), g.unsqueezed(places, 0))
        scores = g.node("Where", later, g.constant(np.float32(-1e4)), scores)
    likely = g.node("Softmax", scores, axis=g.pick(-1, inner))
    if g.opset >= 12 and g.chance(0.2):
        named = "bqst"[: len(lead)]
        return value._replace(name=g.node("Einsum", likely, value.name, equation=f"{named}ij,{named}je->{named}ie"))
    return value._replace(name=g.node("MatMul", likely, value.name))


# -- whole graphs


def random_graph(seed: int) -> tuple[onnx.ModelProto, FeedsOf]:
    """Draws a graph that the ONNX checker accepts and that ONNX Runtime runs to finite numbers, and to the same ones twice.

    Args:
        seed: the graph is a function of it (and, where something is refused, of the versions of onnx and ONNX Runtime).

    Returns:
        The model, and a function of a batch, a length and a seed that draws its inputs; a graph of fixed sizes has inputs
        of those sizes, whatever is asked for.
    """
    for attempt in range(ATTEMPTS):
        proto, feeds = _draw(np.random.default_rng((seed, attempt)))
        if _runs(proto, [feeds(*shape, i) for i, shape in enumerate(((3, 5), (1, 1), (2, 7), (9, 13), (8, 11)))]):
            return proto, feeds
    raise AssertionError(f"seed {seed}: {ATTEMPTS} graphs in a row were refused; the generator is broken")


def _draw(rng: np.random.Generator) -> tuple[onnx.ModelProto, FeedsOf]:
    """Draws a graph that may be refused."""
    g = Drawing(rng)
    width = g.between(4, 9)
    of_tokens, masked = g.chance(0.5), g.chance(0.4)
    shape: list[int | str] = [FIXED["b"], FIXED["s"]] if g.fixed else ["b", "s"]
    inputs = []
    if of_tokens:
        inputs.append(helper.make_tensor_value_info("tokens", TensorProto.INT64, shape))
        table = g.constant(g.normal(VOCABULARY, width), "table")
        x = Tensor(g.node("Gather", table, "tokens", axis=0), ("b", "s", width))
    else:
        inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [*shape, width]))
        x = Tensor("x", ("b", "s", width))
    if masked:
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.INT64, shape))
        g.mask = "mask"
    for _ in range(g.between(1, 3)):
        y = g.pick(_feed_forward, _attention)(g, _normalised(g, x) if g.chance(0.6) else x)
        x = x._replace(name=g.node("Add", *g.pick((x.name, y.name), (y.name, x.name))))
    if of_tokens and g.chance(0.3):
        x = Tensor(g.node("MatMul", x.name, g.node("Transpose", table, perm=[1, 0])), ("b", "s", VOCABULARY))
    outputs = [
        helper.make_tensor_value_info(t.name, TensorProto.FLOAT, [FIXED.get(str(a), a) if g.fixed else a for a in t.axes])
        for t in (x, *g.outputs)
    ]
    graph = helper.make_graph(g.nodes, "random", inputs, outputs, g.initializers)
    opsets = [helper.make_opsetid("", g.opset), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8 if g.opset < 19 else 10)

    def feeds(batch: int, length: int, seed: int) -> Feeds:
        b, s = (FIXED["b"], FIXED["s"]) if g.fixed else (batch, length)
        drawn = np.random.default_rng((seed, b, s))
        result: Feeds = {}
        if of_tokens:
            result["tokens"] = drawn.integers(0, VOCABULARY, (b, s))
        else:
            result["x"] = drawn.standard_normal((b, s, width)).astype(np.float32)
        if masked:  # every row has at least one token
            result["mask"] = (np.arange(s) < drawn.integers(1, s + 1, (b, 1))).astype(np.int64)
        return result

    return proto, feeds


def _runs(proto: onnx.ModelProto, cases: Sequence[Feeds]) -> bool:
    """Returns whether the checker accepts a model and ONNX Runtime runs it to finite numbers.

    With its optimizer on and off these must be the same, so a graph that magnifies rounding, whose output nobody can hold
    against another one, is not accepted either.
    """
    try:
        onnx.checker.check_model(proto, full_check=True)
        plain, optimized = (_outputs(proto, cases, level) for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"))
    except Exception:  # ONNX Runtime and the checker have no exception of their own in common
        return False
    return all(
        bool(np.isfinite(a).all()) and float(np.abs(a - b).max()) <= SAME * float(np.abs(a).max())
        for a, b in zip(plain, optimized, strict=True)
    )


def _outputs(proto: onnx.ModelProto, cases: Sequence[Feeds], level: str) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(array) for feeds in cases for array in session.run(None, feeds)]
