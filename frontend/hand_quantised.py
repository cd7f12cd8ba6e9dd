"""Graphs that are quantised by hand: weights in small integers behind a Cast, and a Mul by their scale.

    w = Mul(Cast(w_int8), scale)        w = Mul(Sub(Cast(w_uint8), zero), scale)        y = MatMul(x, w)

Such a graph has no quantising operator, and ONNX Runtime computes ``w`` in float when it loads it. Converters from
TensorFlow Lite write it, and exporters of modules that were quantised with torch alone. Folded, its file would be four
times as large.
"""

import onnx

from liar_opt.frontend.graph_tensors import STANDARD
from liar_opt.frontend.rules.operators import operator
from liar_opt.frontend.rules.table import Trait
from liar_opt.frontend.widen_graph import bodies_of

COMPUTING = Trait.ARITHMETIC | Trait.UNPACKS
CARRYING = Trait.KEEPS_ORDER | Trait.TURNS | Trait.JOINS | Trait.SLICES
NARROW = {
    onnx.TensorProto.DataType.Value(name)
    for name in onnx.TensorProto.DataType.keys()
    if name in ("INT8", "UINT8", "INT16", "UINT16")
    or name.startswith(("INT4", "UINT4", "INT2", "UINT2", "FLOAT8", "FLOAT4"))
}
FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
WHOLE = {onnx.TensorProto.INT32, onnx.TensorProto.UINT32, onnx.TensorProto.INT64, onnx.TensorProto.UINT64}
"""Element types in which several small integers may be packed."""
Constants = dict[str, onnx.TensorProto]
Kinds = dict[str, tuple[bool, bool]]
"""Of each tensor that is computed from constants: whether it is float, and whether it was small integers."""


def hand_quantised_node(graph: onnx.GraphProto) -> onnx.NodeProto | None:
    """Returns the first node, in the graph or in a branch, that contracts a weight computed from small integers, or None.

    Large initializers may be stubs.
    """
    return _first(graph, {}, {})


def _first(graph: onnx.GraphProto, outer: Constants, outer_kinds: Kinds) -> onnx.NodeProto | None:
    constants = {**outer, **{t.name: t for t in graph.initializer}}
    kinds = dict(outer_kinds)
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    constants[node.output[0]] = attribute.t
        elif node.domain in STANDARD and operator("", node.op_type).contracts:
            operands = [node.input[i] for i in operator("", node.op_type).contracts if i < len(node.input)]
            if any(kinds.get(name) == (True, True) for name in operands):
                first: onnx.NodeProto = node
                return first
        elif _traits(node) & (COMPUTING | CARRYING) and node.output:
            kind = _kind(node, constants, kinds)
            if kind is not None:
                kinds[node.output[0]] = kind
        for body in bodies_of(node):
            found = _first(body, constants, kinds)
            if found is not None:
                return found
    return None


def _traits(node: onnx.NodeProto) -> Trait:
    return operator(node.domain, node.op_type).traits


def _kind(node: onnx.NodeProto, constants: Constants, kinds: Kinds) -> tuple[bool, bool] | None:
    """Returns whether what a node makes of constants is float and was small integers; None where it reads others."""
    data = node.input if _traits(node) & (COMPUTING | Trait.JOINS) else node.input[:1]
    small = False
    for name in data:
        if name in kinds:
            small |= kinds[name][1]
        elif name in constants:
            tensor = constants[name]
            matrix = sum(size > 1 for size in tensor.dims) > 1
            packed = tensor.data_type in WHOLE and bool(_traits(node) & Trait.UNPACKS)
            small |= matrix and (tensor.data_type in NARROW or packed)
        else:
            return None
    if node.op_type == "Cast":
        return next((a.i for a in node.attribute if a.name == "to"), 0) in FLOATS, small
    floats = any(kinds[name][0] for name in data if name in kinds)
    return floats or node.op_type == "CastLike", small
