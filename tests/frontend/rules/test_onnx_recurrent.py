# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Operators that go over a sequence: what they read and their hidden units go exactly, what is behind is found."""

from __future__ import annotations

import graphs
import numpy as np
import onnx
import onnx.reference
import oracle
import pytest
from graphs import Weights

from liar_opt import inspect, prune

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
H, N = 5, 11  # hidden units, channels that are read
SIZES = ({"b": 2, "s": 3}, {"b": 1, "s": 7}, {"b": 3, "s": 1})


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def weights(op: str, directions: int = 1, **more: tuple[int, ...] | np.ndarray | np.generic) -> Weights:
    gates = GATES[op]
    own: Weights = {"w": (directions, gates * H, N), "r": (directions, gates * H, H), "bias": (directions, 2 * gates * H)}
    join = ints(0, 0, -1)
    return {"w1": (6, N), **own, "w2": (directions * H, 13), "w3": (13, 7), "one": ints(1), "join": join, **more}


def sequence(call: str, outputs: str = "y0") -> str:
    """A recurrent operator between matrix products; Y [s, directions, b, h] is joined to [s, b, directions * h]."""
    return f"""f (float[s, b, 6] x) => (float[s, b, 7] y) {{ u = MatMul(x, w1)  v = Relu(u)  {outputs} = {call}
        t = Transpose<perm=[0, 2, 1, 3]>(y0)  j = Reshape(t, join)  q = MatMul(j, w2)  e = Relu(q)  y = MatMul(e, w3) }}"""


ALL = [("ffn", 13), ("recurrent", H), ("recurrent", N)]
PINNED = [("ffn", 13), ("recurrent", N)]


def found(proto: onnx.ModelProto) -> list[tuple[str, int]]:
    """Returns (kind, size) of the groups, those among them that are cut when asked for alone, sorted."""
    groups = graphs.analyse(proto)[2]
    return sorted((g.kind, g.size) for g in (*groups.groups, *groups.values))


MATCH: dict[str, tuple[str, Weights, list[tuple[str, int]]]] = {
    **{
        f"{op}, {direction}": (
            sequence(f'{op}<hidden_size={H}, direction="{direction}"{extra}>(v, w, r, bias)'),
            weights(op, 1 + (direction == "bidirectional")),
            ALL,
        )
        for op, extra in (("RNN", ""), ("GRU", ", linear_before_reset=1"), ("LSTM", ""))
        for direction in ("forward", "reverse", "bidirectional")
    },
    "GRU that resets before the product": (sequence(f"GRU<hidden_size={H}>(v, w, r, bias)"), weights("GRU"), PINNED),
    "no bias": (sequence(f"LSTM<hidden_size={H}>(v, w, r)"), weights("LSTM"), ALL),
    "clipped, gates coupled, other activations": (
        sequence(
            f'LSTM<hidden_size={H}, clip=0.5, input_forget=1, activations=["HardSigmoid", "Relu", "Tanh"]>(v, w, r, bias)'
        ),
        weights("LSTM"),
        ALL,
    ),
    "peepholes and states": (
        sequence(f"LSTM<hidden_size={H}>(v, w, r, bias, , h0, c0, p)").replace("s, b, ", "s, 2, "),
        weights("LSTM", h0=(1, 2, H), c0=(1, 2, H), p=(1, 3 * H)),
        ALL,
    ),
    "lengths": (
        sequence(f"RNN<hidden_size={H}>(v, w, r, bias, lengths)").replace("s, b, ", "s, 2, "),
        weights("RNN", lengths=np.asarray([1, 1], np.int32)),
        ALL,
    ),
    "two layers, the second begins where the first ends": (
        sequence(f"LSTM<hidden_size={H}>(v, w, r, bias)", "a, h, c").replace(
            "t = Tr", f"a1 = Squeeze(a, one)  y0 = LSTM<hidden_size={H}>(a1, wb, rb, , , h, c)  t = Tr"
        ),
        weights("LSTM", wb=(1, 4 * H, H), rb=(1, 4 * H, H)),
        ALL,
    ),
    "the last state is read, too": (
        f"""f (float[s, b, 6] x) => (float[b, 7] y, float[s, b, 7] z) {{ u = MatMul(x, w1)  v = Relu(u)
            y0, yh, yc = LSTM<hidden_size={H}>(v, w, r, bias)  h = Squeeze(yh, nought)  q = MatMul(h, w2)  e = Relu(q)
            y = MatMul(e, w3)  a = Squeeze(y0, one)  c = MatMul(a, w2)  z = MatMul(c, w3) }}""",
        weights("LSTM", nought=ints(0)),
        ALL,
    ),
}


