# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""ONNX files in and out: what is refused, what is kept, what is shared, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import oracle
import pytest
from onnx import TensorProto, helper, numpy_helper

from liar_opt import prune
from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.tables import looked_up, vocabulary
from liar_opt.passes.prune_job import inspect
from liar_opt.runtime.errors import ModelError

TEXT = "f (float[b, 6] x) => (float[b, 7] y) { u = MatMul(x, w1)  h = Relu(u)  y = MatMul(h, w2) }"
WEIGHTS: graphs.Weights = {"w1": (6, 300), "w2": (300, 7)}


@pytest.fixture
def proto() -> onnx.ModelProto:
    return graphs.parse(TEXT, WEIGHTS)


def save_external(proto: onnx.ModelProto, folder: Path) -> Path:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    onnx.save(copy, folder / "model.onnx", save_as_external_data=True, location="model.bin", size_threshold=0)
    return folder / "model.onnx"


# -- loading ---------------------------------------------------------------------------------------------------------


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(ModelError, match="is not a file"):
            OnnxModel.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 a zip", b"hello, world\n" * 100, bytes(range(256)) * 9, b"\x00" * 64]
)
def test_what_is_not_onnx(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.onnx' (cannot be read as ONNX|holds no ONNX graph)"):
        OnnxModel.load(path)


def test_every_truncation_is_noticed(proto: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    whole = proto.SerializeToString()
    for length in [*range(0, len(whole) - 1, 211), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            OnnxModel.load(path)


def test_an_initializer_with_too_few_bytes(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-4]
    with pytest.raises(ModelError, match=r"initializer 'w1'.* has 7196 bytes where its shape .* needs 7200"):
        OnnxModel.from_proto(proto)


def test_external_data_is_read(proto: onnx.ModelProto, tmp_path: Path) -> None:
    model = OnnxModel.load(save_external(proto, tmp_path))
    feeds = graphs.feeds_of(proto, {"b": 3})
    np.testing.assert_array_equal(oracle.run(model.to_proto(), feeds)[0], oracle.run(proto, feeds)[0])


def test_external_data_that_is_missing_or_short(proto: onnx.ModelProto, tmp_path: Path) -> None:
    path = save_external(proto, tmp_path)
    data = tmp_path / "model.bin"
    whole = data.read_bytes()
    for length in (0, 1, 5000, len(whole) - 1):
        data.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"model\.bin"):
            OnnxModel.load(path)
    data.unlink()
    with pytest.raises(ModelError, match=r"'model\.bin' .* is missing"):
        OnnxModel.load(path)


@pytest.mark.parametrize(
    "op", ["QuantizeLinear", "DequantizeLinear", "MatMulInteger", "QLinearMatMul", "com.microsoft.MatMulNBits"]
)
def test_quantised_graphs_are_refused(op: str, proto: onnx.ModelProto) -> None:
    domain, _, name = op.rpartition(".")
    proto.graph.node.append(helper.make_node(name, ["x"], ["q"], name="quantised", domain=domain))
    with pytest.raises(ModelError, match=rf"'quantised' \({name}\) .* is quantised"):
        OnnxModel.from_proto(proto)


def test_a_tensor_that_nothing_gives_is_named(proto: onnx.ModelProto) -> None:
    broken, output = onnx.ModelProto(), onnx.ModelProto()
    broken.CopyFrom(proto)
    broken.graph.node[-1].input[0] = "nowhere"
    output.CopyFrom(proto)
    output.graph.output[0].name = "nowhere"
    body = helper.make_graph([helper.make_node("Neg", ["nowhere"], ["z"])], "body", [], [])
    body.output.append(helper.make_empty_tensor_value_info("z"))
    inside = onnx.ModelProto()
    inside.CopyFrom(proto)
    inside.graph.node.append(helper.make_node("If", ["c"], ["zz"], then_branch=body, else_branch=body))
    inside.graph.input.append(helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
    for model in (broken, output, inside):
        with pytest.raises(ModelError, match="'nowhere' is read in the model and nothing gives it"):
            OnnxModel.from_proto(model)


def test_weights_listed_as_inputs_are_constants(proto: onnx.ModelProto) -> None:
    """As before IR version 4; the caller's note says so, and the interface is what remains."""
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    proto.ir_version = 3
    model = OnnxModel.from_proto(proto)
    assert [i.name for i in model.inputs()] == ["x"]
    assert any("2 weights" in note for note in model.notes)
    assert [i.name for i in model.to_proto().graph.input] == ["x"]
    assert graphs.sizes(model.to_proto()) == [("ffn", 300)]


def test_local_functions_are_inlined() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        f (float[b, 6] x) => (float[b, 7] y) { u = MatMul(x, w1)  h = local.twice(u)  y = MatMul(h, w2) }
        <domain: "local", opset_import: ["" : 17]> twice (a) => (c) { b = Relu(a)  c = Add(b, b) }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (6, 11)), ("w2", (11, 7))):
        proto.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    graphs.prove(OnnxModel.from_proto(proto).to_proto(), {"b": 3})


def test_metadata_order_and_interface_are_kept(proto: onnx.ModelProto) -> None:
    proto.metadata_props.add(key="author", value="someone")
    for name in ("zz", "aa"):
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(7, np.float32), name))
    proto.graph.node[-1].output[0] = "p"
    proto.graph.node.append(helper.make_node("Add", ["p", "zz"], ["q"]))
    proto.graph.node.append(helper.make_node("Add", ["q", "aa"], ["y"]))
    out = OnnxModel.from_proto(proto).to_proto()
    assert {p.key: p.value for p in out.metadata_props} == {"author": "someone"}
    assert [i.name for i in out.graph.initializer] == ["w1", "w2", "zz", "aa"]
    assert list(out.graph.input) == list(proto.graph.input)
    assert list(out.graph.output) == list(proto.graph.output)
    assert out.opset_import[0].version == 17


