# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Residual streams of two and of four feed-forward blocks, with data on a plane, and how to prune it and what that loses."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import oracle

from liar_opt.frontend.onnx_model import onnx_graph
from liar_opt.passes.base import State
from liar_opt.passes.find_groups import FindGroupsPass
from liar_opt.passes.normalise_graph import NormaliseGraphPass
from liar_opt.passes.open_model import load_state
from liar_opt.passes.prune_groups import PruneGroupsPass
from liar_opt.runtime.calibration_data import CalibrationData

BLOCK = "u{0} = MatMul(x{0}, w{0})  a{0} = Add(u{0}, b{0})  h{0} = Relu(a{0})  z{0} = MatMul(h{0}, v{0})  x{1} = Add(x{0}, z{0})"
STREAM = f"f (float[b, s, 6] x0) => (float[b, s, 6] x2) {{ {BLOCK.format(0, 1)}\n {BLOCK.format(1, 2)} }}"
WEIGHTS: graphs.Weights = {"w0": (6, 17), "b0": (17,), "v0": (17, 6), "w1": (6, 19), "b1": (19,), "v1": (19, 6)}

FOUR = "f (float[b, s, 6] x0) => (float[b, s, 6] y) {{ {} \n y = Tanh(x4) }}"
NORMED = "n{0} = LayerNormalization(x{0}, g{0})  u{0} = MatMul(n{0}, w{0})  h{0} = {2}(u{0})  z{0} = MatMul(h{0}, v{0})  x{1} = Add(x{0}, z{0})"
FOUR_BLOCKS = FOUR.format(
    "\n".join(NORMED.format(i, i + 1, op) for i, op in enumerate(("Relu", "Tanh", "Sigmoid", "Relu")))
)
FOUR_WEIGHTS: dict[str, Any] = {}
for _index, (_wide, _scale) in enumerate(((17, 0.3), (16, 0.02), (19, 0.3), (24, 0.1))):
    _rng = np.random.default_rng(_index)
    FOUR_WEIGHTS |= {
        f"g{_index}": (1.0 + 0.2 * _rng.standard_normal(6)).astype(np.float32),
        f"w{_index}": _rng.standard_normal((6, _wide)).astype(np.float32),
        f"v{_index}": (_scale * _rng.standard_normal((_wide, 6))).astype(np.float32),
    }


def four() -> onnx.ModelProto:
    """Four blocks behind normalisations, of several widths and activations."""
    return graphs.parse(FOUR_BLOCKS, FOUR_WEIGHTS)


def batches(count: int, seed: int, rows: tuple[int, int] = (8, 5)) -> tuple[dict[str, np.ndarray], ...]:
    """Inputs on a plane of their space, so that hidden channels predict each other."""
    rng = np.random.default_rng(seed)
    plane = np.random.default_rng(99).standard_normal((3, 6))
    return tuple(
        {"x0": (rng.standard_normal((*rows, 3)) @ plane + 0.05 * rng.standard_normal((*rows, 6)) + 0.3).astype(np.float32)}
        for _ in range(count)
    )


def data(feeds: tuple[dict[str, np.ndarray], ...], masks: Any = None) -> CalibrationData:
    masks = masks if masks is not None else (None,) * len(feeds)
    return CalibrationData(feeds, masks, sum(len(f["x0"]) for f in feeds), 1, "test", (), False)


def prepared(proto: onnx.ModelProto, keep: float | dict[str, int], calibration: CalibrationData | None = None) -> State:
    state = load_state(proto)
    NormaliseGraphPass()(state)
    FindGroupsPass()(state)
    state.calibration = calibration or data(batches(20, 0))
    state.keep = keep if isinstance(keep, dict) else {g.name: max(1, round(g.size * keep)) for g in state.groups}
    return state


def pruned(
    proto: onnx.ModelProto, keep: float | dict[str, int], calibration: CalibrationData | None = None, **options: Any
) -> tuple[onnx.ModelProto, State, Any]:
    state = prepared(proto, keep, calibration)
    result = PruneGroupsPass(**options)(state)
    return onnx_graph(state.model).to_proto(), state, result


def error(proto: onnx.ModelProto, cut: onnx.ModelProto, seed: int = 1234) -> float:
    """Mean squared difference on rows that were not measured."""
    total = 0.0
    for feeds in batches(5, seed):
        (x,), (y,) = oracle.run(cut, feeds), oracle.run(proto, feeds)
        total += float(((x - y) ** 2).sum())
    return total
