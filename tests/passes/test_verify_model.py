# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""The check can fail: a wrong weight, a wrong bias, another interface."""

from __future__ import annotations

import graphs
import numpy as np
import onnx
import oracle
import pytest
import zoo

import liar_opt
from liar_opt.frontend.onnx_model import onnx_graph
from liar_opt.passes.base import State
from liar_opt.passes.find_groups import FindGroupsPass
from liar_opt.passes.normalise_graph import NormaliseGraphPass
from liar_opt.passes.open_model import load_state
from liar_opt.passes.prune_groups import PruneGroupsPass
from liar_opt.passes.verify_model import Verification, VerifyModelPass
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.compare import TOLERANCES
from liar_opt.runtime.errors import CheckError

TEXT = """f (float[b, s, 6] x) => (float[b, s, 5] y) { u = MatMul(x, w1)  h = Relu(u)  v = MatMul(h, w2)  k = Tanh(v)
    y = MatMul(k, w3) }"""
WEIGHTS: graphs.Weights = {"w1": (6, 17), "w2": (17, 13), "w3": (13, 5)}


def cut(hidden: int = 17, text: str = TEXT) -> State:
    far = {"far": np.asarray(-15, np.float32)}
    state = load_state(graphs.parse(text, {**WEIGHTS, **far, "w1": (6, hidden), "w2": (hidden, 13)}))
    NormaliseGraphPass()(state)
    FindGroupsPass()(state)
    rng = np.random.default_rng(0)
    feeds = tuple({"x": rng.standard_normal((6, 4, 6)).astype(np.float32)} for _ in range(12))
    state.calibration = CalibrationData(feeds, (None,) * 12, 72, 72, "test", (), False)
    state.keep = {g.name: g.size // 2 for g in state.groups}
    PruneGroupsPass()(state)
    return state


def constant(state: State, name: str) -> np.ndarray:
    (found,) = (c for c in state.model.constants() if c.name == name)
    found.values = np.array(found.values)
    values: np.ndarray = found.values
    return values


def test_a_right_cut_passes_and_is_measured() -> None:
    state = cut()
    VerifyModelPass()(state)
    found = state.found(Verification)
    assert found.exact_difference <= 1e-5
    assert found.exact_dtype == "float32"
    assert found.outputs["y"].rows == 24  # one of twelve batches is held back
    assert 0 < found.outputs["y"].relative_rms < 1


@pytest.mark.parametrize("name", ["w1", "w2", "w3"])
def test_a_wrong_weight_is_caught(name: str) -> None:
    state = cut()
    constant(state, name)[0, 0] += 0.5
    with pytest.raises(CheckError, match="cut against masked original: output 'y' differs"):
        VerifyModelPass()(state)


def test_a_wrong_bias_is_caught() -> None:
    state = cut()
    (name,) = (c.name for c in state.model.constants() if c.name.startswith("w3_"))
    constant(state, name)[1] += 0.5
    with pytest.raises(CheckError, match="differs"):
        VerifyModelPass()(state)


def test_another_interface_is_caught() -> None:
    state = cut()
    state.model.graph.outputs[0].name = "z"
    with pytest.raises(CheckError, match="the outputs changed"):
        VerifyModelPass()(state)


def test_a_shape_that_is_no_cache_may_not_change() -> None:
    state = cut()
    state.model.resize(state.model.graph.outputs[0], 2, 4)
    with pytest.raises(CheckError, match="the outputs changed"):
        VerifyModelPass()(state)


def test_what_onnx_runtime_cannot_load_is_caught() -> None:
    state = cut()
    next(n for n in state.model.graph.nodes if n.op == "Tanh").op = "Tanhh"
    with pytest.raises(CheckError, match=r"checker refuses|cannot load"):
        VerifyModelPass()(state)


def test_a_graph_that_the_checker_never_liked_is_not_refused_for_it() -> None:
    """ONNX Runtime's optimizer writes LayerNormalization into graphs of opset 13."""
    proto = graphs.parse(
        "f (float[b, s, 6] x) => (float[b, s, 6] y) { n = LayerNormalization(x, g)  u = MatMul(n, w1)  h = Relu(u)  y = MatMul(h, w2) }",
        {"g": (6,), "w1": (6, 11), "w2": (11, 6)},
        opset=13,
    )
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(proto)
    state = load_state(proto)
    NormaliseGraphPass()(state)
    FindGroupsPass()(state)
    feeds = tuple({"x": np.random.default_rng(i).standard_normal((6, 4, 6)).astype(np.float32)} for i in range(3))
    state.calibration = CalibrationData(feeds, (None,) * 3, 18, 18, "test", (), False)
    state.keep = {g.name: 5 for g in state.groups}
    PruneGroupsPass()(state)
    VerifyModelPass()(state)


def test_half_precision_keeps_the_shape_of_its_output() -> None:
    """The converter lists the output again, without a shape, among the inner values."""
    built = zoo.ready(next(c for c in zoo.cases(fast=True) if c.name == "bert-torchscript-eager-dynamic-transformers"))
    proto = onnx.load(built.path)
    again = proto.graph.value_info.add()
    again.name = proto.graph.output[0].name
    again.type.tensor_type.elem_type = 1
    state = load_state(proto)
    shapes = [len(v.type.tensor_type.shape.dim) for v in onnx_graph(state.model).to_proto().graph.output]
    assert shapes == [len(v.type.tensor_type.shape.dim) for v in proto.graph.output]


@pytest.mark.parametrize("wrong", [False, True])
def test_rounding_that_the_model_magnifies_by_itself_is_no_fault_of_the_cut(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liar_opt.frontend.graph_tensors.STUB_LIMIT", 0)  # every weight counts as large
    monkeypatch.setitem(TOLERANCES, "float32", 1e-12)
    state = cut(hidden=801)  # sums of so many are added up in pieces, which the cut shifts
    if wrong:
        constant(state, "w2")[0, 0] += 0.5
        with pytest.raises(CheckError, match="differs"):
            VerifyModelPass()(state)
        return
    VerifyModelPass()(state)
    found = state.found(Verification)
    assert found.rounding is not None and 1e-8 < found.rounding < 1e-5
    assert 1e-12 < found.exact_difference <= 16 * found.rounding


@pytest.mark.parametrize("wrong", [False, True])
def test_tiny_probabilities_come_in_steps(wrong: bool) -> None:
    """What detects objects finds none in random images: the steps of the last sigmoid are a tenth of the output then."""
    state = cut(hidden=801, text=TEXT.replace("y = MatMul(k, w3)", "m = MatMul(k, w3)  z = Add(m, far)  y = Sigmoid(z)"))
    if wrong:
        constant(state, "w3")[0, :] += 9
        with pytest.raises(CheckError, match="differs"):
            VerifyModelPass()(state)
        return
    VerifyModelPass()(state)
    assert state.found(Verification).exact_difference < 1e-6


# -- outputs that are no tensors -------------------------------------------------------------------------------------


def in_parts(kind: str) -> onnx.ModelProto:
    """Returns a model whose only output is a sequence of its result, or a map of classes for each sample."""
    rng = np.random.default_rng(0)
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w1"], ["u"], name="up"),
        onnx.helper.make_node("Relu", ["u"], ["h"]),
        onnx.helper.make_node("MatMul", ["h", "w2"], ["v"], name="down"),
    ]
    output = onnx.helper.make_tensor_sequence_value_info("all", 1, None)
    if kind == "sequence":
        nodes.append(onnx.helper.make_node("SequenceConstruct", ["v", "x"], ["all"]))
    else:
        labels = ["no", "yes", "may", "be", "not"]
        nodes.append(onnx.helper.make_node("ZipMap", ["v"], ["all"], domain="ai.onnx.ml", classlabels_strings=labels))
        output = onnx.ValueInfoProto(name="all")
        held = output.type.sequence_type.elem_type.map_type
        held.key_type, held.value_type.tensor_type.elem_type = onnx.TensorProto.STRING, onnx.TensorProto.FLOAT
    weights = {"w1": rng.standard_normal((6, 17)), "w2": rng.standard_normal((17, 5))}
    initializers = [onnx.numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()]
    given = onnx.helper.make_tensor_value_info("x", 1, ["b", 6])
    graph = onnx.helper.make_graph(nodes, "g", [given], [output], initializers)
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("ai.onnx.ml", 3)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=8)