# -- normal form -----------------------------------------------------------------------------------------------------


def normalised(text: str, weights: graphs.Weights) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    proto = graphs.parse(text, weights)
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    model = OnnxModel.from_proto(copy)
    model.normalise()
    assert model.normalise() == 0
    names = [n.name for n in model.graph.nodes]
    assert all(names)
    assert len(set(names)) == len(names)
    out = model.to_proto()
    feeds = graphs.feeds_of(proto, {"b": 3})
    for a, b in zip(oracle.run(out, feeds), oracle.run(proto, feeds), strict=True):
        np.testing.assert_array_equal(a, b)
    return proto, out


def test_weights_are_stored_as_they_are_multiplied() -> None:
    text = "f (float[b, 6] x) => (float[b, 7] y) { t = Transpose<perm=[1,0]>(w)  i = Identity(t)  y = MatMul(x, i) }"
    _, out = normalised(text, {"w": (7, 6)})
    assert [n.op_type for n in out.graph.node] == ["MatMul"]
    assert [tuple(i.dims) for i in out.graph.initializer] == [(6, 7)]


def test_constant_nodes_and_dropout_go() -> None:
    text = """f (float[b, 6] x) => (float[b, 6] y) { c = Constant<value = float[1] {2.0}>()  d = Constant<value_float = 3.0>()
        m = Mul(x, c)  n = Dropout(m)  y = Add(n, d) }"""
    _, out = normalised(text, {})
    assert [n.op_type for n in out.graph.node] == ["Mul", "Add"]


def test_equal_folds_of_one_weight_stay_one_weight() -> None:
    text = """f (float[b, 6] x) => (float[b, 6] y) { t = Transpose<perm=[1,0]>(w)  a = MatMul(x, t)  r = Relu(a)
        s = Transpose<perm=[1,0]>(w)  y = MatMul(r, s) }"""
    _, out = normalised(text, {"w": (6, 6)})
    assert len(out.graph.initializer) == 1
    first, _, last = out.graph.node
    assert first.input[1] == last.input[1]


