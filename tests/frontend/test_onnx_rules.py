# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""The ONNX operator table: a match and a near miss for each rule, proved by cutting."""

from __future__ import annotations

import graphs
import numpy as np
import onnx
import pytest
from graphs import Weights

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
    "Conv 1x1": (
        "f (float[b, 6, 5, 3] x) => (float[b, 7, 5, 3] y) { u = Conv(x, w1, b1)\n h = Relu(u)\n y = Conv(h, w2) }",
        {"w1": (11, 6, 1, 1), "b1": (11,), "w2": (7, 11, 1, 1)},
        [("ffn", 11)],
    ),
    "Conv 3x3 before Conv 1x1": (
        "f (float[b, 6, 5, 3] x) => (float[b, 7, 5, 3] y) { u = Conv<pads=[1,1,1,1]>(x, w1, b1)\n h = Relu(u)\n y = Conv(h, w2) }",
        {"w1": (11, 6, 3, 3), "b1": (11,), "w2": (7, 11, 1, 1)},
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


def test_convolutions_that_are_no_products_are_not_cut() -> None:
    text = "f (float[b, 6, 5, 3] x) => (float[b, 7, 3, 1] y) {{ u = Conv(x, w1)\n h = Relu(u)\n {} }}"
    wide = graphs.parse(text.format("y = Conv(h, w2)"), {"w1": (12, 6, 1, 1), "w2": (7, 12, 3, 3)})
    assert graphs.sizes(wide) == []
    grouped = graphs.parse(
        text.format("k = Conv<group=12>(h, w2)\n y = Conv(k, w3)"),
        {"w1": (12, 6, 1, 1), "w2": (12, 1, 3, 3), "w3": (7, 12, 1, 1)},
    )
    assert graphs.sizes(grouped) == []


def test_an_unknown_operator_is_named_with_its_nodes() -> None:
    proto = graphs.parse(FFN.format("h = test.Mystery(v)"), FFN_WEIGHTS)
    _, state, _ = graphs.analyse(proto)
    assert list(state.unknown) == ["test::Mystery"]
    assert len(state.unknown["test::Mystery"]) == 1


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
    tied = name in ("packed, Split by count", "packed, Reshape and Gather")  # equal parts: the width is that of q and k
    assert ("the width within a head is not pruned yet" in graphs.reasons(proto)) != tied


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


def test_every_unary_rule_is_a_standard_operator() -> None:
    from liar_opt.frontend.onnx_rules import RULES

    schemas = {(s.domain, s.name) for s in onnx.defs.get_all_schemas()}
    unknown = {key for key in RULES if key[0] == "" and key not in schemas}
    assert unknown <= {("", "SimplifiedLayerNormalization")}
