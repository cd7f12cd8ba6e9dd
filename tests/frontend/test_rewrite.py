# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Cutting: what is sliced, what is copied first, which sizes and numbers follow; and where a bias goes."""

from __future__ import annotations

import graphs
import numpy as np
import onnx
import oracle
import pytest
from graphs import Weights
from onnx import numpy_helper

from liar_opt.frontend.rewrite import Rewriter
from liar_opt.runtime.errors import InternalError


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def constants(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}


def cut_sizes(proto: onnx.ModelProto, **wanted: list[int]) -> onnx.ModelProto:
    """Cuts the groups by the name of a weight that consumes them; the rest are not touched."""
    model, state, found = graphs.analyse(proto)
    rewriter = Rewriter(state)
    for group in found.groups:
        for name in {u.weight.name for c in group.consumers for u in c.uses} & set(wanted):
            rewriter.cut({group.factor: wanted[name]})
    model.graph.cleanup(remove_unused_node_outputs=False).toposort()
    return model.to_proto()


# -- slicing ---------------------------------------------------------------------------------------------------------

SLICED = """f (float[b, s, 6] x) => (float[b, s, 7] y) {{ p = MatMul(x, w1)
    g = Slice(p, {}, {}, axis)  u = Slice(p, {}, {}, axis)
    y1 = MatMul(g, w2)  y2 = MatMul(u, w3)  y = Add(y1, y2) }}"""
SLICED_WEIGHTS: Weights = {
    "w1": (6, 16), "w2": (11, 7), "w3": (5, 7), "axis": ints(-1), "zero": ints(0), "end": ints(2**62),
    "eleven": ints(11), "sixteen": ints(16), "back": ints(-5),
}  # fmt: skip


@pytest.mark.parametrize("second", ["eleven sixteen", "eleven end", "back end", "back sixteen"])
@pytest.mark.parametrize("first", ["zero eleven", "zero back"])
@pytest.mark.parametrize("cut", [{"w2": [0, 3, 10]}, {"w3": [1, 4]}, {"w2": [1, 2], "w3": [0, 2, 3]}])
def test_slices_follow_whichever_side_is_cut(first: str, second: str, cut: dict[str, list[int]]) -> None:
    proto = graphs.parse(SLICED.format(*first.split(), *second.split()), SLICED_WEIGHTS)
    assert graphs.sizes(proto) == [("ffn", 5), ("ffn", 11)]
    values = constants(proto)
    masked = onnx.ModelProto()
    masked.CopyFrom(proto)
    for name, kept in cut.items():
        (tensor,) = (i for i in masked.graph.initializer if i.name == name)
        value = np.zeros_like(values[name])
        value[kept] = values[name][kept]
        tensor.CopyFrom(numpy_helper.from_array(value, name))
    feeds = graphs.feeds_of(proto, {"b": 2, "s": 3})
    pruned = cut_sizes(proto, **cut)
    assert oracle.difference(oracle.run(pruned, feeds), oracle.run(masked, feeds)) <= 1e-5


def test_a_constant_that_others_share_is_cloned() -> None:
    """Equal biases that an exporter merged: one layer is cut, the other keeps the vector."""
    text = """f (float[b, 6] x) => (float[b, 7] y) { u = MatMul(x, w1)  ub = Add(u, shared)  h = Relu(ub)  v = MatMul(h, w2)
        vb = Add(v, shared)  k = Softmax(vb)  y = MatMul(k, w3) }"""
    proto = graphs.parse(text, {"w1": (6, 11), "shared": (11,), "w2": (11, 11), "w3": (11, 7)})
    assert graphs.sizes(proto) == [("ffn", 11)]
    pruned = graphs.prove(proto, {"b": 3})
    assert sorted(v.size for v in constants(pruned).values() if v.ndim == 1)[-1] == 11
    assert constants(pruned)["shared"].shape == (11,)


