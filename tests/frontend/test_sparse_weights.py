"""Sparse weights are the dense ones that they stand for, wherever they are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import oracle
import pytest
from onnx import SparseTensorProto, helper, numpy_helper

from liar_opt import prune
from liar_opt.frontend.onnx_interface import read_interface
from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.passes.prune_job import inspect
from liar_opt.runtime.errors import ModelError

TEXT = "f (float[b, 6] x) => (float[b, 7] y) { u = MatMul(x, w1)  h = Relu(u)  y = MatMul(h, w2) }"


def thinned(shape: tuple[int, ...], seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < 0.6, 0, rng.standard_normal(shape)).astype(dtype)


def sparse(value: np.ndarray, name: str, flat: bool) -> SparseTensorProto:
    places = np.flatnonzero(value) if flat else np.argwhere(value)
    return SparseTensorProto(
        values=numpy_helper.from_array(value.reshape(-1)[np.flatnonzero(value)], name),
        indices=numpy_helper.from_array(places.astype(np.int64), f"{name}_places"),
        dims=value.shape,
    )


def pair(flat: bool, dtype: type = np.float32) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Returns a model with a sparse first weight, and the same with dense ones."""
    w1, w2 = thinned((6, 11), 0, dtype), thinned((11, 7), 1, dtype)
    text = TEXT if dtype is np.float32 else TEXT.replace("float[", "float16[")
    dense = graphs.parse(text, {"w1": w1, "w2": w2})
    some = graphs.parse(text, {"w2": w2})
    some.graph.sparse_initializer.append(sparse(w1, "w1", flat))
    return some, dense


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("flat", [True, False])
def test_both_layouts_are_read(flat: bool, dtype: type) -> None:
    some, dense = pair(flat, dtype)
    before = some.SerializeToString()
    model = OnnxModel.from_proto(some)
    assert some.SerializeToString() == before
    assert model.parameters() == OnnxModel.from_proto(dense).parameters()
    assert model.weight_bytes() == OnnxModel.from_proto(dense).weight_bytes()
    assert any("sparse weights (1) are read and written dense" in note for note in model.notes)
    out = model.to_proto()
    assert not out.graph.sparse_initializer
    found = {t.name: numpy_helper.to_array(t) for t in out.graph.initializer}
    for tensor in dense.graph.initializer:
        np.testing.assert_array_equal(found[tensor.name], numpy_helper.to_array(tensor))


@pytest.mark.parametrize("flat", [True, False])
def test_a_cut_of_sparse_weights_is_one_of_dense_weights(flat: bool) -> None:
    some, dense = pair(flat)
    feeds = graphs.feeds_of(dense, {"b": 3})
    np.testing.assert_array_equal(oracle.run(some, feeds)[0], oracle.run(dense, feeds)[0])  # ONNX Runtime's own reading
    graphs.prove(some, {"b": 3})
    found = graphs.analyse(some)[2]
    kept = oracle.random_kept(found.groups, 0)
    ours, theirs = (oracle.run(graphs.cut(p, kept), feeds)[0] for p in (some, dense))
    np.testing.assert_array_equal(ours, theirs)


def test_the_whole_command(tmp_path: Path) -> None:
    some, dense = pair(True)
    onnx.save(some, tmp_path / "sparse.onnx")
    assert read_interface(tmp_path / "sparse.onnx").parameters == 6 * 11 + 11 * 7
    inspection = inspect(tmp_path / "sparse.onnx")
    assert [(g.kind, g.size) for g in inspection.groups] == [("ffn", 11)]
    data = {"x": np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)}
    options: dict[str, Any] = {"ffn": 0.5, "multiple_of": 1, "latency": False, "provider": "cpu"}
    ours, theirs = prune(tmp_path / "sparse.onnx", data, **options), prune(dense, data, **options)
    path = ours.save(tmp_path / "out.onnx")
    assert ours.report["after"] == theirs.report["after"]
    assert sum(int(np.prod(t.dims)) for t in onnx.load(path).graph.initializer) == ours.report["after"]["parameters"]
    assert any("written dense" in note for note in ours.report["model"]["notes"])


def test_constants_and_branches_hold_sparse_tensors() -> None:
    w1, inner = thinned((6, 11)), thinned((6, 7), 2)
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "v"], ["e"])], "body", [], [helper.make_tensor_value_info("e", 1, None)]
    )
    body.sparse_initializer.append(sparse(inner, "v", False))
    other = helper.make_graph(
        [
            helper.make_node("Constant", [], ["q"], sparse_value=sparse(inner, "q", True)),
            helper.make_node("MatMul", ["x", "q"], ["t"]),
        ],
        *("other", [], [helper.make_tensor_value_info("t", 1, None)]),
    )
    proto = graphs.parse(
        TEXT.replace("(float[b, 6] x)", "(float[b, 6] x, bool c)").replace(
            "(float[b, 7] y)", "(float[b, 7] y, float[b, 7] z)"
        ),
        {"w2": (11, 7)},
    )
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w1"], sparse_value=sparse(w1, "w1", False)))
    proto.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=other, else_branch=body))
    model = OnnxModel.from_proto(proto)
    assert model.parameters() == 6 * 11 + 11 * 7 + 2 * 6 * 7
    model.normalise()
    out = model.to_proto()
    assert b"sparse" not in out.SerializeToString()
    for choice in (True, False):
        x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
        y, z = oracle.run(out, {"x": x, "c": np.asarray(choice)})
        np.testing.assert_allclose(z, x @ inner, rtol=1e-5, atol=1e-6)
    assert y.shape == (3, 7)


def test_what_cannot_be_dense_is_refused() -> None:
    def refused(change: str) -> str:
        some, _ = pair(False)
        tensor = some.graph.sparse_initializer[0]
        if change == "outside":
            tensor.dims[0] = 3
        elif change == "short":
            tensor.indices.CopyFrom(numpy_helper.from_array(np.zeros((2, 2), np.int64), "i"))
        elif change == "rank":
            tensor.dims.append(1)
        elif change == "negative":
            tensor.indices.CopyFrom(numpy_helper.from_array(-1 - np.argwhere(thinned((6, 11))), "i"))
        else:
            tensor.dims[:] = [1 << 40, 1 << 40]
        with pytest.raises(ModelError) as caught:
            OnnxModel.from_proto(some)
        return str(caught.value)

    for change in ("outside", "short", "rank", "negative"):
        assert "sparse initializer 'w1'" in refused(change)
        assert "cannot be read" in refused(change)
    assert "as dense weights, and at most" in refused("huge")
