"""A tensor that another stands in for: in the graph, and in parts of it, on both engines, against numpy and torch."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import pytest
import torch
from torch import nn

from liar_opt.frontend.either_model import engine_of
from liar_opt.frontend.fx_module import FxModel, analyse, lower, trace
from liar_opt.frontend.fx_rewrite import cut_graph_module
from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.records import StandIn
from liar_opt.frontend.rewrite import CannotFollow, Rewriter
from liar_opt.frontend.walk import GraphWalk

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, HIDDEN = 6, 11
RNG = np.random.default_rng(3)
SHAPES = [(1, 1, WIDTH), (2, 5, WIDTH), (3, 7, WIDTH)]
CACHED = """
f (float[b, s, 6] x) => (float[b, s, 6] y, float[b, s, 11] kept, float[b, s, 6] whole) {
    n = LayerNormalization(x, g)
    u = MatMul(n, w)
    kept = Relu(u)
    z = MatMul(kept, v)
    f = Add(z, c)
    r = Add(x, f)
    m = LayerNormalization(r, g)
    t = MatMul(m, p)
    e = Tanh(t)
    whole = MatMul(e, q)
    y = Add(r, whole)
}
"""
WEIGHTS = {"g": (6,), "w": (6, 11), "v": (11, 6), "c": (6,), "p": (6, 9), "q": (9, 6)}


def stand_in(target: str, source: str, mapped: bool) -> StandIn:
    """Returns a map, or a constant, of made-up numbers."""
    matrix = RNG.standard_normal((WIDTH, WIDTH)).astype(np.float32) if mapped else None
    return StandIn(target, source, matrix, RNG.standard_normal(WIDTH).astype(np.float32))


def applied(given: StandIn, x: Any) -> Any:
    """Returns what stands there, of a tensor or an array."""
    if isinstance(x, torch.Tensor):
        bias = torch.from_numpy(given.bias)
        return bias.expand_as(x) if given.matrix is None else x @ torch.from_numpy(given.matrix) + bias
    return np.broadcast_to(given.bias, x.shape) if given.matrix is None else x @ given.matrix + given.bias


def norm(x: Any, g: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5) * g


def cached(w: dict[str, Any], x: Any, swapped: dict[str, StandIn]) -> dict[str, Any]:
    """What `CACHED` computes, in numpy."""
    n = norm(x, w["g"])
    kept = np.maximum(n @ w["w"], 0)
    r = x + (applied(swapped["f"], n) if "f" in swapped else kept @ w["v"] + w["c"])
    m = norm(r, w["g"])
    whole = applied(swapped["whole"], m) if "whole" in swapped else np.tanh(m @ w["p"]) @ w["q"]
    return {"y": r + whole, "kept": kept, "whole": whole}


def results(model: OnnxModel, feeds: dict[str, Any]) -> dict[str, Any]:
    """What a model computes now."""
    return dict(engine_of(model, "cpu", False).whole(model).run(feeds, arrays=True))


def masked(model: OnnxModel, walk: GraphWalk, given: StandIn, feeds: dict[str, Any]) -> list[dict[str, Any]]:
    """What an original computes with something in the place of a tensor, as a whole and as a part."""
    engine, outputs = engine_of(model, "cpu", False), [t.name for t in model.graph.outputs]
    part = engine.part(walk, 0, len(model.graph.nodes), outputs, {}, patches=[given])
    return [engine.reference(walk, outputs, [given], None).run(feeds), part.run(feeds, arrays=outputs)]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("target", ["f", "whole"])
def test_an_onnx_graph(target: str, mapped: bool) -> None:
    """Names of outputs stay; a cache that the sublayer made is computed still; what nothing needs is gone."""
    proto = graphs.parse(CACHED, WEIGHTS)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    given = stand_in(target, {"f": "n", "whole": "m"}[target], mapped)
    original, original_walk, _ = graphs.analyse(proto)
    cut, walk, _ = graphs.analyse(proto)
    Rewriter(walk).replace(given)
    onnx.checker.check_model(cut.to_proto(), full_check=True)
    for shape in SHAPES:
        x = RNG.standard_normal(shape).astype(np.float32)
        expected = cached(weights, x, {target: given})
        for found in [results(cut, {"x": x}), *masked(original, original_walk, given, {"x": x})]:
            assert list(found) == list(expected)
            for name in expected:
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4)
    ops = [n.op for n in cut.graph.nodes]
    assert ops.count("Tanh") == (target != "whole")
    assert ("v" in cut.graph.tensors()) == (target != "f") and "w" in cut.graph.tensors()  # for the cache
    if target == "f" and not mapped:  # the addition spreads it
        assert "Expand" not in ops
    results_before = cached(weights, x, {})["y"]
    assert not np.allclose(results(cut, {"x": x})["y"], results_before, atol=1e-2)  # the oracle can fail


def test_a_cut_goes_on_behind_it() -> None:
    """A group elsewhere is cut as before; what was recorded of dead nodes is forgotten."""
    proto = graphs.parse(CACHED, WEIGHTS)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    model, walk, found = graphs.analyse(proto)
    rewriter, given = Rewriter(walk), stand_in("f", "n", True)
    rewriter.replace(given)
    (group,) = (g for g in found.groups if g.size == 9)
    rewriter.cut(group.cut(list(range(5))))
    x = RNG.standard_normal((2, 5, WIDTH)).astype(np.float32)
    weights["p"], weights["q"] = weights["p"][:, :5], weights["q"][:5]
    expected = cached(weights, x, {"f": given})
    for name, value in results(model, {"x": x}).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4)
    gone = {id(n) for n in walk.gone}
    assert gone and not any(id(u.node) in gone for u in walk.constant_uses)


def test_what_cannot_be_replaced() -> None:
    text = "f (float[b, 6] x) => (float[b, 3] a, float[b, 3] c) { h = MatMul(x, w)  a, c = Split<axis = 1>(h, s) }"
    _, walk, _ = graphs.analyse(graphs.parse(text, {"w": (6, 6), "s": np.asarray([3, 3])}))
    with pytest.raises(CannotFollow, match="'a' is one of several"):
        Rewriter(walk).replace(StandIn("a", "x", None, np.zeros(3, np.float32)))
    with pytest.raises(CannotFollow, match="'c' is not made before 'h'"):
        Rewriter(walk).replace(StandIn("h", "c", None, np.zeros(6, np.float32)))


class Layers(nn.Module):
    """Two sublayers; the second one's output is handed out, too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.first, self.last = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH, bias=False)
        self.swapped: dict[str, StandIn] = {}

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n = self.one(x)
        x = x + (applied(self.swapped["down"], n) if "down" in self.swapped else self.down(self.up(n).relu()))
        m = self.two(x)
        whole = applied(self.swapped["last"], m) if "last" in self.swapped else self.last(self.first(m).tanh())
        return x + whole, whole


