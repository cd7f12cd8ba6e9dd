"""What is read of a file without running it, quantised or not."""

from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest

from liar_opt.frontend.onnx_interface import read_interface
from liar_opt.runtime.errors import ModelError

TEXT = """
f (int64[b, s] ids, float[b, 3, 4] x) => (float[b, s, 5] y, float[b, 3, 6] z) {
    y = Gather(table, ids)
    z = MatMul(x, w)
}"""
WEIGHTS = {"table": (7, 5), "w": (4, 6)}


def test_a_float_model(tmp_path: Path) -> None:
    onnx.save(graphs.parse(TEXT, WEIGHTS), tmp_path / "m.onnx")
    found = read_interface(tmp_path / "m.onnx")
    assert [(i.name, i.dtype.name, i.shape) for i in found.inputs] == [
        ("ids", "int64", ("b", "s")),
        ("x", "float32", ("b", 3, 4)),
    ]
    assert (found.parameters, found.weight_bytes, found.vocabulary) == (7 * 5 + 4 * 6, 4 * (7 * 5 + 4 * 6), 7)


def test_external_data(tmp_path: Path) -> None:
    proto = graphs.parse(TEXT, {"table": (700, 5), "w": (4, 6)})
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=64)
    assert read_interface(tmp_path / "m.onnx").parameters == 700 * 5 + 4 * 6


def test_a_quantised_model(tmp_path: Path) -> None:
    text = """
    f (float[b, 4] x) => (float[b, 6] y) {
        f = DequantizeLinear(w, scale)
        y = MatMul(x, f)
    }"""
    weights: graphs.Weights = {"w": np.ones((4, 6), np.int8), "scale": np.float32(0.5)}
    onnx.save(graphs.parse(text, weights), tmp_path / "m.onnx")
    found = read_interface(tmp_path / "m.onnx")
    assert (found.parameters, found.weight_bytes, found.vocabulary) == (4 * 6 + 1, 4 * 6 + 4, None)


def test_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("nothing")
    with pytest.raises(ModelError, match="cannot be read as ONNX"):
        read_interface(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="is not a file"):
        read_interface(tmp_path / "no.onnx")