def test_other_folds_of_one_weight_are_not_stored_beside_it() -> None:
    """Folded, the file would be larger; the weight that stays computed is named."""
    text = """f (float[b, 6] x) => (float[b, 7] y) { t = Transpose<perm=[1,0]>(w)  a = MatMul(x, t)  r = Relu(a)
        y = MatMul(r, w) }"""
    proto, out = normalised(text.replace("float[b, 7]", "float[b, 6]"), {"w": (6, 6)})
    assert len(out.graph.initializer) == 1
    (refusal,) = (r for r in inspect(proto).refusals if "is computed" in r.reason)
    assert refusal.reason.endswith("(node 'Transpose_0', Transpose): folded, it would make the file larger")
    assert refusal.nodes == ("MatMul_1",)


def test_a_table_that_is_also_multiplied_is_stored_once() -> None:
    text = """f (int64[b, 5] ids) => (float[b, 5, 120] y) { x = Gather(w, ids)  t = Transpose<perm=[1,0]>(w)
        y = MatMul(x, t) }"""
    _, out = normalised(text, {"w": (120, 11)})
    assert [tuple(i.dims) for i in out.graph.initializer] == [(120, 11)]


def test_the_rows_that_an_input_looks_up() -> None:
    text = """f (int64[b] speaker, int64[b] both, int64[b, s] x, int64[b] plain) => (float[b, 7] y, int64[b] z) {
        m = Cast<to=6>(speaker)  p = Gather(t3, m)  q = Gather(t5, both)  r = Gather<axis=1>(t3, both)
        u = Transpose(r)  v = Add(p, q)  y = Add(v, u)  i = Add(x, one)  k = Gather(t5, i)  z = Identity(plain) }"""
    weights: graphs.Weights = {"t3": (3, 7), "t5": (5, 7), "one": np.asarray(1)}
    out = graphs.parse(text, weights)
    assert looked_up(OnnxModel.from_proto(out)) == {"speaker": 3, "both": 5}


def test_the_vocabulary_behind_indices_that_are_wrapped() -> None:
    """TensorFlow and JAX count negative indices from the end; what is looked up by positions is no vocabulary."""
    text = """f (int64[b, 5] ids, int64[b, 5] mask) => (float[b, 5, 11] y) { c = Cast<to=6>(ids)  l = Less(c, zero)  a = Add(c, rows)
        w = Where(l, a, c)  x = Gather(table, w)  p = CumSum(mask, axis)  q = Mul(p, mask)  z = Gather(places, q)  y = Add(x, z) }"""
    weights = {"zero": np.asarray(0, np.int32), "rows": np.asarray(70, np.int32), "axis": np.asarray(1)}
    _, out = normalised(text, {**weights, "table": (70, 11), "places": (500, 11)})
    assert vocabulary(OnnxModel.from_proto(out)) == 70


def test_a_table_of_positions_is_no_vocabulary() -> None:
    text = """f (int64[b, 5] input_ids, int64[b, 5] position_ids) => (float[b, 5, 11] y) { r = Reshape(input_ids, shape)
        x = Gather(words, r)  z = Gather(places, position_ids)  y = Add(x, z) }"""
    _, out = normalised(text, {"shape": np.asarray([-1, 5]), "words": (70, 11), "places": (500, 11)})
    assert vocabulary(OnnxModel.from_proto(out)) == 70


def test_a_weight_of_the_head_whose_columns_are_looked_up_is_stored_once() -> None:
    text = """f (int64[b, 5] ids) => (float[b, 5, 120] y) { t = Transpose<perm=[1,0]>(w)  x = Gather(t, ids)
        y = MatMul(x, w) }"""
    _, out = normalised(text, {"w": (11, 120)})
    assert [tuple(i.dims) for i in out.graph.initializer] == [(11, 120)]
    assert vocabulary(OnnxModel.from_proto(out)) == 120


