# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Weights that a graph computes from weights alone: folded where the file does not grow, left with a reason elsewhere."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import oracle
import pytest
from onnx import TensorProto, helper, numpy_helper

from liar_opt import prune
from liar_opt.frontend.fold_weights import Grows, compute
from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.passes.prune_job import inspect

WEIGHT_NORM = """f (float[b, 6] x) => (float[b, 7] y) {
    n1 = ReduceL2<axes = [0], keepdims = 1>(v1)  d1 = Div(v1, n1)  w1 = Mul(d1, g1)  u = MatMul(x, w1)  h = Relu(u)
    q2 = Pow(v2, two)  s2 = ReduceSum(q2, rows)  n2 = Sqrt(s2)  r2 = Div(g2, n2)  w2 = Mul(v2, r2)  y = Gemm<transB = 1>(h, w2) }"""
NORMED: graphs.Weights = {
    **{"v1": (6, 11), "g1": (1, 11), "v2": (7, 11), "g2": (7, 1)},
    **{"two": np.float32(2), "rows": np.asarray([1])},
}
SPECTRAL = """f (float[b, 6] x) => (float[b, 7] y) {
    t = Transpose<perm = [1, 0]>(v)  u = MatMul(t, left)  s = MatMul(right, u)  w = Div(t, s)  a = MatMul(x, w1)  h = Relu(a)  y = MatMul(h, w) }"""
LORA = """f (float[b, 6] x) => (float[b, 7] y) {
    p = MatMul(low, high)  q = Mul(p, scale)  s = Add(w, q)  t = Transpose<perm = [1, 0]>(s)  u = MatMul(x, t)  h = Relu(u)  y = MatMul(h, w2) }"""
TUNED: graphs.Weights = {"low": (11, 2), "high": (2, 6), "scale": np.float32(0.5), "w": (11, 6), "w2": (11, 7)}
PARTS = """f (float[b, 6] x) => (float[b, 7] y) {
    w = Concat<axis = 1>(left, right)  s = Squeeze(w2, zero)  r = Reshape(s, shape)  u = MatMul(x, w)  h = Relu(u)  y = MatMul(h, r) }"""
JOINED: graphs.Weights = {
    **{"left": (6, 4), "right": (6, 7), "w2": (1, 77), "zero": np.asarray([0]), "shape": np.asarray([11, 7])},
}


def inspected(proto: onnx.ModelProto) -> tuple[list[tuple[str, int]], str]:
    """Returns the groups that are found, and the reasons of all refusals."""
    found = inspect(proto)
    return [(g.kind, g.size) for g in found.groups], "\n".join(r.reason for r in found.refusals)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        (WEIGHT_NORM, NORMED),
        (SPECTRAL, {"v": (7, 11), "left": (7, 1), "right": (1, 11), "w1": (6, 11)}),
        (LORA, TUNED),
        (PARTS, JOINED),
    ],
    ids=["weight_norm", "spectral_norm", "lora", "parts"],
)
def test_computed_weights_are_cut(text: str, weights: graphs.Weights) -> None:
    proto = graphs.parse(text, weights)
    assert graphs.sizes(proto) == [("ffn", 11)]
    out = graphs.prove(proto, {"b": 3})
    assert sorted({n.op_type for n in out.graph.node} - {"Gemm"}) == ["MatMul", "Relu"]
    assert _stored(out) < _stored(proto)


def _stored(proto: onnx.ModelProto) -> int:
    return sum(numpy_helper.to_array(t).nbytes for t in proto.graph.initializer)


def test_folding_changes_nothing_beyond_rounding() -> None:
    for text, weights in ((WEIGHT_NORM, NORMED), (LORA, TUNED), (PARTS, JOINED)):
        proto = graphs.parse(text, weights)
        model = OnnxModel.from_proto(proto)
        model.normalise()
        feeds = graphs.feeds_of(proto, {"b": 5})
        assert oracle.difference(oracle.run(model.to_proto(), feeds), oracle.run(proto, feeds)) < 1e-6
        assert _stored(model.to_proto()) <= _stored(proto)


def test_a_weight_whose_folding_would_make_the_file_larger_stays_computed() -> None:
    """Of low rank without a base; a base shared by two sums; one row repeated."""
    low_rank = LORA.replace("s = Add(w, q)  t = Transpose<perm = [1, 0]>(s)", "t = Transpose<perm = [1, 0]>(q)")
    shared = """f (float[b, 6] x) => (float[b, 7] y) { w1 = Add(w, d1)  u = MatMul(x, w1)  h = Relu(u)  v = MatMul(h, w2)
        w3 = Add(w, d2)  z = MatMul(x, w3)  g = Relu(z)  t = MatMul(g, w4)  y = Add(v, t) }"""
    repeated = (
        "f (float[b, 6] x) => (float[b, 7] y) { w = Tile(row, times)  u = MatMul(x, w)  h = Relu(u)  y = MatMul(h, w2) }"
    )
    cases: list[tuple[str, graphs.Weights, str]] = [
        (low_rank, {**TUNED, "low": (110, 2), "high": (2, 60), "w2": (110, 7)}, "MatMul_3"),
        (shared, {"w": (6, 11), "d1": (1, 11), "d2": (1, 11), "w2": (11, 7), "w4": (11, 7)}, "MatMul_1"),
        (repeated, {"row": (2, 11), "times": np.asarray([3, 1]), "w2": (11, 7)}, "MatMul_1"),
    ]
    for text, weights, reader in cases:
        proto = graphs.parse(text.replace("[b, 6]", "[b, 60]") if text is low_rank else text, weights)
        _, reasons = inspected(proto)
        assert f"the weight of '{reader}' is computed (node '" in reasons, reasons
        assert "folded, it would make the file larger" in reasons
        model = OnnxModel.from_proto(proto)
        model.normalise()
        assert _stored(model.to_proto()) <= _stored(proto)


