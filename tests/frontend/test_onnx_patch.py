"""A patched segment against numpy: shifts, scales, axes, weights that others read, and large ones kept outside."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import pytest

from liar_opt.frontend.onnx_patch import patch_consumer
from liar_opt.frontend.onnx_segments import extract
from liar_opt.runtime.sessions import Session

RNG = np.random.default_rng(0)


def patched(text: str, weights: graphs.Weights, feeds: dict[str, Any], change: Any, shift: Any) -> tuple[Any, Any]:
    """Returns the output before and after patching the first consumer."""
    model, walk, found = graphs.analyse(graphs.parse(text, weights))
    (use, *rest) = (u for g in found.groups for c in g.consumers for u in c.uses)
    old = np.asarray(use.node.inputs[use.weight_position].values)
    results = []
    for patch in (False, True):
        segment = extract(walk, 0, len(model.graph.nodes), [t.name for t in model.graph.outputs], {})
        if patch:
            patch_consumer(segment, (use, *(u for u in rest if u.weight is use.weight)), change(old), shift)
        session = Session(segment.serialise(), weights=segment.weights)
        results.append(next(iter(session.run(feeds, arrays=True).values())))
    return results[0], results[1]


def relu(x: Any) -> Any:
    return np.maximum(x, 0.0)


@pytest.mark.parametrize("hidden", [9, 4096])
def test_a_product_gets_weight_and_shift(hidden: int) -> None:
    """A wide weight lies outside of the model: it is replaced there as well."""
    w, v = (RNG.standard_normal(s).astype(np.float32) for s in ((5, hidden), (hidden, 4)))
    x = RNG.standard_normal((2, 3, 5)).astype(np.float32)
    shift = np.arange(4.0)
    text = "f (float[b, s, 5] x) => (float[b, s, 4] y) { u = MatMul(x, w)  h = Relu(u)  y = MatMul(h, v) }"
    before, after = patched(text, {"w": w, "v": v}, {"x": x}, lambda old: 0.5 * old, shift)
    np.testing.assert_allclose(before, relu(x @ w) @ v, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(after, 0.5 * before + shift, rtol=1e-4, atol=1e-3)


def test_the_scale_of_a_gemm_is_that_of_the_shift() -> None:
    w, v, c = (RNG.standard_normal(s).astype(np.float32) for s in ((5, 7), (4, 7), (4,)))
    x = RNG.standard_normal((3, 5)).astype(np.float32)
    text = (
        "f (float[b, 5] x) => (float[b, 4] y) { u = MatMul(x, w)  h = Relu(u)  y = Gemm<alpha = 0.5, transB = 1>(h, v, c) }"
    )
    _, after = patched(text, {"w": w, "v": v, "c": c}, {"x": x}, lambda old: old, np.ones(4))
    np.testing.assert_allclose(after, 0.5 * (relu(x @ w) @ v.T + 1.0) + c, rtol=1e-4, atol=1e-5)


def test_channels_of_a_convolution() -> None:
    w, v = (RNG.standard_normal(s).astype(np.float32) for s in ((7, 3, 1, 1), (4, 7, 1, 1)))
    x = RNG.standard_normal((2, 3, 5, 6)).astype(np.float32)
    text = "f (float[b, 3, 5, 6] x) => (float[b, 4, 5, 6] y) { u = Conv(x, w)  h = Relu(u)  y = Conv(h, v) }"
    shift = np.arange(4.0)
    before, after = patched(text, {"w": w, "v": v}, {"x": x}, lambda old: old, shift)
    np.testing.assert_allclose(after, before + shift[:, None, None], rtol=1e-4, atol=1e-4)


def test_every_use_of_a_shared_weight_and_nobody_else() -> None:
    """Both uses are patched; a third reader of the constant still sees the old one."""
    w, v = (RNG.standard_normal(s).astype(np.float32) for s in ((6, 7), (7, 6)))
    x = RNG.standard_normal((3, 6)).astype(np.float32)
    text = """f (float[n, 6] x) => (float[n, 6] y) {
        u = MatMul(x, w)  h = Relu(u)  a = MatMul(h, v)  t = MatMul(a, w)  k = Relu(t)  y = MatMul(k, v) }"""
    _, after = patched(text, {"w": w, "v": v}, {"x": x}, lambda old: 2.0 * old, np.zeros(6))
    np.testing.assert_allclose(after, relu(2.0 * relu(x @ w) @ v @ w) @ (2.0 * v), rtol=1e-3, atol=1e-3)


def test_uses_that_the_outputs_do_not_need_are_left() -> None:
    """An extract holds what its outputs need: of two branches of one weight, perhaps one."""
    w, v = (RNG.standard_normal(s).astype(np.float32) for s in ((6, 7), (7, 4)))
    text = """f (float[n, 6] x, float[n, 6] z) => (float[n, 4] y, float[n, 4] t) {
        u = MatMul(x, w)  h = Relu(u)  y = MatMul(h, v)  o = MatMul(z, w)  k = Relu(o)  t = MatMul(k, v) }"""
    model, walk, found = graphs.analyse(graphs.parse(text, {"w": w, "v": v}))
    (consumer,) = found.groups[0].consumers
    x = RNG.standard_normal((3, 6)).astype(np.float32)
    for name, factor in (("y", 2.0), ("t", 2.0), ("h", 1.0)):
        segment = extract(walk, 0, len(model.graph.nodes), [name], {})
        patch_consumer(segment, consumer.uses, 2.0 * v, np.zeros(4))
        session = Session(segment.serialise(), weights=segment.weights)
        (value,) = session.run({"x": x, "z": x}, arrays=True).values()
        np.testing.assert_allclose(value, relu(x @ w) if name == "h" else factor * relu(x @ w) @ v, rtol=1e-4, atol=1e-4)
