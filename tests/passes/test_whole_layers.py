# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Layers that go whole: which can, what stands in for them, that it is one more choice in the budget, and the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import oracle
import pytest
from streams import FOUR_WEIGHTS, STREAM, WEIGHTS, batches, data, error, four, prepared

import liar_opt
from liar_opt.frontend.onnx_model import onnx_graph
from liar_opt.passes.allocate_widths import candidates_together, meant
from liar_opt.passes.allocations import ALLOCATIONS
from liar_opt.passes.base import DenseModel
from liar_opt.passes.blank_cut import blank_cut
from liar_opt.passes.choosable import choosable
from liar_opt.passes.curves import Curves, GroupCurve
from liar_opt.passes.groups import GONE, MAPPED, ChannelGroup, parameters_left
from liar_opt.passes.measure_curves import MeasureCurvesPass
from liar_opt.passes.prove_groups import ProveGroupsPass
from liar_opt.passes.prune_groups import Cut, PruneGroupsPass
from liar_opt.passes.verify_model import VerifyModelPass
from liar_opt.runtime.errors import ModelError, OptionError


def norm(x: Any, g: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5) * g


def computed(x: Any, swapped: Mapping[int, Any]) -> Any:
    """What the four blocks compute in numpy, some of them with (matrix or None, bias) in their place."""
    acts: list[Any] = [lambda u: np.maximum(u, 0), np.tanh, lambda u: 1 / (1 + np.exp(-u)), lambda u: np.maximum(u, 0)]
    for i, act in enumerate(acts):
        n = norm(x, FOUR_WEIGHTS[f"g{i}"])
        if i in swapped:
            matrix, bias = swapped[i]
            x = x + (bias if matrix is None else n @ matrix + bias)
        else:
            x = x + act(n @ FOUR_WEIGHTS[f"w{i}"]) @ FOUR_WEIGHTS[f"v{i}"]
    return np.tanh(x)


def cut(proto: onnx.ModelProto, keep: dict[str, int], **options: Any) -> tuple[onnx.ModelProto, Any]:
    state = prepared(proto, keep, options.pop("calibration", None))
    PruneGroupsPass(**options)(state)
    return onnx_graph(state.model).to_proto(), state


def names(proto: onnx.ModelProto) -> list[str]:
    return [g.name for g in prepared(proto, {}).groups]


@pytest.mark.parametrize("weighting", ["stream", "none"])
@pytest.mark.parametrize("form", [GONE, MAPPED])
def test_a_layer_that_is_gone_equals_the_original_with_its_output_replaced(form: int, weighting: str) -> None:
    """Blocks 1 and 3 go; what stands in is the mean of the output, or its least squares on what the block reads."""
    proto = four()
    groups = names(proto)
    result, state = cut(proto, {groups[1]: form, groups[3]: form}, ridge=1e-9, weighting=weighting)
    onnx.checker.check_model(result, full_check=True)
    stand_ins = state.found(Cut).stand_ins
    assert [s.target for s in stand_ins] == ["z1", "z3"] and all((s.matrix is None) == (form == GONE) for s in stand_ins)
    swapped = {i: (s.matrix, s.bias) for i, s in zip((1, 3), stand_ins, strict=True)}
    for feeds in batches(2, 7, (3, 7)):
        (found,) = oracle.run(result, feeds)
        np.testing.assert_allclose(found, computed(feeds["x0"], swapped), rtol=1e-4, atol=1e-5)
    left = {t.name for t in result.graph.initializer}
    assert not {"w1", "v1", "w3", "v3"} & left and {"w0", "v0", "w2", "v2"} <= left
    if weighting == "none":  # the first one by hand
        rows = np.concatenate([f["x0"].reshape(-1, 6) for f in batches(20, 0)]).astype(np.float64)
        x = rows + np.maximum(norm(rows, FOUR_WEIGHTS["g0"]) @ FOUR_WEIGHTS["w0"], 0) @ FOUR_WEIGHTS["v0"]
        n = norm(x, FOUR_WEIGHTS["g1"])
        y = np.tanh(n @ FOUR_WEIGHTS["w1"]) @ FOUR_WEIGHTS["v1"]
        one = np.ones((len(n), 1))
        fit = np.linalg.lstsq(one if form == GONE else np.hstack([n, one]), y, rcond=None)[0]
        expected = np.broadcast_to(fit[-1], y.shape) if form == GONE else np.hstack([n, one]) @ fit
        ours = np.broadcast_to(stand_ins[0].bias, y.shape) if form == GONE else n @ swapped[1][0] + swapped[1][1]
        np.testing.assert_allclose(ours, expected, atol=1e-3 * np.abs(y).max())