def lowered(module: nn.Module) -> FxModel:
    feeds = {"x": torch.randn(3, 7, WIDTH)}
    return lower(trace(module, feeds), module)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("target", ["down", "last"])
def test_a_traced_module(target: str, mapped: bool) -> None:
    torch.manual_seed(0)
    module = Layers().eval()
    model, original = lowered(module), lowered(module)
    nodes = {n.inputs[1].name.removesuffix(".weight"): n for n in model.graph.nodes if n.op == "linear"}
    (before,) = (n.inputs[0].name for name, n in nodes.items() if name == {"down": "up", "last": "first"}[target])
    given = stand_in(nodes[target].outputs[0].name, before, mapped)
    count = len(model.graph.nodes)
    Rewriter(analyse(model)).replace(given)
    assert len(model.graph.nodes) < count
    whole = cut_graph_module(model)
    module.swapped = {target: given}
    for shape in [(1, 7, WIDTH), (2, 7, WIDTH)]:
        x = torch.from_numpy(RNG.standard_normal(shape).astype(np.float32))
        with torch.no_grad():
            expected = dict(zip(model.results, (t.numpy() for t in module(x)), strict=True))
            made = dict(zip(model.results, (t.numpy() for t in whole(x)), strict=True))
        others = masked(original, analyse(original), given, {"x": x.numpy()})
        for found in [results(model, {"x": x.numpy()}), made, *others]:
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
    own = {"down": ("up.", "down."), "last": ("first.", "last.")}[target]
    # Where a constant is added, nothing reads what the norm makes, not even its shape.
    gone = (*own, "one.") if target == "down" and not mapped else own
    assert not any(name.startswith(gone) for name in dict(whole.named_parameters()))
    left = sum(p.numel() for name, p in module.named_parameters() if not name.startswith(gone))
    assert model.parameters() == left + given.parameters
    exported = torch.export.export(whole, (x,))
    np.testing.assert_allclose(exported.module()(x)[0].detach().numpy(), expected[model.results[0]], rtol=1e-4, atol=1e-5)
