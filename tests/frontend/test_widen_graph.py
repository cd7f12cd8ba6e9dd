"""A model in bfloat16 is measured and checked in float32, and stays in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import ml_dtypes
import numpy as np
import onnx
import pytest
import streams
from onnx import TensorProto, helper, numpy_helper

import liar_opt
from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.widen_graph import narrow_values, widen
from liar_opt.runtime import memory
from liar_opt.runtime.sessions import Session

WEIGHTS: graphs.Weights = {"w0": (6, 97), "b0": (97,), "v0": (97, 6)}


def narrow(dtype: Any = ml_dtypes.bfloat16, kind: int = TensorProto.BFLOAT16) -> onnx.ModelProto:
    """x -> bfloat16 (or another type) -> a feed-forward layer -> float32."""
    wide = graphs.parse(f"f (float[b, s, 6] x0) => (float[b, s, 6] x1) {{ {streams.BLOCK.format(0, 1)} }}", WEIGHTS)
    tensors = []
    for tensor in wide.graph.initializer:
        value = numpy_helper.to_array(tensor).astype(dtype)
        tensors.append(helper.make_tensor(tensor.name, kind, value.shape, value.tobytes(), raw=True))
    nodes = [helper.make_node("Cast", ["x0"], ["n0"], name="narrow", to=kind)]
    for node in wide.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for names in (copy.input, copy.output):
            for i, name in enumerate(names):
                names[i] = {"x0": "n0", "x1": "n1"}.get(name, name)
        nodes.append(copy)
    nodes.append(helper.make_node("Cast", ["n1"], ["x1"], name="widen", to=TensorProto.FLOAT))
    graph = helper.make_graph(nodes, "f", wide.graph.input, wide.graph.output, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_is_widened_computes_the_same() -> None:
    proto = narrow()
    wide = widen(proto)
    assert all(t.data_type == TensorProto.BFLOAT16 for t in proto.graph.initializer)
    x = np.random.default_rng(0).standard_normal((2, 3, 6)).astype(np.float32)
    got = Session(wide.SerializeToString()).run({"x0": x}, arrays=True)["x1"]
    w, b, v = (narrow_values(t).astype(np.float32) for t in proto.graph.initializer)
    np.testing.assert_allclose(got, x + np.maximum(x @ w + b, 0) @ v, rtol=1e-5, atol=1e-5)


def test_other_models_are_not_touched() -> None:
    proto = graphs.parse("f (float[b, 6] x) => (float[b, 5] y) { y = MatMul(x, w) }", {"w": (6, 5)})
    assert widen(proto) is proto


@pytest.mark.parametrize("small", [False, True])
def test_a_model_is_pruned_in_its_own_type(small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the biases keep their numbers in the proto."""
    proto = narrow()
    if small:
        for tensor in proto.graph.initializer:
            numbers = np.frombuffer(tensor.raw_data, np.uint16)
            tensor.ClearField("raw_data")
            tensor.int32_data.extend(int(n) for n in numbers)
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    feeds = [dict(f) for f in streams.batches(20, 0)]
    errors = {}
    for repair in ("liar", "none"):
        result = liar_opt.prune(path, feeds, ffn=0.5, multiple_of=1, repair=repair, latency=False)
        out = result.save(tmp_path / f"{repair}.onnx")
        stored = onnx.load(out)
        assert {t.name for t in stored.graph.initializer} >= {"w0", "b0", "v0"}
        for tensor in stored.graph.initializer:
            assert tensor.data_type == TensorProto.BFLOAT16
        shapes = {t.name: list(t.dims) for t in stored.graph.initializer}
        assert shapes["w0"] == [6, 49]
        assert result.report["verification"]["exact_dtype"] == "bfloat16"
        onnx.checker.check_model(stored, full_check=True)
        errors[repair] = result.report["verification"]["outputs"]["x1"]["relative_rms"]
        x = streams.batches(1, 5)[0]["x0"]
        data, arrays = OnnxModel.load(out).detached()
        assert Session(data, weights=arrays).run({"x0": x}, arrays=True)["x1"].shape == x.shape
    assert errors["liar"] < 0.7 * errors["none"]


@pytest.mark.parametrize("large", [False, True])
def test_half_precision_needs_no_help(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime casts by itself; weights are written in float16, also by the sessions of large models."""
    if large:
        monkeypatch.setattr(memory, "LARGE_MODEL", 1 << 40)
    proto = narrow(np.float16, TensorProto.FLOAT16)
    assert widen(proto) is proto
    feeds = [dict(f) for f in streams.batches(20, 0)]
    errors = []
    for repair in ("liar", "none"):
        result = liar_opt.prune(proto, feeds, ffn=0.5, multiple_of=1, repair=repair, latency=False)
        assert {t.data_type for t in result.model.graph.initializer} == {TensorProto.FLOAT16}
        assert result.report["verification"]["exact_dtype"] == "float16"
        errors.append(result.report["verification"]["outputs"]["x1"]["relative_rms"])
    assert errors[0] < 0.7 * errors[1]
