# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Fused operators: a convolution with what follows it, and gated activations."""

from __future__ import annotations

import graphs
import numpy as np
import onnx
import pytest
from graphs import Weights

SIZES = ({"b": 2, "s": 4}, {"b": 1, "s": 7})
CONV = "f (float[b, 6, 5, 3] x) => (float[b, 7, 5, 3] y) {{ u = Conv(x, w1, b1)  v = Relu(u)  {}  y = Conv(h, w2) }}"
LAST = "f (float[b, 5, 3, 6] x) => (float[b, 5, 3, 7] y) {{ u = MatMul(x, w1)  {}  y = MatMul(h, w2) }}"


def function(domain: str, text: str, opset: int = 17) -> onnx.FunctionProto:
    return onnx.parser.parse_function(f'<opset_import: ["" : {opset}], domain: "{domain}">\n{text}')


NHWC = [
    function(
        "com.microsoft",
        "NhwcConv <pads, group> (x, w, b) => (y) { t = Transpose<perm=[0,3,1,2]>(x)\n"
        " c = Conv<pads: ints = @pads, group: int = @group>(t, w, b)\n y = Transpose<perm=[0,2,3,1]>(c) }",
    ),
    function(
        "com.microsoft",
        "NhwcFusedConv <pads> (x, w, b, z) => (y) { t = Transpose<perm=[0,3,1,2]>(x)\n c = Conv<pads: ints = @pads>(t, w, b)\n"
        " d = Transpose<perm=[0,2,3,1]>(c)\n a = Add(d, z)\n y = Relu(a) }",
    ),
]
MATCH: dict[str, tuple[str, Weights, list[tuple[str, int]]]] = {
    "FusedConv": (
        CONV.format('h = com.microsoft.FusedConv<activation="Relu", pads=[1,1,1,1]>(v, k, b2)'),
        {"w1": (5, 6, 1, 1), "b1": (5,), "k": (11, 5, 3, 3), "b2": (11,), "w2": (7, 11, 1, 1)},
        [("ffn", 5), ("ffn", 11)],
    ),
    "FusedConv with a sum": (
        CONV.format('h = com.microsoft.FusedConv<activation="Relu">(v, k, b2, v)'),
        {"w1": (11, 6, 1, 1), "b1": (11,), "k": (11, 11, 1, 1), "b2": (11,), "w2": (7, 11, 1, 1)},
        [("ffn", 11)],
    ),
    "NhwcConv of one place": (
        LAST.format("v = com.microsoft.NhwcConv(u, k, b2)  h = Relu(v)"),
        {"w1": (6, 5), "k": (11, 5, 1, 1), "b2": (11,), "w2": (11, 7)},
        [("ffn", 5), ("ffn", 11)],
    ),
    "NhwcConv of several places": (
        LAST.format("v = com.microsoft.NhwcConv<pads=[1,1,1,1]>(u, k, b2)  h = Relu(v)"),
        {"w1": (6, 5), "k": (11, 5, 3, 3), "b2": (11,), "w2": (11, 7)},
        [("ffn", 11)],
    ),
    "NhwcConv of each channel": (
        LAST.format("h = com.microsoft.NhwcConv<pads=[1,1,1,1], group=11>(u, k, b2)"),
        {"w1": (6, 11), "k": (11, 1, 3, 3), "b2": (11,), "w2": (11, 7)},
        [("ffn", 11)],
    ),
    "NhwcFusedConv with a sum": (
        LAST.format("h = com.microsoft.NhwcFusedConv<pads=[1,1,1,1]>(x, k, b2, u)"),
        {"w1": (6, 11), "k": (11, 6, 3, 3), "b2": (11,), "w2": (11, 7)},
        [("ffn", 11)],
    ),
}


@pytest.mark.parametrize("name", MATCH)
def test_match(name: str) -> None:
    text, weights, expected = MATCH[name]
    proto = graphs.parse(text, weights)
    assert graphs.sizes(proto) == expected
    for sizes in SIZES:
        graphs.prove(proto, sizes, functions=NHWC if "Nhwc" in name else ())


def test_swiglu() -> None:
    """Of opset 28, which ONNX Runtime does not take yet: two widths that are one."""
    text = """f (float[b, s, 6] x) => (float[b, s, 7] y) { a = MatMul(x, wa)  u = MatMul(x, wb)  h = SwiGLU<alpha=1.5>(a, u)
        y = MatMul(h, w2) }"""
    proto = graphs.parse(text, {"wa": (6, 11), "wb": (6, 11), "w2": (11, 7)}, 28)
    assert graphs.sizes(proto) == [("ffn", 11)]
    body = "SwiGLU <alpha> (a, b) => (y) { k = Constant<value_float: float = @alpha>()\n m = Mul(a, k)\n s = Sigmoid(m)\n t = Mul(a, s)\n y = Mul(t, b) }"
    pruned = graphs.prove(proto, SIZES[0], functions=[function("", body, 28)])
    assert [n.op_type for n in pruned.graph.node].count("SwiGLU") == 1
    assert np.ptp([t.dims[-1] for t in pruned.graph.initializer if t.name != "w2"]) == 0
