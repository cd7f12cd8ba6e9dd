# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Numbers that say sizes: only operands of their arithmetic follow a cut, and every element is right for inputs of any size."""

from __future__ import annotations

import graphs
import numpy as np
import onnx
import pytest
from graphs import Weights

from liar_opt.frontend.rewrite import Rewriter
from liar_opt.frontend.size_sources import Probe, counterparts, is_written, operands


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


# 3 heads of 5 channels, laid out as [b, s, 3, 5] and back; {} makes the targets t and, of the way back, t2. h is [b, s, 15].
HEADS = """f (float[b, s, 6] x) => (float[b, s, 7] y) {{ h = MatMul(x, w1)  n = Shape(h)
    bn = Gather(n, i0)  sn = Gather(n, i1)  wn = Gather(n, i2)  b1 = Slice(n, i0, i1, i0)  s1 = Slice(n, i1, i2, i0)
    {}
    q = Reshape(h, t)  q4 = Transpose<perm=[0,2,1,3]>(q)  {}  r = Relu(m)  {}  o4 = Transpose<perm=[0,2,1,3]>(m4)
    {}  j = Reshape(o4, t2)  y = MatMul(j, o) }}"""
PLAIN = (
    "t = Concat<axis=0>(b1, s1, i3, i5)",
    "m = Identity(q4)",
    "m4 = Identity(r)",
    "t2 = Concat<axis=0>(b1, s1, i15)",
)
NUMBERS: Weights = {
    "w1": (6, 15), "o": (15, 7), **{f"i{n}": ints(n) for n in (0, 1, 2, 3, 4, 5, 6, 15)}, "none": ints(-1),
    "ones": ints(1, 1, 1, 1), "three": np.asarray(3), "five": np.asarray(5), "n3": np.asarray(3), "zero": ints(0),
    "three32": np.asarray([3], np.int32),
}  # fmt: skip
# Which of the four parts are written otherwise, by place.
COMPUTED: dict[str, dict[int, str]] = {
    "an index that equals the heads": {
        1: "z = Shape(q4)  z0 = Gather(z, i0)  bh = Mul(z0, i3)  d = Gather(z, i3)  t3 = Concat<axis=0>(bh, none, d)  m = Reshape(q4, t3)",
        2: "t4 = Concat<axis=0>(b1, i3, none, i5)  m4 = Reshape(r, t4)",
    },
    "a bound that equals the heads": {
        1: "z = Shape(q4)  z0 = Gather(z, i0)  bh = Mul(i3, z0)  d = Slice(z, i3, i4, i0)  t3 = Concat<axis=0>(bh, none, d)  m = Reshape(q4, t3)",
        2: "t4 = Concat<axis=0>(b1, i3, none, i5)  m4 = Reshape(r, t4)",
    },
    "heads times batch, in pieces": {
        1: "p = Concat<axis=0>(b1, i3)  bh = ReduceProd(p)  t3 = Concat<axis=0>(bh, s1, i5)  m = Reshape(q4, t3)",
        2: "e = Shape(r)  e0 = Gather(e, i0)  e3 = Div(e0, i3)  t4 = Concat<axis=0>(e3, i3, s1, i5)  m4 = Reshape(r, t4)",
    },
    "a factor that is cast": {
        1: "k = Cast<to=7>(three32)  bh = Mul(b1, k)  t3 = Concat<axis=0>(bh, s1, i5)  m = Reshape(q4, t3)",
        2: "t4 = Concat<axis=0>(b1, k, s1, i5)  m4 = Reshape(r, t4)",
    },
    "a choice between sizes": {
        0: "t0 = Concat<axis=0>(b1, s1, none, i5)  c = Equal(t0, none)  u = Concat<axis=0>(b1, s1, i3, i5)  t = Where(c, u, t0)",
    },
    "a vector of sizes times a vector": {
        1: "v = Concat<axis=0>(b1, s1, i5)  f = Concat<axis=0>(i3, i1, i1)  t3 = Mul(v, f)  m = Reshape(q4, t3)",
        2: "t4 = Concat<axis=0>(b1, i3, s1, i5)  m4 = Reshape(r, t4)",
    },
    "a sum of sizes": {
        1: "w9 = Add(i5, wn9)  bh = Mul(w9, b1)  w8 = Sub(bh, b1)  t3 = Concat<axis=0>(w8, s1, i5)  m = Reshape(q4, t3)",
        2: "t4 = Concat<axis=0>(b1, i3, s1, i5)  m4 = Reshape(r, t4)",
    },
    "arithmetic that is not followed, beside nothing open": {
        1: "f = Cast<to=1>(b1)  e = Exp(f)  l = Log(e)  g = Mul(l, lb)  k = Cast<to=7>(g)  t3 = Concat<axis=0>(none, s1, i5)  m = Reshape(q4, t3)",
        2: "t4 = Concat<axis=0>(b1, i3, s1, i5)  m4 = Reshape(r, t4)",
    },
    "a product by a power": {
        1: "b2 = Pow(b1, i1)  bh = Mul(b2, i3)  t3 = Concat<axis=0>(bh, s1, i5)  m = Reshape(q4, t3)",
        2: "t4 = Concat<axis=0>(b1, i3, s1, i5)  m4 = Reshape(r, t4)",
    },
    "a size by a remainder, so that what is left must say it": {
        1: "big = Mul(b1, i15)  bh0 = Mod(big, far)  bh = Div(bh0, i5)  t3 = Concat<axis=0>(bh, s1, i5)  m = Reshape(q4, t3)",
        2: "t4 = Concat<axis=0>(b1, i3, s1, i5)  m4 = Reshape(r, t4)",
    },
    "a width divided by all heads": {0: "d = Div(wn, i3)  t = Concat<axis=0>(b1, s1, i3, d)"},
    "a way back that copies": {3: "t2 = Concat<axis=0>(zero, zero, none)"},
    "heads and width left open": {0: "t = Concat<axis=0>(b1, s1, none, i5)", 3: "z = Shape(o4)  z2 = Gather(z, i2)  z3 = Gather(z, i3)  zz = Mul(z2, z3)  t2 = Concat<axis=0>(zero, zero, zz)"},
}  # fmt: skip
MORE: Weights = {"wn9": ints(-1), "lb": np.asarray([1.0], np.float32), "far": ints(10**6)}


