# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Broken and hostile files: one sentence that names the node, the tensor or the function, and no time or memory lost."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.sound_model import DEEPEST, DEEPEST_CALLS, inlined, require_sound
from liar_opt.passes.prune_job import inspect
from liar_opt.runtime.errors import LiarOptError, ModelError

TEXT = "f (float[b, s, 6] x) => (float[b, s, 5] y) { u = MatMul(x, w1)  h = Relu(u)  y = MatMul(h, w2) }"
WEIGHTS: graphs.Weights = {"w1": (6, 17), "w2": (17, 5)}


@pytest.fixture
def proto() -> onnx.ModelProto:
    return graphs.parse(TEXT, WEIGHTS)


def refused(proto: onnx.ModelProto, match: str) -> None:
    """From memory and from a file it is the same."""
    with pytest.raises(ModelError, match=match):
        inspect(proto)


def test_a_sound_model_is_none_of_this(proto: onnx.ModelProto) -> None:
    assert len(inspect(proto).groups) == 1


def test_nodes_out_of_order_are_no_cycle(proto: onnx.ModelProto) -> None:
    nodes = list(proto.graph.node)[::-1]
    proto.graph.ClearField("node")
    proto.graph.node.extend(nodes)
    OnnxModel.from_proto(proto)


def test_a_deep_graph_out_of_order(proto: onnx.ModelProto) -> None:
    """graphsurgeon sorts nodes by going back from each on the stack."""
    nodes, last = list(proto.graph.node), proto.graph.node[0].output[0]
    for k in range(1500):
        nodes.append(helper.make_node("Relu", [last], [f"r{k}"]))
        last = f"r{k}"
    nodes[1].input[0] = last
    body = helper.make_graph(
        [helper.make_node("Neg", ["q"], ["p"]), helper.make_node("Relu", ["y"], ["q"])],
        "g",
        [],
        [helper.make_tensor_value_info("p", 1, None)],
    )
    nodes.append(helper.make_node("If", ["c"], ["z"], name="choice", then_branch=body, else_branch=body))
    proto.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    proto.graph.output.append(helper.make_tensor_value_info("z", 1, None))
    proto.graph.ClearField("node")
    proto.graph.node.extend(nodes[::-1])
    given = proto.SerializeToString()
    assert [g.kind for g in inspect(proto).groups] == ["ffn"]
    assert proto.SerializeToString() == given


def test_a_cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "h"
    refused(proto, r"node '[uh]' \((MatMul|Relu)\) of the model needs its own result")


def test_a_cycle_within_a_branch() -> None:
    body = helper.make_graph(
        [helper.make_node("Relu", ["q"], ["p"]), helper.make_node("Relu", ["p"], ["q"])],
        "g",
        [],
        [helper.make_tensor_value_info("q", 1, None)],
    )
    proto = graphs.parse("f (float[b, 6] x, bool c) => (float[b, 6] y) { y = Relu(x) }")
    proto.graph.node.append(helper.make_node("If", ["c"], ["z"], name="choice", then_branch=body, else_branch=body))
    refused(proto, "a branch of node 'choice' .If. of the model needs its own result")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda g: g.node[1].output.__setitem__(0, "u"), "tensor 'u' of the model is made twice"),
        (lambda g: g.node[1].output.__setitem__(0, "x"), "tensor 'x' of the model is made twice"),
        (lambda g: g.initializer.append(g.initializer[0]), "the name 'w1'"),
        (lambda g: g.input.append(g.input[0]), "the name 'x'"),
    ],
)
def test_names_given_twice(proto: onnx.ModelProto, change: Callable[[onnx.GraphProto], None], match: str) -> None:
    change(proto.graph)
    refused(proto, match)


