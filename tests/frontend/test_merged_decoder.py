# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""A merged decoder is laid out flat and folded back; what only looks like one is left as it is."""

from __future__ import annotations

from typing import Any

import graphs
import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import oracle
import pytest

import liar_opt
from liar_opt.frontend.graph_tensors import is_constant
from liar_opt.frontend.merged_decoder import side_by_side, unfold
from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.weight_files import lightened
from liar_opt.runtime.compare import TOLERANCES
from liar_opt.runtime.errors import ModelError


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


# Self attention and attention to an encoder, 3 heads of 4 each; hidden 6, encoder 5, feed-forward 11, outputs 7.
ATTENTION = """q{0} = MatMul({1}, wq{0})  qr{0} = Reshape(q{0}, heads)  qt{0} = Transpose<perm=[0,2,1,3]>(qr{0})
    kx{0} = Transpose<perm=[0,1,3,2]>({2})  s{0} = MatMul(qt{0}, kx{0})  p{0} = Softmax<axis=-1>(s{0})  c{0} = MatMul(p{0}, {3})
    ct{0} = Transpose<perm=[0,2,1,3]>(c{0})  cr{0} = Reshape(ct{0}, joined)  o{0} = MatMul(cr{0}, wo{0})  y{0} = Add({1}, o{0})"""
KEYS = "{2}m{0} = MatMul({1}, w{2}{0})  {2}r{0} = Reshape({2}m{0}, heads)  {3} = Transpose<perm=[0,2,1,3]>({2}r{0})"
FFN = "u = MatMul(y2, w1)  h = Relu(u)  z = MatMul(h, w2)  logits = Add(z, b2)"
FIRST = "\n".join(
    [
        *(KEYS.format(1, "x", what, f"present_1_self_{what}") for what in "kv"),
        ATTENTION.format(1, "x", "present_1_self_k", "present_1_self_v"),
        *(KEYS.format(2, "enc", what, f"present_1_cross_{what}") for what in "kv"),
        ATTENTION.format(2, "y1", "present_1_cross_k", "present_1_cross_v"),
        FFN,
    ]
)
GROWN = "present_1_self_{0} = Concat<axis=2>(past_1_self_{0}, {0}n)"
SECOND = "\n".join(
    [
        *(f"{KEYS.format(1, 'x', what, f'{what}n')}  {GROWN.format(what)}" for what in "kv"),
        ATTENTION.format(1, "x", "present_1_self_k", "present_1_self_v"),
        ATTENTION.format(2, "y1", "past_1_cross_k", "past_1_cross_v"),
        FFN,
    ]
)
EMPTY = "present_1_cross_{0} = Constant<value=float[0,3,1,4] {{}}>()"
PASSED = "present_1_cross_{0} = Identity(past_1_cross_{0})"
SELF = "float[b, 3, t, 4] present_1_self_{0}"
CROSS = "float[b, 3, e, 4] present_1_cross_{0}"
OUTPUTS = ", ".join(["float[b, s, 7] logits", *(SELF.format(w) for w in "kv"), *(CROSS.format(w) for w in "kv")])
INPUTS = ", ".join(
    [
        "float[b, s, 6] x, float[b, e, 5] enc",
        *(f"float[b, 3, p, 4] past_1_self_{w}" for w in "kv"),
        *(f"float[b, 3, e, 4] past_1_cross_{w}" for w in "kv"),
        "bool c",
    ]
)
TEXT = f"""f ({INPUTS}) => ({OUTPUTS}) {{
    logits, present_1_self_k, present_1_self_v, present_1_cross_k, present_1_cross_v = If (c) <
        then_branch = with_past () => ({OUTPUTS}) {{ {SECOND} CROSSED }},
        else_branch = no_past () => ({OUTPUTS}) {{ {FIRST} }}
    > }}"""
