"""Every file that the input consists of is known, and none that only lies beside it."""

from __future__ import annotations

import os
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest

from liar_opt.frontend.input_files import Inputs

BRANCH = """f (bool c, float[b, 5] x) => (float[b, 7] y) {
    y = If(c) <
        then_branch = t () => (float[b, 7] p) { p = MatMul(x, w) },
        else_branch = e () => (float[b, 7] q) <float[5, 7] v = {VALUES}> { q = MatMul(x, v) }
    >
}"""


def found(inputs: Inputs, folder: Path) -> list[str]:
    return sorted(os.path.relpath(path, folder) for path, _ in inputs.files())


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_a_model_with_data_wherever_it_stands(tmp_path: Path) -> None:
    proto = graphs.parse(BRANCH.replace("VALUES", ", ".join(["0.5"] * 35)), {"w": (5, 7)})
    inner = proto.graph.node[0].attribute[1].g.initializer[0]
    sparse = proto.graph.sparse_initializer.add()
    sparse.values.CopyFrom(onnx.numpy_helper.from_array(np.ones(3, np.float32), "s"))
    tensors = {"w.bin": proto.graph.initializer[0], "sub/v.bin": inner, "s.bin": sparse.values}
    for location, tensor in tensors.items():
        touch(tmp_path, location)
        data = onnx.numpy_helper.to_array(tensor).tobytes()
        tensor.ClearField("float_data")
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        (tmp_path / location).write_bytes(data)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    touch(tmp_path, "m.onnx.data", "other.bin")
    assert found(Inputs((tmp_path / "m.onnx",)), tmp_path) == ["m.onnx", "s.bin", "sub/v.bin", "w.bin"]
    touch(tmp_path, "genai_config.json")
    assert "genai_config.json" in found(Inputs((str(tmp_path / "m.onnx"),)), tmp_path)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x08\x3a\xff"])
def test_a_file_that_is_no_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    assert found(Inputs((tmp_path / "m.onnx",)), tmp_path) == ["m.onnx"]


def test_a_checkpoint_is_its_folder(tmp_path: Path) -> None:
    mine = ["config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json", "README.md"]
    touch(tmp_path, *mine, "small.onnx")
    (tmp_path / "r.json").write_text('{\n "schema": 1')
    (tmp_path / "r.html").write_text("<!DOCTYPE html><!-- liar-opt report --><html>")
    assert found(Inputs((tmp_path,)), tmp_path) == sorted(mine)


def test_calibration_and_tokenizers(tmp_path: Path) -> None:
    touch(
        tmp_path, "a/ids.npy", "a/mask.npy", "a/out.onnx", "d/state.json", "d/data-0.arrow", "d/sub/data.arrow", "data.npz"
    )
    touch(tmp_path, "t/tokenizer.json", "t/vocab.txt", "t/spiece.model", "t/out.onnx", "t/r.json", "ops.so")
    assert found(Inputs(calibration=tmp_path / "a"), tmp_path) == ["a/ids.npy", "a/mask.npy"]
    assert found(Inputs(calibration=str(tmp_path / "d")), tmp_path) == [
        "d/data-0.arrow",
        "d/state.json",
        "d/sub/data.arrow",
    ]
    assert found(Inputs(calibration=tmp_path / "data.npz", more=(tmp_path / "ops.so", None)), tmp_path) == [
        "data.npz",
        "ops.so",
    ]
    # as the command and Python give them: several libraries, a folder of token ids
    assert found(Inputs(more=([tmp_path / "ops.so", str(tmp_path / "data.npz")], tmp_path / "a")), tmp_path) == [
        "a/ids.npy",
        "a/mask.npy",
        "data.npz",
        "ops.so",
    ]
    tokenizer = ["t/spiece.model", "t/tokenizer.json", "t/vocab.txt"]
    assert found(Inputs(tokenizers=(tmp_path / "t", None)), tmp_path) == tokenizer
    assert found(Inputs(tokenizers=(tmp_path / "t" / "tokenizer.json",)), tmp_path).count("t/tokenizer.json") >= 1


def test_what_is_no_path(tmp_path: Path) -> None:
    given = (object(), "owner/name", "x" * 5000, "a\0b", None)
    assert list(Inputs(given, {"x": np.ones(3)}, ("bert-base-uncased",), (None,)).files()) == []