def test_what_is_a_graph_output_is_not_folded_away() -> None:
    text = "f (float[b, 6] x) => (float[b, 6] y, float[b, 6] z, float[6, 2] t) { y = Relu(x)  z = Identity(y)  t = Transpose(w) }"
    _, out = normalised(text, {"w": (2, 6)})
    assert [o.name for o in out.graph.output] == ["y", "z", "t"]


# -- saving ----------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole(proto: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    OnnxModel.from_proto(proto).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    onnx.checker.check_model(onnx.load(path))
    reference = tmp_path / "reference"
    reference.touch()
    assert path.stat().st_mode == reference.stat().st_mode


# -- weights as they are stored --------------------------------------------------------------------------------------

NARROW = """f (float[b, 6] x) => (float[b, 7] y) { w = Cast<to = 1>(w_h)  t = Transpose<perm=[1,0]>(v_h)  v = Cast<to = 1>(t)
    u = MatMul(x, w)  h = Relu(u)  y = MatMul(h, v) }"""
HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def narrow(kind: np.dtype[Any], hidden: int = 300) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {"w_h": rng.standard_normal((6, hidden)), "v_h": rng.standard_normal((7, hidden))}
    proto = graphs.parse(NARROW)
    for name, value in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(value.astype(kind), name))
    return proto


def stored(proto: onnx.ModelProto) -> dict[str, tuple[int, list[int]]]:
    return {t.name: (t.data_type, list(t.dims)) for t in proto.graph.initializer}


@pytest.mark.parametrize("kind", HALVES)
def test_what_is_stored_narrow_stays_so(kind: np.dtype[Any]) -> None:
    proto = narrow(kind)
    code = helper.np_dtype_to_tensor_dtype(kind)
    model, _, found = graphs.analyse(proto)
    assert [(g.kind, g.size) for g in found.groups] == [("ffn", 300)]
    assert model.parameters() == OnnxModel.from_proto(proto).parameters() == 6 * 300 + 7 * 300
    assert model.weight_bytes() == OnnxModel.from_proto(proto).weight_bytes() == 2 * 13 * 300
    out = graphs.prove(proto, {"b": 3})
    kept = stored(out)["w_h"][1][1]
    assert sorted(stored(out).values()) == sorted([(code, [6, kept]), (code, [kept, 7])])
    assert [n.name for n in out.graph.node if n.op_type == "Cast"]
    assert out.ByteSize() < proto.ByteSize()


@pytest.mark.parametrize("kind", HALVES)
def test_a_repaired_weight_is_rounded_behind_its_cast(kind: np.dtype[Any], tmp_path: Path) -> None:
    proto = narrow(kind)
    x = np.random.default_rng(1).standard_normal((600, 6)).astype(np.float32)
    result = prune(proto, {"x": x}, ffn=0.5, latency=False, provider="cpu")
    out = onnx.load(result.save(tmp_path / "out.onnx"))
    code = helper.np_dtype_to_tensor_dtype(kind)
    assert [t.data_type for t in out.graph.initializer if len(t.dims) == 2] == [code, code]
    assert result.report["after"]["parameters"] == sum(int(np.prod(t.dims)) for t in out.graph.initializer)
    assert result.report["after"]["bytes"] < result.report["before"]["bytes"]
    assert out.ByteSize() < proto.ByteSize()


def test_a_value_beyond_the_narrow_type_is_stored_wide() -> None:
    model, _, _ = graphs.analyse(narrow(HALVES[0]))
    (weight,) = (c for c in model.constants() if c.shape == [300, 7] or tuple(c.shape) == (300, 7))
    weight.values = np.where(np.arange(300)[:, None] == 4, np.float32(1e6), weight.values)
    out = model.to_proto()
    assert sorted(t.data_type for t in out.graph.initializer) == [TensorProto.FLOAT, TensorProto.FLOAT16]
    assert np.isfinite(oracle.run(out, {"x": np.ones((2, 6), np.float32)})[0]).all()


