# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""The ONNX operator table: a match and a near miss for each rule, proved by cutting."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import graphs
import numpy as np
import onnx
import oracle
import pytest
from graphs import Weights

from liar_opt import prune
from liar_opt.frontend.rules.meaning import spelled_out

I64 = np.int64


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, I64)


# A feed-forward block of width 11 between 6 and 7 channels; {} is what happens to the hidden layer.
FFN = "f (float[b, s, 6] x) => (float[b, s, 7] y) {{ u = MatMul(x, w1)\n v = Add(u, b1)\n {} \n y = MatMul(h, w2) }}"
FFN_WEIGHTS: Weights = {"w1": (6, 11), "b1": (11,), "w2": (11, 7)}

UNARY = (
    "Abs Atan Ceil Cos Elu Erf Exp Floor HardSigmoid HardSwish LeakyRelu Neg Relu Round Selu Sigmoid Sign Sin Softplus "
    "Softsign Tanh Identity"
).split()
MATCH: dict[str, tuple[str, Weights, list[tuple[str, int]]]] = {
    **{op: (FFN.format(f"h = {op}(v)"), FFN_WEIGHTS, [("ffn", 11)]) for op in UNARY},
    "Clip": (FFN.format("h = Clip(v, lo, hi)"), {**FFN_WEIGHTS, "lo": np.float32(-1), "hi": np.float32(1)}, [("ffn", 11)]),
    "PRelu": (FFN.format("h = PRelu(v, p)"), {**FFN_WEIGHTS, "p": (11,)}, [("ffn", 11)]),
    "Where": (
        FFN.format("c = Greater(v, t)\n h = Where(c, v, t)"),
        {**FFN_WEIGHTS, "t": (11,)},
        [("ffn", 11)],
    ),
    "Max": (FFN.format("h = Max(v, t, u)"), {**FFN_WEIGHTS, "t": (1, 11)}, [("ffn", 11)]),
    "gelu by parts": (
        FFN.format("d = Div(v, r)\n e = Erf(d)\n a = Add(e, one)\n g = Mul(v, a)\n h = Mul(g, half)"),
        {**FFN_WEIGHTS, "r": np.float32(1.4), "one": np.float32(1), "half": np.float32(0.5)},
        [("ffn", 11)],
    ),
    "BiasGelu": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { u = MatMul(x, w1)\n h = com.microsoft.BiasGelu(u, b1)\n y = MatMul(h, w2) }",
        FFN_WEIGHTS,
        [("ffn", 11)],
    ),
    "FastGelu": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { u = MatMul(x, w1)\n h = com.microsoft.FastGelu(u, b1)\n y = MatMul(h, w2) }",
        FFN_WEIGHTS,
        [("ffn", 11)],
    ),
    "transposed and back": (
        FFN.format("t = Transpose<perm=[2,0,1]>(v)\n r = Relu(t)\n h = Transpose<perm=[1,2,0]>(r)"),
        FFN_WEIGHTS,
        [("ffn", 11)],
    ),
    "unsqueezed and squeezed": (
        FFN.format("t = Unsqueeze(v, one)\n r = Relu(t)\n h = Squeeze(r, one)"),
        {**FFN_WEIGHTS, "one": ints(1)},
        [("ffn", 11)],
    ),
    "shape followed through Shape": (
        FFN.format("n = Shape(v)\n f = Reshape(v, flat)\n r = Relu(f)\n h = Reshape(r, n)"),
        {**FFN_WEIGHTS, "flat": ints(-1, 11)},
        [("ffn", 11)],
    ),
    "Gemm": (
        "f (float[n, 6] x) => (float[n, 7] y) { u = Gemm(x, w1, b1)\n h = Relu(u)\n y = Gemm<alpha=0.5, beta=2.0>(h, w2, b2) }",
        {"w1": (6, 11), "b1": (11,), "w2": (11, 7), "b2": (7,)},
        [("ffn", 11)],
    ),
    "Gemm, transposed, no bias": (
        "f (float[n, 6] x) => (float[n, 7] y) { u = Gemm<transB=1>(x, w1)\n h = Tanh(u)\n y = Gemm<transB=1>(h, w2) }",
        {"w1": (11, 6), "w2": (7, 11)},
        [("ffn", 11)],
    ),
    "Gemm of a transposed activation": (
        "f (float[6, n] x) => (float[7, n] y) { u = Gemm<transA=1>(x, w1)\n t = Transpose(u)\n h = Relu(t)\n"
        " z = Gemm<transA=1>(h, w2)\n y = Transpose(z) }",
        {"w1": (6, 11), "w2": (11, 7)},
        [("ffn", 11)],
    ),
    "weight on the left": (
        "f (float[b, 6, s] x) => (float[b, 7, s] y) { u = MatMul(w1, x)\n h = Relu(u)\n y = MatMul(w2, h) }",
        {"w1": (11, 6), "w2": (7, 11)},
        [("ffn", 11)],
    ),
    "FusedMatMul": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { u = com.microsoft.FusedMatMul<alpha=0.5>(x, w1)\n h = Relu(u)\n"
        " y = com.microsoft.FusedMatMul<transB=1, alpha=2.0>(h, w2) }",
        {"w1": (6, 11), "w2": (7, 11)},
        [("ffn", 11)],
    ),
    "FusedMatMul of a transposed activation": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { u = MatMul(x, w1)\n h = Transpose<perm=[0,2,1]>(u)\n"
        " y = com.microsoft.FusedMatMul<transA=1>(h, w2) }",
        {"w1": (6, 11), "w2": (11, 7)},
        [("ffn", 11)],
    ),
    "gated, two weights": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { g = MatMul(x, wg)\n s1 = Sigmoid(g)\n a = Mul(g, s1)\n u = MatMul(x, wu)\n"
        " h = Mul(a, u)\n y = MatMul(h, w2) }",
        {"wg": (6, 11), "wu": (6, 11), "w2": (11, 7)},
        [("ffn", 11)],
    ),
    "gated, packed, Split by sizes": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { p = MatMul(x, w1)\n g, u = Split<axis=-1>(p, n)\n a = Sigmoid(g)\n"
        " h = Mul(a, u)\n y = MatMul(h, w2) }",
        {"w1": (6, 22), "n": ints(11, 11), "w2": (11, 7)},
        [("ffn", 11)],
    ),
    "gated, packed, Split by count": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { p = MatMul(x, w1)\n g, u = Split<axis=2>(p)\n a = Sigmoid(g)\n"
        " h = Mul(a, u)\n y = MatMul(h, w2) }",
        {"w1": (6, 22), "w2": (11, 7)},
        [("ffn", 11)],
    ),
    "gated, packed, Slice": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { p = MatMul(x, w1)\n g = Slice(p, zero, half, two)\n"
        " u = Slice(p, half, end, two)\n a = Sigmoid(g)\n h = Mul(a, u)\n y = MatMul(h, w2) }",
        {"w1": (6, 22), "zero": ints(0), "half": ints(11), "end": ints(2**62), "two": ints(2), "w2": (11, 7)},
        [("ffn", 11)],
    ),
    "gated, interleaved": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { p = MatMul(x, w1)\n g = Slice(p, zero, end, last, two)\n"
        " u = Slice(p, one, end, last, two)\n a = Sigmoid(g)\n h = Mul(a, u)\n y = MatMul(h, w2) }",
        {"w1": (6, 20), "w2": (10, 7), "zero": ints(0), "one": ints(1), "two": ints(2), "end": ints(20), "last": ints(-1)},
        [("ffn", 10)],
    ),
    "gated, packed, Slice from the end": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { p = MatMul(x, w1)\n g = Slice(p, zero, back, last)\n"
        " u = Slice(p, back, end, last)\n a = Sigmoid(g)\n h = Mul(a, u)\n y = MatMul(h, w2) }",
        {"w1": (6, 22), "zero": ints(0), "back": ints(-11), "end": ints(2**62), "last": ints(-1), "w2": (11, 7)},
        [("ffn", 11)],
    ),
    "unequal parts, Slice from the end": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { p = MatMul(x, w1)\n g = Slice(p, zero, back, last)\n"
        " u = Slice(p, back, end, last)\n y1 = MatMul(g, w2)\n y2 = MatMul(u, w3)\n y = Add(y1, y2) }",
        {
            "w1": (6, 16),
            "zero": ints(0),
            "back": ints(-5),
            "end": ints(2**62),
            "last": ints(-1),
            "w2": (11, 7),
            "w3": (5, 7),
        },
        [("ffn", 5), ("ffn", 11)],
    ),
    "two widths joined": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { u = MatMul(x, w1)\n v = MatMul(x, w3)\n r = Relu(u)\n"
        " c = Concat<axis=-1>(r, v)\n g, h = Split<axis=-1>(c, n)\n y1 = MatMul(g, w2)\n y2 = MatMul(h, w4)\n y = Add(y1, y2) }",
        {"w1": (6, 11), "w3": (6, 5), "n": ints(11, 5), "w2": (11, 7), "w4": (5, 7)},
        [("ffn", 5), ("ffn", 11)],
    ),
    "Einsum": (
        'f (float[b, s, 6] x) => (float[b, s, 7] y) { u = Einsum<equation="bsd,dh->bsh">(x, w1)\n h = Relu(u)\n'
        ' y = Einsum<equation="bsh,mh->bsm">(h, w2) }',
        {"w1": (6, 11), "w2": (7, 11)},
        [("ffn", 11)],
    ),
    "Einsum with an ellipsis": (
        'f (float[b, s, 6] x) => (float[b, s, 7] y) { u = Einsum<equation="...d,dh->...h">(x, w1)\n h = Relu(u)\n'
        ' y = Einsum<equation="... h, m h -> ... m">(h, w2) }',
        {"w1": (6, 11), "w2": (7, 11)},
        [("ffn", 11)],
    ),
    "Einsum without a result": (
        'f (float[b, s, 6] x) => (float[b, s, 7] y) { u = Einsum<equation="bcz,zd">(x, w1)\n h = Relu(u)\n'
        ' y = Einsum<equation="abd,dn">(h, w2) }',
        {"w1": (6, 11), "w2": (11, 7)},
        [("ffn", 11)],
    ),
    "Conv 1x1": (
        "f (float[b, 6, 5, 3] x) => (float[b, 7, 5, 3] y) { u = Conv(x, w1, b1)\n h = Relu(u)\n y = Conv(h, w2) }",
        {"w1": (11, 6, 1, 1), "b1": (11,), "w2": (7, 11, 1, 1)},
        [("ffn", 11)],
    ),
    "Conv 3x3 before Conv 1x1": (
        "f (float[b, 6, 5, 3] x) => (float[b, 7, 5, 3] y) { t = Conv(x, w0)\n u = Conv<pads=[1,1,1,1]>(t, w1, b1)\n h = Relu(u)\n"
        " y = Conv(h, w2) }",
        {"w0": (5, 6, 1, 1), "w1": (11, 5, 3, 3), "b1": (11,), "w2": (7, 11, 1, 1)},
        [("ffn", 5), ("ffn", 11)],
    ),
    "depthwise Conv, BatchNormalization": (
        "f (float[b, 6, 5, 3] x) => (float[b, 7, 5, 3] y) { u = Conv(x, w1, b1)\n d = Conv<group=11, pads=[1,1,1,1]>(u, k, b2)\n"
        " n = BatchNormalization(d, g, b3, m, v)\n h = Relu(n)\n y = Conv(h, w2) }",
        {
            **{"w1": (11, 6, 1, 1), "b1": (11,), "k": (11, 1, 3, 3), "b2": (11,), "w2": (7, 11, 1, 1)},
            **{"g": (11,), "b3": (11,), "m": (11,), "v": np.linspace(0.5, 2.0, 11, dtype=np.float32)},
        },
        [("ffn", 11)],
    ),
    "depthwise Conv over tokens": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { u = MatMul(x, w1)\n t = Transpose<perm=[0,2,1]>(u)\n"
        " d = Conv<group=11, pads=[2,2]>(t, k)\n r = Transpose<perm=[0,2,1]>(d)\n h = Relu(r)\n y = MatMul(h, w2) }",
        {"w1": (6, 11), "k": (11, 1, 5), "w2": (11, 7)},
        [("ffn", 11)],
    ),
    "InstanceNormalization, pooled": (
        "f (float[b, 6, 5, 3] x) => (float[b, 7, 4, 2] y) { u = Conv(x, w1)\n n = InstanceNormalization(u, g, b1)\n"
        " h = MaxPool<kernel_shape=[2,2]>(n)\n y = Conv(h, w2) }",
        {"w1": (11, 6, 1, 1), "g": (11,), "b1": (11,), "w2": (7, 11, 1, 1)},
        [("ffn", 11)],
    ),
    "Resize by scales": (
        "f (float[b, 6, 5, 3] x) => (float[b, 7, 10, 4] y) { u = Conv(x, w1)\n"
        ' h = Resize<mode="linear">(u, , factors)\n y = Conv(h, w2) }',
        {"w1": (11, 6, 1, 1), "factors": np.asarray([1, 1, 2, 1.5], np.float32), "w2": (7, 11, 1, 1)},
        [("ffn", 11)],
    ),
    "Resize to sizes": (
        "f (float[b, 6, 5, 3] x) => (float[b, 7, 4, 8] y) { u = Conv(x, w1)\n s = Shape(u)\n c = Slice(s, z, two)\n"
        ' n = Concat<axis=0>(c, hw)\n h = Resize<mode="cubic">(u, , , n)\n y = Conv(h, w2) }',
        {"w1": (11, 6, 1, 1), "z": ints(0), "two": ints(2), "hw": ints(4, 8), "w2": (7, 11, 1, 1)},
        [("ffn", 11)],
    ),
    "Resize to sizes that are written down": (
        "f (float[2, 6, 5, 3] x) => (float[2, 7, 4, 8] y) { u = Conv(x, w1)\n"
        ' h = Resize<mode="nearest">(u, , , n)\n y = Conv(h, w2) }',
        {"w1": (11, 6, 1, 1), "n": ints(2, 11, 4, 8), "w2": (7, 11, 1, 1)},
        [("ffn", 11)],
    ),
    "chain of three": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { u = MatMul(x, w1)\n h = Relu(u)\n v = MatMul(h, w2)\n k = Tanh(v)\n"
        " y = MatMul(k, w3) }",
        {"w1": (6, 11), "w2": (11, 13), "w3": (13, 7)},
        [("ffn", 11), ("ffn", 13)],
    ),
    "Pad elsewhere": (
        FFN.format("r = Pad(v, p)\n h = Slice(r, one, end, one)"),
        {**FFN_WEIGHTS, "p": ints(0, 1, 0, 0, 0, 0), "one": ints(1), "end": ints(2**62)},
        [("ffn", 11)],
    ),
}