def graph(parts: dict[int, str]) -> onnx.ModelProto:
    return graphs.parse(HEADS.format(*(parts.get(i, plain) for i, plain in enumerate(PLAIN))), {**NUMBERS, **MORE})


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_sizes_hold_for_any_input(name: str) -> None:
    """As many tokens as channels or heads are among the sizes: a wrong target may have the right product there alone."""
    proto = graph(COMPUTED[name])
    assert ("heads", 3) in graphs.sizes(proto), graphs.reasons(proto)
    for b, s in ((1, 1), (2, 5), (3, 2), (2, 3), (5, 7), (1, 15)):
        graphs.prove(proto, {"b": b, "s": s}, seeds=2)


ONES = """f (float[b, s, 6] x) => (float[b, s, 7] y) { h = MatMul(x, w1)  n = Shape(h)  w = Gather(n, two)  d = Div(w, six)
    t = Concat<axis=0>(zero, zero, six, d)  q = Reshape(h, t)  v = Relu(q)  j = Reshape(v, back)  y = MatMul(j, w2) }"""


def test_a_computed_zero_is_a_size() -> None:
    """6 heads of width 1, of which 4 stay: 4 / 6 is 0, which is no axis to copy."""
    weights: Weights = {"w1": (6, 6), "w2": (6, 7), "two": ints(2), "six": ints(6), "zero": ints(0), "back": ints(0, 0, -1)}
    proto = graphs.parse(ONES, weights)
    assert graphs.sizes(proto) == [("ffn", 6)]
    graphs.prove(proto, {"b": 2, "s": 4})
    model, state, found = graphs.analyse(proto)
    rewriter = Rewriter(state)
    rewriter.cut({found.groups[0].factor: range(4)})
    (reshape,) = (n for n in model.graph.nodes if n.op == "Reshape" and n.outputs[0].name == "q")
    for probe in rewriter._probes:
        target = probe.evaluate(reshape.inputs[1], {})
        assert target is not None and target.tolist() == [0, 0, 4, 1]