WEIGHTS: graphs.Weights = {
    **{f"w{what}1": (6, 12) for what in "qkv"},
    **{"wq2": (6, 12), "wk2": (5, 12), "wv2": (5, 12), "wo1": (12, 6), "wo2": (12, 6)},
    **{"w1": (6, 11), "w2": (11, 7), "b2": (7,), "heads": ints(0, 0, 3, 4), "joined": ints(0, 0, -1)},
}
SIZES = {"b": 2, "s": 5, "e": 8, "p": 4}


def merged(crossed: str = EMPTY, text: str = TEXT) -> onnx.ModelProto:
    """Returns a merged decoder whose second branch gives ``crossed`` for the encoder's keys and values."""
    return graphs.parse(text.replace("CROSSED", "\n".join(crossed.format(what) for what in "kv")), WEIGHTS)


def run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], cached: bool) -> dict[str, np.ndarray]:
    outputs = oracle.run(proto, {**feeds, "c": np.asarray(cached)})
    return dict(zip([o.name for o in proto.graph.output], outputs, strict=True))


def bodies(proto: onnx.ModelProto) -> dict[str, onnx.GraphProto]:
    return {a.name: a.g for a in proto.graph.node[-1].attribute}


def test_the_flat_graph_gives_what_both_branches_give() -> None:
    proto = merged()
    flat = unfold(*lightened(proto))
    assert flat is not None
    feeds = graphs.feeds_of(proto, SIZES)
    outputs = oracle.run(flat[0], feeds)
    named = dict(zip([o.name for o in flat[0].graph.output], outputs, strict=True))
    first = run(proto, feeds, cached=False)
    second = run(proto, {**feeds, **{f"past_1_cross_{w}": first[f"present_1_cross_{w}"] for w in "kv"}}, cached=True)
    assert [*named] == [*first, "with_past/logits", "with_past/present_1_self_k", "with_past/present_1_self_v"]
    for name, value in named.items():
        wanted = second[name.removeprefix("with_past/")] if "/" in name else first[name]
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5)


def test_wires_and_twins() -> None:
    model = OnnxModel.from_proto(merged())
    assert model.merged is not None
    assert model.merged.wires == {f"past_1_cross_{w}": f"present_1_cross_{w}" for w in "kv"}
    assert [i.name for i in model.inputs()] == ["x", "enc", "past_1_self_k", "past_1_self_v"]
    assert model.merged.twins[0] == ("logits", "with_past/logits")
    assert "a merged decoder" in model.notes[0]


@pytest.mark.parametrize("crossed", [EMPTY, PASSED], ids=["empty", "passed"])
def test_folded_without_a_change_it_is_what_it_was(crossed: str) -> None:
    proto = merged(crossed)
    stored = OnnxModel.from_proto(proto).stored
    assert stored is not None
    folded = stored.as_given()
    onnx.checker.check_model(folded)
    for mine, its in ((folded.graph.input, proto.graph.input), (folded.graph.output, proto.graph.output)):
        assert list(mine) == list(its)
    assert {t.name for t in folded.graph.initializer} == {t.name for t in proto.graph.initializer}
    before, after = bodies(proto), bodies(folded)
    for name, body in before.items():
        assert list(body.output) == list(after[name].output)
        wanted = [(n.op_type, list(n.input), list(n.output)) for n in body.node]
        assert [(n.op_type, list(n.input), list(n.output)) for n in after[name].node] == wanted