@pytest.mark.parametrize("name", MATCH)
def test_match(name: str) -> None:
    text, weights, expected = MATCH[name]
    proto = graphs.parse(text, weights)
    assert graphs.sizes(proto) == expected
    graphs.prove(proto, {"b": 2, "s": 4, "n": 9})


# What runs over the hidden axis, or reads it in a way that is not followed: {reason: rest of the block}.
NEAR_MISS: dict[str, tuple[str, Weights, str]] = {
    "Softmax": ("h = Softmax(v)", {}, "Softmax runs over it"),
    "ReduceMean": ("m = ReduceMean<axes=[-1]>(v)\n h = Sub(v, m)", {}, "ReduceMean runs over it"),
    "LayerNormalization": ("h = LayerNormalization(v, g)", {"g": (11,)}, "LayerNormalization runs over it"),
    "SkipLayerNormalization": (
        "h = com.microsoft.SkipLayerNormalization(v, u, g)",
        {"g": (11,)},
        "SkipLayerNormalization runs over it",
    ),
    "CumSum": ("h = CumSum(v, two)", {"two": np.asarray(2, I64)}, "CumSum runs over it"),
    "Gather": ("k = Gather<axis=2>(v, i)\n z = Add(k, v)\n h = Relu(z)", {"i": ints(*range(10, -1, -1))}, "looked up by Gather"),
    "Slice with a step": ("h = Slice(v, s0, e0, a0, t0)", {"s0": ints(10), "e0": ints(-99), "a0": ints(2), "t0": ints(-1)}, "step"),
    "Pad": ("r = Pad(v, p)\n h = Slice(r, z, e, t)", {"p": ints(0, 0, 0, 0, 0, 2), "z": ints(0), "e": ints(11), "t": ints(2)}, "padded"),
    "unknown operator": ("h = test.Mystery(v)", {}, "operator test::Mystery has no rule"),
    "contracted with data": ("t = Transpose<perm=[0,2,1]>(v)\n a = MatMul(v, t)\n h = MatMul(a, v)", {}, "contracted between two activations"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISS)
def test_near_miss(name: str) -> None:
    rest, weights, reason = NEAR_MISS[name]
    proto = graphs.parse(FFN.format(rest), {**FFN_WEIGHTS, **weights})
    assert graphs.sizes(proto) == []
    assert reason in graphs.reasons(proto)


def test_graph_output_is_not_cut() -> None:
    text = "f (float[b, s, 6] x) => (float[b, s, 7] y, float[b, s, 11] h) { u = MatMul(x, w1)\n h = Relu(u)\n y = MatMul(h, w2) }"
    proto = graphs.parse(text, FFN_WEIGHTS)
    assert graphs.sizes(proto) == []
    assert "graph output 'h'" in graphs.reasons(proto)


def test_variable_weight_is_not_cut() -> None:
    text = "f (float[b, s, 6] x, float[11, 7] w2) => (float[b, s, 7] y) { u = MatMul(x, w1)\n h = Relu(u)\n y = MatMul(h, w2) }"
    proto = graphs.parse(text, {"w1": (6, 11)})
    assert graphs.sizes(proto) == []


WINDOWS = {
    "plain": ("(h, w2, b2)", (1, 5)),
    "padded, with steps": ("<pads=[1, 0, 0, 2], strides=[2, 1], dilations=[1, 2]>(h, w2, b2)", (1, 5)),
    "padded to the same size": ('<auto_pad="SAME_UPPER">(h, w2)', (3, 7)),
    "unpadded by name": ('<auto_pad="VALID">(h, w2)', (1, 5)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_channels_between_convolutions(name: str) -> None:
    call, (height, width) = WINDOWS[name]
    text = f"f (float[b, 6, 5, 7] x) => (float[b, 7, {height}, {width}] y) {{ t = Conv(x, w0)\n u = Conv(t, w1)\n h = Relu(u)\n y = Conv{call} }}"
    proto = graphs.parse(text, {"w0": (4, 6, 1, 1), "w1": (12, 4, 3, 1), "w2": (7, 12, 3, 3), "b2": (7,)})
    assert graphs.sizes(proto) == [("ffn", 4), ("ffn", 12)]
    graphs.prove(proto, {"b": 2})


@pytest.mark.parametrize(
    "call, length",
    [
        ("(u, w2, b2)", 11),
        ("<strides=[2], pads=[1, 1], output_padding=[1], dilations=[2]>(u, w2, b2)", 20),
        ("<strides=[2], output_shape=[16]>(u, w2)", 16),
    ],
)
def test_channels_around_a_transposed_convolution(call: str, length: int) -> None:
    text = f"""f (float[b, 6, 9] x) => (float[b, 7, {length}] y) {{
        v = Conv(x, w1)  u = Relu(v)  t = ConvTranspose{call}  h = Relu(t)  y = Conv(h, w3) }}"""
    proto = graphs.parse(text, {"w1": (8, 6, 1), "w2": (8, 12, 3), "b2": (12,), "w3": (7, 12, 1)})
    assert graphs.sizes(proto) == [("ffn", 8), ("ffn", 12)]
    graphs.prove(proto, {"b": 2})


def test_transposed_convolutions_of_groups_are_not_cut() -> None:
    text = """f (float[b, 6, 9] x) => (float[b, 7, 11] y) {
        u = Conv(x, w1)  t = ConvTranspose<group=2>(u, w2)  y = Conv(t, w3) }"""
    proto = graphs.parse(text, {"w1": (8, 6, 1), "w2": (8, 6, 3), "w3": (7, 12, 1)})
    assert graphs.sizes(proto) == []


def test_random_numbers_of_a_width_keep_it() -> None:
    """Of another width others would be drawn; what is behind them is cut all the same."""
    text = """f (float[b, s, 6] x) => (float[b, s, 7] y) {
        u = MatMul(x, w1)  r = RandomNormalLike(u)  z = Mul(r, zero)  a = Add(u, z)  v = MatMul(a, w2)  h = Relu(v)
        y = MatMul(h, w3) }"""
    proto = graphs.parse(text, {"w1": (6, 12), "w2": (12, 11), "w3": (11, 7), "zero": np.asarray(0, np.float32)})
    assert graphs.sizes(proto) == [("ffn", 11)]
    assert "random numbers are drawn for it" in graphs.reasons(proto)
    graphs.prove(proto, {"b": 2, "s": 3})


def test_behind_a_range_whose_length_depends_on_the_data() -> None:
    """As voices make a mask of the length that they foresee for a text."""
    text = """f (float[b, s, 6] x, int64[b] n) => (float[b, t, 7] y) {
        most = ReduceMax<keepdims=0>(n)  steps = Range(none, most, one)  ends = Unsqueeze(n, last)  inside = Less(steps, ends)
        f = Cast<to=1>(inside)  mask = Unsqueeze(f, last)  m = ReduceMean<keepdims=1, axes=[1]>(x)  e = Mul(mask, m)
        u = MatMul(e, w1)  h = Relu(u)  y = MatMul(h, w2) }"""
    zeros = {"none": np.asarray(0), "one": np.asarray(1), "last": np.asarray([-1])}
    proto = graphs.parse(text, {**FFN_WEIGHTS, **zeros})
    assert graphs.sizes(proto) == [("ffn", 11)]
    model, state, found = graphs.analyse(proto)
    kept = oracle.random_kept(found.groups, 0)
    feeds = {**graphs.feeds_of(proto, {"b": 2, "s": 3}), "n": np.asarray([3, 5])}
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(proto, Path(folder) / "model.onnx")
        reference = oracle.masked(Path(folder) / "model.onnx", found, kept)
    pruned = oracle.prune(model, state, found, kept)
    assert oracle.difference(oracle.run(pruned, feeds), oracle.run(reference, feeds)) <= 1e-5


def test_the_first_convolution_over_an_input_is_left_alone() -> None:
    """Whatever is done to the input without weights before; what the second one makes is cut."""
    text = """f (float[b, 6, 9] x) => (float[b, 5, 3] y) {
        c = Sub(x, mean)  u = Conv(c, w1)  h = Relu(u)  v = Conv(h, w2)  k = Relu(v)  y = Conv(k, w3) }"""
    weights: Weights = {"mean": (6, 1), "w1": (12, 6, 3), "w2": (10, 12, 3), "w3": (5, 10, 3)}
    proto = graphs.parse(text, weights)
    assert graphs.sizes(proto) == [("ffn", 10)]
    assert "the first convolution over an input is left alone" in graphs.reasons(proto)
    graphs.prove(proto, {"b": 2})


def test_convolutions_that_are_no_products_are_not_cut() -> None:
    text = "f (float[b, 6, 5, 3] x) => (float[b, 7, 3, 1] y) {{ u = Conv(x, w1)\n h = Relu(u)\n {} }}"
    padded = 'y = Conv<auto_pad="SAME_UPPER", strides=[2, 2]>(h, w2)'  # how much depends on the size of the input
    assert graphs.sizes(graphs.parse(text.format(padded), {"w1": (12, 6, 1, 1), "w2": (7, 12, 3, 3)})) == []
    grouped = graphs.parse(
        text.format("k = Conv<group=4>(h, w2)\n y = Conv(k, w3)"),
        {"w1": (12, 6, 1, 1), "w2": (12, 3, 3, 3), "w3": (7, 12, 1, 1)},
    )
    assert graphs.sizes(grouped) == []


BRANCHES = """f (float[b, s, 6] x) => (float[b, t, 7] y) {{
    n = Shape(x)  r = Size(n)  c = {condition}
    p = If (c) <
        then_branch = g1 () => (float[q, 6] t1) {{ k = Constant<value = int64[2] {{-1, 6}}>()  t1 = Reshape(x, k) }},
        else_branch = g2 () => (float[v, w, 6] t2) {{ t2 = Identity(x) }}
    >
    m = Shape(p)  f = Reshape(p, m)  u = MatMul(f, w1)  h = Relu(u)  y1 = MatMul(h, w2)  y = Reshape(y1, end) }}"""


@pytest.mark.parametrize("condition", ["Less(r, three)", "Greater(r, two)"])
def test_behind_a_branch_whose_condition_is_known(condition: str) -> None:
    """Its shape is that of the branch that is taken: exporters write such branches for shapes of other ranks."""
    weights: Weights = {
        "w1": (6, 11),
        "w2": (11, 7),
        "two": np.asarray(2, I64),
        "three": np.asarray(3, I64),
        "end": ints(0, -1, 7),
    }
    proto = graphs.parse(BRANCHES.format(condition=condition), weights)
    assert graphs.sizes(proto) == [("ffn", 11)]
    assert "operator If has no rule" in graphs.reasons(proto)
    graphs.prove(proto, {"b": 2, "s": 5})


@pytest.mark.parametrize(
    "rest",
    [
        "h = Resize(u, , factors)",  # as many channels, but not the same
        'h = Resize<coordinate_transformation_mode="tf_crop_and_resize">(u, roi, ones)',
        "r = Resize(u, , any)\n k = Shape(u)\n h = Reshape(r, k)",
        "h, d1, d2 = BatchNormalization<training_mode=1>(u, g, g, g, g)",
    ],
)
def test_what_runs_over_channels_of_images(rest: str) -> None:
    text = "f (float[b, 6, 4, 3] x, float[four] any) => (float[b, 7, q, w] y) {{ u = Conv(x, w1)\n {}\n y = Conv(h, w2) }}"
    ones = np.ones(4, np.float32)
    weights: Weights = {"w1": (8, 6, 1, 1), "w2": (7, 8, 1, 1), "g": (8,), "ones": ones, "roi": np.zeros(8, np.float32)}
    proto = graphs.parse(text.format(rest), {**weights, "factors": np.asarray([1, 1.01, 1, 1], np.float32)})
    assert graphs.sizes(proto) == []


def test_an_unknown_operator_is_named_with_its_nodes() -> None:
    proto = graphs.parse(FFN.format("h = test.Mystery(v)"), FFN_WEIGHTS)
    _, state, _ = graphs.analyse(proto)
    assert list(state.unknown) == ["test::Mystery"]
    assert len(state.unknown["test::Mystery"]) == 1


def test_what_is_behind_an_unknown_shape_is_said() -> None:
    """Weights there are in no group and read no axis that could be named; the shape itself has a rule."""
    text = """f (float[b, s, 6] x) => (float[p, q] y, int64[n] z) {
        u = test.Mystery(x)  h = Relu(u)  v = MatMul(h, w1)  y = Add(v, b1)  z = Shape(v) }"""
    proto = graphs.parse(text, {"w1": (6, 11), "b1": (11,)})
    _, state, _ = graphs.analyse(proto)
    assert list(state.unknown) == ["test::Mystery"]
    assert graphs.reasons(proto).splitlines() == [
        "operator test::Mystery has no rule",
        f"no shape is known behind Mystery (node '{state.unknown['test::Mystery'][0]}')",
    ]


def test_tensors_captured_by_a_branch_are_not_cut() -> None:
    text = """f (float[b, s, 6] x, bool c) => (float[b, s, 7] y) {
        u = MatMul(x, w1)  h = Relu(u)  y1 = MatMul(h, w2)
        z = If (c) <
            then_branch = g1 () => (float[b, s, 1] t) { t = ReduceMax<axes=[-1]>(h) },
            else_branch = g2 () => (float[b, s, 1] e) { e = ReduceMin<axes=[-1]>(x) }
        >
        y = Add(y1, z) }"""
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 7)})
    assert graphs.sizes(proto) == []
    assert "operator If has no rule" in graphs.reasons(proto)


