# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Operators that move elements between axes or pick places: channels go through them, what is behind is found."""

from __future__ import annotations

import graphs
import numpy as np
import onnx
import pytest
from graphs import Weights

I64 = np.int64


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, I64)


IMAGE = "f (float[b, 6, p, q] x) => (float[b, 7, r, t] y) {{ u = Conv(x, w1, b1)\n {} \n y = Conv(h, w2) }}"
SIZES = ({"b": 2, "p": 4, "q": 6}, {"b": 1, "p": 8, "q": 2})


def image(width: int, behind: int = 0, **more: tuple[int, ...] | np.ndarray | np.generic) -> Weights:
    return {"w1": (width, 6, 1, 1), "b1": (width,), "w2": (7, behind or width, 1, 1), **more}


GRID = np.random.default_rng(0).uniform(-1, 1, (2, 4, 5, 2)).astype(np.float32)
BOXES = np.asarray([[0, 0, 2, 2], [1, 0, 3, 2], [0, 1, 2, 2]], np.float32)
# Of opset 28, which ONNX Runtime does not take yet.
MOVED = onnx.parser.parse_function(
    '<opset_import: ["" : 28], domain: "">\n'
    "SpaceToDepth (x) => (y) { s = Shape(x)\n b = Constant<value_ints=[0]>()\n rest = Constant<value_ints=[-1]>()\n"
    " one = Constant<value_ints=[1]>()\n two = Constant<value_ints=[2]>()\n three = Constant<value_ints=[3]>()\n"
    " four = Constant<value_ints=[4]>()\n n = Slice(s, two, three)\n m = Slice(s, three, four)\n i = Div(n, two)\n"
    " j = Div(m, two)\n bc = Slice(s, b, two)\n apart = Concat<axis=0>(bc, i, two, j, two)\n r = Reshape(x, apart)\n"
    " t = Transpose<perm=[0,1,3,5,2,4]>(r)\n first = Slice(s, b, one)\n back = Concat<axis=0>(first, rest, i, j)\n"
    " y = Reshape(t, back) }"
)
MATCH: dict[str, tuple[str, Weights, int, list[tuple[str, int]]]] = {
    "DepthToSpace": (IMAGE.format("h = DepthToSpace<blocksize=2>(u)"), image(20, 5), 17, [("ffn", 5)]),
    "DepthToSpace, channels outermost": (
        IMAGE.format('h = DepthToSpace<blocksize=2, mode="CRD">(u)'),
        image(20, 5),
        17,
        [("ffn", 5)],
    ),
    "SpaceToDepth": (IMAGE.format("h = SpaceToDepth<blocksize=2>(u)"), image(5, 20), 17, [("ffn", 5)]),
    "SpaceToDepth and back": (
        IMAGE.format("d = SpaceToDepth<blocksize=2>(u)\n v = Conv(d, w3)\n a = Relu(v)\n h = DepthToSpace<blocksize=2>(a)"),
        image(5, 3, w3=(12, 20, 1, 1)),
        17,
        [("ffn", 3), ("ffn", 5)],
    ),
    "channel shuffle": (
        IMAGE.format(
            "r = Reshape(u, apart)\n t1 = Transpose<perm=[0,2,1,3,4]>(r)\n s = Shape(u)\n k = Reshape(t1, s)\n h = Relu(k)"
        ).replace("6, p, q]", "6, 4, 6]"),
        image(15, apart=ints(0, 3, 5, 4, 6)),
        17,
        [("ffn", 5)],
    ),
    "channel shuffle between matrix products": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { u = MatMul(x, w1)\n r = Reshape(u, apart)\n t = Transpose<perm=[0,1,3,2]>(r)\n"
        " k = Reshape(t, back)\n h = Relu(k)\n y = MatMul(h, w2) }",
        {"w1": (6, 15), "w2": (15, 7), "apart": ints(0, 0, 3, 5), "back": ints(0, 0, -1)},
        17,
        [("ffn", 5)],
    ),
    "Col2Im": (
        "f (float[b, 6, 12] x) => (float[b, 7, 4, 5] y) { u = Conv(x, w1)\n h = Col2Im(u, size, block)\n y = Conv(h, w2) }",
        {"w1": (20, 6, 1), "w2": (7, 5, 1, 1), "size": ints(4, 5), "block": ints(2, 2)},
        18,
        [("ffn", 5)],
    ),
    "CenterCropPad": (
        IMAGE.format("h = CenterCropPad<axes=[3, 1, -2]>(u, n)"),
        image(11, n=ints(7, 11, 3)),
        18,
        [("ffn", 11)],
    ),
    "Pad of some axes, in another order": (
        IMAGE.format("h = Pad(u, n, , axes)"),
        image(11, n=ints(1, 2, 0, 3), axes=ints(3, -2)),
        18,
        [("ffn", 11)],
    ),
    "GridSample": (
        IMAGE.format("h = GridSample(u, g)").replace("float[b, 6", "float[2, 6"),
        image(11, g=GRID),
        16,
        [("ffn", 11)],
    ),
    "RoiAlign": (
        IMAGE.format("h = RoiAlign<output_height=2, output_width=3>(u, boxes, of)").replace("float[b, 7", "float[3, 7"),
        image(11, boxes=BOXES, of=ints(0, 0, 0)),
        16,
        [("ffn", 11)],
    ),
    "MaxRoiPool": (
        IMAGE.format("h = MaxRoiPool<pooled_shape=[2, 3]>(u, boxes)").replace("float[b, 7", "float[3, 7"),
        image(11, boxes=np.concatenate([np.zeros((3, 1), np.float32), BOXES], 1)),
        16,
        [("ffn", 11)],
    ),
    "DeformConv": (
        "f (float[2, 6, 4, 5] x) => (float[2, 7, 3, 4] y) { u = Conv(x, w1)\n v = DeformConv<kernel_shape=[2,2]>(u, w3, off, b3)\n"
        " h = Relu(v)\n y = Conv(h, w2) }",
        {"w1": (5, 6, 1, 1), "w3": (11, 5, 2, 2), "off": (2, 8, 3, 4), "b3": (11,), "w2": (7, 11, 1, 1)},
        22,
        [("ffn", 11)],
    ),
    "ReverseSequence": (
        "f (float[s, 2, 6] x) => (float[s, 2, 7] y) { u = MatMul(x, w1)\n h = ReverseSequence(u, n)\n y = MatMul(h, w2) }",
        {"w1": (6, 11), "w2": (11, 7), "n": ints(3, 2)},
        17,
        [("ffn", 11)],
    ),
    "Trilu beside the width": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { u = MatMul(x, w1)\n t = Transpose<perm=[2,0,1]>(u)\n l = Trilu(t, k)\n"
        " h = Transpose<perm=[1,2,0]>(l)\n y = MatMul(h, w2) }",
        {"w1": (6, 11), "w2": (11, 7), "k": np.asarray(0, I64)},
        17,
        [("ffn", 11)],
    ),
    "CumProd": (
        "f (float[b, s, 6] x) => (float[b, s, 7] y) { u = MatMul(x, w1)\n v = Tanh(u)\n h = CumProd<exclusive=1>(v, one)\n y = MatMul(h, w2) }",
        {"w1": (6, 11), "w2": (11, 7), "one": np.asarray(1, I64)},
        26,
        [("ffn", 11)],
    ),
}


