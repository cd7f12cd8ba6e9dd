"""Quantised graphs, read as the numbers that they stand for.

    QDQ         weights behind DequantizeLinear; activations through QuantizeLinear and back, at scales that are written
    QOperator   the same in one node: QLinearMatMul, QLinearConv, QGemm, QLinearAdd, ...
    dynamic     activations quantised as they come: DynamicQuantizeLinear, MatMulInteger, ConvInteger, QAttention, ...
    blocks      weights in blocks of few bits: MatMulNBits, GatherBlockQuantized

What comes out is a float graph of the same nodes under the same names, which everything else works on, and a
:class:`Reading`: how each weight was stored, where activations are quantised and by what, and which nodes computed on whole
numbers. `quantised_out` writes a graph that was cut in the scheme that it had.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from liar_opt.frontend.quantised_grids import Grid, laid_out
from liar_opt.frontend.weight_files import STUB_LIMIT, element_type, stub
from liar_opt.frontend.widen_graph import bodies_of, nodes_within
from liar_opt.runtime.errors import ModelError

Array = NDArray[Any]
MICROSOFT = "com.microsoft"
PLAIN, NBITS, TABLE = "plain", "nbits", "table"
"""How whole numbers are packed: each by itself, as MatMulNBits has them, as GatherBlockQuantized has them."""
QUANTISED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}
QUANTISED_PREFIXES = (
    *("QLinear", "QGemm", "QAttention", "QMoE", "QOrdered", "QEmbed", "GatherBlockQuantized", "DynamicQuantize"),
    *("MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "MatMulBlockQuantized", "MatMulIntegerToFloat"),
)
MOVERS = {
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Gather", "Split", "Expand", "Tile"),
    *("MaxPool", "DepthToSpace", "SpaceToDepth", "GatherElements", "GatherND"),
}
"""Operators that give whole numbers out as they are."""
MOVED = "moved"
"""The form of a node that moves whole numbers."""
WAY_OUT = "prune the float model and quantise the result"


@dataclass(frozen=True)
class Fused:
    """What a node that computes on whole numbers does to their float values.

    Attributes:
        op: the operator on floats.
        operands: its inputs: "q" is quantised, as three inputs of the node; "f" is as it is; "b" is a bias at the scales of
            the first two; "*" is "q" as often as there are inputs; "y" is no input, and where scale and zero point of the
            result stand.
    """

    op: str
    operands: str


FUSED = {
    "QLinearMatMul": Fused("MatMul", "qqy"),
    "QLinearConv": Fused("Conv", "qqyb"),
    "QGemm": Fused("Gemm", "qqby"),
    "QLinearAdd": Fused("Add", "qqy"),
    "QLinearMul": Fused("Mul", "qqy"),
    "QLinearSigmoid": Fused("Sigmoid", "qy"),
    "QLinearLeakyRelu": Fused("LeakyRelu", "qy"),
    "QLinearSoftmax": Fused("Softmax", "qy"),
    "QLinearGlobalAveragePool": Fused("GlobalAveragePool", "qy"),
    "QLinearAveragePool": Fused("AveragePool", "qy"),
    "QLinearConcat": Fused("Concat", "y*"),
    "QLinearWhere": Fused("Where", "fqqy"),
}
DROPPED = {"channels_last", "opset"}
"""Attributes that the operator on floats does not have."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight as it is stored.

    Attributes:
        grid: its whole numbers, as they lie in the file.
        numbers: the initializer that holds them.
        scale: that of the scales; empty where they are the product of others' (``bias_of``).
        zero: that of the zero points; empty where there are none.
        packing: how the numbers are packed.
        node: the name of the node that makes floats of it, and what it gives; empty where none does.
        output: what that gives.
        domain: of that node.
        bias_of: the node whose input and weight give its scales.
        bits: of a number.
        axis: along which scales differ, as the node says it (it may count from the end); None where it says none.
    """

    grid: Grid
    numbers: str
    scale: str
    zero: str = ""
    packing: str = PLAIN
    node: str = ""
    output: str = ""
    domain: str = ""
    bias_of: str = ""
    bits: int = 8
    axis: int | None = None


@dataclass(eq=False)
class Pair:
    """A tensor that is quantised, and made floats of again.

    Attributes:
        tensor: its name in the float graph.
        scale: the initializer of the scale.
        zero: that of the zero point; empty where there is none.
        numbers: what the whole numbers are called.
        output: the floats that are made of them; empty where the graph gives these out, under the name of the tensor.
        nodes: the names of the two nodes.
        domain: of the two.
        attributes: of the first node: what the whole numbers are where no zero point says it.
        before: what the tensor was called, where the float graph has the name of what came out.
        raw: the nodes and inputs that read it as it was before.
    """

    tensor: str
    scale: str
    zero: str
    numbers: str
    output: str
    nodes: list[str]
    domain: str = ""
    attributes: tuple[onnx.AttributeProto, ...] = ()
    before: str = ""
    raw: set[tuple[str, int]] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class Form:
    """How a node of the float graph computed.

    Attributes:
        op: the operator.
        domain: its domain.
        attributes: its own.
        parts: names of nodes and tensors around it, in an order of its kind's own.
        bias: whether it adds a bias.
    """

    op: str
    domain: str
    attributes: tuple[onnx.AttributeProto, ...] = ()
    parts: tuple[str, ...] = ()
    bias: bool = False


@dataclass(frozen=True, eq=False)
class Reading:
    """What a quantised graph was, beside its float reading.

    Attributes:
        scheme: QDQ, QOperator, dynamic or blocks.
        weights: by the names that they have in the float graph.
        pairs: where activations are quantised.
        forms: by node.
        dynamic: what DynamicQuantizeLinear makes of a tensor: the node's name and its three outputs.
        tensors: the constants that the graph had.
        proto: the graph as it came; large initializers are stubs.
        arrays: their data.
    """

    scheme: str
    weights: Mapping[str, Weight]
    pairs: tuple[Pair, ...]
    forms: Mapping[str, Form]
    dynamic: Mapping[str, tuple[str, ...]]
    tensors: Mapping[str, onnx.TensorProto]
    proto: onnx.ModelProto
    arrays: Mapping[str, Array]

    @property
    def block(self) -> int:
        """The size of the blocks of weights that are contracted; 1 where there are none."""
        return max((w.grid.block for w in self.weights.values() if w.packing != TABLE and w.grid.block), default=1)

    def sentence(self) -> str:
        """Says the scheme in a few words: what weights and activations are."""
        stored = [w for w in self.weights.values() if not w.bias_of]
        kinds = sorted({_type_of(w) for w in stored})
        ways = {_way(w.grid) for w in stored}
        of_all: list[str] = [way for way in ("for all", "by channel") if way in ways]
        blocks = sorted({w.grid.block for w in stored if w.grid.block})
        of_all += [f"in blocks of {' and '.join(map(str, blocks))}"] if blocks else []
        weights = f"{len(stored)} weights in {' and '.join(kinds)} ({', '.join(of_all)})" if stored else "no weights"
        if self.scheme == "dynamic":
            return f"{self.scheme}: {weights}, activations as they come"
        return f"{self.scheme}: {weights}" + (f", {len(self.pairs)} activations" if self.pairs else "")


def _type_of(weight: Weight) -> str:
    if weight.bits != 8:
        return f"{weight.bits} bits"
    return str(weight.grid.numbers.dtype)


def _way(grid: Grid) -> str:
    return "" if grid.block else "for all" if grid.axis is None else "by channel"


def quantised_node(proto: onnx.ModelProto) -> onnx.NodeProto | None:
    """Returns the first node that quantises, or reads what is quantised; it may be in a branch."""
    return next((n for n in nodes_within(proto.graph.node) if _quantises(n)), None)


def _quantises(node: onnx.NodeProto) -> bool:
    return node.op_type in QUANTISED or node.op_type.startswith(QUANTISED_PREFIXES)


def read_quantised(
    proto: onnx.ModelProto, arrays: Mapping[str, Array], name: str
) -> tuple[onnx.ModelProto, dict[str, Array], Reading]:
    """Returns the float reading of a quantised graph, the data of its large initializers, and what it was.

    Args:
        proto: the graph; what has its data in ``arrays`` is a stub.
        arrays: that data.
        name: of the file, for messages.

    Raises:
        ModelError: it is quantised in two schemes, or in a way that is not read.
    """
    scheme = _scheme(proto, name)
    reader = _Reader(proto, arrays)
    for node in reader.nodes:
        try:
            reader.read(node)
        except (_Unreadable, ValueError, IndexError) as err:
            why = err if isinstance(err, _Unreadable) else "its inputs are not those of its operator"
            raise ModelError(f"node '{node.name}' ({node.op_type}) of {name} is quantised, and {why}; {WAY_OUT}") from err
    return reader.finished(scheme, name)


def _scheme(proto: onnx.ModelProto, name: str) -> str:
    """Returns the scheme of a graph.

    Raises:
        ModelError: there are two, or branches have some.
    """
    found: dict[str, onnx.NodeProto] = {}
    for node in proto.graph.node:
        kind = _scheme_of(node)
        if kind:
            found.setdefault(kind, node)
    bodies = (body for node in proto.graph.node for body in bodies_of(node))
    within = next((n for body in bodies for n in nodes_within(body.node) if _quantises(n)), None)
    if within is not None:
        raise ModelError(
            f"node '{within.name or within.output[0]}' ({within.op_type}) of {name} is quantised within a branch; {WAY_OUT}"
        )
    if len(found) > 1:
        (one, first), (other, second) = [*found.items()][:2]
        raise ModelError(
            f"{name} is quantised in two schemes: node '{first.name or first.output[0]}' ({first.op_type}) is {one}, "
            f"node '{second.name or second.output[0]}' ({second.op_type}) is {other}; give the model in one of them, or "
            f"{WAY_OUT}"
        )
    kind = next(iter(found), "static")
    if kind != "static":
        return kind
    return "QOperator" if any(n.op_type in FUSED or n.op_type == "QAttention" for n in proto.graph.node) else "QDQ"


def _scheme_of(node: onnx.NodeProto) -> str | None:
    """Returns which scheme a node is of; None of one that may be of any."""
    if node.op_type.startswith("DynamicQuantize") or node.op_type in ("MatMulInteger", "ConvInteger"):
        return "dynamic"
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        return "blocks"
    return "static" if node.op_type == "QuantizeLinear" or node.op_type in FUSED else None


class _Unreadable(Exception):
    """A fact about a node that no rule here reads."""


@dataclass(frozen=True)
class _Params:
    """Scale and zero point of a tensor in whole numbers, by name."""

    scale: str
    zero: str


class _Reader:
    """Reads the nodes of a graph one after the other.

    Args:
        proto: the graph, which stays as it is.
        arrays: the data of its large initializers.
    """

    def __init__(self, proto: onnx.ModelProto, arrays: Mapping[str, Array]) -> None:
        self.proto, self.arrays = proto, arrays
        self.tensors = {t.name: t for t in proto.graph.initializer}
        self.nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in proto.graph.node]
        self._name_all()
        for node in self.nodes:
            tensor = _constant(node)
            if tensor is not None:
                self.tensors[tensor.name] = tensor
        self.taken = {n for node in self.nodes for n in (*node.input, *node.output)} | set(self.tensors)
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for read in {*node.input, *(n for body in bodies_of(node) for n in read_within(body))}:
                self.readers.setdefault(read, []).append(node)
        self.makers = {out: node for node in self.nodes for out in node.output}
        self.alias: dict[str, str] = {}
        self.params: dict[str, _Params] = {}
        self.scales: dict[str, str] = {}  # of what DynamicQuantizeLinear gives: scale -> whole numbers
        self.made: list[onnx.NodeProto] = []
        self.raw: list[tuple[str, str, int]] = []
        self.skipped: set[str] = set()
        self.floats: dict[str, Array] = {}
        self.weights: dict[str, Weight] = {}
        self.known: dict[tuple[str, ...], str] = {}
        self.pairs: dict[str, Pair] = {}
        self.forms: dict[str, Form] = {}
        self.dynamic: dict[str, tuple[str, ...]] = {}

    def _name_all(self) -> None:
        taken: set[str] = set()
        for place, node in enumerate(self.nodes):
            if not node.name or node.name in taken:
                base = node.name or node.op_type
                names = itertools.chain([f"{base}_{place}"], (f"{base}_{place}_{k}" for k in itertools.count()))
                node.name = next(n for n in names if n not in taken)
            taken.add(node.name)

    # -- what a node is -------------------------------------------------------------------------------------------------

    def read(self, node: onnx.NodeProto) -> None:
        """Reads one node.

        Raises:
            _Unreadable: there is no rule for it.
        """
        if node.name in self.skipped:
            return
        rules = {
            "QuantizeLinear": self._quantize,
            "DequantizeLinear": self._dequantize,
            "DynamicQuantizeLinear": self._dynamic,
            "MatMulInteger": self._integer,
            "ConvInteger": self._integer,
            "DynamicQuantizeMatMul": self._dynamic_product,
            "MatMulIntegerToFloat": self._product_to_float,
            "QAttention": self._attention,
            "MatMulNBits": self._blocks,
            "GatherBlockQuantized": self._table,
        }
        if node.op_type in rules:
            rules[node.op_type](node)
        elif node.op_type in FUSED:
            self._fused(node, FUSED[node.op_type])
        elif _quantises(node):
            raise _Unreadable("this operator is not read")
        elif any(name in self.params for name in node.input):
            self._moved(node)
        elif self._table_of_numbers(node):
            self._gather(node)
        else:
            self._plain(node)

    def _plain(self, node: onnx.NodeProto) -> None:
        """Keeps a node, which reads floats where it read what was made of whole numbers."""
        for place, name in enumerate(node.input):
            self.raw.append((name, node.name, place))
            node.input[place] = self.alias.get(name, name)
        for body in bodies_of(node):
            self.raw += [(name, node.name, -1) for name in read_within(body)]
            rename_within(body, self.alias)
        self.made.append(node)

    def _moved(self, node: onnx.NodeProto) -> None:
        """Keeps a node that moves whole numbers: it moves floats as well."""
        said = {self.params[name] for name in node.input if name in self.params}
        whole = [name in self.params for name in node.input]
        joined = node.op_type == "Concat" and all(whole)
        if len(said) > 1 or not (joined or (node.op_type in MOVERS and whole[0] and not any(whole[1:]))):
            raise _Unreadable("it computes on whole numbers, and not as one of the operators that are read")
        for name in node.output:
            self.params[name] = next(iter(said))
        self.forms[node.name] = Form(MOVED, "")
        for place, name in enumerate(node.input):
            node.input[place] = self.alias.get(name, name)
        self.made.append(node)

    def _table_of_numbers(self, node: onnx.NodeProto) -> bool:
        """Returns whether a node looks up rows of a weight in whole numbers."""
        if node.op_type != "Gather" or node.input[0] not in self.tensors:
            return False
        return any(n.op_type in ("DequantizeLinear", *FUSED) for n in self.readers.get(node.output[0], ()))

    # -- weights and activations ----------------------------------------------------------------------------------------

    def array(self, name: str) -> Array:
        """Returns an initializer; what numpy has no type for is widened to bytes."""
        if name not in self.tensors:
            raise _Unreadable(f"'{name}' is no constant")
        if name in self.arrays:
            return self.arrays[name]
        values = np.asarray(onnx.numpy_helper.to_array(self.tensors[name]))
        kind = values.dtype.name
        if kind.endswith(("int4", "int2")):
            return values.astype(np.uint8 if kind.startswith("uint") else np.int8)
        return values

    def bits(self, name: str) -> int:
        """Returns the bits of a number of an initializer."""
        if name not in self.tensors:
            raise _Unreadable(f"'{name}' is no constant")
        kind = onnx.TensorProto.DataType.Name(self.tensors[name].data_type)
        return next((int(kind[-1]) for end in ("INT4", "INT2") if kind.endswith(end)), 8)

    def fresh(self, *names: str) -> str:
        """Returns the first of some names that nothing has, or one that is made of the last."""
        tried = itertools.chain(names, (f"{names[-1]}_{k}" for k in itertools.count(2)))
        name = next(n for n in tried if n and n not in self.taken)
        self.taken.add(name)
        return name

    def weight(self, weight: Weight, axes: tuple[int, ...] | None = None) -> str:
        """Returns the name that a weight has in the float graph; ``axes``: of each axis there, the one in the file."""
        key = (weight.numbers, weight.scale, weight.zero, weight.packing, weight.bias_of, str(axes))
        if key not in self.known:
            name = weight.output or self.fresh(weight.numbers.removesuffix("_quantized"), f"{weight.numbers}_float")
            values = weight.grid.values
            self.floats[name] = values if axes is None else laid_out(values.transpose(axes))
            self.weights[name] = weight
            self.known[key] = name
        return self.known[key]

    def stored(self, numbers: str, scale: str, zero: str, axis: int | None, **more: Any) -> Weight:
        """Returns a weight whose numbers lie one by one; ``more``: of its node."""
        block, said = more.pop("block", 0), more.pop("said", None)
        values = more.pop("values", None)
        values = self.array(numbers) if values is None else values
        if values.dtype.kind not in "iu":
            raise _Unreadable(f"'{numbers}' is stored in {values.dtype.name}, and not in whole numbers")
        bits = self.bits(numbers) if numbers in self.tensors else 8
        scales = self.array(scale)
        axis = None if axis is None else axis % max(values.ndim, 1)
        try:
            grid = Grid.read(values, scales, self.array(zero) if zero else None, axis, block, bits=bits)
        except ValueError as err:
            raise _Unreadable(f"the scales '{scale}' do not fit '{numbers}' ({err})") from err
        return Weight(grid, numbers, scale, zero, bits=bits, axis=said, **more)

    def same(self, one: _Params, other: _Params) -> bool:
        """Returns whether two tensors are quantised by the same numbers."""
        if one == other:
            return True
        scales, zeros = (
            [self.array(n) if n else np.zeros(()) for n in names]
            for names in zip((one.scale, one.zero), (other.scale, other.zero), strict=True)
        )
        return all(np.array_equal(a, b) for a, b in (scales, zeros))

    def operand(self, numbers: str, scale: str, zero: str, axis: int | None) -> str:
        """Returns the floats of one quantised input of a node."""
        if numbers in self.tensors:
            return self.weight(self.stored(numbers, scale, zero, axis))
        self.require(numbers, scale, zero)
        return self.alias.get(numbers, numbers)

    def require(self, numbers: str, scale: str, zero: str) -> None:
        """Checks that a tensor in whole numbers is read by the scale that it was made with."""
        if numbers not in self.params:
            raise _Unreadable(f"nothing says what the whole numbers '{numbers}' stand for")
        if not self.same(self.params[numbers], _Params(scale, zero)):
            raise _Unreadable(f"it reads '{numbers}' by another scale than that which it was made with")

    def activation(
        self, tensor: str, numbers: str, scale: str, zero: str, node: str, domain: str = "", attributes: Any = ()
    ) -> None:
        """Notes that a tensor is quantised; ``attributes``: of the node that does so."""
        if self.array(scale).size != 1:
            raise _Unreadable("activations have a scale for each channel")
        zeros = [self.array(zero)] if zero else []
        if any(z.dtype.kind not in "iu" for z in zeros):
            raise _Unreadable("activations are not in whole numbers")
        params = _Params(scale, zero)
        known = self.pairs.get(tensor)
        if known is None:
            output = self.fresh(f"{tensor}_dequantised")
            names = [node, f"{tensor}_dequantise"]
            self.pairs[tensor] = Pair(tensor, scale, zero, numbers, output, names, domain, tuple(attributes))
        elif not self.same(params, _Params(known.scale, known.zero)):
            raise _Unreadable(f"'{tensor}' is quantised by two scales")
        self.params[numbers], self.alias[numbers] = params, tensor

    # -- QDQ ------------------------------------------------------------------------------------------------------------

    def _quantize(self, node: onnx.NodeProto) -> None:
        inputs = [*node.input, "", ""]
        source, scale, zero = inputs[0], inputs[1], inputs[2]
        if len(node.input) < 2 or not scale:
            raise _Unreadable("it has no scale")
        tensor = self.alias.get(source, source)
        if source in self.tensors and self.array(source).dtype.kind == "f":
            self._constant_pair(node, source, scale, zero)
            return
        if tensor in self.floats:
            raise _Unreadable(f"it quantises '{source}', which is a quantised weight")
        if not zero and _numbers_of(node).kind not in "iu":
            raise _Unreadable("activations are not in whole numbers")
        self.activation(tensor, node.output[0], scale, zero, node.name, node.domain, node.attribute)

    def _constant_pair(self, node: onnx.NodeProto, source: str, scale: str, zero: str) -> None:
        """Takes a float weight that is quantised in the graph as one that is stored so."""
        scales, values = self.array(scale), self.array(source)
        axis = _attribute(node, "axis", 1) if scales.size > 1 else None
        zeros = self.array(zero) if zero else np.zeros(scales.shape, _numbers_of(node))
        small = zero and self.bits(zero) < 8
        if zeros.dtype.kind not in "iu" or small or _attribute(node, "block_size", 0):
            raise _Unreadable(
                f"'{source}' is quantised in the graph, and not to whole numbers of 8 bits or more, by channel"
            )
        shape = [-1 if i == axis else 1 for i in range(values.ndim)] if axis is not None else []
        limit = np.iinfo(zeros.dtype)
        numbers = np.rint(values / scales.reshape(shape)) + zeros.reshape(shape).astype(np.float64)
        whole = np.clip(numbers, limit.min, limit.max).astype(zeros.dtype)
        reader = next((n for n in self.readers.get(node.output[0], ()) if n.op_type == "DequantizeLinear"), None)
        own = {} if reader is None else {"node": reader.name, "output": reader.output[0], "domain": reader.domain}
        weight = self.stored(node.output[0], scale, zero, axis, values=whole, **own)
        self.alias[node.output[0]] = self.weight(weight)
        self.params[node.output[0]] = _Params(scale, zero)

    def _dequantize(self, node: onnx.NodeProto) -> None:
        inputs = [*node.input, ""]
        numbers, zero = inputs[0], inputs[2] if len(node.input) > 2 else ""
        if len(node.input) < 2:
            raise _Unreadable("it has no scale")
        scale = inputs[1]
        if numbers in self.params:
            self.require(numbers, scale, zero)
            tensor = self.alias.get(numbers, numbers)
            self.alias[node.output[0]] = tensor
            pair = self.pairs.get(tensor)
            if pair is not None and pair.numbers == numbers and pair.output.startswith(f"{tensor}_dequantised"):
                pair.output, pair.nodes[1] = node.output[0], node.name
            return
        if numbers not in self.tensors:
            raise _Unreadable(f"nothing says what the whole numbers '{numbers}' stand for")
        axis, block = _attribute(node, "axis", 1), _attribute(node, "block_size", 0)
        if _attribute(node, "output_dtype", 0) not in (0, self.tensors[scale].data_type if scale in self.tensors else 0):
            raise _Unreadable("it gives another type than that of its scale")
        own = {"node": node.name, "output": node.output[0], "domain": node.domain, "block": block, "said": axis}
        weight = self.stored(numbers, scale, zero, axis, **own)
        bias = self._bias_of(node.output[0]) if weight.grid.numbers.dtype == np.int32 else ""
        self.alias[node.output[0]] = self.weight(replace(weight, bias_of=bias))

    def _bias_of(self, output: str) -> str:
        """Returns the only node that adds a bias, where it is one that has an input for it."""
        readers = self.readers.get(output, [])
        takes = len(readers) == 1 and readers[0].op_type in ("Conv", "Gemm", "ConvTranspose")
        return readers[0].name if takes and [*readers[0].input, "", ""][2] == output else ""

    # -- nodes on whole numbers -----------------------------------------------------------------------------------------

    def _fused(self, node: onnx.NodeProto, fused: Fused) -> None:
        """Reads a node on whole numbers as one on floats whose result is quantised."""
        if _attribute(node, "channels_last", 0):
            raise _Unreadable("its channels come last")
        given, names, bias, result = itertools.chain(node.input, itertools.repeat("")), [], "", ("", "")
        for kind in self._operands(node, fused):
            if kind == "y":
                result = (next(given), next(given))
            elif kind == "f":
                names.append(self.alias.get(name := next(given), name))
            elif kind == "b":
                bias = next(given)
                names += [self._bias(node, bias)] if bias else []
            else:
                numbers, scale, zero = next(given), next(given), next(given)
                names.append(self.operand(numbers, scale, zero, self._axis(node, numbers)))
        if not result[0]:
            raise _Unreadable("its result is in floats")
        tensor = self.fresh(node.output[0].removesuffix("_quantized"), f"{node.output[0]}_float")
        attributes = [a for a in node.attribute if a.name not in DROPPED]
        self.forms[node.name] = Form(node.op_type, node.domain, tuple(node.attribute), bias=bool(bias))
        self._emit(fused.op, names, tensor, node.name, attributes)
        self.activation(tensor, node.output[0], *result, f"{node.name}_quantise")

    def _operands(self, node: onnx.NodeProto, fused: Fused) -> Iterator[str]:
        count = (len(node.input) - 2) // 3
        for kind in fused.operands:
            yield from "q" * count if kind == "*" else kind

    def _axis(self, node: onnx.NodeProto, numbers: str) -> int:
        """Returns along which axis scales of a weight differ."""
        if node.op_type == "QLinearConv" or (node.op_type == "QGemm" and _attribute(node, "transB", 0)):
            return 0
        return max(len(self.tensors[numbers].dims) - 1, 0) if numbers in self.tensors else 0

    def _bias(self, node: onnx.NodeProto, bias: str) -> str:
        """Returns the floats of a bias in whole numbers of 32 bits, at the product of the scales of input and weight."""
        scales = [self.array(node.input[place]) for place in (1, 4)]
        product = np.asarray(scales[0] * scales[1] * _attribute(node, "alpha", 1.0), np.float32).reshape(-1)
        try:
            grid = Grid.read(self.array(bias).reshape(-1), product, None, 0)
        except ValueError as err:
            raise _Unreadable(f"the bias '{bias}' does not fit its scales ({err})") from err
        return self.weight(Weight(grid, bias, "", bias_of=node.name))

    def _attention(self, node: onnx.NodeProto) -> None:
        numbers, weight, bias, scale, by, mask, zero, its_zero, past = [*node.input, *[""] * 9][:9]
        if numbers in self.scales.values():
            source = self._came_from(numbers, scale)
        else:
            source = self.operand(numbers, scale, zero, None)
        names = [source, self.operand(weight, by, its_zero, 1), *(self.alias.get(n, n) for n in (bias, mask, past))]
        while names and not names[-1]:
            names.pop()
        self.forms[node.name] = Form("QAttention", MICROSOFT)
        self._emit("Attention", names, node.output[0], node.name, node.attribute, MICROSOFT)
        self.made[-1].output.extend(node.output[1:])

    def _emit(self, op: str, inputs: list[str], output: str, name: str, attributes: Any = (), domain: str = "") -> None:
        made = onnx.helper.make_node(op, inputs, [output], name, domain=domain or None)
        made.attribute.extend(attributes)
        self.made.append(made)

    def _gather(self, node: onnx.NodeProto) -> None:
        """Reads a lookup in whole numbers, whose rows are made floats of behind it."""
        (output,) = node.output
        reader = next(n for n in self.readers[output] if n.op_type in ("DequantizeLinear", *FUSED))
        place = list(reader.input).index(output)
        scale, zero = [*reader.input, "", ""][place + 1 : place + 3]
        if self.array(scale).size != 1:
            raise _Unreadable("a table has a scale for each row")
        tensor = reader.output[0] if reader.op_type == "DequantizeLinear" else self.fresh(f"{output}_float")
        table = self.weight(self.stored(node.input[0], scale, zero, None))
        name = reader.name if reader.op_type == "DequantizeLinear" else f"{node.name}_dequantise"
        self.forms[node.name] = Form("Gather", "", parts=(output, name))
        self.alias[output], self.params[output] = tensor, _Params(scale, zero)
        self._emit("Gather", [table, node.input[1]], tensor, node.name, node.attribute)

    # -- dynamic --------------------------------------------------------------------------------------------------------

    def _dynamic(self, node: onnx.NodeProto) -> None:
        source = self.alias.get(node.input[0], node.input[0])
        self.dynamic.setdefault(source, (node.name, *node.output))
        self.alias[node.output[0]] = source
        self.scales[node.output[1]] = node.output[0]

    def _came_from(self, numbers: str, scale: str) -> str:
        """Returns the floats that were quantised as they came."""
        if self.scales.get(scale) != numbers:
            raise _Unreadable(f"'{numbers}' is read by a scale that is not its own")
        return self.alias[numbers]

    def _integer(self, node: onnx.NodeProto) -> None:
        """Reads a product of whole numbers with the Cast and the two Muls behind it."""
        cast, product, scales = self._behind(node)
        numbers, zeros = node.input[0], [*node.input[2:], "", ""]
        known = {scale for scale, of in self.scales.items() if of == numbers}
        known |= {self.params[numbers].scale} if numbers in self.params else set()
        of_input = next((s for s in scales.input if s in known), None)
        if of_input is None:
            raise _Unreadable("nothing says what its input stands for")
        others = [s for s in scales.input if s != of_input] or [of_input]
        if numbers in self.params:
            source = self.operand(numbers, of_input, zeros[0], None)
        else:
            source = self._came_from(numbers, of_input)
        if node.input[1] in self.tensors:
            axis = max(len(self.tensors[node.input[1]].dims) - 1, 0)
            weight = self.stored(node.input[1], others[0], zeros[1], axis)
            if node.op_type == "ConvInteger" and weight.grid.axis is not None:
                raise _Unreadable("its weight has a scale for each channel")
            second = self.weight(weight)
        else:
            second = self._came_from(node.input[1], others[0])
        names = (cast.name, cast.output[0], scales.name, scales.output[0], product.name)
        self.forms[node.name] = Form(node.op_type, node.domain, parts=names)
        self.skipped |= {cast.name, product.name}
        if all(n.name in self.skipped for n in self.readers[scales.output[0]]):
            self.skipped.add(scales.name)
        op = "MatMul" if node.op_type == "MatMulInteger" else "Conv"
        self._emit(op, [source, second], product.output[0], node.name, node.attribute)

    def _behind(self, node: onnx.NodeProto) -> tuple[onnx.NodeProto, onnx.NodeProto, onnx.NodeProto]:
        """Returns the Cast behind a product of whole numbers, the Mul behind that, and the Mul of its scales."""
        fact = _Unreadable("what makes floats of its result is not a Cast and a Mul by the product of two scales")
        steps = [node]
        for op in ("Cast", "Mul"):
            readers = self.readers.get(steps[-1].output[0], [])
            if len(readers) != 1 or readers[0].op_type != op:
                raise fact
            steps.append(readers[0])
        other = next((n for n in steps[2].input if n != steps[1].output[0]), "")
        scales = self.makers.get(other)
        if scales is None or scales.op_type != "Mul":
            raise fact
        return steps[1], steps[2], scales

    def _dynamic_product(self, node: onnx.NodeProto) -> None:
        source, numbers, scale, zero, bias = [*node.input, *[""] * 5][:5]
        source = self.alias.get(source, source)
        weight = self.weight(self.stored(numbers, scale, zero, 1))
        self._with_bias(node, [source, weight], bias)

    def _product_to_float(self, node: onnx.NodeProto) -> None:
        first, second, scale, its, zero, its_zero, bias = [*node.input, *[""] * 7][:7]
        if first in self.scales.values():
            source = self._came_from(first, scale)
        else:
            source = self.operand(first, scale, zero, None)
        if second in self.tensors:
            weight = self.weight(self.stored(second, its, its_zero, 1))
        elif second in self.scales.values():
            weight = self._came_from(second, its)
        else:
            weight = self.operand(second, its, its_zero, None)
        self._with_bias(node, [source, weight], bias)

    def _with_bias(self, node: onnx.NodeProto, inputs: list[str], bias: str) -> None:
        """Emits a MatMul, and an Add where it has a bias."""
        output = node.output[0]
        product = self.fresh(f"{output}_product") if bias else output
        self.forms[node.name] = Form(node.op_type, node.domain, tuple(node.attribute), bias=bool(bias))
        self._emit("MatMul", inputs, product, node.name)
        if bias:
            self._emit("Add", [product, self.alias.get(bias, bias)], output, f"{node.name}_bias")

    # -- blocks ---------------------------------------------------------------------------------------------------------

    def _blocks(self, node: onnx.NodeProto) -> None:
        source, packed, scale, zero, order, bias = [*node.input, *[""] * 6][:6]
        size, columns = _attribute(node, "K", 0), _attribute(node, "N", 0)
        bits, block = _attribute(node, "bits", 4), _attribute(node, "block_size", 128)
        if order:
            raise _Unreadable("its rows are in an order of their own (g_idx)")
        if bits not in (2, 4, 8) or _attribute(node, "weight_prepacked", 0):
            raise _Unreadable(f"its weights are packed in {bits} bits" if bits not in (2, 4, 8) else "it is packed already")
        blocks = -(-size // block)
        numbers = unpacked(self.array(packed).reshape(columns, -1), bits)[:, :size]
        scales = self.array(scale).reshape(columns, blocks)
        zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
        if zero:
            stored = self.array(zero).reshape(columns, -1)
            zeros = unpacked(stored, bits)[:, :blocks] if stored.dtype == np.uint8 else stored
        grid = Grid.read(numbers, scales, zeros, 1, block, bits=bits, signed=True)
        weight = Weight(grid, packed, scale, zero, NBITS, bits=bits)
        self._with_bias(node, [self.alias.get(source, source), self.weight(weight, (1, 0))], bias)

    def _table(self, node: onnx.NodeProto) -> None:
        packed, indices, scale, zero = [*node.input, ""][:4]
        bits = self.bits(packed) if self.bits(packed) != 8 else _attribute(node, "bits", 4)
        block, gather = _attribute(node, "block_size", 128), _attribute(node, "gather_axis", 0)
        values, scales = self.array(packed), self.array(scale)
        whole = self.tensors[packed].data_type == onnx.TensorProto.UINT8
        axis = _attribute(node, "quantize_axis", 1) % values.ndim
        if values.dtype.kind not in "iu" or not block or bits not in (2, 4, 8):
            raise _Unreadable("its table is not in blocks of whole numbers of 2, 4 or 8 bits")
        if whole and bits < 8 and axis != values.ndim - 1:
            raise _Unreadable("its blocks do not lie along the axis that is packed")
        numbers = unpacked(values, bits) if whole else values
        middle = 1 << (bits - 1) if whole else 0
        zeros: Array = np.full(scales.shape, middle, numbers.dtype)
        if zero:
            stored = self.array(zero)
            zeros = unpacked(stored, bits)[..., : scales.shape[-1]] if whole and bits < 8 else stored
        try:
            grid = Grid.read(numbers, scales, zeros, axis, block, bits=bits, signed=True)
        except ValueError as err:
            raise _Unreadable(f"the scales '{scale}' do not fit '{packed}' ({err})") from err
        table = self.weight(Weight(grid, packed, scale, zero, TABLE if whole else PLAIN, bits=bits))
        self.forms[node.name] = Form(node.op_type, node.domain, tuple(node.attribute))
        attributes = [onnx.helper.make_attribute("axis", gather)]
        self._emit("Gather", [table, self.alias.get(indices, indices)], node.output[0], node.name, attributes)

    # -- the graph as a whole -------------------------------------------------------------------------------------------

    def finished(self, scheme: str, name: str) -> tuple[onnx.ModelProto, dict[str, Array], Reading]:
        """Returns the float graph, its data and what it was."""
        self._settle_outputs(name)
        self.made = alive(self.made, {value.name for value in self.proto.graph.output})
        for tensor_name, reader, place in self.raw:
            pair = self.pairs.get(tensor_name)
            if pair is not None and tensor_name not in self.alias:
                pair.raw.add((reader, place))
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        graph = proto.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:], graph.quantization_annotation[:]
        read = {n for node in self.made for n in (*node.input, *(k for b in bodies_of(node) for k in read_within(b)))}
        read |= {value.name for value in graph.output}
        arrays: dict[str, Array] = {}
        constants = {node.output[0] for node in self.nodes if node.op_type == "Constant"}
        graph.node.extend(n for n in self.made if n.op_type != "Constant" or n.output[0] in read)
        for tensor in self.tensors.values():
            if tensor.name in read and tensor.name not in constants:
                graph.initializer.append(tensor)
                if tensor.name in self.arrays:
                    arrays[tensor.name] = self.arrays[tensor.name]
        for known, values in self.floats.items():
            if known not in read:
                continue
            if values.nbytes > STUB_LIMIT:
                graph.initializer.append(stub(known, element_type(values.dtype), values.shape))
                arrays[known] = values
            else:
                graph.initializer.append(onnx.numpy_helper.from_array(values, known))
        weights = {n: w for n, w in self.weights.items() if n in read}
        return proto, arrays, self._reading(scheme, weights)

    def _reading(self, scheme: str, weights: Mapping[str, Weight]) -> Reading:
        pairs = tuple(self.pairs.values())
        return Reading(scheme, weights, pairs, self.forms, self.dynamic, self.tensors, self.proto, self.arrays)

    def _settle_outputs(self, name: str) -> None:
        """Gives what the graph gives out the names that it had.

        Raises:
            ModelError: it gives out whole numbers.
        """
        given = {value.name for value in self.proto.graph.output}
        inputs = {value.name for value in self.proto.graph.input}
        for output in [value.name for value in self.proto.graph.output]:
            if output in self.params or output in self.scales.values():
                raise ModelError(f"output '{output}' of {name} is quantised: nothing makes floats of it; {WAY_OUT}")
            tensor = self.alias.get(output, output)
            if tensor == output:
                continue
            if tensor in given or tensor in inputs or tensor in self.floats or tensor in self.tensors:
                self._emit("Identity", [tensor], output, f"{output}_given")
                continue
            self._renamed(tensor, output)

    def _renamed(self, old: str, new: str) -> None:
        """Gives a tensor another name, in the nodes and in what was noted of it."""
        for node in self.made:
            for names in (node.input, node.output):
                for place, known in enumerate(names):
                    if known == old:
                        names[place] = new
            for body in bodies_of(node):
                rename_within(body, {old: new})
        self.alias = {k: new if v == old else v for k, v in self.alias.items()} | {old: new}
        pair = self.pairs.pop(old, None)
        if pair is not None:
            pair.tensor, pair.before = new, old
            pair.raw |= {(node, place) for read, node, place in self.raw if read == old}
            pair.output = ""
            self.pairs[new] = pair
        if old in self.dynamic:
            self.dynamic[new] = self.dynamic.pop(old)


def unpacked(packed: Array, bits: int) -> Array:
    """Returns the numbers that lie in bytes along the last axis, the first in the lowest bits."""
    if bits == 8:
        return packed
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1)


def packed(numbers: Array, bits: int) -> Array:
    """Returns numbers in bytes along the last axis, the first in the lowest bits; what fills the last byte is zero."""
    if bits == 8:
        return numbers.astype(np.uint8)
    each = 8 // bits
    short = -numbers.shape[-1] % each
    full = np.pad(numbers, [*[(0, 0)] * (numbers.ndim - 1), (0, short)]).astype(np.uint8)
    parts = full.reshape(*full.shape[:-1], -1, each)
    result = np.zeros(parts.shape[:-1], np.uint8)
    for place in range(each):
        result |= parts[..., place] << (place * bits)
    return result


def _numbers_of(node: onnx.NodeProto) -> np.dtype[Any]:
    """Returns the type of what a QuantizeLinear gives, where no zero point says it."""
    kind = _attribute(node, "output_dtype", 0) or onnx.TensorProto.UINT8
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """Returns what a Constant holds, under the name that it has in the graph; None of other nodes."""
    if node.op_type != "Constant":
        return None
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.name == "value":
            tensor = onnx.TensorProto()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
            return tensor
        if attribute.name.startswith(("value_float", "value_int")):
            kind = np.float32 if "float" in attribute.name else np.int64
            return onnx.numpy_helper.from_array(np.asarray(value, kind), node.output[0])
    return None


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def alive(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """Returns the nodes that an output needs, in order."""
    needed, result = set(outputs), []
    for node in reversed(nodes):
        if any(name in needed for name in node.output if name):
            result.append(node)
            needed |= {*node.input, *(n for body in bodies_of(node) for n in read_within(body))}
    return result[::-1]


def read_within(graph: onnx.GraphProto) -> set[str]:
    """Returns what a branch, and those within it, read."""
    names = {n for node in graph.node for n in node.input} | {v.name for v in graph.output}
    return names | {n for node in graph.node for body in bodies_of(node) for n in read_within(body)}


def rename_within(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Has a branch read other tensors of the graph around it."""
    own = {n for node in graph.node for n in node.output} | {t.name for t in (*graph.initializer, *graph.input)}
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in names and name not in own:
                node.input[place] = names[name]
        for body in bodies_of(node):
            rename_within(body, names)
    for value in graph.output:
        if value.name in names and value.name not in own:
            value.name = names[value.name]
