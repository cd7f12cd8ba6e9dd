"""Graphs that are quantised by hand: weights in small integers behind a Cast, and a Mul by their scale.

    w = Mul(Cast(w_int8), scale)        w = Mul(Sub(Cast(w_uint8), zero), scale)        y = MatMul(x, w)

Such a graph has no quantising operator, and ONNX Runtime computes ``w`` in float when it loads it. Converters from
TensorFlow Lite write it, and exporters of modules that were quantised with torch alone. Folded, its file would be four
times as large.
"""

import onnx

from liar_opt.frontend.widen_graph import bodies_of

CONTRACTIONS = {"MatMul": (0, 1), "Gemm": (0, 1), "Conv": (1,), "ConvTranspose": (1,), "Einsum": (0, 1, 2)}
"""Operators that contract weights: the input positions of these."""
FUSED_CONTRACTIONS = {
    **dict.fromkeys(("FusedMatMul", "FusedMatMulActivation", "TransposeMatMul", "FusedGemm"), (0, 1)),
    **dict.fromkeys(("FusedConv", "NhwcConv", "NhwcFusedConv"), (1,)),
}
"""The same of ONNX Runtime's own domain."""
ARITHMETIC = {"Add", "Sub", "Mul", "Div"}
UNPACKING = {"BitShift", "BitwiseAnd", "BitwiseOr", "Mod"}
CARRYING = {"Cast", "CastLike", "Concat", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
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
        elif node.op_type in CONTRACTIONS and node.domain in ("", "ai.onnx"):
            operands = [node.input[i] for i in CONTRACTIONS[node.op_type] if i < len(node.input)]
            if any(kinds.get(name) == (True, True) for name in operands):
                first: onnx.NodeProto = node
                return first
        elif node.op_type in ARITHMETIC | UNPACKING | CARRYING and node.output:
            kind = _kind(node, constants, kinds)
            if kind is not None:
                kinds[node.output[0]] = kind
        for body in bodies_of(node):
            found = _first(body, constants, kinds)
            if found is not None:
                return found
    return None


def _kind(node: onnx.NodeProto, constants: Constants, kinds: Kinds) -> tuple[bool, bool] | None:
    """Returns whether what a node makes of constants is float and was small integers; None where it reads others."""
    data = node.input if node.op_type in ARITHMETIC | UNPACKING or node.op_type == "Concat" else node.input[:1]
    small = False
    for name in data:
        if name in kinds:
            small |= kinds[name][1]
        elif name in constants:
            tensor = constants[name]
            matrix = sum(size > 1 for size in tensor.dims) > 1
            packed = tensor.data_type in WHOLE and node.op_type in UNPACKING
            small |= matrix and (tensor.data_type in NARROW or packed)
        else:
            return None
    if node.op_type == "Cast":
        return next((a.i for a in node.attribute if a.name == "to"), 0) in FLOATS, small
    floats = any(kinds[name][0] for name in data if name in kinds)
    return floats or node.op_type == "CastLike", small