@pytest.mark.parametrize("name", MATCH)
def test_match(name: str) -> None:
    text, weights, opset, expected = MATCH[name]
    proto = graphs.parse(text, weights, opset)
    assert graphs.sizes(proto) == expected
    for sizes in SIZES:
        graphs.prove(proto, {"s": 3, **sizes})


def test_space_to_depth_with_channels_outermost() -> None:
    """The order of channels that opset 28 can ask for."""
    proto = graphs.parse(IMAGE.format('h = SpaceToDepth<blocksize=2, mode="CRD">(u)'), image(5, 20), 28)
    assert graphs.sizes(proto) == [("ffn", 5)]
    for sizes in SIZES:
        graphs.prove(proto, sizes, functions=[MOVED])


# What pins the channels, the reason, and what must be found behind all the same: 13 channels.
NEAR_MISS: dict[str, tuple[str, Weights, int, str]] = {
    "DepthToSpace that does not divide": ("n = DepthToSpace<blocksize=3>(u)", {}, 17, "of 20 channels into blocks of 3"),
    "Pad of the channels": ("n = Pad(u, w, , axes)", {"w": ints(1, 0), "axes": ints(-3)}, 18, "padded"),
    "Trilu of the channels": (
        "t1 = Transpose<perm=[0,2,1,3]>(u)\n l = Trilu(t1)\n l2 = Transpose<perm=[0,3,2,1]>(l)\n l3 = Trilu(l2)\n n = Transpose<perm=[0,2,3,1]>(l3)",
        {},
        17,
        "a triangle of it is taken",
    ),
    "CenterCropPad of the channels": (
        "n = CenterCropPad<axes=[1]>(u, w)",
        {"w": ints(22)},
        18,
        "CenterCropPad runs over it",
    ),
    "MaxUnpool": (
        "m, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(u)\n n = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(m, i)",
        {},
        17,
        "counted by the indices of MaxPool",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISS)
def test_near_miss(name: str) -> None:
    body, weights, opset, reason = NEAR_MISS[name]
    text = IMAGE.format(f"{body}\n v = Conv(n, w3)\n h = Relu(v)")
    width = {"Cent": 22, "Pad ": 21, "Dept": 2}.get(name[:4], 20)
    proto = graphs.parse(text, {**image(20, 13), "w3": (13, width, 1, 1), **weights}, opset)
    assert graphs.sizes(proto) == [("ffn", 13)]
    assert reason in graphs.reasons(proto)
    if "divide" not in name:
        graphs.prove(proto, SIZES[0])


def test_what_is_counted_by_the_data_has_a_length() -> None:
    """Behind operators whose results are as many as the data says, widths are found."""
    text = """f (float[b, s, 4] boxes, float[b, 3, s] scores, float[m, 6] x) => (float[n, 7] y) {
        k = NonMaxSuppression(boxes, scores, most)  r = Gather<axis=1>(k, last)  u1 = Unique(r)  f = Gather(x, u1)
        u = MatMul(f, w1)  h = Relu(u)  y = MatMul(h, w2) }"""
    proto = graphs.parse(text, {"most": ints(5), "last": np.asarray(2, I64), "w1": (6, 11), "w2": (11, 7)}, 17)
    assert graphs.sizes(proto) == [("ffn", 11)]
