# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""ONNX files in and out: what is refused, what is kept, what is shared, and that nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import graphs
import numpy as np
import onnx
import oracle
import pytest
from onnx import helper, numpy_helper

from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.onnx_rules import looked_up, vocabulary
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


def test_other_folds_of_one_weight_are_others() -> None:
    text = """f (float[b, 6] x) => (float[b, 6] y) { t = Transpose<perm=[1,0]>(w)  a = MatMul(x, t)  r = Relu(a)
        y = MatMul(r, w) }"""
    _, out = normalised(text, {"w": (6, 6)})
    assert len(out.graph.initializer) == 2


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