def test_two_forms_of_one_narrow_weight_have_names_of_their_own() -> None:
    text = """f (float[b, 6] x) => (float[b, 6] y) { w = Cast<to = 1>(w_h)  p = Slice(w, zero, four, one)  q = Slice(w, four, six, one)
        u = MatMul(x, k)  h = Relu(u)  a = MatMul(h, p)  c = MatMul(h, q)  y = Concat<axis = 1>(a, c) }"""
    bounds = {name: np.asarray([value]) for name, value in (("zero", 0), ("four", 4), ("six", 6), ("one", 1))}
    weight = np.random.default_rng(0).standard_normal((11, 6)).astype(np.float16)
    proto = graphs.parse(text, {"w_h": weight, "k": (6, 11), **bounds})
    out = graphs.prove(proto, {"b": 3})
    onnx.checker.check_model(out)
    assert [t.data_type for t in out.graph.initializer if len(t.dims) == 2].count(TensorProto.FLOAT16) == 2
    assert len({n.name for n in out.graph.node}) == len(out.graph.node)


# -- branches --------------------------------------------------------------------------------------------------------

BRANCHES = """f (float[b, 6] x, bool c) => (float[b, 7] y, float[b, 300] z) { u = MatMul(x, w1)  r = Relu(u)  v = MatMul(r, w2)
    z = If (c) <then_branch = g () => (float[b, 300] t) { t = MatMul(x, w1) },
                else_branch = e () => (float[b, 300] s) { k = Constant<value = float[2] {2.0, 3.0}>()  n = ReduceSum(k)  m = MatMul(x, w3)  s = Mul(m, n) }>
    a = MatMul(x, w5)  o = Relu(a)  p = MatMul(o, w6)  q = Add(v, p)  y = Add(q, w4) }"""
READ_INSIDE: graphs.Weights = {
    **{"w1": (6, 300), "w2": (300, 7), "w3": (6, 300), "w4": (7,)},
    **{"w5": (6, 11), "w6": (11, 7)},
}


def test_a_weight_that_branches_read_is_stored_and_counted_once() -> None:
    proto = graphs.parse(BRANCHES, READ_INSIDE)
    size = sum(int(np.prod(t.dims)) for t in proto.graph.initializer) + 2
    assert OnnxModel.from_proto(proto).parameters() == size
    model, _, found = graphs.analyse(proto)
    assert model.parameters() == size
    assert model.weight_bytes() == 4 * size
    assert [(g.kind, g.size) for g in found.groups] == [("ffn", 11)]  # what a branch reads is not cut
    out = graphs.prove(proto, {"b": 3})
    onnx.checker.check_model(out)
    assert [t.name for t in out.graph.initializer] == ["w1", "w2", "w3", "w4", "w5", "w6"]
    bodies = [a.g for n in out.graph.node for a in n.attribute if n.op_type == "If"]
    assert len(bodies) == 2
    assert not any(body.initializer for body in bodies)


