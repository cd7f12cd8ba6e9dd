# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Experts in one constant: each is measured on its own rows, selected, repaired and cut by itself."""

from __future__ import annotations

import re
from typing import Any

import graphs
import numpy as np
import onnx
import oracle
import pytest
import streams

from liar_opt.frontend.onnx_model import onnx_graph
from liar_opt.passes.base import State
from liar_opt.passes.curves import Curves
from liar_opt.passes.measure_curves import MeasureCurvesPass
from liar_opt.passes.prune_groups import LEAST_ROWS, PruneGroupsPass
from liar_opt.passes.verify_model import Verification, VerifyModelPass
from liar_opt.runtime.calibration_data import CalibrationData

TEXT = """f (float[b, s, 6] x0) => (float[b, s, 6] y) {
    flatx = Reshape(x0, many)  logits = MatMul(flatx, router)  best, choice = TopK(logits, two)  share = Softmax(best)
    numbers = Reshape(choice, rows)  x3 = Unsqueeze(flatx, middle)  wide = Expand(x3, twice)  xs = Reshape(wide, many)
    xc = Unsqueeze(xs, last)  w1 = Gather(up, numbers)  u = MatMul(w1, xc)  h = Relu(u)
    w2 = Gather(down, numbers)  z = MatMul(w2, h)  zs = Squeeze(z, last)  shares = Reshape(share, column)  part = Mul(zs, shares)
    pairs = Reshape(part, paired)  sum = ReduceSum<keepdims = 0>(pairs, middle)  like = Shape(x0)  back = Reshape(sum, like)  y = Add(x0, back) }"""


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


WEIGHTS: graphs.Weights = {
    **{"many": ints(-1, 6), "two": ints(2), "rows": ints(-1), "middle": ints(1), "twice": ints(1, 2, 1), "last": ints(-1)},
    **{"column": ints(-1, 1), "paired": ints(-1, 2, 6), "router": (6, 4), "up": (4, 17, 6), "down": (4, 6, 17)},
}


def model(shy: int | None = None) -> onnx.ModelProto:
    """The experts behind their router; no token chooses the one that is shy."""
    weights = dict(WEIGHTS)
    if shy is not None:
        router = np.random.default_rng(5).standard_normal((6, 4)).astype(np.float32) * 0.1
        router[:, shy] = 0  # inputs lie around 0.3, on a plane
        router += np.where(np.arange(4) == shy, -np.ones(6)[:, None], 0).astype(np.float32)
        weights["router"] = router
    return graphs.parse(TEXT, weights)


def pruned(proto: onnx.ModelProto, calibration: CalibrationData | None = None, **options: Any) -> tuple[State, Any]:
    state = streams.prepared(proto, 0.5, calibration)
    result = PruneGroupsPass(**options)(state)
    VerifyModelPass()(state)
    return state, result


def lost(proto: onnx.ModelProto, state: State) -> float:
    feeds = streams.batches(1, 77, (30, 5))[0]
    (dense,), (cut,) = oracle.run(proto, feeds), oracle.run(onnx_graph(state.model).to_proto(), feeds)
    return float(np.square(dense - cut).mean())


def test_each_expert_is_repaired_on_its_own_rows() -> None:
    proto = model()
    state, result = pruned(proto)
    (change,) = result.changes
    kept = np.asarray(change.details["kept"]).reshape(4, -1)
    assert kept.shape == (4, 8)
    assert all(np.all(own // 17 == expert) for expert, own in enumerate(kept))
    assert len({tuple(own % 17) for own in kept}) > 1
    consumers = change.details["consumers"]
    assert len(consumers) == 4
    assert all(c["error_repair"] < c["error_none"] for c in consumers)
    assert change.details["rows"] == 2 * 20 * 8 * 5
    other = {repair: lost(proto, pruned(model(), repair=repair)[0]) for repair in ("none", "liar")}
    assert lost(proto, state) == pytest.approx(other["liar"])
    assert other["liar"] < 0.5 * other["none"]
    assert state.found(Verification).exact_difference < 1e-5


def test_padding_is_no_row_of_any_expert() -> None:
    feeds = streams.batches(20, 0)
    masks = tuple(np.arange(5)[None, :] < np.arange(1, 9)[:, None] for _ in feeds)
    state, result = pruned(model(), streams.data(feeds, masks))
    assert result.changes[0].details["rows"] == 2 * 20 * int(masks[0].sum())
    noisy = tuple(
        {"x0": np.where(m[..., None], f["x0"], 50.0).astype(np.float32)} for f, m in zip(feeds, masks, strict=True)
    )
    again, _ = pruned(model(), streams.data(noisy, masks))
    for a, b in zip(state.repairs, again.repairs, strict=True):
        np.testing.assert_allclose(a.weight, b.weight, rtol=1e-4, atol=1e-5)


def test_an_expert_without_rows_is_cut_by_magnitude_and_said() -> None:
    feeds = streams.batches(20, 0)
    positive = tuple({"x0": np.abs(f["x0"]) + 0.1} for f in feeds)
    state, result = pruned(model(shy=2), streams.data(positive))
    (refusal,) = result.refusals
    assert re.fullmatch(rf"experts (.*, )?2(, .*)? saw fewer than {LEAST_ROWS} calibration rows: .*", refusal.reason)
    kept = np.asarray(result.changes[0].details["kept"]).reshape(4, -1)[2] % 17
    down = np.asarray(next(r for r in state.repairs if r.index[0] == [2]).weight)[0]
    dense = next(onnx.numpy_helper.to_array(t) for t in model(shy=2).graph.initializer if t.name == "down")[2]
    np.testing.assert_allclose(down, dense[:, kept], rtol=1e-5)  # nothing is repaired
    assert set(kept) == set(np.argsort(-np.square(dense).sum(axis=0))[:8])


def test_curves_add_up_what_experts_lose() -> None:
    state = streams.prepared(model(), 1.0)
    MeasureCurvesPass()(state)
    (curve,) = state.found(Curves).by_group.values()
    assert curve.errors.shape == (18,)
    assert np.all(np.diff(curve.errors) <= 0)
    assert curve.errors[17] == 0 < curve.errors[8]