def test_a_shared_matrix_is_cut_once() -> None:
    text = """f (float[b, 6] x) => (float[b, 6] y) { u = MatMul(x, w1)  h = Relu(u)  v = MatMul(h, w2)
        r = Softmax(v)  u2 = MatMul(r, w1)  h2 = Relu(u2)  y = MatMul(h2, w2) }"""
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 6)})
    _, _, found = graphs.analyse(proto)
    assert [len(c.uses) for g in found.groups for c in g.consumers] == [2]
    pruned = graphs.prove(proto, {"b": 3})
    assert set(constants(pruned)) == {"w1", "w2"}


def test_a_shared_reshape_target_is_copied_where_another_layer_keeps_it() -> None:
    half = "h{0} = MatMul({1}, w{0})  a{0} = Reshape(h{0}, to)  r{0} = Relu(a{0})  b{0} = Reshape(r{0}, back)  y{0} = MatMul(b{0}, o{0})"
    text = f"f (float[b, s, 6] x) => (float[b, s, 6] y2) {{ {half.format(1, 'x')}\n {half.format(2, 'y1')} }}"
    weights: Weights = {
        "w1": (6, 15),
        "o1": (15, 6),
        "w2": (6, 15),
        "o2": (15, 6),
        "to": ints(0, 0, 3, 5),
        "back": ints(0, 0, 15),
    }
    proto = graphs.parse(text, weights)
    assert graphs.sizes(proto) == [("ffn", 6), ("heads", 3), ("heads", 3)]
    graphs.prove(proto, {"b": 2, "s": 4})
    only = cut_sizes(proto, o1=[2])
    targets = sorted(tuple(v.tolist()) for v in constants(only).values() if v.dtype == np.int64)
    assert targets == [(0, 0, 1, 5), (0, 0, 3, 5), (0, 0, 5), (0, 0, 15)]


HEADS = """f (float[b, s, 6] x) => (float[b, s, 7] y) {{ h = MatMul(x, w1)
    n = Shape(h)  bn = Gather(n, i0)  sn = Gather(n, i1)  b1 = Unsqueeze(bn, zero)  s1 = Unsqueeze(sn, zero)
    {}
    y = MatMul(j, o) }}"""
HEAD_WEIGHTS: Weights = {
    "w1": (6, 15), "o": (15, 7), "i0": np.asarray(0), "i1": np.asarray(1), "i2": np.asarray(2), "zero": ints(0),
    "three": ints(3), "five": ints(5), "fifteen": ints(15), "minus": ints(-1), "k3": np.asarray(3), "perm": ints(0),
}  # fmt: skip
COMPUTED = {
    "target of pieces": "t = Concat<axis=0>(b1, s1, three, five)  q = Reshape(h, t)  r = Relu(q)  t2 = Concat<axis=0>(b1, s1, fifteen)  j = Reshape(r, t2)",
    "heads left open": "t = Concat<axis=0>(b1, s1, minus, five)  q = Reshape(h, t)  r = Relu(q)  t2 = Concat<axis=0>(b1, s1, minus)  j = Reshape(r, t2)",
    "heads divided from the width": "w = Gather(n, i2)  d = Div(w, k3)  d1 = Unsqueeze(d, zero)  t = Concat<axis=0>(b1, s1, three, d1)  q = Reshape(h, t)  r = Relu(q)  j = Reshape(r, n)",
    "heads times batch": """t = Concat<axis=0>(b1, s1, three, five)  q = Reshape(h, t)  qt = Transpose<perm=[0,2,1,3]>(q)
        bh = Mul(bn, k3)  bh1 = Unsqueeze(bh, zero)  t3 = Concat<axis=0>(bh1, s1, five)  m = Reshape(qt, t3)  r = Relu(m)
        t4 = Concat<axis=0>(b1, three, s1, five)  m4 = Reshape(r, t4)  mt = Transpose<perm=[0,2,1,3]>(m4)
        t2 = Concat<axis=0>(b1, s1, fifteen)  j = Reshape(mt, t2)""",
    "scaled by a size that goes": """t = Concat<axis=0>(b1, s1, three, five)  q = Reshape(h, t)  w = Gather(n, i2)
        f = Cast<to=1>(w)  e = Sqrt(f)  r = Div(q, e)  t2 = Concat<axis=0>(b1, s1, fifteen)  j = Reshape(r, t2)""",
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_sizes(name: str) -> None:
    proto = graphs.parse(HEADS.format(COMPUTED[name]), HEAD_WEIGHTS)
    assert graphs.sizes(proto) == [("heads", 3)]
    pruned = graphs.prove(proto, {"b": 2, "s": 4})
    assert oracle.run(pruned, graphs.feeds_of(proto, {"b": 5, "s": 3}))[0].shape == (5, 3, 7)


def test_a_number_that_depends_on_both_is_refused() -> None:
    """A mean over everything, written as a product with 1 / (b s n), cannot keep its value for all inputs."""
    text = """f (float[b, 6] x) => (float[b, 7] y) { h = MatMul(x, w1)  n = Size(h)  f = Cast<to=1>(n)  r = Div(h, f)  y = MatMul(r, w2) }"""
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 7)})
    assert graphs.sizes(proto) == []
    assert "depends on this size" in graphs.reasons(proto)