@pytest.mark.parametrize("crossed", [EMPTY, PASSED], ids=["empty", "passed"])
@pytest.mark.parametrize("options", [{"ffn": 0.5}, {"heads": 0.34}, {"ffn": 0.5, "heads": 0.67}])
def test_pruned_both_branches_agree(crossed: str, options: dict[str, Any]) -> None:
    """On the same tokens, at once or behind a cache of the first of them."""
    proto = merged(crossed)
    result = liar_opt.prune(proto, multiple_of=1, samples=16, batch_size=4, latency=False, **options)
    model = result.model
    onnx.checker.check_model(model, full_check=True)
    heads = 3 - round(3 * options.get("heads", 0))
    ends = [v for v in [*model.graph.input, *model.graph.output] if v.name.startswith(("past", "present"))]
    assert len(ends) == 8
    assert {v.type.tensor_type.shape.dim[1].dim_value for v in ends} == {heads}
    feeds = graphs.feeds_of(model, SIZES)
    first = run(model, feeds, cached=False)
    empty = {f"past_1_self_{w}": np.zeros((2, heads, 0, 4), np.float32) for w in "kv"}
    crossing = {f"past_1_cross_{w}": first[f"present_1_cross_{w}"] for w in "kv"}
    second = run(model, {**feeds, **empty, **crossing}, cached=True)
    assert oracle.difference([second["logits"]], [first["logits"]]) <= TOLERANCES["float32"]
    handed = second["present_1_cross_k"]
    assert handed.shape == ((0, heads, 1, 4) if crossed == EMPTY else (2, heads, 8, 4))
    assert result.report["verification"]["folded_difference"] <= TOLERANCES["float32"]
    assert len(model.graph.node) == 1


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_narrow_types(kind: str) -> None:
    wide = merged(EMPTY.replace("float", kind), TEXT.replace("float[", f"{kind}["))
    for tensor in wide.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            narrow = values.astype(np.float16 if kind == "float16" else ml_dtypes.bfloat16)
            code = onnx.TensorProto.DataType.Value(kind.upper())
            tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=code, dims=tensor.dims, raw_data=narrow.tobytes()))
    result = liar_opt.prune(wide, ffn=0.5, heads=0.34, multiple_of=1, samples=8, latency=False)
    assert {v.type.tensor_type.elem_type for v in result.model.graph.output} == {
        onnx.TensorProto.DataType.Value(kind.upper())
    }


def test_two_uses_of_a_weight_are_next_to_each_other() -> None:
    model = OnnxModel.from_proto(merged())
    model.normalise()
    seen: dict[int, list[int]] = {}
    products = [n for n in model.graph.nodes if n.op == "MatMul" and is_constant(n.inputs[1])]
    for place, node in enumerate(products):
        seen.setdefault(id(node.inputs[1]), []).append(place)
    assert [places for places in seen.values() if len(places) > 1 and places[1] - places[0] > 1] == []
    assert sum(len(places) == 2 for places in seen.values()) == 8
    made: set[str] = {t.name for t in model.graph.inputs}
    for node in model.graph.nodes:
        assert all(is_constant(t) or t.name in made for t in node.inputs)
        made |= {t.name for t in node.outputs}


def test_the_first_branch_is_measured_for_both() -> None:
    """On a whole text a branch that was traced with one token may not be causal."""
    _, _, found = graphs.analyse(merged())
    names = [[u.node.outputs[0].name for u, _ in g.taps] for g in found.groups]
    assert names == [["o1"], ["o2"], ["z"]]
    assert all(len(c.uses) == 2 for g in found.groups for c in g.consumers)


def test_weights_in_another_order_do_not_stop_the_layout() -> None:
    """Of pairs that cross each other some are kept: the nodes of a branch stay in order."""
    a, b = gs.Constant("a", np.ones((2, 3))), gs.Constant("b", np.ones((2, 3)))
    x = gs.Variable("x")
    nodes = [
        gs.Node("MatMul", n, {}, [x, w], [gs.Variable(n)])
        for n, w in zip(("1a", "1b", "2b", "2a"), (a, b, b, a), strict=True)
    ]
    found = side_by_side(nodes, {id(nodes[0]), id(nodes[1])})
    assert [n.name for n in found if n.name[0] == "1"] == ["1a", "1b"]
    assert [n.name for n in found if n.name[0] == "2"] == ["2b", "2a"]


def test_weights_that_lie_in_the_branches_become_one() -> None:
    proto = merged()
    large = np.random.default_rng(0).standard_normal((6, 400)).astype(np.float32)
    for body in bodies(proto).values():
        body.initializer.append(onnx.numpy_helper.from_array(large, "inner"))
        next(n for n in body.node if "w1" in n.input).input[1] = "inner"
        body.initializer.append(onnx.numpy_helper.from_array(np.ones((400, 7), np.float32), "inner2"))
        next(n for n in body.node if "w2" in n.input).input[1] = "inner2"
    result = liar_opt.prune(proto, ffn=0.5, samples=8, latency=False)
    assert {t.name: list(t.dims) for t in result.model.graph.initializer if "inner" in t.name} == {
        "inner": [6, 200],
        "inner2": [200, 7],
    }
    assert not [t for body in bodies(result.model).values() for t in body.initializer if len(t.dims) > 1]