def test_windows_longer_than_the_sizes_tried_first() -> None:
    text = """f (float[b, 6, n] x) => (float[b, 7, k] y) { t = Conv(x, w0)  u = Conv<strides=[50]>(t, w1)
        p = MaxPool<kernel_shape=[4]>(u)  h = Relu(p)  y = Conv(h, w2) }"""
    proto = graphs.parse(text, {"w0": (5, 6, 1), "w1": (11, 5, 90), "w2": (7, 11, 1)})
    assert graphs.sizes(proto) == [("ffn", 5), ("ffn", 11)]
    graphs.prove(proto, {"b": 2, "n": 300, "k": 2})


COUNTED = """f (float[b, 6, 5, 3] x) => (float[b, 7, 4, 2] y{}) {{ u = Conv(x, w1)
    h, i = MaxPool<kernel_shape=[2,2]>(u)  {}  v = Conv(k, w2)  r = Relu(v)  y = Conv(r, w3) }}"""
COUNTED_WEIGHTS: Weights = {
    "few": np.asarray([0.01], np.float32),
    "w1": (11, 6, 1, 1),
    "w2": (9, 11, 1, 1),
    "w3": (7, 9, 1, 1),
}


@pytest.mark.parametrize(
    ("output", "then"),
    [("", "c = Cast<to=1>(i)  n = Mul(c, few)  k = Add(h, n)"), (", int64[b, 11, 4, 2] i", "k = Relu(h)")],
)
def test_channels_that_the_indices_of_a_pool_count_stay(output: str, then: str) -> None:
    """The number of a maximum counts the channels before its own; what lies behind them may go."""
    proto = graphs.parse(COUNTED.format(output, then), COUNTED_WEIGHTS)
    assert graphs.sizes(proto) == [("ffn", 9)]
    assert "counted by the indices of MaxPool" in graphs.reasons(proto)
    graphs.prove(proto, {"b": 2})