def cut_in_parts(kind: str) -> State:
    state = load_state(in_parts(kind))
    NormaliseGraphPass()(state)
    FindGroupsPass()(state)
    rng = np.random.default_rng(0)
    feeds = tuple({"x": rng.standard_normal((6, 6)).astype(np.float32)} for _ in range(12))
    state.calibration = CalibrationData(feeds, (None,) * 12, 72, 72, "test", (), False)
    state.keep = {g.name: g.size // 2 for g in state.groups}
    PruneGroupsPass()(state)
    return state


@pytest.mark.parametrize(
    ("kind", "names"),
    [("sequence", {"all[0]", "all[1]"}), ("map", {f"all[{k}]" for k in ("no", "yes", "may", "be", "not")})],
)
def test_sequences_and_maps_are_compared_in_their_parts(kind: str, names: set[str]) -> None:
    state = cut_in_parts(kind)
    assert [(g.kind, g.size) for g in state.groups] == [("ffn", 17)]
    VerifyModelPass()(state)
    found = state.found(Verification)
    assert found.exact_difference <= 1e-5
    assert set(found.outputs) == names
    assert found.not_compared is None
    written = onnx.shape_inference.infer_shapes(onnx_graph(state.model).to_proto())
    assert written.graph.output[0].type.WhichOneof("value") == "sequence_type"
    assert (
        onnx.ModelProto.FromString(onnx_graph(state.model).to_proto().SerializeToString()).graph.output[0]
        == in_parts(kind).graph.output[0]
    )


@pytest.mark.parametrize("kind", ["sequence", "map"])
def test_a_wrong_weight_behind_a_sequence_is_caught(kind: str) -> None:
    state = cut_in_parts(kind)
    constant(state, "w2")[0, 0] += 0.5
    with pytest.raises(CheckError, match=r"output 'all\["):
        VerifyModelPass()(state)


def test_logits_tell_how_often_the_largest_changes() -> None:
    """Of two outputs the one whose name says it."""
    text = "f (float[b, s, 6] x0) => (float[b, s, 6] hidden, float[b, s, 5] logits) { u = MatMul(x0, w0)  h = Relu(u)  z = MatMul(h, v0)  hidden = Add(x0, z)  logits = MatMul(hidden, c0) }"
    proto = graphs.parse(text, {"w0": (6, 47), "v0": (47, 6), "c0": (6, 5)})
    feeds = {"x0": np.random.default_rng(0).standard_normal((7, 9, 6)).astype(np.float32)}
    report = liar_opt.prune(proto, feeds, ffn=0.7, repair="none", latency=False, multiple_of=1)
    outputs = report.report["verification"]["outputs"]
    assert outputs["hidden"]["changed_top1"] is None
    x, y = (oracle.run(model, feeds)[1].argmax(-1) for model in (report.model, proto))
    assert 0 < outputs["logits"]["changed_top1"] == pytest.approx((x != y).mean())
