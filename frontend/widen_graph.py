"""Graphs in bfloat16 are run in float32: ONNX Runtime has few kernels for bfloat16 on the CPU.

A weight stays in bfloat16 where it lies and is cast as the graph runs, so that only one is wide at a time. Every bfloat16
number is a float32 number: what is computed is what the model would compute without rounding in between. The model itself
is not touched; its weights are written in their own type.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

NARROW, WIDE = int(onnx.TensorProto.BFLOAT16), int(onnx.TensorProto.FLOAT)


def widen(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model with float32 in the place of bfloat16, or the model itself where it has none."""
    graph = model.graph
    names = {t.name for t in graph.initializer if t.data_type == NARROW}
    ends = [*graph.input, *graph.output]
    inner = any(t.data_type == NARROW for n in nodes_within(graph.node) for a in n.attribute for t in _tensors(a))
    inner = inner or any(t.data_type == NARROW for body in _bodies(graph.node) for t in body.initializer)
    if not names and not inner and not any(v.type.tensor_type.elem_type == NARROW for v in ends):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.value_info[:]
    bodies = list(_bodies(graph.node))
    for value in [*graph.input, *graph.output, *(v for body in bodies for v in body.output)]:
        if value.type.tensor_type.elem_type == NARROW:
            value.type.tensor_type.elem_type = WIDE
    casts = [onnx.helper.make_node("Cast", [n], [f"{n}/wide"], name=f"{n}/widen", to=WIDE) for n in sorted(names)]
    for node in nodes_within(graph.node):
        for i, name in enumerate(node.input):
            if name in names:
                node.input[i] = f"{name}/wide"
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_datatype") and attribute.i == NARROW:
                attribute.i = WIDE
            for tensor in _tensors(attribute):
                _widen_tensor(tensor)
    for tensor in (t for body in bodies for t in body.initializer):
        _widen_tensor(tensor)
    nodes = [*casts, *graph.node]
    made = {o for n in graph.node for o in n.output}
    nodes += [
        onnx.helper.make_node("Identity", [f"{v.name}/wide"], [v.name])
        for v in graph.output
        if v.name in names and v.name not in made
    ]
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    return result


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == NARROW:
        wide = narrow_values(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))


def narrow_values(tensor: onnx.TensorProto) -> NDArray[Any]:
    """Returns the values of a bfloat16 tensor that has its data in it."""
    raw = tensor.raw_data if tensor.HasField("raw_data") else np.asarray(tensor.int32_data, np.uint16).tobytes()
    return np.frombuffer(raw, ml_dtypes.bfloat16).reshape(tuple(tensor.dims))


def nodes_within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yields nodes, and those in their branches."""
    for node in nodes:
        yield node
        for graph in bodies_of(node):
            yield from nodes_within(graph.node)


def bodies_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yields the branches of a node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    return (body for node in nodes_within(nodes) for body in bodies_of(node))


def _tensors(attribute: onnx.AttributeProto) -> list[onnx.TensorProto]:
    return [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
