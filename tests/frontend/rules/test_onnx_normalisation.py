# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Normalisations over more than one axis: whole groups of channels go, and what is behind is found."""

from __future__ import annotations

import graphs
import numpy as np
import onnx
import pytest
from graphs import Weights

from liar_opt import prune

Case = tuple[str, Weights, int, list[tuple[str, int]]]
IMAGE = "f (float[b, 6, p, q] x) => (float[b, 7, r, t] y) {{ u = Conv(x, w1, b1)\n {} \n y = Conv(h, w2) }}"
LAST = "f (float[b, p, q, 6] x) => (float[b, p, q, 7] y) {{ u = MatMul(x, w1)\n {} \n y = MatMul(h, w2) }}"
SIZES = ({"b": 2, "p": 5, "q": 3}, {"b": 1, "p": 4, "q": 7})


def image(width: int, **more: tuple[int, ...] | np.ndarray | np.generic) -> Weights:
    return {"w1": (width, 6, 1, 1), "b1": (width,), "w2": (7, width, 1, 1), **more}


def last(width: int, **more: tuple[int, ...] | np.ndarray | np.generic) -> Weights:
    return {"w1": (6, width), "w2": (width, 7), **more}


# Written out for ONNX Runtime, which has no kernel of these on the CPU.
FUNCTIONS = [
    onnx.parser.parse_function(f'<opset_import: ["" : 21], domain: "com.microsoft">\n{text}')
    for text in (
        "GroupNorm <groups> (x, g, b) => (y) { t = Transpose<perm=[0,3,1,2]>(x)\n"
        " n = GroupNormalization<num_groups: int = @groups>(t, g, b)\n y = Transpose<perm=[0,2,3,1]>(n) }",
        "SkipGroupNorm <groups> (x, g, b, k, a) => (y, s) { d = Add(x, k)\n s = Add(d, a)\n t = Transpose<perm=[0,3,1,2]>(s)\n"
        " n = GroupNormalization<num_groups: int = @groups>(t, g, b)\n y = Transpose<perm=[0,2,3,1]>(n) }",
        "BiasSoftmax <axis> (x, b) => (y) { s = Add(x, b)\n y = Softmax<axis: int = @axis>(s) }",
    )
]
MATCH: dict[str, Case] = {
    "GroupNormalization, scale by group": (
        IMAGE.format("n = GroupNormalization<num_groups=5>(u, s, t)\n h = Relu(n)"),
        image(15, s=(5,), t=(5,)),
        18,
        [("ffn", 5)],
    ),
    "GroupNormalization, scale by channel": (
        IMAGE.format("n = GroupNormalization<num_groups=5, epsilon=0.1>(u, s, t)\n h = Relu(n)"),
        image(15, s=(15,), t=(15,)),
        21,
        [("ffn", 5)],
    ),
    "GroupNormalization of as many groups as channels": (
        IMAGE.format("h = GroupNormalization<num_groups=11>(u, s, t)"),
        image(11, s=(11,), t=(11,)),
        21,
        [("ffn", 11)],
    ),
    "GroupNormalization as torch writes it": (
        IMAGE.format(
            "r = Reshape(u, n)\n i = InstanceNormalization(r, one, zero)\n v = Shape(u)\n k = Reshape(i, v)\n m = Mul(k, s)\n"
            " h = Add(m, t)"
        ),
        image(
            15,
            n=np.asarray([0, 5, -1]),
            one=np.ones(5, np.float32),
            zero=np.zeros(5, np.float32),
            s=(15, 1, 1),
            t=(15, 1, 1),
        ),
        17,
        [("ffn", 5)],
    ),
    "GroupNormalization of rows": (
        "f (float[n, 6] x) => (float[n, 7] y) { u = Gemm(x, w1, b1)\n g = GroupNormalization<num_groups=5>(u, s, t)\n h = Relu(g)\n y = Gemm(h, w2) }",
        {"w1": (6, 15), "b1": (15,), "w2": (15, 7), "s": (15,), "t": (15,)},
        21,
        [("ffn", 5)],
    ),
    "GroupNorm": (
        LAST.format("h = com.microsoft.GroupNorm<groups=5, activation=0>(u, s, t)"),
        last(15, s=(15,), t=(15,)),
        21,
        [("ffn", 5)],
    ),
    "SkipGroupNorm": (
        LAST.format(
            "v = MatMul(x, w3)\n n, d = com.microsoft.SkipGroupNorm<groups=5, activation=0>(u, s, t, v, b1)\n h = Add(n, d)"
        ),
        last(15, w3=(6, 15), s=(15,), t=(15,), b1=(15,)),
        21,
        [("ffn", 5)],
    ),
    "SkipGroupNorm with a skip by sample and channel": (
        LAST.format(
            "a = ReduceMean<keepdims=1>(x, mid)\n v = MatMul(a, w3)\n"
            " h, d = com.microsoft.SkipGroupNorm<groups=5, activation=0>(u, s, t, v, b1)"
        ),
        last(15, w3=(6, 15), mid=np.asarray([1, 2]), s=(15,), t=(15,), b1=(15,)),
        21,
        [("ffn", 5)],
    ),
    "LRN": (
        IMAGE.format("n = LRN<size=3, alpha=0.2>(u)\n v = Conv(n, w3)\n h = Relu(v)"),
        {**image(11), "w3": (13, 11, 1, 1), "w2": (7, 13, 1, 1)},
        17,
        [("ffn", 13)],
    ),
    "MeanVarianceNormalization": (IMAGE.format("h = MeanVarianceNormalization(u)"), image(11), 17, [("ffn", 11)]),
    "GlobalLpPool": (IMAGE.format("h = GlobalLpPool<p=3>(u)"), image(11), 17, [("ffn", 11)]),
    "BiasSoftmax": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { u = MatMul(x, w1)\n r = Reshape(u, n)\n t = Transpose<perm=[0,2,1,3]>(r)\n"
        " p = com.microsoft.BiasSoftmax<axis=3, is_inner_broadcast=0>(t, m)\n v = Transpose<perm=[0,2,1,3]>(p)\n h = Reshape(v, k)\n"
        " y = MatMul(h, w2) }",
        last(20, n=np.asarray([0, 0, 5, 4]), m=(1, 5, 1, 4), k=np.asarray([0, 0, -1])),
        21,
        [("heads", 5)],
    ),
}