def test_indices_of_a_pool_that_nobody_reads_count_nothing() -> None:
    proto = graphs.parse(COUNTED.format("", "k = Relu(h)"), COUNTED_WEIGHTS)
    assert graphs.sizes(proto) == [("ffn", 9), ("ffn", 11)]
    graphs.prove(proto, {"b": 2})


@pytest.mark.parametrize(
    "then", ["i = ArgMax<axis=1, keepdims=1>(v)", "t, i = TopK<axis=1, largest=1>(v, two)", "t, i = TopK<axis=1>(h, two)"]
)
def test_positions_that_are_used_as_data_count_the_tokens(then: str) -> None:
    """They number places of an axis that stays, not channels: each channel has numbers of its own."""
    text = (
        FFN.replace("{{", "{")
        .replace("}}", "}")
        .replace("{}", f"h = Relu(v)  {then}  c = Cast<to=1>(i)  s = ReduceSum<keepdims=0>(c, one)")
    )
    text = text.replace("float[b, s, 7] y", "float[b, s, 7] y, float[b, 11] s")
    proto = graphs.parse(text, {**FFN_WEIGHTS, "two": ints(2), "one": ints(1)})
    assert graphs.sizes(proto) == []  # the sums are an output
    text = text.replace(", float[b, 11] s", ", float[b, 5] o").replace(
        "y = MatMul(h, w2)", "y = MatMul(h, w2)  o = MatMul(s, w3)"
    )
    proto = graphs.parse(text, {**FFN_WEIGHTS, "two": ints(2), "one": ints(1), "w3": (11, 5)})
    assert graphs.sizes(proto) == [("ffn", 11)]
    graphs.prove(proto, {"b": 2, "s": 4})


def test_a_number_of_channels_that_is_chosen_stays() -> None:
    """Which channels are the largest is told by their numbers."""
    proto = graphs.parse(
        FFN.format("t, i = TopK(v, all)  c = Cast<to=1>(i)  h = Add(t, c)"), {**FFN_WEIGHTS, "all": ints(11)}
    )
    assert graphs.sizes(proto) == []
    assert "TopK runs over it" in graphs.reasons(proto)


HANDED_OUT = """f (float[b, s, 6] x) => (float[b, s, 7] y, {}) {{ u = MatMul(x, w1)  v = Add(u, b1)  h = Relu(v)
    z = MatMul(h, w2)  zb = Add(z, b2)  g = Relu(zb)  y = MatMul(g, w3) }}"""
HANDED_WEIGHTS: Weights = {"w1": (6, 11), "b1": (11,), "w2": (11, 9), "b2": (9,), "w3": (9, 7)}


@pytest.mark.parametrize(
    ("output", "left"),
    [
        ("float[6, 11] w1", [("ffn", 9)]),
        ("float[11] b1", [("ffn", 9)]),
        ("float[11, 9] w2", []),
        ("float[9] b2", [("ffn", 11)]),
    ],
)
def test_a_weight_that_is_an_output_keeps_its_shape(output: str, left: list[tuple[str, int]]) -> None:
    proto = graphs.parse(HANDED_OUT.format(output), HANDED_WEIGHTS)
    assert graphs.sizes(proto) == left
    assert f"axis of graph output '{output.split()[-1]}'" in graphs.reasons(proto)
    if left:
        graphs.prove(proto, {"b": 2, "s": 3})


def test_a_bias_that_is_an_output_keeps_its_numbers() -> None:
    """A repair adds to a copy of it."""
    proto = graphs.parse(HANDED_OUT.format("float[9] b2"), HANDED_WEIGHTS)
    feeds = [graphs.feeds_of(proto, {"b": 4, "s": 3}, seed) for seed in range(4)]
    result = prune(proto, feeds, ffn=0.5, multiple_of=1, latency=False, fresh=True)
    assert result.report["verification"]["exact_difference"] < 1e-5
    assert np.array_equal(oracle.run(result.model, feeds[0])[1], oracle.run(proto, feeds[0])[1])
    changed = [t for t in result.model.graph.initializer if list(t.dims) == [9] and t.name != "b2"]
    assert len(changed) == 1


def test_a_window_longer_than_a_fixed_axis_is_refused() -> None:
    text = """f (float[b, 6, 5] x) => (float[b, 7, k] y) { u = Conv(x, w1)  h = Relu(u)  y = Conv(h, w2) }"""
    proto = graphs.parse(text, {"w1": (11, 6, 9), "w2": (7, 11, 1)})
    assert graphs.sizes(proto) == []
    assert "Conv over fewer elements than its window" in graphs.reasons(proto)


def test_a_model_inside_branches_is_said_to_be_there() -> None:
    """Two models of one set of weights, neither of which has a cache, are no merged decoder."""
    branch = "{0} () => (float[b, s, 7] {0}y) {{ {0}u = MatMul(x, w1)  {0}h = Relu({0}u)  {0}y = MatMul({0}h, w2) }}"
    text = f"""f (float[b, s, 6] x, bool c) => (float[b, s, 7] y) {{
        y = If (c) <then_branch = {branch.format("t")}, else_branch = {branch.format("e")}> }}"""
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 7)})
    assert graphs.sizes(proto) == []
    assert "4 products with weights inside the branches of If are left alone: only a merged decoder" in graphs.reasons(
        proto
    )


def test_einsum_that_keeps_the_output_letter_in_both_terms_is_no_consumer() -> None:
    """Summed per output channel, y[b, m] = sum_h x[b, h, m] W[h, m] is no product x W with one W for all rows."""
    text = """f (float[b, 6] x) => (float[b, 7] y) {
        u = MatMul(x, w1)  r = Reshape(u, n)  h = Relu(r)  y = Einsum<equation="bhm,hm->bm">(h, w2) }"""
    proto = graphs.parse(text, {"w1": (6, 77), "n": ints(-1, 11, 7), "w2": (11, 7)})
    _, state, found = graphs.analyse(proto)
    assert not [u for u in state.consumers if u.node.op == "Einsum"]
    assert not found.groups


# -- attention -------------------------------------------------------------------------------------------------------

# 3 heads of 4 channels, hidden 10; scores of q k^T, softmax, values, joined; {} makes q, k, v [b, s, 12].
ATTENTION = """f (float[b, s, 10] x) => (float[b, s, 10] y) {{
    {}
    q4 = Reshape(q, split)  k4 = Reshape(k, split)  v4 = Reshape(v, split)
    qt = Transpose<perm=[0,2,1,3]>(q4)  kt = Transpose<perm=[0,2,3,1]>(k4)  vt = Transpose<perm=[0,2,1,3]>(v4)
    a = MatMul(qt, kt)  p = Softmax(a)  c = MatMul(p, vt)
    ct = Transpose<perm=[0,2,1,3]>(c)  j = Reshape(ct, join)  y = MatMul(j, wo) }}"""