SAID = """f (float[b, s, 6] x) => (float[b, s, 9] y, {1}) {{ u = MatMul(x, w1)  h = Relu(u)  z = MatMul(h, w2)
    {0}  v = MatMul(z, w3)  r = Relu(v)  y = MatMul(r, w4) }}"""
SAYING: Weights = {"w1": (6, 11), "w2": (11, 7), "w3": (7, 13), "w4": (13, 9), "two": ints(2), "zero": ints(0)}


@pytest.mark.parametrize(
    "nodes, output",
    [
        ("o = Shape(h)", "int64[3] o"),
        ("o = Shape<start=2>(h)", "int64[1] o"),
        ("o = Size(h)", "int64 o"),
        ("n = Shape(h)  o = Gather(n, two)", "int64[1] o"),
        ("n = Shape(h)  i = Gather(n, two)  f = Cast<to=1>(i)  o = Sqrt(f)", "float[1] o"),
        ("n = Shape(h)  i = Gather(n, two)  j = Gather(n, zero)  o = Concat<axis=0>(j, i)", "int64[2] o"),
    ],
)
def test_a_size_that_is_handed_out_stays(nodes: str, output: str) -> None:
    proto = graphs.parse(SAID.format(nodes, output), SAYING)
    assert graphs.sizes(proto) == [("ffn", 7), ("ffn", 13)]
    assert "graph output 'o' says this size" in graphs.reasons(proto)
    graphs.prove(proto, {"b": 2, "s": 4})


@pytest.mark.parametrize("nodes", ["n = Shape(h)  o = Gather(n, zero)", "n = Shape<end=2>(h)  o = Slice(n, zero, two)"])
def test_other_sizes_of_what_is_cut_may_be_handed_out(nodes: str) -> None:
    proto = graphs.parse(SAID.format(nodes, "int64[k] o"), SAYING)
    assert graphs.sizes(proto) == [("ffn", 7), ("ffn", 11), ("ffn", 13)]


LOOP = """y = Loop ({}, yes, z) <body = g (int64 i, bool go, float[b, s, 7] a) => (bool on, float[b, s, 7] t) {{
    on = Identity(go)  t = {} }}>"""
SIDES = (
    "<then_branch = g () => (float[b, s, 7] t) { t = Neg(z) }, else_branch = e () => (float[b, s, 7] e1) { e1 = Exp(z) }>"
)


@pytest.mark.parametrize(
    "reader",
    [
        LOOP.format("w", "Tanh(a)"),
        LOOP.format("three", "Mul(a, f)"),
        f"c = Greater(w, eight)  y = If (c) {SIDES}",
        "k = HannWindow(w)  q = ReduceSum<keepdims=0>(k)  y = Mul(z, q)",
    ],
)
def test_a_size_that_an_operator_without_a_rule_reads_stays_what_it_was(reader: str) -> None:
    """It says how often a loop runs, or which branch is taken; or the body of a loop reads it from outside."""
    text = f"""f (float[b, s, 6] x) => (float[b, s, 7] y) {{ u = MatMul(x, w1)  h = Relu(u)  z = MatMul(h, w2)
        n = Shape(h)  w = Gather(n, i2)  f = Cast<to=1>(w)  {reader} }}"""
    numbers: Weights = {"i2": np.asarray(2), "three": np.asarray(3), "eight": np.asarray(8), "yes": np.asarray(True)}
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 7), **numbers})
    assert graphs.sizes(proto) == [("ffn", 11)]
    graphs.prove(proto, {"b": 2, "s": 4})