def test_an_operator_that_is_not_computed_is_named() -> None:
    text = """f (float[b, 6] x) => (float[b, 7] y) { w = LayerNormalization<axis = -1>(v, g)  u = MatMul(x, w)  h = Relu(u)
        y = MatMul(h, w2) }"""
    groups, reasons = inspected(graphs.parse(text, {"v": (6, 11), "g": (11,), "w2": (11, 7)}))
    assert groups == []
    assert "the weight of 'MatMul_1' is computed (node 'LayerNormalization_0', LayerNormalization)" in reasons


def test_one_weight_computed_twice_is_one_weight() -> None:
    text = """f (float[b, 6] x) => (float[b, 6] y) { n = ReduceL2<axes = [0], keepdims = 1>(v)  a = Div(v, n)  u = MatMul(x, a)
        h = Relu(u)  m = ReduceL2<axes = [0], keepdims = 1>(v)  c = Div(v, m)  y = MatMul(h, c) }"""
    model = OnnxModel.from_proto(graphs.parse(text, {"v": (6, 6)}))
    model.normalise()
    assert len(model.to_proto().graph.initializer) == 1


def test_what_grows_is_not_made() -> None:
    """However small what it is made of, and whatever comes behind."""
    ones = np.ones((1, 1), np.float32)
    limit = 1 << 12
    for op, inputs, attributes in (
        ("Expand", [ones, np.asarray([1 << 30, 1 << 30])], {}),
        ("Tile", [ones, np.asarray([1 << 31, 1])], {}),
        ("MatMul", [np.ones((1 << 16, 1), np.float32), np.ones((1, 1 << 16), np.float32)], {}),
        ("Gemm", [np.ones((1 << 16, 1), np.float32), np.ones((1, 1 << 16), np.float32)], {}),
        ("Einsum", [np.ones(1 << 16, np.float32), np.ones(1 << 16, np.float32)], {"equation": "i,j->ij"}),
        ("Sum", [np.ones((1 << 16, 1), np.float32), np.ones((1, 1 << 16), np.float32)], {}),
        ("Add", [np.ones((1 << 16, 1), np.float32), np.ones((1, 1 << 16), np.float32)], {}),
    ):
        with pytest.raises(Grows):
            compute(op, inputs, attributes, limit)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_operators_as_onnx_runtime_computes_them(kind: type) -> None:
    rng = np.random.default_rng(0)
    a: np.ndarray = rng.standard_normal((3, 5)).astype(kind)
    b: np.ndarray = rng.standard_normal((5, 4)).astype(kind)
    cases: list[tuple[str, list[np.ndarray], dict[str, Any]]] = [
        *(
            (op, [a], {"axes": [1], "keepdims": k})
            for op in ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceMean")
            for k in (0, 1)
        ),
        *((op, [a], {}) for op in ("ReduceL2", "Exp", "Tanh", "Sigmoid", "Softplus", "Sign")),
        *(("LpNormalization", [a], {"axis": axis, "p": p}) for axis in (0, 1) for p in (1, 2)),
        ("MatMul", [a, b], {}),
        ("Gemm", [a.T.copy(), b.T.copy(), b[:1]], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
        ("Einsum", [a, b], {"equation": "ij,jk->ki"}),
        ("Sum", [a, a[:1], a[:, :1]], {}),
        ("Clip", [a, np.asarray(-0.5, kind), np.asarray(0.7, kind)], {}),
    ]
    for op, inputs, attributes in cases:
        names = [f"x{i}" for i in range(len(inputs))]
        infos = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in zip(names, inputs, strict=True)
        ]
        node = helper.make_node(op, names, ["y"], **attributes)
        output = helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(np.dtype(kind)), None)
        graph = helper.make_graph([node], "g", infos, [output])
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        try:
            (wanted,) = oracle.run(proto, dict(zip(names, inputs, strict=True)))
        except Exception as err:
            assert "NOT_IMPLEMENTED" in str(err)  # this release has no kernel for it
            continue
        found = compute(op, inputs, attributes, 1 << 12)
        assert found is not None, op
        assert found[0].dtype == wanted.dtype, op
        np.testing.assert_allclose(found[0], wanted, rtol=3e-3 if kind is np.float16 else 1e-5, atol=1e-6, err_msg=op)


def test_the_whole_command_on_a_computed_weight(tmp_path: object) -> None:
    proto = graphs.parse(WEIGHT_NORM, NORMED)
    rng = np.random.default_rng(0)
    result = prune(
        proto, {"x": rng.standard_normal((64, 6)).astype(np.float32)}, ffn=0.5, multiple_of=1, latency=False, provider="cpu"
    )
    path = result.save(f"{tmp_path}/out.onnx")
    counted = sum(int(np.prod(t.dims)) for t in onnx.load(path).graph.initializer if t.data_type == TensorProto.FLOAT)
    assert result.report["after"]["parameters"] == counted
    assert result.report["before"]["parameters"] == sum(
        v.size for v in map(numpy_helper.to_array, proto.graph.initializer) if v.dtype == np.float32
    )