def test_what_lies_in_a_branch_stays_there() -> None:
    proto = graphs.parse(BRANCHES, {k: v for k, v in READ_INSIDE.items() if k != "w3"})
    choice = next(n for n in proto.graph.node if n.op_type == "If")
    body = next(a.g for a in choice.attribute if a.name == "else_branch")
    body.initializer.append(numpy_helper.from_array(np.ones((6, 300), np.float32), "w3"))
    model = OnnxModel.from_proto(proto)
    before = model.parameters()
    model.normalise()
    assert model.parameters() == before == 6 * 300 * 2 + 300 * 7 + 7 + 6 * 11 + 11 * 7 + 2
    out = model.to_proto()
    assert "w3" not in {t.name for t in out.graph.initializer}
    for chosen in (True, False):
        feeds = {"x": np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32), "c": np.asarray(chosen)}
        for a, b in zip(oracle.run(out, feeds), oracle.run(proto, feeds), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_bias_that_a_branch_reads_too_is_cut_outside_alone() -> None:
    """A vector ties nothing: the branch keeps the old one."""
    text = """f (float[b, 6] x, bool c) => (float[b, 7] y, float[11] z) { u = MatMul(x, w1)  v = Add(u, bias)  r = Relu(v)
        y = MatMul(r, w2)  z = If (c) <then_branch = g () => (float[11] t) { t = Neg(bias) },
        else_branch = e () => (float[11] s) { s = Exp(bias) }> }"""
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 7), "bias": (11,)})
    assert graphs.sizes(proto) == [("ffn", 11)]
    graphs.prove(proto, {"b": 3})


def test_a_loop_reads_weights_from_outside() -> None:
    text = """f (float[b, 6] x) => (float[b, 7] y, float[b, 6] z) { z = Loop (times, , x) <body = g (int64 i, bool k, float[b, 6] a) => (bool again, float[b, 6] out)
        { again = Identity(k)  m = MatMul(a, square)  out = Tanh(m) }>  u = MatMul(x, w1)  h = Relu(u)  y = MatMul(h, w2) }"""
    weights: graphs.Weights = {"times": np.asarray(3), "square": (6, 6), "w1": (6, 11), "w2": (11, 7)}
    proto = graphs.parse(text, weights)
    assert OnnxModel.from_proto(proto).parameters() == 36 + 66 + 77
    out = graphs.prove(proto, {"b": 3})
    assert "square" in {t.name for t in out.graph.initializer}
    assert not any(a.g.initializer for n in out.graph.node for a in n.attribute)


# -- descriptions ----------------------------------------------------------------------------------------------------


def test_descriptions_are_kept(proto: onnx.ModelProto, tmp_path: Path) -> None:
    proto.domain, proto.model_version, proto.doc_string = "org.example", 7, "what it is for"
    proto.producer_name, proto.producer_version, proto.ir_version = "someone", "1.2", 10
    proto.metadata_props.add(key="license", value="none")
    proto.graph.name, proto.graph.doc_string = "main", "the graph"
    proto.graph.metadata_props.add(key="place", value="graph")
    for node in proto.graph.node:
        node.name, node.doc_string = f"n_{node.output[0]}", f"makes {node.output[0]}"
        node.metadata_props.add(key="scope", value=node.output[0])
    proto.graph.initializer[0].doc_string = "the first weight"
    proto.graph.input[0].doc_string = "an input"
    x = np.random.default_rng(1).standard_normal((600, 6)).astype(np.float32)
    result = prune(proto, {"x": x}, ffn=0.5, latency=False, provider="cpu")
    out = onnx.load(result.save(tmp_path / "out.onnx"))
    for field in (
        "domain",
        "model_version",
        "doc_string",
        "producer_name",
        "producer_version",
        "ir_version",
        "metadata_props",
    ):
        assert getattr(out, field) == getattr(proto, field), field
    assert sorted((o.domain, o.version) for o in out.opset_import) == sorted(
        (o.domain, o.version) for o in proto.opset_import
    )
    for field in ("name", "doc_string", "metadata_props", "input", "output"):
        assert getattr(out.graph, field) == getattr(proto.graph, field), field
    described = {n.name: (n.doc_string, [p.value for p in n.metadata_props]) for n in out.graph.node}
    assert {
        n.name: (n.doc_string, [p.value for p in n.metadata_props]) for n in proto.graph.node
    }.items() <= described.items()
    assert next(t.doc_string for t in out.graph.initializer if t.name == "w1") == "the first weight"


def test_an_input_that_is_no_tensor_is_named(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_sequence_value_info("many", 1, None))
    with pytest.raises(ModelError, match="input 'many' of the model is no tensor"):
        OnnxModel.from_proto(proto)