def test_a_size_of_the_input_too_that_an_operator_without_a_rule_reads_is_refused() -> None:
    text = """f (float[b, 6] x) => (float[b, 7] y) { u = MatMul(x, w1)  h = Relu(u)  z = MatMul(h, w2)
        n = Size(h)  k = HannWindow(n)  q = ReduceSum<keepdims=0>(k)  y = Mul(z, q) }"""
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 7)})
    assert graphs.sizes(proto) == []
    assert "depends on this size" in graphs.reasons(proto)


def test_cutting_twice_or_what_is_pinned_is_a_bug() -> None:
    proto = graphs.parse(
        "f (float[b, 6] x) => (float[b, 7] y) { u = MatMul(x, w1)  h = Relu(u)  y = MatMul(h, w2) }",
        {"w1": (6, 11), "w2": (11, 7)},
    )
    _, state, found = graphs.analyse(proto)
    rewriter = Rewriter(state)
    rewriter.cut({found.groups[0].factor: [0, 1]})
    with pytest.raises(InternalError, match="cut before"):
        rewriter.cut({found.groups[0].factor: [0]})
    axes = state.axes["x"]
    assert axes is not None
    with pytest.raises(InternalError, match="graph input 'x'"):
        rewriter.cut({axes[1]: [0]})


# -- biases ----------------------------------------------------------------------------------------------------------

