"""Repairs towards the dense model, against least squares on the rows of both models."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import oracle
import pytest
from onnx import numpy_helper
from streams import BLOCK, STREAM, WEIGHTS, batches, data, error, pruned

from liar_opt.passes.repairs import AWARE

FEEDS = batches(20, 0)


def rows(proto: onnx.ModelProto, name: str) -> Any:
    """An inner tensor on the calibration rows."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    copy.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    found = [oracle.run(copy, f)[0] for f in FEEDS]
    return np.concatenate([f.reshape(-1, f.shape[-1]) for f in found]).astype(np.float64)


def weights(proto: onnx.ModelProto) -> dict[str, Any]:
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in proto.graph.initializer}


@pytest.mark.parametrize("repair", AWARE)
def test_the_second_layer_is_the_fit_to_the_dense_target(repair: str) -> None:
    proto = graphs.parse(STREAM, WEIGHTS)
    cut, _, result = pruned(proto, 0.5, repair=repair, ridge=1e-9, weighting="none")
    assert [c.details["consumers"][0]["repair"] for c in result.changes] == ["dense", "dense"]
    seen = rows(cut, "h1")  # what the second layer sees: the first is pruned
    target = rows(proto, "z1") + (rows(proto, "x1") - rows(cut, "x1") if repair == "residual" else 0.0)
    design = np.concatenate([seen, np.ones((len(seen), 1))], axis=1)
    best = np.linalg.lstsq(design, target, rcond=None)[0]
    reached = rows(cut, "x2") - rows(cut, "x1")  # x_U W' + b'
    np.testing.assert_allclose(reached, design @ best, atol=2e-3 * np.abs(target).max())
    # The local solution is another one.
    local = pruned(proto, 0.5, repair="liar", ridge=1e-9, weighting="none")[0]
    assert np.abs(weights(cut)["v1"] - weights(local)["v1"]).max() > 1e-3


def test_both_targets_bring_the_output_nearer_than_the_local_fit() -> None:
    proto = graphs.parse(STREAM, WEIGHTS)
    errors = {r: error(proto, pruned(proto, 0.5, repair=r)[0]) for r in ("liar", "dense", "residual")}
    assert errors["residual"] < errors["liar"]
    assert errors["dense"] < errors["liar"]


@pytest.mark.parametrize("repair", AWARE)
def test_weighted_rows_padding_and_shared_weights(repair: str) -> None:
    masks = tuple(np.random.default_rng(i).random((8, 5)) < 0.7 for i in range(10))
    proto = graphs.parse(STREAM, WEIGHTS)
    cuts = []
    for padding in (50.0, -7.0):
        feeds = tuple(
            {"x0": np.where(m[..., None], f["x0"], np.float32(padding))} for f, m in zip(FEEDS[:10], masks, strict=True)
        )
        cuts.append(weights(pruned(proto, 0.5, data(feeds, masks), repair=repair, weighting="stream")[0]))
    for name, value in cuts[0].items():
        np.testing.assert_allclose(value, cuts[1][name], rtol=1e-3, atol=1e-4)
    shared = BLOCK.replace("w{0}", "w").replace("b{0}", "b").replace("v{0}", "v")
    text = f"f (float[n, s, 6] x0) => (float[n, s, 6] x2) {{ {shared.format(0, 1)}\n {shared.format(1, 2)} }}"
    tied = graphs.parse(text, {"w": (6, 17), "b": (17,), "v": (17, 6)})
    for tensor in tied.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(0.4 * numpy_helper.to_array(tensor), tensor.name))
    assert error(tied, pruned(tied, 0.5, repair=repair)[0]) < error(tied, pruned(tied, 0.5, repair="none")[0])


def test_the_first_layer_is_as_without() -> None:
    """Nothing before it is pruned: both targets are its own output."""
    text = (
        "f (float[b, s, 6] x0) => (float[b, s, 6] y) { u = MatMul(x0, w)  h = Relu(u)  z = Gemm(h, v, c)  y = Add(x0, z) }"
    )
    text = text.replace("[b, s, 6]", "[b, 6]")
    proto = graphs.parse(text, {"w": (6, 17), "v": (17, 6), "c": (6,)})
    feeds = tuple({"x0": f["x0"].reshape(-1, 6)} for f in FEEDS)
    given = {"ridge": 1e-6, "weighting": "none"}
    local, aware = (weights(pruned(proto, 0.5, data(feeds), repair=r, **given)[0]) for r in ("liar", "residual"))
    for name, value in local.items():
        np.testing.assert_allclose(aware[name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("repair", AWARE)
def test_without_new_biases_there_are_none(repair: str) -> None:
    proto = graphs.parse(STREAM, WEIGHTS)
    cut, _, _ = pruned(proto, 0.5, repair=repair, new_bias=False)
    assert weights(cut).keys() == weights(proto).keys()
    assert error(proto, cut) < error(proto, pruned(proto, 0.5, repair="none")[0])


@pytest.mark.parametrize("repair", AWARE)
def test_where_nothing_can_be_aimed_the_repair_is_local(repair: str) -> None:
    """The output of a 1x1 convolution has its channels in the middle: it is not laid out beside its input."""
    text = """f (float[b, s, 6] x0) => (float[b, s, 7] y) {
        u = MatMul(x0, w)  t = Transpose<perm=[0, 2, 1]>(u)  h = Relu(t)  z = Conv(h, v)
        y = Transpose<perm=[0, 2, 1]>(z) }"""
    proto = graphs.parse(text, {"w": (6, 17), "v": (7, 17, 1)})
    local, aware = (weights(pruned(proto, 0.5, repair=r)[0]) for r in ("liar", repair))
    for name, value in local.items():
        np.testing.assert_array_equal(aware[name], value)
    assert error(proto, pruned(proto, 0.5, repair=repair)[0]) < error(proto, pruned(proto, 0.5, repair="none")[0])


@pytest.mark.parametrize("repair", ["none", "liar", *AWARE])
def test_a_layer_inside_a_stream_that_was_cut(repair: str) -> None:
    """No normalisation keeps the stream whole: it goes before the layer inside, whose output has fewer columns then."""
    text = """f (float[b, s, 6] x0) => (float[b, s, 7] y) {
        t = MatMul(x0, into)  u = MatMul(t, w)  h = Relu(u)  z = MatMul(h, v)  r = Add(t, z)  y = MatMul(r, out) }"""
    proto = graphs.parse(text, {"into": (6, 11), "w": (11, 17), "v": (17, 11), "out": (11, 7)})
    cut, _, result = pruned(proto, 0.5, repair=repair)
    assert [(c.before, c.after) for c in result.changes] == [(11, 6), (17, 8)]
    shapes = {n: v.shape for n, v in weights(cut).items()}
    assert [shapes[n] for n in ("into", "w", "v", "out")] == [(6, 6), (6, 8), (8, 6), (6, 7)]
    if repair != "none":
        assert error(proto, cut) < error(proto, pruned(proto, 0.5, repair="none")[0])