SHAPES: Weights = {"split": ints(0, 0, 3, 4), "join": ints(0, 0, 12), "wo": (12, 10)}
HEADS: dict[str, tuple[str, Weights]] = {
    "three weights": (
        "q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)",
        {"wq": (10, 12), "wk": (10, 12), "wv": (10, 12)},
    ),
    "packed, Split": ("p3 = MatMul(x, w)  q, k, v = Split<axis=-1>(p3, n)", {"w": (10, 36), "n": ints(12, 12, 12)}),
    "packed, Split by count": ("p3 = MatMul(x, w)  q, k, v = Split<axis=-1>(p3)", {"w": (10, 36)}),
    "packed, Slice": (
        "p3 = MatMul(x, w)  q = Slice(p3, n0, n1, a2)  k = Slice(p3, n1, n2, a2)  v = Slice(p3, n2, n3, a2)",
        {"w": (10, 36), "n0": ints(0), "n1": ints(12), "n2": ints(24), "n3": ints(36), "a2": ints(2)},
    ),
    "packed, Reshape and Gather": (
        "p3 = MatMul(x, w)  p4 = Reshape(p3, r)  pt = Transpose<perm=[2,0,1,3]>(p4)\n"
        " q = Gather(pt, i0)  k = Gather(pt, i1)  v = Gather(pt, i2)",
        {"w": (10, 36), "r": ints(0, 0, 3, 12), "i0": np.asarray(0), "i1": np.asarray(1), "i2": np.asarray(2)},
    ),
    "packed with a bias": (
        "p2 = MatMul(x, w)  p3 = Add(p2, bias)  q, k, v = Split<axis=-1>(p3, n)",
        {"w": (10, 36), "bias": (36,), "n": ints(12, 12, 12)},
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    make, weights = HEADS[name]
    proto = graphs.parse(ATTENTION.format(make), {**SHAPES, **weights})
    assert graphs.sizes(proto) == [("heads", 3)]
    graphs.prove(proto, {"b": 2, "s": 5})
    tied = name == "packed, Reshape and Gather"  # equal parts: the width is that of q and k
    assert [(g.size, g.sets) for g in graphs.analyse(proto)[2].values] == ([] if tied else [(4, 3)])
    if not tied:
        graphs.prove(proto, {"b": 2, "s": 5}, values=True)


# The same attention with weights of three axes, as JAX, Keras and XLNet write it.
EINSUMS: dict[str, tuple[str, Weights]] = {
    "rows first": (
        """q = Einsum<equation="bsd,dhk->bshk">(x, wq)  k = Einsum<equation="bsd,dhk->bshk">(x, wk)
        v = Einsum<equation="dhk,bsd->bhsk">(wv, x)
        a = Einsum<equation="bshk,bthk->bhst">(q, k)  p = Softmax(a)  c = Einsum<equation="bhst,bhtk->bshk">(p, v)
        y = Einsum<equation="bshk,hkd->bsd">(c, wo)""",
        {"wq": (10, 3, 4), "wk": (10, 3, 4), "wv": (10, 3, 4), "wo": (3, 4, 10)},
    ),
    "columns last": (
        """q = Einsum<equation="bsd,hdk->bhsk">(x, wq)  k = Einsum<equation="bsd,hdk->bhsk">(x, wk)
        v = Einsum<equation="bsd,hkd->bhsk">(x, wv)
        a = Einsum<equation="bhsk,bhtk->bhst">(q, k)  p = Softmax(a)  c = Einsum<equation="bhst,bhtk->bhsk">(p, v)
        y = Einsum<equation="bhsk,dhk->bsd">(c, wo)""",
        {"wq": (3, 10, 4), "wk": (3, 10, 4), "wv": (3, 4, 10), "wo": (10, 3, 4)},
    ),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_heads_of_weights_with_three_axes(name: str) -> None:
    text, weights = EINSUMS[name]
    proto = graphs.parse(f"f (float[b, s, 10] x) => (float[b, s, 10] y) {{ {text} }}", weights)
    assert graphs.sizes(proto) == [("heads", 3)]
    graphs.prove(proto, {"b": 2, "s": 5})
    graphs.prove(proto, {"b": 2, "s": 5}, values=True)


def two_layers(text: str, weights: Weights) -> tuple[str, Weights]:
    """Returns an attention layer behind another with weights of its own, what is between them added up, from x to y."""

    def layer(number: int, x: str, y: str) -> str:
        renamed = re.sub(r"\b(q|qb|k|v|a|m|p|c)\b(?=[ ,)])", rf"\g<1>{number}", text)
        renamed = re.sub(r"\b(w[qkvo])\b", rf"\g<1>{number}", renamed)
        return renamed.replace("(x, ", f"({x}, ").replace(", x)", f", {x})").replace(" y = ", f" {y} = ")

    joined = f"{layer(1, 'x', 'z')}  r = Add(x, z)  {layer(2, 'r', 'y')}"
    return joined, {f"{name}{number}": value for name, value in weights.items() for number in (1, 2)}


def test_layers_that_share_equal_biases_are_cut_apart() -> None:
    """Exporters store equal constants once, Keras' biases by head and channel among them: that ties no heads."""
    text, weights = EINSUMS["rows first"]
    text = text.replace("(x, wq)", "(x, wq)  qb = Add(q, shared)").replace("(q, k)", "(qb, k)")
    joined, every = two_layers(text, weights)
    proto = graphs.parse(f"f (float[b, s, 10] x) => (float[b, s, 10] y) {{ {joined} }}", {**every, "shared": (3, 4)})
    assert graphs.sizes(proto) == [("heads", 3), ("heads", 3)]
    graphs.prove(proto, {"b": 2, "s": 5})
    same = re.sub(r"\b(w[qkvo])[12]\b", r"\1", joined)  # one layer, twice
    proto = graphs.parse(f"f (float[b, s, 10] x) => (float[b, s, 10] y) {{ {same} }}", {**weights, "shared": (3, 4)})
    assert graphs.sizes(proto) == [("heads", 3)]
    graphs.prove(proto, {"b": 2, "s": 5})


def test_a_mask_that_layers_share_ties_no_heads() -> None:
    """torch repeats a padding mask by heads once, for all layers."""
    text, weights = EINSUMS["rows first"]
    joined, every = two_layers(text.replace("p = Softmax(a)", "m = Add(a, wide)  p = Softmax(m)"), weights)
    made = "e = Expand(mask, heads)  wide = Reshape(e, same)"
    graph = f"f (float[b, s, 10] x, float[b, 1, 1, s] mask) => (float[b, s, 10] y) {{ {made}  {joined} }}"
    proto = graphs.parse(graph, {**every, "heads": ints(1, 3, 1, 1), "same": ints(0, 0, 0, 0)})
    assert graphs.sizes(proto) == [("heads", 3), ("heads", 3)]
    graphs.prove(proto, {"b": 2, "s": 5})
    # Layer by layer, each mask is made where it is read: what was measured before a cut has all heads.
    data = graphs.feeds_of(proto, {"b": 40, "s": 5})
    report = prune(proto, calibration=data, heads=0.4, latency=False).report
    assert report["verification"]["exact_difference"] < 1e-5


def test_a_mask_as_wide_as_the_scores() -> None:
    """Keras makes one of ones_like(scores): its extents follow those of the scores."""
    make, weights = HEADS["three weights"]
    mask = "n = Shape(a1)  ones = Expand(true, n)  m = And(ones, wide)  a = Where(m, a1, low)"
    text = ATTENTION.format(make).replace("a = MatMul(qt, kt)", f"a1 = MatMul(qt, kt)  {mask}")
    constants = {"true": np.asarray([True]), "wide": np.tri(5, dtype=bool), "low": np.asarray(-9.0, np.float32)}
    proto = graphs.parse(text.replace("[b, s,", "[2, 5,"), {**SHAPES, **weights, **constants})
    assert graphs.sizes(proto) == [("heads", 3)]
    graphs.prove(proto)


def test_heads_stay_apart_from_positions_that_are_shifted() -> None:
    """Relative positions (Transformer-XL, XLNet) are shifted by two reshapes that do not align along the positions."""
    make, weights = HEADS["three weights"]
    shift = (
        "a2 = MatMul(qt, pk)  r = Reshape(a2, turned)  n = Slice(r, one, end, axis)  a3 = Reshape(n, back)  a = Add(a1, a3)"
    )
    text = ATTENTION.format(make).replace("a = MatMul(qt, kt)", f"a1 = MatMul(qt, kt)  {shift}")
    constants = {"turned": ints(2, 3, 6, 5), "one": ints(1), "end": ints(6), "axis": ints(2), "back": ints(2, 3, 5, 5)}
    proto = graphs.parse(text.replace("[b, s,", "[2, 5,"), {**SHAPES, **weights, **constants, "pk": (3, 4, 6)})
    assert graphs.sizes(proto) == [("heads", 3)]
    graphs.prove(proto)


def test_axes_that_a_diagonal_pairs_are_kept() -> None:
    text = """f (float[b, 6] x) => (float[b, 7] y) { u = MatMul(x, w1)  h = Relu(u)  v = MatMul(h, w2)
        t = Transpose(w3)  z = MatMul(h, t)  e = EyeLike(z)  k = Cast<to=1>(e)  p = MatMul(k, w4)  y = Add(v, p) }"""
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 7), "w3": (5, 11), "w4": (5, 7)})
    assert graphs.sizes(proto) == [("ffn", 11)]
    graphs.prove(proto, {"b": 5})
    assert "paired by EyeLike" in graphs.reasons(proto)


@pytest.mark.parametrize(
    ("equation", "ranks", "terms"),
    [
        ("ij,jk->ik", (2, 2), (["ij", "jk"], "ik")),
        ("ba,cb", (2, 2), (["ba", "cb"], "ac")),
        ("ij,jk->ik", (2, 3), None),
        ("ii->i", (2,), None),
    ],
)
def test_equations(equation: str, ranks: tuple[int, ...], terms: object) -> None:
    assert spelled_out(equation, ranks) == terms


@pytest.mark.parametrize("equation", ["...ij,...jk->...ik", "i...j,kj...->...ik", "...a,a...", "b...,...b->..."])
def test_an_ellipsis_means_what_it_means_in_numpy(equation: str) -> None:
    rng = np.random.default_rng(0)
    operands = [rng.standard_normal((2, 2, 2)), rng.standard_normal((2, 2, 2, 2))]
    spelled = spelled_out(equation, [3, 4])
    assert spelled is not None
    letters = {c: "abcdefghijkl"[i] for i, c in enumerate(sorted({*"".join(spelled[0])}))}
    plain = ",".join(spelled[0]) + "->" + spelled[1]
    plain = "".join(letters.get(c, c) for c in plain)
    np.testing.assert_allclose(np.einsum(plain, *operands), np.einsum(equation, *operands))