BEFORE = "f (float[b, 6, 5, 3] x) => (float[b, 7, 5, 3] y) {{ u = Conv(x, w1)  h = Relu(u)  {} }}"
FLAT = "f (float[n, 6] x) => (float[n, 7] y) {{ u = MatMul(x, w1)  h = Relu(u)  {} }}"
CONV: Weights = {"w1": (11, 6, 1, 1), "w2": (7, 11, 1, 1), "b2": (7,)}
DENSE: Weights = {"w1": (6, 11), "w2": (11, 7), "b2": (7,)}
ONES = np.ones(7, np.float32)
PLACES: dict[str, tuple[str, Weights, int, bool]] = {
    "MatMul without": (FLAT.format("y = MatMul(h, w2)"), DENSE, 1, False),
    "MatMul, Add": (FLAT.format("z = MatMul(h, w2)  y = Add(z, b2)"), DENSE, 1, True),
    "MatMul, Add from the left": (FLAT.format("z = MatMul(h, w2)  y = Add(b2, z)"), DENSE, 1, True),
    "MatMul, Add of another": (FLAT.format("z = MatMul(h, w2)  y = Add(z, b2)"), {**DENSE, "b2": (1,)}, 1, False),
    "MatMul, Mul": (FLAT.format("z = MatMul(h, w2)  z1 = Identity(z)  y = Add(z1, b2)"), DENSE, 1, True),
    "Gemm": (FLAT.format("y = Gemm(h, w2, b2)"), DENSE, 1, True),
    "Gemm without": (FLAT.format("y = Gemm(h, w2)"), DENSE, 1, False),
    "Gemm, scaled": (FLAT.format("y = Gemm<alpha=0.5, beta=2.0>(h, w2, b2)"), DENSE, 1, True),
    "Gemm, scaled without": (FLAT.format("y = Gemm<beta=4.0>(h, w2)"), DENSE, 1, False),
    "Gemm, switched off": (FLAT.format("y = Gemm<beta=0.0>(h, w2, b2)"), DENSE, 1, False),
    "Gemm, switched off without": (FLAT.format("y = Gemm<beta=0.0>(h, w2)"), DENSE, 1, False),
    "Gemm, broadcast": (FLAT.format("y = Gemm(h, w2, b2)"), {**DENSE, "b2": (1, 1)}, 1, True),
    "Gemm, variable": (FLAT.format("c = ReduceMean<axes=[1]>(x)  y = Gemm(h, w2, c)"), DENSE, 1, False),
    "Conv": (BEFORE.format("y = Conv(h, w2, b2)"), CONV, 1, True),
    "Conv without": (BEFORE.format("y = Conv(h, w2)"), CONV, 1, False),
    "SkipLayerNormalization": ("f (float[b, s, 6] x) => (float[b, s, 7] y) { u = MatMul(x, w1)  h = Relu(u)  k = MatMul(x, w3)  z = MatMul(h, w2)  v, m, r, y = com.microsoft.SkipLayerNormalization(z, k, g, g, b2) }", {**DENSE, "w3": (6, 7), "g": ONES}, 2, True),
    "SkipLayerNormalization without": ("f (float[b, s, 6] x) => (float[b, s, 7] y) { u = MatMul(x, w1)  h = Relu(u)  k = MatMul(x, w3)  z = MatMul(h, w2)  v, m, r, y = com.microsoft.SkipLayerNormalization(k, z, g, g) }", {**DENSE, "w3": (6, 7), "g": ONES}, 2, True),
    "SkipSimplifiedLayerNormalization without": ("f (float[b, s, 6] x) => (float[b, s, 7] y) { u = MatMul(x, w1)  h = Relu(u)  k = MatMul(x, w3)  z = MatMul(h, w2)  v, m, r, y = com.microsoft.SkipSimplifiedLayerNormalization(z, k, g) }", {**DENSE, "w3": (6, 7), "g": ONES}, 2, True),
    "weight on the left": ("f (float[b, 6, s] x) => (float[b, 7, s] y) { u = MatMul(w1, x)  h = Relu(u)  y = MatMul(w2, h) }", {"w1": (11, 6), "w2": (7, 11)}, 1, False),
    "weight on the left, Add": ("f (float[b, 6, s] x) => (float[b, 7, s] y) { u = MatMul(w1, x)  h = Relu(u)  z = MatMul(w2, h)  y = Add(z, b2) }", {"w1": (11, 6), "w2": (7, 11), "b2": (7, 1)}, 1, False),
    "weight on the left, as many columns": ("f (float[b, 6, 7] x) => (float[b, 7, 7] y) { u = MatMul(w1, x)  h = Relu(u)  z = MatMul(w2, h)  y = Add(z, b2) }", {"w1": (11, 6), "w2": (7, 11), "b2": (7,)}, 1, False),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_bias(name: str) -> None:
    text, weights, axis, folded = PLACES[name]
    proto = graphs.parse(text, weights)
    symbols = {"b": 2, "s": 4, "n": 5}
    model, state, found = graphs.analyse(proto)
    (group,) = found.groups
    (consumer,) = group.consumers
    (use,) = consumer.uses
    assert use.weight.name == "w2"
    delta = np.random.default_rng(5).standard_normal(7)
    before = {node.name for node in model.graph.nodes}
    Rewriter(state).add_bias([use], delta)
    feeds = graphs.feeds_of(proto, symbols)
    (dense,), (moved,) = oracle.run(proto, feeds), oracle.run(model.to_proto(), feeds)
    wanted = dense + use.scale * np.moveaxis(
        np.broadcast_to(delta, (*np.moveaxis(dense, axis, -1).shape[:-1], 7)), -1, axis
    )
    np.testing.assert_allclose(moved, wanted, rtol=1e-4, atol=1e-5)
    added = {node.name for node in model.graph.nodes} - before
    assert not added if folded else len(added) <= 1


def test_bias_into_bias_gelu() -> None:
    text = FLAT.format("z = MatMul(h, w2)  y = com.microsoft.BiasGelu(z, b2)")
    proto = graphs.parse(text, DENSE)
    model, state, found = graphs.analyse(proto)
    (group,) = found.groups
    delta = np.linspace(-1, 1, 7)
    Rewriter(state).add_bias(group.consumers[0].uses, delta)
    moved = constants(model.to_proto())["b2"]
    np.testing.assert_allclose(moved, constants(proto)["b2"] + delta, rtol=1e-6)
    assert len(model.graph.nodes) == 4


def test_bias_of_a_shared_weight_with_a_shared_vector_stays_shared() -> None:
    text = """f (float[b, 6] x) => (float[b, 6] y) { u = MatMul(x, w1)  h = Relu(u)  z = MatMul(h, w2)  v = Add(z, b2)
        u2 = MatMul(v, w1)  h2 = Relu(u2)  z2 = MatMul(h2, w2)  y = Add(z2, b2) }"""
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 6), "b2": (6,)})
    model, state, found = graphs.analyse(proto)
    Rewriter(state).add_bias(found.groups[0].consumers[0].uses, np.arange(6.0))
    after = constants(model.to_proto())
    assert set(after) == {"w1", "w2", "b2"}
    np.testing.assert_allclose(after["b2"], constants(proto)["b2"] + np.arange(6), rtol=1e-6)


