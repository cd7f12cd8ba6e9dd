"""Error curves: their ends, what they equal, and that measuring changes nothing."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import oracle
import pytest
from streams import STREAM, WEIGHTS, batches, data, error, prepared, pruned

from liar_opt.frontend.onnx_model import onnx_graph
from liar_opt.passes.allocate_widths import AllocateWidthsPass
from liar_opt.passes.curves import Curves, GroupCurve
from liar_opt.passes.measure_curves import MeasureCurvesPass, curve_report
from liar_opt.passes.prune_groups import PruneGroupsPass


def curves(proto: onnx.ModelProto, **options: Any) -> tuple[dict[str, GroupCurve], Any]:
    state = prepared(proto, 1.0)
    MeasureCurvesPass(**options)(state)
    return dict(state.found(Curves).by_group), state


def test_curves_fall_to_zero_and_the_model_stays() -> None:
    proto = graphs.parse(STREAM, WEIGHTS)
    found, state = curves(proto)
    assert list(found) == [g.name for g in state.groups]
    for group in state.groups:
        curve = found[group.name]
        assert curve.errors.shape == (group.size + 1,) and curve.values.shape == (group.size,)
        assert curve.errors[-1] == 0.0 and np.all(np.diff(curve.errors) <= 0.0)
        # Relative to the variance of a stream that the block adds to: removing all of it costs something, not everything.
        assert 0.01 < curve.errors[0] < 1.5
    (feeds,) = batches(1, 3)
    for x, y in zip(oracle.run(onnx_graph(state.model).to_proto(), feeds), oracle.run(proto, feeds), strict=True):
        np.testing.assert_array_equal(x, y)
    report = curve_report(state.groups, found)
    assert report[state.groups[0].name]["points"][-1] == [17, 0.0]


@pytest.mark.parametrize("streamed", [True, False])
def test_a_curve_says_what_the_cut_does_to_the_output(streamed: bool) -> None:
    """One group alone: the curve's error at a width against that of the pruned model, on rows that were not measured."""
    last = "z = MatMul(h, w2)  y = Add(x0, z)" if streamed else "y = MatMul(h, w2)"
    text = f"f (float[b, s, 6] x0) => (float[b, s, 6] y) {{ u = MatMul(x0, w1)  h = Relu(u)  {last} }}"
    proto = graphs.parse(text, {"w1": (6, 17), "w2": (17, 6)})
    found, state = curves(proto)
    (curve,) = found.values()
    power = sum(float((oracle.run(proto, f)[0] ** 2).sum()) for f in batches(5, 1234))
    for keep, within in ((4, 2.0), (8, 1.7), (12, 2.5)):  # it is scaled at half of the width
        cut, _, _ = pruned(proto, {state.groups[0].name: keep})
        assert 1 / within < curve.errors[keep] / (error(proto, cut) / power) < within


def test_what_all_logits_have_in_common_is_no_difference() -> None:
    """A softmax does not see it: a large constant beside the logits leaves the curves as they are."""
    text = "f (float[b, s, 6] x0) => (float[b, s, 6] y) {{ u = MatMul(x0, w1)  h = Relu(u)  z = MatMul(h, w2)  y = {} }}"
    weights = {"w1": (6, 17), "w2": (17, 6)}
    plain, _ = curves(graphs.parse(text.format("Identity(z)"), weights))
    shifted = graphs.parse(text.format("Add(z, shift)"), weights | {"shift": np.full(1, 50.0, np.float32)})
    (one,), (other,) = plain.values(), curves(shifted)[0].values()
    np.testing.assert_allclose(other.errors, one.errors, rtol=1e-3)


def test_without_their_worth_errors_are_relative_to_the_stream() -> None:
    proto = graphs.parse(STREAM, WEIGHTS)
    found, scaled = curves(proto, worth=False)[0], curves(proto)[0]
    for name, curve in found.items():
        assert curve.worth == 1.0
        np.testing.assert_allclose(curve.errors * scaled[name].worth, scaled[name].errors)
        np.testing.assert_allclose(curve.values, scaled[name].values)


def test_values_are_those_of_the_score() -> None:
    proto = graphs.parse(STREAM, WEIGHTS)
    found, state = curves(proto, score=lambda consumers: np.arange(consumers[0].blocks))
    for group in state.groups:
        np.testing.assert_array_equal(found[group.name].values, np.arange(group.size))


def test_curves_find_the_layer_that_costs_nothing() -> None:
    """The second block is nearly dead: at one and the same number of channels it is narrowed, and the output gains."""
    proto = graphs.parse(STREAM, WEIGHTS)
    for tensor in proto.graph.initializer:
        if tensor.name == "v1":
            tensor.CopyFrom(onnx.numpy_helper.from_array(0.05 * onnx.numpy_helper.to_array(tensor), "v1"))
    errors = {}
    for name in ("uniform", "curves"):
        state = prepared(proto, 1.0, data(batches(20, 0)))
        MeasureCurvesPass()(state)
        AllocateWidthsPass(ffn=0.5, multiple_of=1, allocate=name)(state)
        assert sum(state.keep.values()) == pytest.approx(18, abs=1)
        if name == "curves":
            assert state.keep[state.groups[0].name] > state.keep[state.groups[1].name]
        PruneGroupsPass()(state)
        errors[name] = error(proto, onnx_graph(state.model).to_proto())
    assert errors["curves"] < 0.8 * errors["uniform"]