@pytest.mark.parametrize(("opset", "attribute"), [(11, ""), (13, ""), (18, ", num_outputs=2")])
def test_a_split_that_divides_by_itself_is_told_the_sizes_once_they_differ(opset: int, attribute: str) -> None:
    text = f"""f (float[b, 6] x) => (float[b, 5] y) {{ p = MatMul(x, w1)  a, c = Split<axis=1{attribute}>(p)  s = Softmax(c)
        h = Relu(a)  u = MatMul(h, w2)  v = MatMul(s, w3)  y = Add(u, v) }}"""
    proto = graphs.parse(text, {"w1": (6, 22), "w2": (11, 5), "w3": (11, 5)}, opset=opset)
    assert graphs.sizes(proto) == [("ffn", 11)]
    pruned = graphs.prove(proto, {"b": 4})
    (split,) = (n for n in pruned.graph.node if n.op_type == "Split")
    assert not [a for a in split.attribute if a.name == "num_outputs"]
    assert (len(split.input) == 1) == (opset < 13)
    whole = graphs.cut(proto, {graphs.analyse(proto)[2].groups[0].name + "ffn": list(range(11))})
    (split,) = (n for n in whole.graph.node if n.op_type == "Split")
    assert len(split.input) == 1
    assert "split" not in [a.name for a in split.attribute]


def test_a_split_over_rows_is_left_to_itself() -> None:
    """Its parts are as long as the input says; what is cut is another axis."""
    text = """f (float[b, 6] x) => (float[n, 5] y) { p = MatMul(x, w1)  r = Reshape(p, rows)  a, c = Split<axis=0>(r)
        h = Relu(a)  y = MatMul(h, w2) }"""
    proto = graphs.parse(text, {"w1": (6, 22), "rows": ints(-1, 11), "w2": (11, 5)})
    pruned = graphs.prove(proto, {"b": 4})
    assert [len(n.input) for n in pruned.graph.node if n.op_type == "Split"] == [1]


# 2 key-value heads for 6 query heads of 4 channels; {} makes c [b, 6, s, 4] of qt [b, 6, s, 4], k2 and v2 [b, 2, s, 4].
GROUPED = """f (float[b, s, 10] x) => (float[b, s, 10] y) {{
    q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)  q4 = Reshape(q, six)  k4 = Reshape(k, two)  v4 = Reshape(v, two)
    qt = Transpose<perm=[0,2,1,3]>(q4)  k2 = Transpose<perm=[0,2,1,3]>(k4)  v2 = Transpose<perm=[0,2,1,3]>(v4)
    {}
    ct = Transpose<perm=[0,2,1,3]>(c)  j = Reshape(ct, join)  y = MatMul(j, wo) }}"""
GROUPED_SHAPES: Weights = {
    **{"wq": (10, 24), "wk": (10, 8), "wv": (10, 8), "wo": (24, 10)},
    **{"six": ints(0, 0, 6, 4), "two": ints(0, 0, 2, 4), "join": ints(0, 0, 24)},
}
SCORES = "kt = Transpose<perm=[0,1,3,2]>(kr)  a = MatMul(qt, kt)  p = Softmax(a)  c = MatMul(p, vr)"
REPEATS: dict[str, tuple[str, Weights]] = {
    "Expand": (
        f"""s = Shape<start=2,end=3>(qt)  b = Shape<end=1>(qt)  wide = Concat<axis=0>(b, n23, s, n4)
            ku = Unsqueeze(k2, two_)  vu = Unsqueeze(v2, two_)  ke = Expand(ku, wide)  ve = Expand(vu, wide)
            merged = Concat<axis=0>(b, n6, s, n4)  kr = Reshape(ke, merged)  vr = Reshape(ve, merged)  {SCORES}""",
        {"n23": ints(2, 3), "n4": ints(4), "n6": ints(6), "two_": ints(2)},
    ),
    "Tile": (
        f"""ku = Unsqueeze(k2, two_)  vu = Unsqueeze(v2, two_)  ke = Tile(ku, times)  ve = Tile(vu, times)
            kr = Reshape(ke, merged)  vr = Reshape(ve, merged)  {SCORES}""",
        {"times": ints(1, 1, 3, 1, 1), "merged": ints(0, 6, -1, 4), "two_": ints(2)},
    ),
    "broadcast": (
        """q5 = Reshape(qt, five)  ku = Unsqueeze(k2, two_)  vu = Unsqueeze(v2, two_)
            kt = Transpose<perm=[0,1,2,4,3]>(ku)  a = MatMul(q5, kt)  p = Softmax(a)  c5 = MatMul(p, vu)
            c = Reshape(c5, merged)""",
        {"five": ints(0, 2, 3, -1, 4), "merged": ints(0, 6, -1, 4), "two_": ints(2)},
    ),
}


@pytest.mark.parametrize("name", REPEATS)
def test_query_heads_go_with_the_keys_and_values_that_they_share(name: str) -> None:
    make, weights = REPEATS[name]
    proto = graphs.parse(GROUPED.format(make), {**GROUPED_SHAPES, **weights})
    (group,) = graphs.analyse(proto)[2].groups
    assert (group.kind, group.size, group.block_width, group.queries) == ("heads", 2, 12, 3)
    assert [(g.size, g.sets, g.block_width) for g in graphs.analyse(proto)[2].values] == [(4, 2, 3)]
    graphs.prove(proto, {"b": 2, "s": 5})
    graphs.prove(proto, {"b": 2, "s": 5}, values=True)


def test_a_weight_that_all_heads_share_gives_their_values_one_index_set() -> None:
    make, weights = HEADS["three weights"]
    text = ATTENTION.format(make).replace("c = MatMul(p, vt)", "vs = Mul(vt, scale)  c = MatMul(p, vs)")
    proto = graphs.parse(text, {**SHAPES, **weights, "scale": (4,)})
    assert [(g.size, g.sets, g.block_width) for g in graphs.analyse(proto)[2].values] == [(4, 1, 3)]
    graphs.prove(proto, {"b": 2, "s": 5}, values=True)


def test_heads_that_are_added_up_keep_the_same_values() -> None:
    make, weights = HEADS["three weights"]
    text = ATTENTION.format(make).replace(
        "j = Reshape(ct, join)", "h0, h1, h2 = Split<axis=2>(ct, ones)  h = Sum(h0, h1, h2)  j = Reshape(h, join)"
    )
    proto = graphs.parse(text, {**SHAPES, **weights, "ones": ints(1, 1, 1), "join": ints(0, 0, 4), "wo": (4, 10)})
    assert [(g.kind, g.size, g.sets) for g in graphs.analyse(proto)[2].values] == [("values", 4, 1)]
    graphs.prove(proto, {"b": 2, "s": 5}, values=True)


def test_one_head_is_no_feed_forward_layer() -> None:
    make, weights = HEADS["three weights"]
    proto = graphs.parse(ATTENTION.format(make), {**SHAPES, **weights, "split": ints(0, 0, 1, 12)})
    _, _, found = graphs.analyse(proto)
    assert found.groups == ()
    assert [(g.kind, g.size, g.sets) for g in found.values] == [("values", 12, 1)]
    graphs.prove(proto, {"b": 2, "s": 5}, values=True)