def test_bias_of_a_shared_weight_follows_the_scale_of_each_use() -> None:
    text = """f (float[b, 6] x) => (float[b, 6] y) { u = MatMul(x, w1)  h = Relu(u)  v = Gemm<alpha=0.5>(h, w2, b2)
        u2 = MatMul(v, w1)  h2 = Relu(u2)  y = Gemm<alpha=3.0, beta=2.0>(h2, w2, b2) }"""
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 6), "b2": (6,)})
    model, state, found = graphs.analyse(proto)
    Rewriter(state).add_bias(found.groups[0].consumers[0].uses, np.arange(6.0))
    after, before = constants(model.to_proto()), constants(proto)["b2"]
    biases = {n.attrs["alpha"]: after[n.inputs[2].name] for n in model.graph.nodes if n.op == "Gemm"}
    np.testing.assert_allclose(biases[0.5], before + 0.5 * np.arange(6), rtol=1e-6)
    np.testing.assert_allclose(biases[3.0], before + 1.5 * np.arange(6), rtol=1e-6)


@pytest.mark.parametrize("bias, pruned", [("b2", True), ("c", False)])
def test_a_computed_bias_inside_a_fused_activation_is_refused(bias: str, pruned: bool) -> None:
    text = FLAT.format(f"c = ReduceMean<axes=[1]>(x)  y = com.microsoft.GemmFastGelu(h, w2, {bias})")
    _, _, found = graphs.analyse(graphs.parse(text, DENSE))
    assert bool(found.groups) == pruned
    assert any("bias of a fused activation" in r.reason for r in found.refusals) != pruned


@pytest.mark.parametrize("second", ["v = MatMul(h, w2)", "v = Gemm(h, w2)", "v = Gemm(h, w2, c)"])
def test_an_inserted_bias_is_cut_with_the_layer_behind_it(second: str) -> None:
    """In a chain the consumer of one group makes the channels of the next."""
    text = f"f (float[n, 6] x) => (float[n, 7] y) {{ u = MatMul(x, w1)  h = Relu(u)  {second}  k = Tanh(v)  y = MatMul(k, w3) }}"
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 13), "c": (1,), "w3": (13, 7)})
    model, state, found = graphs.analyse(proto)
    first, last = found.groups
    rewriter = Rewriter(state)
    rewriter.add_bias(first.consumers[0].uses, np.linspace(1, 2, 13))
    rewriter.cut({first.factor: [0, 4]})
    feeds = graphs.feeds_of(proto, {"n": 5})
    whole = model.to_proto()
    (w3,) = (i for i in whole.graph.initializer if i.name == "w3")
    value = numpy_helper.to_array(w3).copy()
    value[3:] = 0
    w3.CopyFrom(numpy_helper.from_array(value, "w3"))
    wanted = oracle.run(whole, feeds)
    rewriter.cut({last.factor: [0, 1, 2]})
    assert oracle.difference(oracle.run(model.to_proto(), feeds), wanted) <= 1e-5


