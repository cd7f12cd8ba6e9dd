"""A change of basis alone changes nothing: values and their consumer, queries and keys, under any invertible matrices."""

from __future__ import annotations

import graphs
import numpy as np
import onnx
import oracle
import pytest
from graphs import Weights

from liar_opt.frontend.rewrite import Rewriter
from liar_opt.passes.change_basis import BasisChange, basis_of

# 3 heads of 4 channels, hidden 10; {} stand for how values, queries and keys are made, and what is done with them.
ATTENTION = """f (float[b, s, 10] x) => (float[b, s, 10] y) {{ {made}
    qt = Transpose<perm=[{to}]>(q4)  kt = Transpose<perm=[{across}]>(k4)  vt = Transpose<perm=[{to}]>(v4)
    a = MatMul(qt, kt)  {soft}  c = MatMul(p, vt)
    ct = Transpose<perm=[{back}]>(c)  j = Reshape(ct, join)  y = MatMul(j, wo) }}"""
HEADS_OUTSIDE = {"to": "0,2,1,3", "across": "0,2,3,1", "back": "0,2,1,3"}
HEADS_INSIDE = {"to": "0,3,1,2", "across": "0,3,2,1", "back": "0,2,3,1"}
EACH_TOKEN = {"to": "0,1,2,3", "across": "0,1,3,2", "back": "0,1,2,3"}
SOFTMAX = "p = Softmax<axis={}>(a)"
PLAIN = "{0}p = MatMul(x, w{0})  {0}b = Add({0}p, b{0})  {0}4 = Reshape({0}b, split)"
GEMM = "{0}x = Reshape(x, rows)  {0}p = Gemm({0}x, w{0}, b{0})  {0}4 = Reshape({0}p, split3)"
WEIGHTS: Weights = {
    **{f"w{n}": (10, 12) for n in "qkv"}, "wo": (12, 10),
    "join": np.asarray([0, 0, 12]), "rows": np.asarray([-1, 10]),
}  # fmt: skip


def attention(
    made: str = PLAIN, layout: dict[str, str] = HEADS_OUTSIDE, axis: int = -1, bias: tuple[int, ...] = (12,)
) -> onnx.ModelProto:
    split = [3, 4] if layout is not HEADS_INSIDE else [4, 3]
    text = ATTENTION.format(made="  ".join(made.format(n) for n in "qkv"), soft=SOFTMAX.format(axis), **layout)
    shapes: Weights = {"split": np.asarray([0, 0, *split]), "split3": np.asarray([-1, 7, *split])}
    weights: Weights = {**WEIGHTS, **{f"b{n}": bias for n in "qkv"}, **shapes}
    return graphs.parse(text.replace("[b, s, 10]", "[b, 7, 10]"), weights)


CASES = {
    "heads outside": attention(),
    "heads inside": attention(layout=HEADS_INSIDE),
    "a softmax over heads": attention(axis=1),
    "a softmax over heads, heads inside": attention(layout=HEADS_INSIDE, axis=1),
    "heads attend to heads": attention(layout=EACH_TOKEN),
    "Gemm": attention(GEMM),
    "Gemm, one number": attention(GEMM, bias=(1,)),
    "Gemm, one number a row": attention(GEMM, bias=(1, 1)),
    "one number": attention(bias=(1,)),
    "one number without an axis": attention(bias=()),
}


@pytest.mark.parametrize("name", CASES)
def test_a_change_of_basis_changes_nothing(name: str) -> None:
    proto = CASES[name]
    feeds = graphs.feeds_of(proto, {"b": 2})
    wanted = oracle.run(proto, feeds)
    rng = np.random.default_rng(3)
    model, state, found = graphs.analyse(proto)
    bases = BasisChange(state, Rewriter(state))
    for group in found.values:
        if group.bent is None:
            turn = rng.standard_normal((group.sets, group.size, group.size))
            bases.turn_values(group, turn)
            for consumer in group.consumers:
                use = consumer.uses[0]
                weight = use.matrix(use.node.inputs[use.weight_position].values)
                back = basis_of(consumer.owners, turn).weight(weight).astype(np.float32)
                bases.rewriter.set_constant([(use.node, use.weight_position)], use.laid_out(back, weight.shape))
    if "one number" in name:  # it would have to become a vector
        assert all(g.bent is not None for g in found.values) and not found.queries
    for group in found.queries:
        turn = rng.standard_normal((group.sets, group.size, group.size))
        bases.turn_logits(group, turn, np.linalg.inv(turn).transpose(0, 2, 1).astype(np.float64))
    assert oracle.difference(oracle.run(model.to_proto(), feeds), wanted) <= 1e-3


def test_channels_around_their_heads_are_the_same_in_all_heads() -> None:
    """Values lie [4 channels, 3 heads] in the weight that makes them and [3, 4] in the one that reads them.

    Each head may keep channels of its own only where its channels lie side by side in every weight.
    """
    text = """f (float[b, s, 10] x) => (float[b, s, 10] y) { v = MatMul(x, wv)  v4 = Reshape(v, split)
        vt = Transpose<perm=[0,3,1,2]>(v4)  q = MatMul(x, wq)  q4 = Reshape(q, heads)  qt = Transpose<perm=[0,2,1,3]>(q4)
        kt = Transpose<perm=[0,2,3,1]>(q4)  a = MatMul(qt, kt)  p = Softmax<axis=-1>(a)  c = MatMul(p, vt)
        ct = Transpose<perm=[0,2,1,3]>(c)  j = Reshape(ct, join)  y = MatMul(j, wo) }"""
    shapes = {"split": np.asarray([0, 0, 4, 3]), "heads": np.asarray([0, 0, 3, 5]), "join": np.asarray([0, 0, 12])}
    proto = graphs.parse(text, {"wv": (10, 12), "wq": (10, 15), "wo": (12, 10), **shapes})
    (values,) = graphs.analyse(proto)[2].values
    assert (values.size, values.sets) == (4, 1)
    graphs.prove(proto, {"b": 2, "s": 7}, values=True)