@pytest.mark.parametrize(("heads", "groups", "sets"), [(1, 1, 1), (6, 2, 2), (4, 4, 4), (6, 1, 1)])
def test_values_inside_an_attention_operator(heads: int, groups: int, sets: int) -> None:
    text = f"""f (float[b, s, 10] x) => (float[b, s, 10] y) {{ q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        c = Attention<q_num_heads = {heads}, kv_num_heads = {groups}>(q, k, v)  y = MatMul(c, wo) }}"""
    weights: Weights = {"wq": (10, 4 * heads), "wk": (10, 4 * groups), "wv": (10, 6 * groups), "wo": (6 * heads, 10)}
    proto = graphs.parse(text, weights, opset=23)
    _, _, found = graphs.analyse(proto)
    assert [(g.kind, g.size, g.sets, g.block_width) for g in found.values] == [("values", 6, sets, heads // groups)]
    graphs.prove(proto, {"b": 2, "s": 5}, values=True)


# -- caches ----------------------------------------------------------------------------------------------------------

CACHED = """f (float[b, s, 10] x, float[b, 3, past, 4] pk, float[b, 3, past, 4] pv)
    => (float[b, s, 10] y, float[b, 3, all, 4] nk, float[b, 3, all, 4] nv) {{
    q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)  q4 = Reshape(q, split)  k4 = Reshape(k, split)  v4 = Reshape(v, split)
    qt = Transpose<perm=[0,2,1,3]>(q4)  kt = Transpose<perm=[0,2,1,3]>(k4)  vt = Transpose<perm=[0,2,1,3]>(v4)
    {}
    kk = Transpose<perm=[0,1,3,2]>(nk)  a = MatMul(qt, kk)  p = Softmax(a)  c = MatMul(p, nv)
    ct = Transpose<perm=[0,2,1,3]>(c)  j = Reshape(ct, join)  y = MatMul(j, wo) }}"""
CACHED_SHAPES: Weights = {**SHAPES, "wq": (10, 12), "wk": (10, 12), "wv": (10, 12)}
GROWN = "nk = Concat<axis=2>(pk, kt)  nv = Concat<axis=2>(pv, vt)"


@pytest.mark.parametrize(
    "grown",
    [
        GROWN,
        "pk1 = Concat<axis=-2>(pk)  nk = Concat<axis=-2>(pk1, kt)  pv1 = Cast<to=1>(pv)  nv = Concat<axis=2>(pv1, vt)",
        "nk1 = Concat<axis=2>(pk, kt)  nk = Identity(nk1)  nv1 = Concat<axis=2>(pv, vt)  nv = Cast<to=1>(nv1)",
    ],
)
def test_a_cache_loses_the_heads_that_go(grown: str) -> None:
    proto = graphs.parse(CACHED.format(grown), CACHED_SHAPES)
    assert graphs.sizes(proto) == [("heads", 3)]
    _, state, found = graphs.analyse(proto)
    assert {(c.past, c.present, c.axis) for c in state.caches.values()} == {("pk", "nk", 2), ("pv", "nv", 2)}
    assert found.values == ()  # caches have one width for all heads
    pruned = graphs.prove(proto, {"b": 2, "s": 5, "past": 4})
    sizes = {v.name: v.type.tensor_type.shape.dim[1].dim_value for v in [*pruned.graph.input, *pruned.graph.output][1:]}
    assert len({sizes[n] for n in ("pk", "pv", "nk", "nv")}) == 1
    assert sizes["pk"] < 3


@pytest.mark.parametrize(
    "grown",
    [
        "nk = Identity(kt)  nv = Add(vt, pv)",  # what comes in is not what comes out, longer
        "kl = Concat<axis=2>(pk, kt)  nk = Abs(kl)  nv = Concat<axis=2>(pv, vt)",  # changed in between
        "pk0 = Neg(pk)  nk = Concat<axis=2>(pk0, kt)  nv = Concat<axis=2>(pv, vt)",
    ],
)
def test_other_inputs_and_outputs_keep_their_heads(grown: str) -> None:
    proto = graphs.parse(CACHED.format(grown), CACHED_SHAPES)
    assert graphs.sizes(proto) == []
    assert "axis of graph" in graphs.reasons(proto)


def test_a_mask_covers_what_is_in_the_cache_and_what_is_new() -> None:
    """Its length is a symbol of its own in the file; scores have past + s columns."""
    text = CACHED.format(GROWN).replace("float[b, s, 10] x,", "float[b, s, 10] x, float[b, 1, 1, all] mask,")
    text = text.replace("p = Softmax(a)", "m = Add(a, mask)  sh = Shape(m)  r = Reshape(m, sh)  p = Softmax(r)")
    proto = graphs.parse(text, CACHED_SHAPES)
    assert graphs.sizes(proto) == [("heads", 3)]
    _, state, _ = graphs.analyse(proto)
    assert state.symbols["all"] == state.symbols["past"] + state.symbols["s"]
    graphs.prove(proto, {"b": 2, "s": 5, "past": 4, "all": 9})


def test_sizes_that_no_choice_of_symbols_reconciles_are_pinned() -> None:
    """n + m is equated with s, then with t, then n + m + n with s: the last cannot be."""
    text = """f (float[b, 1, n] p, float[b, 1, m] q, float[b, s, 1] r, float[b, t, 1, 1] u) => (float[b, 1, s] y, float[b, 1, s] z) {
        rt = Transpose<perm=[0,2,1]>(r)  u3 = Squeeze(u, three)  ut = Transpose<perm=[0,2,1]>(u3)
        pq = Concat<axis=2>(p, q)  a = Add(pq, rt)  y = Add(a, ut)  ppp = Concat<axis=2>(p, q, p)  z = Add(ppp, rt) }"""
    _, state, found = graphs.analyse(graphs.parse(text, {"three": ints(3)}))
    assert state.symbols["s"] == state.symbols["t"] == state.symbols["n"] + state.symbols["m"]
    assert not found.groups


# -- experts ---------------------------------------------------------------------------------------------------------

# Rows of the tokens that are routed to expert {0} are looked up, go through its layer and are added back.
EXPERT = """m{0} = Equal(choice, n{0})  z{0} = NonZero(m{0})  r{0} = Gather(z{0}, zero)  x{0} = Gather(flat, r{0})
    g{0} = MatMul(x{0}, wg{0})  u{0} = MatMul(x{0}, wu{0})  a{0} = Sigmoid(g{0})  h{0} = Mul(a{0}, u{0})
    d{0} = MatMul(h{0}, wd{0})  c{0} = Unsqueeze(r{0}, last)"""
ROUTED = f"""flat = Reshape(x, rows)  logits = MatMul(flat, router)
    p = Softmax(logits)  best, choice = TopK(p, one)  zeros = Mul(flat, nothing)
    {EXPERT.format(0)}  y0 = ScatterND<reduction="add">(zeros, c0, d0)
    {EXPERT.format(1)}"""
EXPERT_WEIGHTS: Weights = {
    **{"rows": ints(-1, 6), "router": (6, 2), "one": ints(1), "zero": np.asarray(0), "last": ints(-1)},
    **{"nothing": np.zeros(1, np.float32), "n0": np.asarray(0), "n1": np.asarray(1)},
    **{"wg0": (6, 11), "wu0": (6, 11), "wd0": (11, 6), "wg1": (6, 13), "wu1": (6, 13), "wd1": (13, 6)},
}


@pytest.mark.parametrize(
    "back",
    [
        'y1 = ScatterND<reduction="add">(y0, c1, d1)',
        's1 = Shape(d1)  w1 = Expand(c1, s1)  y1 = ScatterElements<axis=0, reduction="add">(y0, w1, d1)',
    ],
)
def test_each_expert_is_a_feed_forward_layer_of_its_own(back: str) -> None:
    text = f"f (float[b, s, 6] x) => (float[b, s, 6] y) {{ {ROUTED}  {back}  sx = Shape(x)  y = Reshape(y1, sx) }}"
    proto = graphs.parse(text, EXPERT_WEIGHTS)
    assert graphs.sizes(proto) == [("ffn", 11), ("ffn", 13)]
    graphs.prove(proto, {"b": 3, "s": 5})


LOOKED_UP = """f (float[b, 6] x) => (float[n, 6, 1] y) {{ logits = MatMul(x, router)  best, choice = TopK(logits, two)
    flat = Reshape(choice, rows)  x3 = Unsqueeze(x, middle)  wide = Expand(x3, twice)  xs = Reshape(wide, many)
    xc = Unsqueeze(xs, last)  w1 = Gather(up, flat)  u = MatMul(w1, xc)  {0}
    w2 = Gather(down, {1})  y = MatMul(w2, h) }}"""
EXPERTS: Weights = {
    "router": (6, 4),
    "two": ints(2),
    "rows": ints(-1),
    "middle": ints(1),
    "twice": ints(1, 2, 1),
    "many": ints(-1, 6),
    "last": ints(-1),
    "up": (4, 22, 6),
    "down": (4, 6, 11),
}
GATED = "g, v = Split<axis = 1>(u)  a = Sigmoid(g)  h = Mul(a, v)"


def test_experts_in_one_constant_have_channels_of_their_own() -> None:
    proto = graphs.parse(LOOKED_UP.format(GATED, "flat"), EXPERTS)
    (group,) = graphs.analyse(proto)[2].groups
    assert (group.kind, group.size, group.sets, len(group.consumers)) == ("ffn", 11, 4, 4)
    assert [c.expert for c in group.consumers] == [0, 1, 2, 3]
    pruned = graphs.prove(proto, {"b": 9})
    left = {t.name: list(t.dims) for t in pruned.graph.initializer}
    assert left["up"] == [4, 2 * left["down"][2], 6]


@pytest.mark.parametrize(
    ("between", "numbers"),
    [
        (GATED, "other"),
        (GATED.replace("h = ", "m = ") + "  h = Gather(m, order)", "flat"),
        (GATED.replace("h = ", "m = ") + "  h = Mul(m, scale)", "flat"),
    ],
    ids=["other numbers", "rows in another order", "a factor that all share"],
)
def test_experts_that_do_not_keep_their_rows_are_left_alone(between: str, numbers: str) -> None:
    text = LOOKED_UP.format(between, numbers)
    extra = "other = Neg(flat)" if numbers == "other" else "order = Neg(flat)" if "order" in between else ""
    text = text.replace("x3 = ", f"{extra}  x3 = ", 1)
    proto = graphs.parse(text, {**EXPERTS, **({"scale": (11, 1)} if "scale" in between else {})})
    assert graphs.sizes(proto) == []
    assert "not everything between the weights of experts is looked up by the same numbers" in graphs.reasons(proto)


@pytest.mark.parametrize(("axis", "size"), [(0, 11), (1, None)])
def test_what_is_compressed_keeps_its_axis(axis: int, size: int | None) -> None:
    text = f"""f (float[b, 6] x, bool[{"b" if axis == 0 else 11}] keep) => (float[n, 6] y) {{ u = MatMul(x, w1)  h = Relu(u)
        c = Compress<axis={axis}>(h, keep)  y = MatMul(c, w2) }}"""
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 6)})
    assert graphs.sizes(proto) == ([("ffn", size)] if size else [])


# -- indices that pick a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("v = Gather<axis=2>(p4, last)", ints(-2)),
        ("v = Gather<axis=2>(p4, last)", ints(6)),
        (
            "pt = Transpose<perm=[2,0,1,3]>(p4)  vt = GatherND(pt, last)  v = Transpose<perm=[1,2,0,3]>(vt)",
            ints(-2).reshape(1, 1),
        ),
    ],
)
def test_indices_follow_the_heads_before_them(text: str, index: np.ndarray) -> None:
    """As Falcon packs them: 6 query heads, then a key and a value that all of them share."""
    proto = graphs.parse(
        f"""f (float[b, s, 10] x) => (float[b, s, 10] y) {{ p = MatMul(x, w)  p4 = Reshape(p, eight)
            q = Slice(p4, n0, n6, n2)  {text}  t = Tanh(v)  h = Mul(q, t)  sm = Softmax(h)  j = Reshape(sm, join)
            y = MatMul(j, wo) }}""",
        {
            **{"w": (10, 32), "wo": (24, 10), "last": index, "eight": ints(0, 0, 8, 4), "join": ints(0, 0, -1)},
            **{"n0": ints(0), "n6": ints(-2), "n2": ints(2)},
        },
    )
    assert graphs.sizes(proto) == [("heads", 6)]
    graphs.prove(proto, {"b": 2, "s": 5})