def test_nodes_with_one_name_are_renamed(proto: onnx.ModelProto, tmp_path: Path) -> None:
    for node, name in zip(proto.graph.node, ("MatMul", "MatMul_2", "MatMul"), strict=True):
        node.name = name
    model = OnnxModel.from_proto(proto)
    assert [n.name for n in proto.graph.node] == ["MatMul", "MatMul_2", "MatMul"]  # the user's own stays
    assert sorted(n.name for n in model.graph.nodes) == ["MatMul", "MatMul_2", "MatMul_3"]
    assert [t.name for t in (*model.graph.inputs, *model.graph.outputs)] == ["x", "y"]
    assert any("renamed" in note and "1" in note for note in model.notes)


# Tensors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"dims": [-6, -17]}, r"shape \[-6, -17\]"),
        ({"dims": [1 << 40, 1 << 40]}, "needs|which no tensor"),
        ({"dims": [1 << 32, 1 << 32]}, "needs|which no tensor"),  # their product is 0 in 64 bits
        ({"dims": [6, 18]}, "needs"),
        ({"data_type": 77}, "element type 77"),
        ({"data_type": 0}, "element type 0"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_initializers(proto: onnx.ModelProto, tmp_path: Path, in_file: bool, fields: dict[str, object], match: str) -> None:
    tensor = proto.graph.initializer[0]
    for name, value in fields.items():
        tensor.ClearField(name)
        getattr(tensor, name).extend(value) if name == "dims" else setattr(tensor, name, value)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=f"{match}|no valid ONNX|cannot be read as ONNX"):
        inspect(path if in_file else proto)