@pytest.mark.parametrize("name", MATCH)
def test_match(name: str) -> None:
    text, values, expected = MATCH[name]
    proto = graphs.parse(text, values, 17)
    assert found(proto) == sorted(expected)
    for sizes in SIZES:
        graphs.prove(proto, sizes, seeds=2, values=True)


def test_units_go_from_all_that_is_theirs() -> None:
    text, values, _ = MATCH["peepholes and states"]
    proto = graphs.parse(text, values, 17)
    model, state, groups = graphs.analyse(proto)
    kept = {g.name + g.kind: [0, 3] if g.size == H else list(range(g.size)) for g in (*groups.groups, *groups.values)}
    pruned = oracle.prune(model, state, oracle.with_values(groups), kept)
    dims = {t.name: list(t.dims) for t in pruned.graph.initializer}
    assert (dims["w"], dims["r"], dims["bias"], dims["p"]) == ([1, 8, N], [1, 8, 2], [1, 16], [1, 6])
    assert dims["h0"] == dims["c0"] == [1, 2, 2] and dims["w2"] == [2, 13]
    (node,) = (n for n in pruned.graph.node if n.op_type == "LSTM")
    assert {a.name: a.i for a in node.attribute} == {"hidden_size": 2}
    old = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    new = {t.name: onnx.numpy_helper.to_array(t) for t in pruned.graph.initializer}
    rows = [gate * H + i for gate in range(4) for i in (0, 3)]
    np.testing.assert_array_equal(new["r"], old["r"][:, rows][:, :, [0, 3]])


@pytest.mark.parametrize("op", GATES)
def test_batch_first(op: str) -> None:
    """Layout 1, which ONNX Runtime has not: shapes alone."""
    proto = graphs.parse(
        f"""f (float[b, s, 6] x) => (float[b, s, 7] y) {{ u = MatMul(x, w1)  v = Relu(u)
            y0 = {op}<hidden_size={H}, layout=1, direction="bidirectional">(v, w, r, bias)
            j = Reshape(y0, join)  q = MatMul(j, w2)  e = Relu(q)  y = MatMul(e, w3) }}""",
        weights(op, 2),
        17,
    )
    assert found(proto) == (PINNED if op == "GRU" else ALL)