LEFT = "f (float[b, 6, s] x) => (float[b, 7, s] y) { u = MatMul(w1, x)  h = Relu(u)  y = MatMul(w2, h) }"


def test_two_biases_behind_one_consumer() -> None:
    """The second goes into the first where it can, also behind a weight on the left; else each addition has its own name."""
    proto = graphs.parse(LEFT, {"w1": (11, 6), "w2": (7, 11)})
    model, state, found = graphs.analyse(proto)
    (use,) = found.groups[0].consumers[0].uses
    rewriter, first, second = Rewriter(state), np.arange(7.0), np.linspace(-1, 1, 7)
    rewriter.add_bias([use], first)
    assert rewriter.has_bias(use)
    rewriter.add_bias([use], second)
    feeds = graphs.feeds_of(proto, {"b": 2, "s": 4})
    moved = model.to_proto()
    wanted = oracle.run(proto, feeds)[0] + (first + second)[:, None]
    np.testing.assert_allclose(oracle.run(moved, feeds)[0], wanted, rtol=1e-4, atol=1e-5)
    assert [n.op_type for n in moved.graph.node] == ["MatMul", "Relu", "MatMul", "Add"]


def test_a_name_that_is_taken_is_not_given_to_an_addition() -> None:
    """Two additions behind one node: something else reads what is between them."""
    text = """f (float[b, 6] x) => (float[b, 7] y, float[b, 7] z) { u = MatMul(x, w1)  h = Relu(u)  y = MatMul(h, w2)
        z = Sigmoid(y) }"""
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 7)})
    model, state, found = graphs.analyse(proto)
    (use,) = found.groups[0].consumers[0].uses
    rewriter = Rewriter(state)
    for _ in range(2):
        rewriter.add_bias([use], np.ones(7))
        output = use.node.outputs[0]
        rewriter.walk.model.graph.outputs.append(output)  # now nothing may be folded into what is added to it
    names = [n.name for n in model.graph.nodes]
    assert len(set(names)) == len(names) and sum(n.op == "Add" for n in model.graph.nodes) == 2


def test_a_bias_of_one_number_becomes_a_vector_that_later_cuts_follow() -> None:
    """A Gemm adds one number, as a matrix [1, 1], to the channels of the next group; it becomes [1, 13] and is cut with them."""
    text = """f (float[b, 6] x) => (float[b, 7] y) { u = MatMul(x, w1)  h = Relu(u)  v = Gemm(h, w2, one)  r = Relu(v)
        y = MatMul(r, w3) }"""
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 13), "one": (1, 1), "w3": (13, 7)})
    model, state, found = graphs.analyse(proto)
    first, second = found.groups
    rewriter = Rewriter(state)
    rewriter.add_bias(first.consumers[0].uses, np.arange(13.0))
    rewriter.cut({second.factor: [0, 5, 12]})
    (gemm,) = (n for n in model.graph.nodes if n.op == "Gemm")
    np.testing.assert_allclose(gemm.inputs[2].values, constants(proto)["one"] + np.asarray([[0.0, 5.0, 12.0]]), rtol=1e-6)


def test_a_weight_that_is_an_output_keeps_its_value_there() -> None:
    text = "f (float[b, 6] x) => (float[b, 7] y, float[11, 7] w2) { u = MatMul(x, w1)  h = Relu(u)  y = MatMul(h, w2) }"
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 7)})
    model, state, _ = graphs.analyse(proto)
    rewriter = Rewriter(state)
    node = next(n for n in model.graph.nodes if n.outputs[0].name == "y")
    new = rewriter.set_constant([(node, 1)], np.zeros((11, 7), np.float32))
    assert new.name != "w2"
    out = model.to_proto()
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in out.graph.initializer}
    np.testing.assert_array_equal(stored["w2"], onnx.numpy_helper.to_array(proto.graph.initializer[1]))
    assert model.parameters() == sum(v.size for v in stored.values())