def test_typed_fields_of_the_wrong_length(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(TensorProto(name="k", data_type=TensorProto.FLOAT, dims=[3], float_data=[1.0, 2.0]))
    refused(proto, "tensor 'k' of the model has 2 numbers, its shape .3. needs 3")


@pytest.mark.parametrize("name", [n for n in TensorProto.DataType.keys() if n not in ("UNDEFINED", "STRING")])
def test_typed_fields_of_all_types(proto: onnx.ModelProto, name: str) -> None:
    kind = TensorProto.DataType.Value(name)
    tensor = helper.make_tensor("k", kind, [3], [1, 0, 1])
    proto.graph.initializer.append(tensor)
    OnnxModel.from_proto(proto)


def test_a_constant_of_an_attribute(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(
        helper.make_node("Constant", [], ["k"], name="k", value=TensorProto(name="v", data_type=1, dims=[5]))
    )
    refused(proto, "tensor 'v' of the model has 0 numbers, its shape .5. needs 5")


def test_text_that_is_no_utf_8(proto: onnx.ModelProto, tmp_path: Path) -> None:
    data = proto.SerializeToString()
    for old, new in ((b"Relu", b"R\xfflu"), (b"\x01h", b"\x01\xff"), (b"\x01s", b"\x01\xff")):
        assert old in data
        path = tmp_path / "m.onnx"
        path.write_bytes(data.replace(old, new))
        with pytest.raises(ModelError, match="no UTF-8 text"):
            inspect(path)


def test_strings_where_numbers_belong() -> None:
    proto = graphs.parse(
        "f (float[b, s, 6] x) => (float[b, s, 5] y) { t = Transpose(w)  u = MatMul(x, t)  y = Relu(u) }", {"w": (5, 6)}
    )
    proto.graph.node[0].attribute.append(helper.make_attribute("perm", "one, zero"))
    refused(proto, "no valid ONNX")


def test_branches_within_branches(proto: onnx.ModelProto) -> None:
    graph = proto.graph
    for depth in range(1000):
        node = graph.node.add(op_type="If", input=["h"], output=[f"z{depth}"])
        graph = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
    with pytest.raises(ModelError, match=f"more than {DEEPEST} deep"):
        require_sound(proto, (), "it")
    refused(proto, f"more than {DEEPEST} deep|no valid ONNX")


# Functions ------------------------------------------------------------------------------------------------------------


def calling(bodies: list[list[onnx.NodeProto]]) -> onnx.ModelProto:
    proto = graphs.parse("f (float[b, 6] x) => (float[b, 6] y) { y = loc.F0(x) }")
    proto.opset_import.append(helper.make_opsetid("loc", 1))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("loc", 1)]
    for i, body in enumerate(bodies):
        proto.functions.append(helper.make_function("loc", f"F{i}", ["a"], ["b"], body, opsets))
    return proto


def call(i: int, a: str = "a", b: str = "b") -> onnx.NodeProto:
    return helper.make_node(f"F{i}", [a], [b], domain="loc")


LAST = [helper.make_node("Relu", ["a"], ["b"])]


def test_functions_that_call_themselves() -> None:
    refused(calling([[call(1)], [call(0)]]), "function 'loc::F0' of the model calls itself")
    refused(calling([[call(0)]]), "function 'loc::F0' of the model calls itself")


def test_functions_that_double() -> None:
    bodies = [[call(i + 1, "a", "c"), call(i + 1, "c", "b")] for i in range(39)]
    refused(calling([*bodies, LAST]), "stand for 549,755,813,888 nodes")


def test_functions_nested_deep() -> None:
    chain = [[call(i + 1)] for i in range(DEEPEST_CALLS + 1)]
    refused(calling([*chain, LAST]), f"deep, more than {DEEPEST_CALLS}")
    proto = inlined(calling([*chain[: DEEPEST_CALLS - 1], LAST]), "it")
    assert [n.op_type for n in proto.graph.node] == ["Relu"]


# Folds that would fill the memory -------------------------------------------------------------------------------------

HUGE = np.asarray([1 << 36])
BOMBS: dict[str, tuple[str, dict[str, Any]]] = {
    "ConstantOfShape": ("z = ConstantOfShape(n)", {"n": HUGE}),
    "Tile": ("z = Tile(one, n)", {"one": np.ones(1, np.float32), "n": HUGE}),
    "Expand": ("z = Expand(one, n)", {"one": np.ones(1, np.float32), "n": HUGE}),
    "Range": ("z = Range(a, b, c)", {"a": np.float32(0), "b": np.float32(1e12), "c": np.float32(1)}),
    "infinite": ("z = Range(a, b, c)", {"a": np.float32(0), "b": np.float32(np.inf), "c": np.float32(1)}),
    "Pad": ("z = Pad(one, n)", {"one": np.ones(1, np.float32), "n": np.asarray([0, 1 << 36])}),
    "OneHot": ("z = OneHot(i, d, v)", {"i": np.zeros(64, np.int64), "d": HUGE, "v": np.zeros(2, np.float32)}),
    "Gather": ("z = Gather(t, i)", {"t": np.zeros((1, 1 << 16), np.float32), "i": np.zeros(1 << 16, np.int64)}),
    "Mul": ("z = Mul(p, q)", {"p": np.ones((1 << 16, 1), np.float32), "q": np.ones((1, 1 << 16), np.float32)}),
    "Where": (
        "z = Where(c, p, q)",
        {"c": np.ones((1 << 16, 1), np.bool_), "p": np.ones((1, 1 << 16), np.float32), "q": np.float32(1)},
    ),
    "MatMul": ("z = MatMul(p, q)", {"p": np.ones((1 << 16, 1), np.float32), "q": np.ones((1, 1 << 16), np.float32)}),
    "Resize": (
        "z = Resize(e, , s)",
        {"e": np.ones((1, 1, 1, 1), np.float32), "s": np.asarray([1, 1, 1e6, 1e6], np.float32)},
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_constants_that_no_machine_holds(bomb: str) -> None:
    line, weights = BOMBS[bomb]
    text = f"f (float[b, s, 6] x) => (float[b, s, 5] y) {{ {line}  k = ReduceMax<keepdims = 0>(z)  u = MatMul(x, w)  y = Add(u, k) }}"
    refused(graphs.parse(text, {**weights, "w": (6, 5)}), r"makes a constant of [\d,]{13,} elements")


@pytest.mark.parametrize("op", ["ConstantOfShape", "Tile", "Expand"])
def test_constants_that_are_only_large_are_left_to_onnx_runtime(op: str) -> None:
    line, weights = BOMBS[op]
    weights = {**weights, "n": np.asarray([1 << 22])}
    text = f"f (float[b, s, 6] x) => (float[b, s, 5] y) {{ {line}  k = ReduceMax<keepdims = 0>(z)  u = MatMul(x, w1)  h = Relu(u)  v = MatMul(h, w2)  y = Add(v, k) }}"
    found = inspect(graphs.parse(text, {**weights, **WEIGHTS}))
    assert op in {n.op for n in found.model.graph.nodes}
    assert [g.size for g in found.groups] == [17]


@pytest.mark.parametrize("opset", [1, 6])
def test_operators_that_do_not_broadcast(opset: int) -> None:
    text = "f (float[b, s, 6] x) => (float[b, s, 6] y) { u = MatMul(x, w1)  r = Relu(u)  y = MatMul(r, w2) }"
    proto = graphs.parse(text, {"w1": (6, 17), "w2": (17, 6)}, opset=opset)
    refused(proto, rf"is of opset {opset}, and 7 is the oldest that is read; export the model again, or convert it")


DOUBLING = {
    "of data": "z0 = Concat<axis = 2>(x, x)",
    "of a weight": "z0 = Concat<axis = 2>(t, t)",
    "Tile": "z0 = Tile(x, two)",
}


@pytest.mark.parametrize("kind", DOUBLING)
def test_tensors_that_double_until_no_machine_holds_them(kind: str) -> None:
    """Each step is small beside what it reads, so that no limit of one node stops it."""
    step = "Tile({0}, two)" if kind == "Tile" else "Concat<axis = 2>({0}, {0})"
    chain = " ".join(f"z{i + 1} = {step.format(f'z{i}')} " for i in range(40))
    weights: graphs.Weights = {"w": (6, 5), "t": (1, 1, 6), "two": np.asarray([1, 1, 2])}
    text = f"f (float[b, s, 6] x) => (float[b, s, 5] y) {{ {DOUBLING[kind]}  {chain} k = ReduceMax<keepdims = 0>(z40)  u = MatMul(x, w)  y = Add(u, k) }}"
    refused(graphs.parse(text, weights), r"makes a tensor of [\d,]{13,} elements, more than this machine holds")


@pytest.mark.parametrize("kind", ["joined", "cut"])
def test_long_chains(kind: str) -> None:
    """What an unrolled loop collects one by one, or takes off: as deep as it is long."""
    step = (
        "r{0} = Neg(u)  z{1} = Concat<axis = 2>(z{0}, r{0})" if kind == "joined" else "z{1} = Slice(z{0}, one, last, axis)"
    )
    chain = " ".join(step.format(i, i + 1) for i in range(1200))
    width, rest = (3, 3 * 1201) if kind == "joined" else (1211, 11)
    weights: graphs.Weights = {
        "w1": (6, width),
        "w2": (rest, 5),
        "one": np.asarray([1]),
        "last": np.asarray([1 << 31]),
        "axis": np.asarray([2]),
    }
    text = (
        f"f (float[b, s, 6] x) => (float[b, s, 5] y) {{ u = MatMul(x, w1)  z0 = Relu(u)  {chain} y = MatMul(z1200, w2) }}"
    )
    found = inspect(graphs.parse(text, weights))
    assert [g.size for g in found.groups] == ([3] if kind == "joined" else [])


def test_sizes_of_an_axis_that_no_weight_has() -> None:
    """A Reshape to half a thousand million heads: a list of whose index each position is would be as long."""
    text = "f (float[b, s, 6] x) => (float[b, s, 5] y) { u = MatMul(x, w1)  r = Reshape(u, t)  h = Relu(r)  k = Reshape(h, back)  y = MatMul(k, w2) }"
    for target in ([520_093_696, 0, 17], [0, 520_093_696, 17], [0, 0, 520_093_696]):
        with_target = {"t": np.asarray(target), "back": np.asarray([0, 0, 17])}
        try:
            inspect(graphs.parse(text, {**WEIGHTS, **with_target}))
        except ModelError as err:  # of a machine that could not hold it
            assert "more than this machine holds" in str(err)


# Bytes that were turned over ------------------------------------------------------------------------------------------


def test_bytes_that_were_turned_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever a file holds: it is read, or it is refused with a sentence."""
    text = """f (int64[b, s] ids) => (float[b, s, 6] y) {
        e = Gather(table, ids)  n = LayerNormalization(e, g, z)  q = MatMul(n, w1)  q4 = Reshape(q, heads)
        t = Transpose<perm = [0, 2, 1, 3]>(q4)  back = Transpose<perm = [0, 2, 1, 3]>(t)  r = Reshape(back, flat)
        h = Gelu<approximate = "tanh">(r)  d = MatMul(h, w2)  y = Add(e, d) }"""
    weights = {"table": (7, 6), "g": (6,), "z": (6,), "w1": (6, 10), "w2": (10, 6)}
    proto = graphs.parse(text, {**weights, "heads": np.asarray([0, 0, 5, 2]), "flat": np.asarray([0, 0, -1])}, opset=20)
    whole = proto.SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(whole)
    inspect(path)
    outcomes = set()
    for seed in range(80):
        rng = random.Random(seed)
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 4])):
            place = rng.randrange(len(data))
            data[place] ^= 1 << rng.randrange(8)
        if not seed % 5:
            del data[(place := rng.randrange(len(data))) : place + rng.randrange(1, 9)]
        path.write_bytes(data)
        try:
            inspect(path)
            outcomes.add("read")
        except LiarOptError as err:
            assert "\n" not in str(err), seed
            outcomes.add("refused")
        except Exception as err:  # which of the files it was
            pytest.fail(f"seed {seed}: {type(err).__name__}: {err}")
    assert outcomes == {"read", "refused"}
    capfd.readouterr()


def test_weights_are_not_read_to_be_checked(tmp_path: Path) -> None:
    """Data that is longer than a stub's stays where it is."""
    proto = graphs.parse(TEXT, {"w1": np.zeros((6, 1700), np.float32), "w2": (1700, 5)})
    model = OnnxModel.from_proto(proto)
    assert numpy_helper.to_array(proto.graph.initializer[0]).shape == (6, 1700)
    assert set(model.stored.arrays) == {"w1", "w2"}  # type: ignore[union-attr]
    assert sys.getsizeof(model.stored.proto.SerializeToString()) < 5000  # type: ignore[union-attr]


@pytest.mark.parametrize("imports", [[("", 17)], [("ai.onnx", 17)], [("", 17), ("ai.onnx", 17)]], ids=str)
@pytest.mark.parametrize("some", [1, None])
def test_the_other_name_of_the_domain_of_onnx(imports: list[tuple[str, int]], some: int | None) -> None:
    proto = graphs.parse(
        "f (float[b, 6] x) => (float[b, 7] y) { u = MatMul(x, w1)  h = Relu(u)  y = MatMul(h, w2) }",
        {"w1": (6, 11), "w2": (11, 7)},
    )
    for node in proto.graph.node[:some]:
        node.domain = "ai.onnx"
    del proto.opset_import[:]
    proto.opset_import.extend(onnx.helper.make_opsetid(*one) for one in imports)
    assert graphs.sizes(proto) == [("ffn", 11)]
    pruned = graphs.prove(proto, {"b": 2})
    assert not any(node.domain for node in pruned.graph.node)
    assert [(o.domain, o.version) for o in pruned.opset_import] == [("", 17)]