def test_indices_that_skip_are_a_look_up() -> None:
    """What is looked up is not cut; the indices themselves may go."""
    text = """f (float[b, s, 10] x) => (float[b, s, 10] y) { p = MatMul(x, w)  h = Gather<axis=2>(p, odd)  y = MatMul(h, wo) }"""
    proto = graphs.parse(text, {"w": (10, 12), "odd": ints(1, 3, 5), "wo": (3, 10)})
    (group,) = graphs.analyse(proto)[2].groups
    assert group.size == 3
    assert {tuple(i.dims) for i in graphs.prove(proto, {"b": 2, "s": 5}).graph.initializer} >= {(10, 12)}


def test_a_look_up_written_as_a_product() -> None:
    """One-hot vectors, as JAX writes them: cutting a row of the table would take a token away."""
    text = """f (int64[b, s] x) => (float[b, s, 7] y) { i = Unsqueeze(x, two)  e = Equal(i, ids)  o = Cast<to=1>(e)
        v = MatMul(o, w1)  h = Relu(v)  y = MatMul(h, w2) }"""
    weights: Weights = {"w1": (9, 11), "w2": (11, 7), "ids": np.arange(9, dtype=I64), "two": ints(2)}
    proto = graphs.parse(text, weights)
    assert graphs.sizes(proto) == [("ffn", 11)]
    assert "looked up by Equal" in graphs.reasons(proto)
    graphs.prove(proto, {"b": 2, "s": 5})


def test_packed_heads_outermost() -> None:
    """[heads, 3, width], as GPT-NeoX and BLOOM pack it."""
    text = """f (float[b, s, 10] x) => (float[b, s, 10] y) {
        p = MatMul(x, w)  p5 = Reshape(p, r)  q4, k4, v4 = Split<axis=3>(p5, n)
        q3 = Squeeze(q4, a3)  k3 = Squeeze(k4, a3)  v3 = Squeeze(v4, a3)
        qt = Transpose<perm=[0,2,1,3]>(q3)  kt = Transpose<perm=[0,2,3,1]>(k3)  vt = Transpose<perm=[0,2,1,3]>(v3)
        a = MatMul(qt, kt)  pr = Softmax(a)  c = MatMul(pr, vt)
        ct = Transpose<perm=[0,2,1,3]>(c)  j = Reshape(ct, join)  y = MatMul(j, wo) }"""
    weights: Weights = {
        "w": (10, 60),
        "r": ints(0, 0, 5, 3, 4),
        "n": ints(1, 1, 1),
        "a3": ints(3),
        "join": ints(0, 0, 20),
        "wo": (20, 10),
    }
    proto = graphs.parse(text, weights)
    assert graphs.sizes(proto) == [("heads", 5)]
    graphs.prove(proto, {"b": 2, "s": 3})


def test_grouped_query_attention_by_expand() -> None:
    """2 groups of 3 heads of 4 channels: keys and values are expanded over the heads of a group."""
    text = """f (float[b, s, 10] x) => (float[b, s, 10] y) {
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        q4 = Reshape(q, sq)  k4 = Reshape(k, sk)  v4 = Reshape(v, sk)
        qt = Transpose<perm=[0,2,1,3]>(q4)  kt = Transpose<perm=[0,2,3,1]>(k4)  vt = Transpose<perm=[0,2,1,3]>(v4)
        ku = Unsqueeze(kt, two)  ke = Expand(ku, e)  kr = Reshape(ke, rk)
        vu = Unsqueeze(vt, two)  ve = Expand(vu, e)  vr = Reshape(ve, rv)
        a = MatMul(qt, kr)  p = Softmax(a)  c = MatMul(p, vr)
        ct = Transpose<perm=[0,2,1,3]>(c)  j = Reshape(ct, join)  y = MatMul(j, wo) }"""
    weights: Weights = {
        "wq": (10, 24), "wk": (10, 8), "wv": (10, 8), "wo": (24, 10), "two": ints(2), "e": ints(1, 1, 3, 1, 1),
        "sq": ints(0, 0, 6, 4), "sk": ints(0, 0, 2, 4), "rk": ints(0, 6, 4, -1), "rv": ints(0, 6, -1, 4), "join": ints(0, 0, 24),
    }  # fmt: skip
    proto = graphs.parse(text, weights)
    _, _, found = graphs.analyse(proto)
    assert len({g.name for g in found.groups}) == len(found.groups)
    assert ("heads", 2) in [(g.kind, g.size) for g in found.groups]
    graphs.prove(proto, {"b": 2, "s": 5})


def test_contrib_attention() -> None:
    text = "f (float[b, s, 10] x) => (float[b, s, 10] y) { c = com.microsoft.Attention<num_heads=3>(x, w, d)\n y = MatMul(c, wo) }"
    proto = graphs.parse(text, {"w": (10, 36), "wo": (12, 10), "d": (36,)})
    assert graphs.sizes(proto) == [("heads", 3)]
    pruned = graphs.prove(proto, {"b": 2, "s": 5})
    (node,) = (n for n in pruned.graph.node if n.op_type == "Attention")
    (weight,) = (i for i in pruned.graph.initializer if i.name == "w")
    assert [a.i for a in node.attribute if a.name == "num_heads"] == [weight.dims[1] // 12]


def test_contrib_multi_head_attention() -> None:
    text = """f (float[b, s, 10] x) => (float[b, s, 10] y) { q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        c = com.microsoft.MultiHeadAttention<num_heads=3>(q, k, v, bias)  y = MatMul(c, wo) }"""
    proto = graphs.parse(text, {"wq": (10, 12), "wk": (10, 12), "wv": (10, 12), "bias": (36,), "wo": (12, 10)})
    assert graphs.sizes(proto) == [("heads", 3)]
    graphs.prove(proto, {"b": 2, "s": 5})


def test_standard_attention_in_groups() -> None:
    text = """f (float[b, s, 10] x) => (float[b, s, 10] y) { q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        c = Attention<q_num_heads=6, kv_num_heads=2>(q, k, v)  y = MatMul(c, wo) }"""
    proto = graphs.parse(text, {"wq": (10, 24), "wk": (10, 8), "wv": (10, 8), "wo": (24, 10)}, opset=23)
    assert graphs.sizes(proto) == [("heads", 2)]
    graphs.prove(proto, {"b": 2, "s": 5})


def test_a_stage_with_fewer_rows_is_no_pooler() -> None:
    """Hierarchical models halve their tokens; a pooler has one row a sample."""
    text = """f (float[b, 12, 6] x) => (float[b, 6, 7] y, float[b, 3] z) {
        u = MatMul(x, w1)  h = Relu(u)  r = MatMul(h, w2)  r2 = Add(x, r)
        half = Slice(r2, zero, six, one)  v = MatMul(half, w3)  k = Relu(v)  y = MatMul(k, w4)
        first = Gather<axis=1>(x, none)  g = MatMul(first, w5)  t = Tanh(g)  z = MatMul(t, w6) }"""
    weights: Weights = {
        "w1": (6, 11), "w2": (11, 6), "w3": (6, 13), "w4": (13, 7), "w5": (6, 9), "w6": (9, 3),
        "zero": ints(0), "six": ints(6), "one": ints(1), "none": np.asarray(0),
    }  # fmt: skip
    proto = graphs.parse(text, weights)
    assert graphs.sizes(proto) == [("ffn", 11), ("ffn", 13)]
    assert "hidden layer of a pooler" in graphs.reasons(proto)


def test_two_symbols_that_must_be_equal_are_merged() -> None:
    text = FFN.format("h = Add(v, z)").replace("float[b, s, 6] x", "float[b, s, 6] x, float[b, t, 1] z")
    proto = graphs.parse(text, FFN_WEIGHTS)
    _, state, found = graphs.analyse(proto)
    assert state.symbols["s"] == state.symbols["t"]
    assert [g.size for g in found.groups] == [11]


def test_a_batch_of_one_that_the_exporter_took_for_fixed() -> None:
    """torch writes the size one of its sample where it is told that the batch is open: the graph runs with no other."""
    text = """f (float[b, s, 6] x) => (float[1, s, 7] y) {
        n = Shape(x)  length = Slice(n, one, two)  target = Concat<axis=0>(one, length, width)
        u = MatMul(x, w1)  v = Reshape(u, target)  h = Relu(v)  y = MatMul(h, w2) }"""
    weights: Weights = {"w1": (6, 11), "w2": (11, 7), "one": ints(1), "two": ints(2), "width": ints(11)}
    proto = graphs.parse(text, weights)
    _, state, found = graphs.analyse(proto)
    assert [g.size for g in found.groups] == [11]
    assert [i.shape for i in state.input_specs()] == [(1, "s", 6)]
    graphs.prove(proto, {"b": 1, "s": 13})


def test_every_unary_rule_is_a_standard_operator() -> None:
    from liar_opt.frontend.rules.operators import OPERATORS

    schemas = {(s.domain, s.name) for s in onnx.defs.get_all_schemas()}
    unknown = {key for key in OPERATORS if key[0] == "" and key not in schemas}
    assert unknown <= {("", "SimplifiedLayerNormalization")}