def test_nodes_of_both_stay_outside() -> None:
    text = TEXT.replace("{\n    logits", "{\n    x2 = Mul(x, two)\n    logits").replace("MatMul(x,", "MatMul(x2,")
    proto = merged(text=text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(2, np.float32), "two"))
    result = liar_opt.prune(proto, ffn=0.5, multiple_of=1, samples=8, latency=False)
    assert [n.op_type for n in result.model.graph.node] == ["Mul", "If"]
    assert all(n.op_type != "Mul" for body in bodies(result.model).values() for n in body.node)


def test_names_inside_branches_of_branches() -> None:
    """What an inner If captures goes by the flat names, too."""
    inner = "r = Shape<start=1, end=2>(x)  few = Less(r, one)  h = If (few) < then_branch = g1 () => (float[b, s, 11] t) { t = Neg(u) }, else_branch = g2 () => (float[b, s, 11] e) { e = Relu(u) } >"
    proto = merged(text=TEXT.replace("h = Relu(u)", inner))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(ints(1), "one"))
    assert ("heads", 3) in graphs.sizes(proto)
    result = liar_opt.prune(proto, heads=0.34, samples=8, latency=False)
    onnx.checker.check_model(result.model)
    feeds = graphs.feeds_of(result.model, SIZES)
    assert np.isfinite(run(result.model, feeds, cached=True)["logits"]).all()


NEAR_MISSES = {
    "the condition is computed": [("If (c)", "If (d)"), ("{\n    logits", "{\n    d = Not(c)\n    logits")],
    "the condition is read elsewhere": [("h = Relu(u)", "h = Relu(u)  d = Not(c)")],
    "an output is not the If's": [("[b, s, 7] logits", "[b, s, 7] last"), ("> }", "> \n last = Neg(logits) }")],
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_is_no_merged_decoder_is_refused(name: str) -> None:
    text = TEXT
    for old, new in NEAR_MISSES[name]:
        text = text.replace(old, new, 1)
    proto = merged(text=text)
    assert OnnxModel.from_proto(proto).merged is None
    assert graphs.sizes(proto) == []
    assert "products with weights inside the branches of If are left alone" in graphs.reasons(proto)


def test_without_a_cache_it_is_no_decoder() -> None:
    branch = "{0} () => (float[b, s, 7] {0}y) {{ {0}u = MatMul(x, w1)  {0}h = Relu({0}u)  {0}y = MatMul({0}h, w2) }}"
    text = f"""f (float[b, s, 6] x, bool c) => (float[b, s, 7] y) {{
        y = If (c) <then_branch = {branch.format("t")}, else_branch = {branch.format("e")}> }}"""
    assert OnnxModel.from_proto(graphs.parse(text, {"w1": (6, 11), "w2": (11, 7)})).merged is None


def test_without_a_common_weight_it_is_none() -> None:
    proto = merged()
    for node in bodies(proto)["then_branch"].node:
        for i, name in enumerate(node.input):
            if name.startswith(("w", "b2")):
                node.input[i] = f"{name}_2"
    for name in [t.name for t in proto.graph.initializer if t.name.startswith(("w", "b2"))]:
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        proto.graph.initializer.add().CopyFrom(tensor)
        proto.graph.initializer[-1].name = f"{name}_2"
    assert OnnxModel.from_proto(proto).merged is None


def test_a_quantised_branch_is_refused() -> None:
    proto = merged()
    next(n for n in bodies(proto)["else_branch"].node if n.op_type == "MatMul").op_type = "MatMulInteger"
    with pytest.raises(ModelError, match="quantised"):
        OnnxModel.from_proto(proto)