@pytest.mark.parametrize("name", MATCH)
def test_match(name: str) -> None:
    text, weights, opset, expected = MATCH[name]
    proto = graphs.parse(text, weights, opset)
    assert graphs.sizes(proto) == expected
    for sizes in SIZES:
        graphs.prove(proto, {"n": 9, "s": 4, **sizes}, functions=FUNCTIONS if "com.microsoft" in text else ())


@pytest.mark.parametrize("opset", [18, 21])
def test_the_number_of_groups_is_written(opset: int) -> None:
    width = 5 if opset == 18 else 15
    proto = graphs.parse(
        IMAGE.format("h = GroupNormalization<num_groups=5>(u, s, t)"), image(15, s=(width,), t=(width,)), opset
    )
    (name,) = (g.name + g.kind for g in graphs.analyse(proto)[2].groups)
    pruned = graphs.cut(proto, {name: [0, 2, 3]})
    (node,) = (n for n in pruned.graph.node if n.op_type == "GroupNormalization")
    assert {a.name: a.i for a in node.attribute} == {"num_groups": 3}
    kept = {t.name: list(t.dims) for t in pruned.graph.initializer}
    assert kept["w2"] == [7, 9, 1, 1] and kept["s"] == [width * 3 // 5]


NEAR_MISS = {
    "one group": (
        "n = GroupNormalization<num_groups=1>(u, s, t)",
        image(15, s=(15,), t=(15,)),
        "GroupNormalization runs over it",
    ),
    "no divisor": ("n = GroupNormalization<num_groups=4>(u, s, t)", image(15, s=(15,), t=(15,)), "15 channels in 4 groups"),
    "LRN": ("n = LRN<size=3>(u)", image(15), "LRN runs along it"),
    "over channels": ("n = MeanVarianceNormalization<axes=[1]>(u)", image(15), "MeanVarianceNormalization runs over it"),
}


@pytest.mark.parametrize("name", NEAR_MISS)
def test_near_miss(name: str) -> None:
    """The channels stay; those behind are found."""
    body, weights, reason = NEAR_MISS[name]
    text = IMAGE.format(f"{body}\n v = Conv(n, w3)\n h = Relu(v)")
    proto = graphs.parse(text, {**weights, "w3": (13, 15, 1, 1), "w2": (7, 13, 1, 1)}, 21)
    assert graphs.sizes(proto) == [("ffn", 13)]
    assert reason in graphs.reasons(proto)


def test_groups_of_channels_are_cut_by_the_ratio_of_feed_forward_widths() -> None:
    proto = graphs.parse(
        IMAGE.format("n = GroupNormalization<num_groups=5>(u, s, t)\n h = Relu(n)"), image(15, s=(15,), t=(15,)), 21
    )
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((2, 6, 5, 3)).astype(np.float32)} for _ in range(6)]
    (group,) = prune(proto, feeds, ffn=0.4, multiple_of=1, latency=False).report["groups"]
    assert (group["kind"], group["block_width"], group["before"], group["after"]) == ("ffn", 3, 5, 3)