NEAR_MISS = {
    "a state is an output": (
        sequence(f"LSTM<hidden_size={H}>(v, w, r, bias)", "y0, yh").replace("7] y)", f"7] y, float[1, b, {H}] yh)"),
        weights("LSTM"),
        "axis of graph output 'yh'",
    ),
    "only the last state is made": (
        f"""f (float[s, b, 6] x) => (float[b, 7] y) {{ u = MatMul(x, w1)  v = Relu(u)
            , yh = RNN<hidden_size={H}>(v, w, r, bias)  h = Squeeze(yh, nought)  q = MatMul(h, w2)  e = Relu(q)
            y = MatMul(e, w3) }}""",
        weights("RNN", nought=ints(0)),
        "contracted at the next step of RNN",
    ),
    "a weight that is computed": (
        sequence(f"RNN<hidden_size={H}>(v, w, rn, bias)").replace(
            "v = Relu(u)", "v = Relu(u)  m = ReduceMean<keepdims=0>(x)  rn = Mul(r, m)"
        ),
        weights("RNN"),
        "contracted at the next step of RNN",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISS)
def test_units_that_stay(name: str) -> None:
    text, values, reason = NEAR_MISS[name]
    proto = graphs.parse(text, values, 17)
    assert ("recurrent", H) not in found(proto) and ("recurrent", N) in found(proto)
    assert reason in graphs.reasons(proto)
    graphs.prove(proto, SIZES[0], seeds=2, values=True)


def test_states_of_zeros_tie_no_layers() -> None:
    """Exporters make one tensor of zeros for all layers; without it each layer has units of its own."""
    text = f"""f (float[s, b, 6] x) => (float[s, b, 7] y) {{ u = MatMul(x, w1)  v = Relu(u)  n = Shape(v)  m = Slice(n, one, two)
        k = Concat<axis=0>(two, m, h)  z = ConstantOfShape(k)  z0 = Slice(z, nought, one, nought)  z1 = Slice(z, one, two, nought)
        a = LSTM<hidden_size={H}>(v, w, r, bias, , z0, z0)  a1 = Squeeze(a, one)
        y0 = LSTM<hidden_size={H}>(a1, wb, rb, , , z1, z1)  t = Squeeze(y0, one)  q = MatMul(t, w2)  e = Relu(q)
        y = MatMul(e, w3) }}"""
    own: Weights = {"h": ints(H), "two": ints(2), "nought": ints(0), "wb": (1, 4 * H, H), "rb": (1, 4 * H, H)}
    proto = graphs.parse(text, {**weights("LSTM"), **own}, 17)
    assert found(proto) == sorted([*ALL, ("recurrent", H)])
    pruned = graphs.prove(proto, SIZES[0], values=True)
    assert not any(n.op_type == "ConstantOfShape" for n in pruned.graph.node)


@pytest.mark.parametrize("repair", ["none", "liar"])
def test_pruned_through_the_pipeline(repair: str) -> None:
    proto = graphs.parse(*MATCH["LSTM, bidirectional"][:2], 17)
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((7, 4, 6)).astype(np.float32)} for _ in range(24)]
    report = prune(proto, feeds, sparsity=0.4, recurrent=0.4, repair=repair, multiple_of=1, latency=False).report
    assert {g["kind"] for g in report["groups"] if g["after"] < g["before"]} == {"ffn", "recurrent"}
    assert report["verification"]["exact_difference"] < 1e-4


def test_recurrent_operators_stay_whole_unless_asked_for() -> None:
    proto = graphs.parse(*MATCH["GRU, forward"][:2], 17)
    feeds = {"x": np.random.default_rng(0).standard_normal((7, 4, 6)).astype(np.float32)}
    pruned = prune(proto, [feeds], ffn=0.5, multiple_of=1, latency=False)
    dims = {t.name: list(t.dims) for t in pruned.model.graph.initializer}
    assert (dims["w1"], dims["r"], dims["w2"]) == ([6, N], [1, 3 * H, H], [H, 7])
    assert {g["kind"] for g in inspect(proto).report["values"]} == {"recurrent"}


CAUSAL = "f (float[b, 6, s] x) => (float[b, 7, s] y{}) {{ u = MatMul(w1, x)  {}  y = MatMul(w2, h) }}"


@pytest.mark.parametrize(
    ("ends", "call", "expected"),
    [
        ("", 'h, c = com.microsoft.CausalConvWithState<activation="silu">(u, k, bias)', [("ffn", N)]),
        ("", "v, c = com.microsoft.CausalConvWithState(u, k)  h = Relu(v)", [("ffn", N)]),
        (f", float[b, {N}, 2] state", "h, state = com.microsoft.CausalConvWithState(u, k, bias)", []),
    ],
    ids=["bias", "no bias", "its state is an output"],
)
def test_causal_convolution(ends: str, call: str, expected: list[tuple[str, int]]) -> None:
    proto = graphs.parse(CAUSAL.format(ends, call), {"w1": (N, 6), "k": (N, 1, 3), "bias": (N,), "w2": (7, N)}, 17)
    assert graphs.sizes(proto) == expected
    if expected:
        for sizes in SIZES:
            graphs.prove(proto, sizes)
