"""What is alive together while a graph runs."""

from __future__ import annotations

import graphs
import numpy as np

from liar_opt.frontend.live_memory import live_bytes, tensor_sizes
from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.walk import walk_sized

TEXT = """f (float[b, 6] x) => (float[b, 6] y) {
    u = MatMul(x, w1)  h = Relu(u)  z = MatMul(h, w2)  k = Tanh(z)  y = Add(x, k) }"""


def test_sizes_and_the_most_that_is_alive() -> None:
    model = OnnxModel.from_proto(graphs.parse(TEXT, {"w1": (6, 10), "w2": (10, 6)}))
    state = walk_sized(model, {"x": np.zeros((3, 6), np.float32)})
    assert state is not None
    sizes = tensor_sizes(state)
    assert {n: sizes[n] for n in "uhzky"} == {"u": 120, "h": 120, "z": 72, "k": 72, "y": 72}
    nodes = model.graph.nodes
    assert live_bytes(nodes, sizes) == 240  # u and h
    assert live_bytes(nodes, sizes, {"h"}) == 120 + 72 + 72
    assert live_bytes(nodes[2:], sizes) == 72 + 72  # what was made before is not counted
    assert live_bytes(nodes, {}) == 0