def test_what_is_left_is_measured_behind_what_went() -> None:
    """The same widths lose less when later groups are repaired on what they see then; the result passes its check."""
    proto = four()
    groups = names(proto)
    keep = {groups[0]: 9, groups[1]: MAPPED, groups[2]: 10, groups[3]: GONE}
    result, state = cut(proto, keep)
    VerifyModelPass()(state)  # against the masked original
    widths, _ = cut(proto, {groups[0]: 9, groups[1]: 16, groups[2]: 10, groups[3]: 24})
    assert error(proto, widths) < error(proto, result) < error(proto, cut(proto, dict.fromkeys(groups, GONE))[0])
    assert parameters_left(state.groups, keep) < parameters_left(state.groups)


def test_only_what_a_budget_could_choose_is_measured() -> None:
    """A layer that says little is; one whose loss would be half of all is not."""
    state = prepared(four(), {})
    groups: tuple[ChannelGroup, ...] = state.groups
    low = {
        g.name: GroupCurve(np.linspace(lost, 0.0, g.size + 1), np.ones(g.size), whole={GONE: lost})
        for g, lost in zip(groups, (9.0, 1e-4, 8.0, 7.0), strict=True)
    }
    found = choosable(groups, low)
    assert groups[1].name in found and groups[0].name not in found