UNFOLLOWED = {
    "a root of a square": "f = Cast<to=1>(bh0)  g = Mul(f, f)  e = Sqrt(g)  bh = Cast<to=7>(e)",
    "a remainder": "big = Add(bh0, far)  bh = Mod(big, far)",
}


@pytest.mark.parametrize("name", UNFOLLOWED)
def test_what_cannot_be_shown_is_left_alone_with_a_reason(name: str) -> None:
    """The length is left open, so that heads times batch cannot be what is left."""
    to = f"bh0 = Mul(b1, i3)  {UNFOLLOWED[name]}  t3 = Concat<axis=0>(bh, none, i5)  m = Reshape(q4, t3)"
    proto = graph({1: to, 2: "t4 = Concat<axis=0>(b1, i3, s1, i5)  m4 = Reshape(r, t4)"})
    assert graphs.sizes(proto) == []
    assert "is computed in a way that cannot be followed" in graphs.reasons(proto)


def test_an_expanded_axis_of_one_is_no_size_that_has_followed() -> None:
    """2 of 3 groups go, and the number of repeats, computed as groups - 2, is 1 of 3 by chance: it is written instead."""
    text = """f (float[b, s, 6] x) => (float[b, s, 7] y) { h = MatMul(x, w1)  q = Reshape(h, t)  n = Shape(q)  k = Gather(n, two)
        k2 = Concat<axis=0>(zero1, zero1, k, one, five)  u = Unsqueeze(q, three)  e = Expand(u, ex)  r = Relu(e)  j = Reshape(r, back)  y = MatMul(j, o) }"""
    weights: Weights = {
        "w1": (6, 15), "o": (30, 7), "t": ints(0, 0, 3, 5), "two": ints(2), "three": ints(3), "one": ints(1), "five": ints(5),
        "zero1": ints(1), "ex": ints(1, 1, 3, 2, 5), "back": ints(0, 0, -1),
    }  # fmt: skip
    proto = graphs.parse(text, weights)
    assert ("heads", 3) in graphs.sizes(proto)
    graphs.prove(proto, {"b": 2, "s": 4})


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_probes_share_no_size_and_find_the_same_leaf() -> None:
    _, state, found = graphs.analyse(graph({}))
    (other,) = state.others
    assert set(state.symbols) == set(other.symbols) == {"b", "s"}
    assert not set(state.symbols.values()) & set(other.symbols.values())
    (group,) = found.groups
    leaf = counterparts(state, other)(group.factor)
    assert leaf is not None and other.algebra.size(leaf) == 3
    first, second = Probe(state), Probe(other)
    first.kept[group.factor] = second.kept[leaf] = np.asarray([True, False, True])
    assert [first.size(f) for f in state.axes["h"] or ()] == [*(state.symbols[k] for k in "bs"), 10]
    assert [second.size(f) for f in other.axes["h"] or ()] == [*(other.symbols[k] for k in "bs"), 10]


def test_what_is_written_and_what_is_computed() -> None:
    model, state, _ = graphs.analyse(graph(COMPUTED["a width divided by all heads"]))
    tensors = model.graph.tensors()
    assert [is_written(Probe(state), tensors["t"], e) for e in range(4)] == [False, False, True, False]
    assert is_written(Probe(state), tensors["i3"], 0)


def test_operands_are_those_of_arithmetic() -> None:
    model, state, _ = graphs.analyse(graph(COMPUTED["an index that equals the heads"]))
    probes = [Probe(state), Probe(state.others[0])]
    target = model.graph.tensors()["t3"]
    batches = [p.walk.symbols["b"] for p in probes]
    found = operands(probes, target, {0: tuple(2 * b for b in batches)})
    assert found is not None
    ((place, value),) = found.items()
    (product,) = (n for n in model.graph.nodes if n.op == "Mul")
    assert place == (id(product), 1) and value.tolist() == [2]
    # No constant factor makes these of the batch, and no index or axis is one.
    assert operands(probes, target, {0: (2 * batches[0], 3 * batches[1])}) is None
    assert operands(probes, target, {2: (4, 6)}) is None