def test_an_input_of_texts_is_named(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("words", TensorProto.STRING, ["b"]))
    with pytest.raises(ModelError, match="input 'words' of the model takes texts"):
        OnnxModel.from_proto(proto)


def _names_of_classes() -> onnx.ModelProto:
    """As scikit-learn's classifiers are exported: the name of the class beside the scores."""
    text = """f (float[b, 6] x) => (string[b] name, float[b, 3] y) { u = MatMul(x, w1)  h = Relu(u)  y = MatMul(h, w2)
        i = ArgMax <axis = 1, keepdims = 0> (y)  name = Gather(names, i) }"""
    names = np.asarray([b"no", b"yes", b"perhaps"], object)
    proto = graphs.parse(text, {"w1": (6, 17), "w2": (17, 3)})
    proto.graph.initializer.append(numpy_helper.from_array(names, "names"))
    return proto


def _input_given_back() -> onnx.ModelProto:
    proto = graphs.parse("f (float[b, 6] x) => (float[b, 3] y) { u = MatMul(x, w1)  h = Relu(u)  y = MatMul(h, w2) }", WIDE)
    proto.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, None))  # its shape is said once
    return proto


def _weights_given_back() -> onnx.ModelProto:
    proto = graphs.parse("f (float[b, 6] x) => (float[b, 3] y) { u = MatMul(x, w1)  h = Relu(u)  y = MatMul(h, w2) }", WIDE)
    proto.graph.initializer.append(numpy_helper.from_array(np.asarray([1, 2, 4], np.float32), "scales"))
    proto.graph.output.append(helper.make_tensor_value_info("scales", TensorProto.FLOAT, [3]))
    return proto


def _a_sequence_beside() -> onnx.ModelProto:
    text = """f (float[b, 6] x) => (float[b, 3] y) { u = MatMul(x, w1)  h = Relu(u)  y = MatMul(h, w2)
        both = SequenceConstruct(y, y) }"""
    proto = graphs.parse(text, WIDE)
    proto.graph.output.append(helper.make_tensor_sequence_value_info("both", 1, None))
    return proto


WIDE: graphs.Weights = {"w1": (6, 17), "w2": (17, 3)}


def _given_twice() -> onnx.ModelProto:
    proto = graphs.parse("f (float[b, 6] x) => (float[b, 3] y) { h = MatMul(x, w1)  a = Relu(h)  y = MatMul(a, w2) }", WIDE)
    proto.graph.output.append(proto.graph.output[0])
    return proto


@pytest.mark.parametrize(
    "make", [_names_of_classes, _input_given_back, _weights_given_back, _a_sequence_beside, _given_twice]
)
def test_outputs_of_rare_kinds(make: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    """By the default options, which measure curves; the interface stays, and rows of zeros are those that go."""
    proto = make()
    (lost,) = (t for t in proto.graph.initializer if t.name == "w2")
    weight = numpy_helper.to_array(lost).copy()
    weight[3:13] = 0
    lost.CopyFrom(numpy_helper.from_array(weight, "w2"))
    x = np.random.default_rng(1).standard_normal((600, 6)).astype(np.float32)
    path = prune(proto, {"x": x}, sparsity=0.5, multiple_of=1, latency=False, provider="cpu").save(tmp_path / "out.onnx")
    out = onnx.load(path)
    assert (out.graph.input, out.graph.output) == (proto.graph.input, proto.graph.output)
    assert next(t.dims for t in out.graph.initializer if t.name == "w1") == [6, 8]
    dense, pruned = (ort.InferenceSession(m).run(None, {"x": x[:7]}) for m in (proto.SerializeToString(), str(path)))
    for expected, found in zip(dense, pruned, strict=True):
        if isinstance(expected, np.ndarray) and expected.dtype == object:
            assert list(found) == list(expected)
        else:
            np.testing.assert_allclose(found, expected, atol=1e-5)