def test_curves_say_what_is_lost_without_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured in the output, on rows that nothing is fitted to; about what the cut does then."""
    every = lambda _, curves: {name for name, curve in curves.items() if curve.whole}  # noqa: E731
    monkeypatch.setattr("liar_opt.passes.measure_curves.choosable", every)
    proto = four()
    state = prepared(proto, {})
    MeasureCurvesPass(whole="on")(state)
    power = sum(float((oracle.run(proto, f)[0] ** 2).sum()) for f in batches(5, 1234))
    for group in state.groups:
        whole = state.found(Curves).by_group[group.name].whole
        assert GONE in whole
        for form, lost in whole.items():
            result, _ = cut(proto, {group.name: form})
            assert lost / 3 < error(proto, result) / power < lost * 3
    plain = prepared(proto, {})
    MeasureCurvesPass()(plain)
    assert not any(curve.whole for curve in plain.found(Curves).by_group.values())


def test_it_is_one_more_choice_in_the_budget() -> None:
    """A layer that says nothing goes first; all that is cut costs no more than what was asked for."""
    state = prepared(four(), {})
    groups: tuple[ChannelGroup, ...] = state.groups
    curves = {
        g.name: GroupCurve(np.linspace(4.0, 0.0, g.size + 1), np.ones(g.size), whole={GONE: lost, MAPPED: lost / 4})
        for g, lost in zip(groups, (9.0, 1e-4, 8.0, 0.4), strict=True)
    }
    candidates, meaning = candidates_together(groups, (), 1, curves)
    everything = parameters_left(groups)
    for sparsity in (0.2, 0.4, 0.7):
        keep = meant(ALLOCATIONS["curves"](candidates, (1.0 - sparsity) * everything), meaning)
        assert set(keep) == {g.name for g in groups} and keep[groups[1].name] in (GONE, MAPPED)
        assert (
            parameters_left(groups, keep) < (1.0 - sparsity) * everything + 36
        )  # the cheapest step is one channel, or a map
    model, _ = blank_cut(state.found(DenseModel).stored, keep)
    assert model.parameters() < state.model.parameters()


def test_the_proof_rehearses_it() -> None:
    state = prepared(four(), {})
    result = ProveGroupsPass(whole=True)(state)
    assert not result.refusals and all(g.sublayer is not None for g in state.groups)


NOT_ADDED = "f (float[b, s, 6] x) => (float[b, s, 6] y) { u = MatMul(x, w)  h = Relu(u)  y = MatMul(h, v) }"
HANDED_OUT = "f (float[b, s, 6] x) => (float[b, s, 6] y, float[b, s, 6] z) { u = MatMul(x, w)  h = Relu(u)  z = MatMul(h, v)  y = Add(x, z) }"
SCALED = "f (float[b, s, 6] x) => (float[b, s, 6] y) { u = MatMul(x, w)  h = Relu(u)  z = MatMul(h, v)  c = Add(z, d)  k = Mul(c, d)  y = Add(k, x) }"
BOTH_READ = "f (float[b, s, 6] x) => (float[b, s, 6] y) { u = MatMul(x, w)  h = Relu(u)  z = MatMul(h, v)  t = Tanh(z)  p = Add(z, t)  y = Add(p, x) }"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (NOT_ADDED, "its output is one of the model's"),
        (HANDED_OUT, "its output is one of the model's"),
        (SCALED, "k"),
        (BOTH_READ, "p"),
    ],
)
def test_which_can_go(text: str, reason: str) -> None:
    """What it adds is behind all of it; where that is handed out, or there is no stream, it stays."""
    _, _, found = graphs.analyse(graphs.parse(text, {"w": (6, 17), "v": (17, 6), "d": (6,)}))
    (group,) = found.groups
    if group.sublayer is None:
        assert [r.reason for r in found.sublayers] == [f"it cannot go whole: {reason}"]
    else:
        assert group.sublayer.target.name == reason and not found.sublayers


def test_two_widths_in_one_layer_go_together() -> None:
    text = "f (float[b, s, 6] x) => (float[b, s, 6] y) { u = MatMul(x, w)  h = Relu(u)  i = MatMul(h, p)  j = Tanh(i)  z = MatMul(j, v)  y = Add(x, z) }"
    proto = graphs.parse(text, {"w": (6, 17), "p": (17, 13), "v": (13, 6)})
    state = prepared(proto, {})
    first, second = state.groups
    assert first.sublayer is not None and first.sublayer.members == (first.name, second.name)
    curves = {
        g.name: GroupCurve(np.linspace(4.0, 0.0, g.size + 1), np.ones(g.size), whole={GONE: 0.1}) for g in state.groups
    }
    candidates, meaning = candidates_together(state.groups, (), 1, curves)
    assert len(candidates) == 1
    keep = meant({first.name: 1}, meaning)
    assert keep == {first.name: GONE, second.name: GONE}
    batch = replace(data(batches(20, 0)), batches=tuple({"x": f["x0"]} for f in batches(20, 0)))
    result, after = cut(proto, keep, calibration=batch)
    assert [n.op_type for n in result.graph.node] == ["Add"] and len(after.found(Cut).stand_ins) == 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(four(), tmp_path / "four.onnx")
    return tmp_path / "four.onnx"


GIVEN = [f for f in batches(20, 0)]


@pytest.mark.parametrize(
    "goal", [{"sparsity": 0.6}, {"target": "size=0.6x"}, {"target": "flops=0.35x"}, {"max_drop": "20%"}]
)
def test_a_run_by_each_goal(path: Path, goal: dict[str, Any]) -> None:
    """What the report says is what was done, and the result passed its check; the default has widths alone."""
    options: dict[str, Any] = {"latency": False, "fresh": True, "multiple_of": 1, **goal}
    result = liar_opt.prune(path, GIVEN, whole_layers="auto", **options)
    gone = [g for g in result.report["groups"] if "stand_in" in g]
    assert gone and all(g["after"] == 0 and g["kept"] == [] for g in gone)
    assert {c.what for c in result.changes} >= {"sublayer replaced"}
    off = liar_opt.prune(path, GIVEN, **options)
    assert not any("stand_in" in g for g in off.report["groups"])


def test_a_run_that_is_resumed_gives_the_same(path: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"sparsity": 0.6, "latency": False, "fresh": True, "multiple_of": 1, "whole_layers": "auto"}
    whole = liar_opt.prune(path, GIVEN, **options)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "verify":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        liar_opt.prune(path, GIVEN, resume=tmp_path / "resume", progress=stop, **options)
    again = liar_opt.prune(path, GIVEN, resume=tmp_path / "resume", **options)
    assert again.report["resumed"] > 0
    assert again.model.SerializeToString() == whole.model.SerializeToString()


def test_bad_input(path: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="whole-layers"):
        liar_opt.prune(path, GIVEN, whole_layers="all", sparsity=0.3)
    with pytest.raises(OptionError, match="whole-layers needs a sparsity, a target or max-drop"):
        liar_opt.prune(path, GIVEN, whole_layers="on", ffn=0.3)
    with pytest.raises(OptionError, match=r"whole-layers goes by error curves, .*; give --calibration, or leave it out"):
        liar_opt.prune(path, None, whole_layers="on", sparsity=0.3)
    onnx.save(graphs.parse(NOT_ADDED, {"w": (6, 17), "v": (17, 6)}), tmp_path / "none.onnx")
    feeds = [{"x": f["x0"]} for f in GIVEN]
    with pytest.raises(ModelError, match=r"no layer can go whole: .* one of the model's; leave whole-layers out"):
        liar_opt.prune(tmp_path / "none.onnx", feeds, whole_layers="on", sparsity=0.3)


def test_streams_without_a_norm_go_too() -> None:
    proto = graphs.parse(STREAM, WEIGHTS)
    first, second = names(proto)
    result, _ = cut(proto, {first: MAPPED, second: GONE})
    assert [n.op_type for n in result.graph.node] == ["MatMul", "Add", "Add", "Add"]


CACHED = """
f (float[b, s, 6] x, float[b, 2, p, 4] past_k, float[b, 2, p, 4] past_v)
    => (float[b, s, 6] y, float[b, 2, t, 4] present_k, float[b, 2, t, 4] present_v) {
    n = LayerNormalization(x, g)
    q0 = MatMul(n, wq)  q1 = Reshape(q0, split)  q = Transpose<perm = [0, 2, 1, 3]>(q1)
    k0 = MatMul(n, wk)  k1 = Reshape(k0, split)  k = Transpose<perm = [0, 2, 1, 3]>(k1)
    v0 = MatMul(n, wv)  v1 = Reshape(v0, split)  v = Transpose<perm = [0, 2, 1, 3]>(v1)
    present_k = Concat<axis = 2>(past_k, k)  present_v = Concat<axis = 2>(past_v, v)
    kt = Transpose<perm = [0, 1, 3, 2]>(present_k)
    a = MatMul(q, kt)  w = Softmax<axis = -1>(a)  c = MatMul(w, present_v)
    ct = Transpose<perm = [0, 2, 1, 3]>(c)  cj = Reshape(ct, join)  o = MatMul(cj, wo)
    r = Add(x, o)
    m = LayerNormalization(r, g)  u = MatMul(m, w1)  h = Relu(u)  z = MatMul(h, w2)
    y = Add(r, z)
}
"""
CACHE_WEIGHTS: dict[str, Any] = {
    **{name: (6, 8) for name in ("wq", "wk", "wv")},
    **{"wo": (8, 6), "w1": (6, 17), "w2": (17, 6), "g": (6,)},
    "split": np.asarray([0, 0, 2, 4]),
    "join": np.asarray([0, 0, 8]),
}


def cached_feeds(seed: int, sizes: tuple[int, int, int] = (4, 5, 3)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    batch, length, past = sizes
    shapes = {"x": (batch, length, 6), "past_k": (batch, 2, past, 4), "past_v": (batch, 2, past, 4)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_keys_and_values_that_are_outputs_are_computed_still() -> None:
    """The interface stays: a run by default leaves such attention, one that is asked to keeps the caches."""
    proto = graphs.parse(CACHED, CACHE_WEIGHTS)
    feeds = replace(data(batches(20, 0)), batches=tuple(cached_feeds(seed) for seed in range(20)))
    state = prepared(proto, {}, feeds)
    heads, ffn = sorted(state.groups, key=lambda g: g.kind, reverse=True)
    assert heads.sublayer is not None and heads.sublayer.cached and ffn.sublayer is not None and not ffn.sublayer.cached
    for mode, both in (("auto", False), ("on", True)):
        MeasureCurvesPass(whole=mode)(state)
        assert bool(state.found(Curves).by_group[heads.name].whole) == both
    keep = {heads.name: GONE}
    result, after = cut(proto, keep, calibration=feeds)
    left = {t.name for t in result.graph.initializer}
    assert {"wk", "wv"} <= left and not {"wq", "wo"} & left
    assert parameters_left(state.groups) - parameters_left(state.groups, keep) == 2 * 48
    ((_, bias),) = [(s.target, s.bias) for s in after.found(Cut).stand_ins]
    given = cached_feeds(99, (2, 1, 7))
    (y, *caches), (_, *before) = oracle.run(result, given), oracle.run(proto, given)
    for ours, theirs in zip(caches, before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    r = given["x"] + bias
    expected = r + np.maximum(norm(r, weights["g"]) @ weights["w1"], 0) @ weights["w2"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
