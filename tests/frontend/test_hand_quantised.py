# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Weights in small integers behind a Cast are refused as other quantised graphs are; other integers are no weights."""

from __future__ import annotations

import graphs
import numpy as np
import pytest
from onnx import TensorProto, helper

from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.runtime.errors import ModelError

FLOAT = int(TensorProto.FLOAT)
CAST = f"c = Cast<to = {FLOAT}>"
REST = "u = MatMul(x, w)  h = Relu(u)  y = MatMul(h, w2) }"
HEAD = "f (float[b, 6] x) => (float[b, 7] y) { "
SCALES = np.full((1, 11), 0.01, np.float32)


def integers(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16])
@pytest.mark.parametrize(
    "text",
    [
        f"{CAST}(q)  w = Mul(c, s)  {REST}",
        f"{CAST}(q)  w = Identity(c)  {REST}",
        f"{CAST}(q)  z = Sub(c, s)  w = Mul(z, s)  {REST}",
        f"z = Sub(q, zero)  {CAST}(z)  w = Div(c, s)  {REST}",
        f"t = Transpose(q)  {CAST}(t)  v = Transpose(c)  w = Mul(s, v)  {REST}",
    ],
)
def test_a_dequantised_weight_is_refused(text: str, dtype: type) -> None:
    weights: graphs.Weights = {"q": integers((6, 11), dtype), "s": SCALES, "zero": np.asarray(3, dtype), "w2": (11, 7)}
    with pytest.raises(ModelError, match=r"\(MatMul\) .* is quantised: .*; prune the float model and quantise the result"):
        OnnxModel.from_proto(graphs.parse(HEAD + text, weights))


def test_packed_integers_are_refused() -> None:
    text = f"{HEAD}m = BitwiseAnd(q, low)  {CAST}(m)  w = Mul(c, s)  {REST}"
    weights: graphs.Weights = {
        "q": integers((6, 11), np.int32),
        "low": np.asarray(15, np.int32),
        "s": SCALES,
        "w2": (11, 7),
    }
    with pytest.raises(ModelError, match="is quantised"):
        OnnxModel.from_proto(graphs.parse(text, weights, opset=18))


def test_a_branch_and_a_function_are_looked_into() -> None:
    weights: graphs.Weights = {"q": integers((6, 7), np.int8), "s": np.float32(0.1)}
    inner = f"g () => (float[b, 7] t) {{ {CAST}(q)  w = Mul(c, s)  t = MatMul(x, w) }}"
    text = f"f (float[b, 6] x, bool k) => (float[b, 7] y) {{ y = If (k) <then_branch = {inner}, else_branch = {inner.replace('g ()', 'e ()')}> }}"
    with pytest.raises(ModelError, match="is quantised"):
        OnnxModel.from_proto(graphs.parse(text, weights))
    proto = graphs.parse(
        f"{HEAD}c = local.wide(q)  w = Mul(c, s)  y = MatMul(x, w) }}".replace("local.wide", "test.wide"), weights
    )
    nodes = [helper.make_node("Cast", ["a"], ["o"], to=FLOAT)]
    proto.functions.append(helper.make_function("test", "wide", ["a"], ["o"], nodes, [helper.make_opsetid("", 17)]))
    with pytest.raises(ModelError, match="is quantised"):
        OnnxModel.from_proto(proto)


@pytest.mark.parametrize(
    ("text", "extra"),
    [
        (
            f"{CAST}(q)  k = Mul(c, s)  u = MatMul(x, w)  v = Add(u, k)  h = Relu(v)  y = MatMul(h, w2) }}",
            {"q": integers((4, 11), np.uint8)},
        ),
        (f"{CAST}(q)  u = MatMul(x, w)  v = Mul(u, c)  h = Relu(v)  y = MatMul(h, w2) }}", {"q": integers((11,), np.int8)}),
        (
            f"{CAST}(q)  p = Add(x, c)  u = MatMul(p, w)  h = Relu(u)  y = MatMul(h, w2) }}",
            {"q": integers((4, 6), np.int8)},
        ),
    ],
    ids=["a mask", "a vector", "positions"],
)
def test_integers_that_are_no_weights_are_let_through(text: str, extra: graphs.Weights) -> None:
    proto = graphs.parse(HEAD.replace("float[b, ", "float[4, ") + text, {"s": SCALES, "w": (6, 11), "w2": (11, 7), **extra})
    assert graphs.sizes(proto) == [("ffn", 11)]
