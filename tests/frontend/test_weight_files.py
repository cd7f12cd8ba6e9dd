"""Weights by memory map and written as they go: the same bytes, no copies, nothing left behind."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import graphs
import ml_dtypes
import numpy as np
import onnx
import oracle
import pytest
from onnx import TensorProto, helper, numpy_helper

from liar_opt.frontend import weight_files
from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.weight_files import completed, lightened, read_model, write_model
from liar_opt.runtime.errors import ModelError

TEXT = "f (float[b, 6] x) => (float[b, 7] y) { u = MatMul(x, w1)  h = Relu(u)  v = Add(h, b1)  y = MatMul(v, w2) }"
WEIGHTS: graphs.Weights = {"w1": (6, 300), "b1": (300,), "w2": (300, 7)}


@pytest.fixture
def proto() -> onnx.ModelProto:
    made = graphs.parse(TEXT, WEIGHTS)
    made.metadata_props.add(key="author", value="someone")
    made.producer_name = "test"
    made.graph.doc_string = "a graph"
    return made


def save(proto: onnx.ModelProto, path: Path, **options: Any) -> Path:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    onnx.save(copy, path, **options)
    return path


def external(proto: onnx.ModelProto, folder: Path) -> Path:
    return save(proto, folder / "model.onnx", save_as_external_data=True, location="model.bin", size_threshold=0)


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "MAP_FROM", 0)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.usefixtures("mapped")
def test_weights_are_views_of_the_file(inside: bool, proto: onnx.ModelProto, tmp_path: Path) -> None:
    path = save(proto, tmp_path / "model.onnx") if inside else external(proto, tmp_path)
    light, arrays = read_model(path)
    # Everything is external there, small as it may be; in the file itself only what is worth it.
    assert set(arrays) == ({"w1", "w2"} if inside else {"w1", "b1", "w2"})
    for tensor in proto.graph.initializer:
        if tensor.name in arrays:
            np.testing.assert_array_equal(arrays[tensor.name], numpy_helper.to_array(tensor))
            assert not arrays[tensor.name].flags.writeable
            assert not arrays[tensor.name].flags.owndata
    assert light.ByteSize() < 3000
    back = completed(light, arrays)
    for a, b in zip(back.graph.initializer, proto.graph.initializer, strict=True):
        assert a.SerializeToString() == b.SerializeToString()


def test_what_was_written_is_what_protobuf_writes(proto: onnx.ModelProto, tmp_path: Path) -> None:
    for name, value in (
        ("i", np.arange(600)),
        ("f", np.ones((40, 60), np.float16)),
        ("d", np.eye(30)),
        ("z", np.ones((0, 7))),
    ):
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    typed = helper.make_tensor("t", TensorProto.FLOAT, [1500], np.arange(1500.0))
    proto.graph.initializer.append(typed)
    write_model(*lightened(proto), tmp_path / "inside.onnx")
    assert (tmp_path / "inside.onnx").read_bytes() == proto.SerializeToString()
    write_model(*read_model(tmp_path / "inside.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == proto.SerializeToString()


@pytest.mark.usefixtures("mapped")
def test_a_mapped_model_computes_the_same(proto: onnx.ModelProto, tmp_path: Path) -> None:
    feeds = graphs.feeds_of(proto, {"b": 3})
    model = OnnxModel.load(external(proto, tmp_path))
    assert model.normalise() == 0
    assert all(not c.values.flags.owndata for c in model.constants())
    np.testing.assert_array_equal(oracle.run(model.to_proto(), feeds)[0], oracle.run(proto, feeds)[0])
    np.testing.assert_array_equal(
        oracle.run(model.stored.as_given() if model.stored else proto, feeds)[0], oracle.run(proto, feeds)[0]
    )


@pytest.mark.usefixtures("mapped")
def test_offsets_need_not_be_aligned(proto: onnx.ModelProto, tmp_path: Path) -> None:
    path = external(proto, tmp_path)
    stored = onnx.load(path, load_external_data=False)
    data = (tmp_path / "model.bin").read_bytes()
    for tensor in stored.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = str(int(entry.value) + 3)
    path.write_bytes(stored.SerializeToString())
    (tmp_path / "model.bin").write_bytes(b"\0\0\0" + data)
    model = OnnxModel.load(path)
    feeds = graphs.feeds_of(proto, {"b": 3})
    np.testing.assert_array_equal(oracle.run(model.to_proto(), feeds)[0], oracle.run(proto, feeds)[0])


def test_types_that_numpy_lacks(tmp_path: Path) -> None:
    """bfloat16 is an array of its own type; four-bit numbers stay as the file has them."""
    value = np.arange(6000, dtype=np.float32).astype(ml_dtypes.bfloat16)
    half = helper.make_tensor("h", TensorProto.BFLOAT16, [60, 100], value.tobytes(), raw=True)
    small = helper.make_tensor("s", TensorProto.INT4, [60, 200], bytes(6000), raw=True)
    node = helper.make_node("Shape", ["h"], ["y"])
    other = helper.make_node("Shape", ["s"], ["z"])
    ends = [helper.make_tensor_value_info(n, TensorProto.INT64, [2]) for n in "yz"]
    graph = helper.make_graph([node, other], "g", [], ends, [half, small])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    for path in (save(proto, tmp_path / "inside.onnx"), external(proto, tmp_path)):
        light, arrays = read_model(path)
        assert arrays["h"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(arrays["h"], value.reshape(60, 100))
        assert "s" not in arrays
        assert light.graph.initializer[1].raw_data == bytes(6000)
        write_model(light, arrays, tmp_path / "back.onnx")
        assert onnx.load(tmp_path / "back.onnx").SerializeToString() == proto.SerializeToString()


def test_tensors_of_attributes_are_read(tmp_path: Path) -> None:
    value = numpy_helper.from_array(np.arange(3000, dtype=np.float32), "c")
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=value), helper.make_node("Add", ["x", "c"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3000])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3000])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = save(
        proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0, convert_attribute=True
    )
    model = OnnxModel.load(path)
    model.normalise()
    feeds = {"x": np.ones(3000, np.float32)}
    np.testing.assert_array_equal(oracle.run(model.to_proto(), feeds)[0], np.arange(3000) + 1)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("length", "7204", r"'w1' .* has 7204 bytes at 0 of 'model\.bin', its shape \[6, 300\] needs 7200"),
        ("offset", "-4", r"'w1' .* needs 7200"),
        ("offset", "many", r"'w1' .* needs 7200"),
        ("offset", "100000", r"'model\.bin' .* ends before initializer 'w1' does"),
        ("location", "../model.bin", r"'\.\./model\.bin' .* is not within the model's folder"),
        ("location", "/etc/passwd", r"'/etc/passwd' .* is not within the model's folder"),
        ("location", "other.bin", r"'other\.bin' .* is missing"),
    ],
)
def test_external_data_that_does_not_fit(key: str, value: str, match: str, proto: onnx.ModelProto, tmp_path: Path) -> None:
    path = external(proto, tmp_path)
    stored = onnx.load(path, load_external_data=False)
    for entry in stored.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    path.write_bytes(stored.SerializeToString())
    with pytest.raises(ModelError, match=match):
        OnnxModel.load(path)


def test_a_proto_without_its_data_is_refused(proto: onnx.ModelProto, tmp_path: Path) -> None:
    stored = onnx.load(external(proto, tmp_path), load_external_data=False)
    with pytest.raises(ModelError, match="external data of initializer 'w1' is not loaded"):
        OnnxModel.from_proto(stored)


# -- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_a_failure_leaves_nothing(
    beside: bool, allowed: int, proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.onnx"
    path.write_bytes(b"precious")
    write, calls = weight_files._write, []

    def fill(stream: Any, data: Any) -> None:
        calls.append(data)
        if len(calls) > allowed:
            raise OSError(28, "No space left on device")
        write(stream, data)

    monkeypatch.setattr(weight_files, "_write", fill)
    if beside:
        monkeypatch.setattr(weight_files, "EXTERNAL_LIMIT", 1000)
    with pytest.raises(OSError, match="No space"):
        write_model(*lightened(proto), path)
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    assert path.read_bytes() == b"precious"


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of a file there")
@pytest.mark.parametrize("beside", [False, True])
def test_a_full_disk(beside: bool, proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system itself refuses the bytes beyond some thousand."""
    import resource

    if beside:
        monkeypatch.setattr(weight_files, "EXTERNAL_LIMIT", 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            write_model(*lightened(proto), tmp_path / "out.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(proto: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_model(*lightened(proto), tmp_path / "none" / "out.onnx")


def test_large_models_keep_their_weights_beside_them(
    proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model in memory is the same afterwards: it can be saved again, and run."""
    monkeypatch.setattr(weight_files, "EXTERNAL_LIMIT", 1000)
    feeds = graphs.feeds_of(proto, {"b": 3})
    wanted = oracle.run(proto, feeds)[0]
    out = OnnxModel.from_proto(proto)
    for name in ("first.onnx", "second.onnx", "first.onnx"):
        out.save(tmp_path / name)
        model = OnnxModel.load(tmp_path / name)
        np.testing.assert_array_equal(oracle.run(model.to_proto(), feeds)[0], wanted)
        np.testing.assert_array_equal(oracle.run(onnx.load(tmp_path / name), feeds)[0], wanted)
        stored = onnx.load(tmp_path / name, load_external_data=False)
        large = [t for t in stored.graph.initializer if len(t.raw_data) == 0]
        assert {t.name for t in large} == {"w1", "w2"}
        assert all(t.data_location == TensorProto.EXTERNAL for t in large)
    names = ["first.onnx", "first.onnx.data", "second.onnx", "second.onnx.data"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert (tmp_path / "first.onnx.data").stat().st_size < 2 * 7200 + 2 * 8400 + 3 * 4096
    np.testing.assert_array_equal(oracle.run(out.to_proto(), feeds)[0], wanted)


def two_files(
    proto: onnx.ModelProto, path: Path, monkeypatch: pytest.MonkeyPatch, factor: float = 1.0, **options: Any
) -> None:
    """Writes a model with its data beside it, its weights times a factor."""
    monkeypatch.setattr(weight_files, "EXTERNAL_LIMIT", 1000)
    light, arrays = lightened(proto)
    write_model(light, {n: a * a.dtype.type(factor) for n, a in arrays.items()}, path, **options)


def check_weights(proto: onnx.ModelProto, path: Path, factor: float) -> None:
    for read in (OnnxModel.load(path).to_proto(), onnx.load(path)):
        found = {t.name: onnx.numpy_helper.to_array(t) for t in read.graph.initializer}
        for tensor in proto.graph.initializer:
            if tensor.name in ("w1", "w2"):
                value = onnx.numpy_helper.to_array(tensor)
                np.testing.assert_array_equal(found[tensor.name], value * value.dtype.type(factor))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_data_gets_a_name_that_no_file_has(proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model before stays whole until the new one has its place; its data goes behind it."""
    path = tmp_path / "m.onnx"
    for factor in (1.0, 2.0, 3.0, 4.0):
        two_files(proto, path, monkeypatch, factor)
        check_weights(proto, path, factor)
        model, data = names(tmp_path)
        assert model == "m.onnx" and re.fullmatch(r"m\.onnx(\.[0-9a-f]{8})?\.data", data)
        assert (data == "m.onnx.data") == (factor in (1.0, 3.0))
    monkeypatch.undo()
    write_model(*lightened(proto), path)  # its weights are within it now
    assert names(tmp_path) == ["m.onnx"]
    assert [p.key for p in onnx.load(path).metadata_props] == ["author"]


def test_data_of_others_stays(proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    (tmp_path / "m.onnx.data").write_text("precious")
    two_files(proto, path, monkeypatch, 2.0)
    two_files(proto, path, monkeypatch, 3.0)
    check_weights(proto, path, 3.0)
    assert (tmp_path / "m.onnx.data").read_text() == "precious" and len(names(tmp_path)) == 3


def test_data_that_another_exporter_wrote_stays(
    proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same name: other models may share it."""
    path = tmp_path / "m.onnx"
    save(proto, path, save_as_external_data=True, location="m.onnx.data", size_threshold=64)
    onnx.save(onnx.load(path, load_external_data=False), tmp_path / "shares.onnx")
    two_files(proto, path, monkeypatch, 2.0)
    check_weights(proto, path, 2.0)
    check_weights(proto, tmp_path / "shares.onnx", 1.0)


def test_data_that_the_input_needs_stays(proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    two_files(proto, path, monkeypatch)
    (tmp_path / "copy.onnx").write_bytes(path.read_bytes())
    (tmp_path / "link").symlink_to("m.onnx.data")
    two_files(proto, path, monkeypatch, 2.0, keep=[tmp_path / "none", tmp_path / "link"])
    check_weights(proto, path, 2.0)
    check_weights(proto, tmp_path / "copy.onnx", 1.0)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_are_followed_within_the_folder_and_the_hubs_cache(proto: onnx.ModelProto, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    save(proto, made / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=64)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "rev" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name in ("m.onnx", "m.bin"):
        (blobs / f"{name}.blob").write_bytes((made / name).read_bytes())
        (snapshot / name).symlink_to(f"../../../blobs/{name}.blob")
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (inside / "m.onnx").write_bytes((made / "m.onnx").read_bytes())
    (inside / "sub" / "data").write_bytes((made / "m.bin").read_bytes())
    (inside / "m.bin").symlink_to("sub/data")
    for path in (made / "m.onnx", snapshot / "m.onnx", inside / "m.onnx"):
        _, arrays = read_model(path)
        for tensor in proto.graph.initializer:
            if tensor.name in ("w1", "w2"):
                np.testing.assert_array_equal(arrays[tensor.name], onnx.numpy_helper.to_array(tensor))


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("folder", [False, True])
def test_links_out_of_the_folder_are_refused(folder: bool, proto: onnx.ModelProto, tmp_path: Path) -> None:
    """As ONNX Runtime does: the bytes of any file of the reader could be in the result."""
    model, secret = tmp_path / "model", tmp_path / "secret"
    model.mkdir()
    secret.mkdir()
    location = "sub/m.bin" if folder else "m.bin"
    (model / "sub").mkdir()
    save(proto, model / "m.onnx", save_as_external_data=True, location=location, size_threshold=64)
    (model / location).rename(secret / "m.bin")
    if folder:
        (model / "sub").rmdir()
        (model / "sub").symlink_to(secret)
    else:
        (model / "m.bin").symlink_to("../secret/m.bin")
    with pytest.raises(
        ModelError, match=r"m.bin' of '.*' is a link that leads out of the model's folder, to '.*secret/m.bin'"
    ):
        read_model(model / "m.onnx")
