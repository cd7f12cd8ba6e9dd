# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Which widths may change their basis: those with nothing but token mixing on their way, on both sides of a product."""

from __future__ import annotations

import graphs
import numpy as np
import pytest

from liar_opt.passes.find_groups import Found

# 3 heads of 4 channels, hidden 10; {} stand for something done to values, to queries, and to the scores.
ATTENTION = """f (float[b, s, 10] x) => (float[b, s, 10] y) {{
    p2 = MatMul(x, w)  p3 = Add(p2, bias)  q, k, v = Split<axis=-1>(p3, n)
    q4 = Reshape(q, split)  k4 = Reshape(k, split)  v4 = Reshape(v, split)  {}
    qt = Transpose<perm=[0,2,1,3]>(q5)  kt = Transpose<perm=[0,2,3,1]>(k4)  vt = Transpose<perm=[0,2,1,3]>(v5)
    a = MatMul(qt, kt)  p = Softmax(a)  c = MatMul(p, vt)
    ct = Transpose<perm=[0,2,1,3]>(c)  j = Reshape(ct, join)  y = MatMul(j, wo) }}"""
PLAIN = "q5 = Identity(q4)", "v5 = Identity(v4)"


def found(queries: str, values: str, **more: np.ndarray | tuple[int, ...]) -> Found:
    ints = {"n": [12, 12, 12], "split": [0, 0, 3, 4], "join": [0, 0, 12]}
    weights: dict[str, tuple[int, ...] | np.ndarray] = {k: np.asarray(v, np.int64) for k, v in ints.items()}
    weights |= {"w": (10, 36), "bias": (36,), "wo": (12, 10), "eight": np.asarray(8.0, np.float32), **more}
    return graphs.analyse(graphs.parse(ATTENTION.format(f"{queries}  {values}"), weights))[2]


def test_a_packed_projection_gives_each_its_part() -> None:
    result = found(*PLAIN)
    (values,), (queries,) = result.values, result.queries
    assert values.bent is None and not result.whole
    assert (queries.size, queries.sets, queries.parameters) == (4, 3, 240 + 24)
    for operand, part in zip(queries.operands, range(2), strict=True):
        assert (operand.activation.name, operand.activation_axis) == ("qk"[part], 2)
        assert [(s.use.constant.name, s.axis) for s in operand.sources] == [("w", 1), ("bias", 0)]
        for source in operand.sources:
            assert np.flatnonzero(source.inside).tolist() == list(range(12 * part, 12 * part + 12))
    assert [o.relative for o in queries.operands] == [False, True]


@pytest.mark.parametrize("scaled", ["{1} = Mul({0}, eight)", "{1} = Div({0}, eight)"])
def test_a_factor_without_the_width_stays_linear(scaled: str) -> None:
    result = found(scaled.format("q4", "q5"), scaled.format("v4", "v5"))
    assert len(result.queries) == 1 and result.values[0].bent is None
    # One for each token is linear, too; but it changes what is measured where heads and width are side by side.
    gate = "g = ReduceMean<axes=[2]>(x)  g4 = Unsqueeze(g, a2)  {1} = Mul({0}, g4)"
    assert found(PLAIN[0], gate.format("v4", "v5"), a2=np.asarray([2])).values[0].bent is None
    result = found(gate.format("q4", "q5"), PLAIN[1], a2=np.asarray([2]))
    assert not result.queries and "never side by side" in result.whole[0].reason


BETWEEN = {
    "Relu": ("{1} = Relu({0})", "is not linear"),
    "a scale of each channel": ("{1} = Mul({0}, each)", "scales each channel by its own"),
    "a gate": ("g = Sigmoid({0})  {1} = Mul({0}, g)", "is not linear|scales each channel by its own"),
    "something over it": ("{1} = Div(eight, {0})", "scales each channel by its own"),
    "a number for all": ("{1} = Add({0}, eight)", "adds the same to all channels"),
    "a choice": ("t = Greater({0}, eight)  {1} = Where(t, {0}, eight)", "is not linear"),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_treats_channels_differently_bends(name: str) -> None:
    between, reason = BETWEEN[name]
    weights = {"each": (4,)}
    (values,) = found(PLAIN[0], between.format("v4", "v5"), **weights).values
    assert _matches(reason, values.bent)
    result = found(between.format("q4", "q5"), PLAIN[1], **weights)
    assert not result.queries and _matches(reason, result.whole[0].reason)


def _matches(reason: str, text: str | None) -> bool:
    assert text is not None
    return any(part in text for part in reason.split("|"))


def test_rotary_embedding_and_normalisation_keep_queries_whole() -> None:
    turned = "qa, qb = Split<axis=-1>(q4, two)  qm = Neg(qb)  qr = Concat<axis=-1>(qm, qa)  q5 = Mul(qr, eight)"
    result = found(turned, PLAIN[1], two=np.asarray([2, 2]))
    assert not result.queries and len(result.values) == 1
    normed = "q5 = LayerNormalization<axis=-1>(q4, each)"
    result = found(normed, PLAIN[1], each=(4,))
    assert not result.queries and "LayerNormalization runs over it" in result.whole[0].reason


def test_keys_that_something_else_reads_stay_whole() -> None:
    text = ATTENTION.format("  ".join(PLAIN)).replace("y = MatMul(j, wo)", "r = Relu(k4)  z = MatMul(j, wo)  m = ReduceMean<axes=[2,3]>(r)  u = Unsqueeze(m, a2)  y = Add(z, u)")  # fmt: skip
    ints = {"n": [12, 12, 12], "split": [0, 0, 3, 4], "join": [0, 0, 12], "a2": [2]}
    weights: dict[str, tuple[int, ...] | np.ndarray] = {k: np.asarray(v, np.int64) for k, v in ints.items()}
    result = graphs.analyse(graphs.parse(text, {**weights, "w": (10, 36), "bias": (36,), "wo": (12, 10)}))[2]
    assert not result.queries and result.whole


@pytest.mark.parametrize("scaled, relative", [("a2 = Mul(a, eight)", True), ("a2 = Div(a, each)", True), ("g = ReduceMean<axes=[2], keepdims=0>(x)  g4 = Unsqueeze(g, axes)  a2 = Mul(a, g4)", False)])  # fmt: skip
def test_keys_are_relative_unless_each_is_scaled_by_its_own(scaled: str, relative: bool) -> None:
    """What all keys share adds one number to the logits of a query, but not where each key has a factor of its own."""
    text = ATTENTION.format("  ".join(PLAIN)).replace("p = Softmax(a)", f"{scaled}  p = Softmax(a2)")
    ints = {"n": [12, 12, 12], "split": [0, 0, 3, 4], "join": [0, 0, 12], "axes": [1, 2]}
    weights: dict[str, tuple[int, ...] | np.ndarray] = {k: np.asarray(v, np.int64) for k, v in ints.items()}
    weights |= {"w": (10, 36), "bias": (36,), "wo": (12, 10), "eight": np.asarray(8.0, np.float32), "each": (3, 1, 1)}
    (queries,) = graphs.analyse(graphs.parse(text, weights))[2].queries
    assert [o.relative for o in queries.operands] == [False, relative]
