"""Models that come quantised: read as floats, pruned, and written in the scheme that they had."""

from __future__ import annotations

import functools
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import oracle
import pytest
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import liar_opt
from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.quantised_grids import Grid
from liar_opt.frontend.quantised_in import packed, unpacked
from liar_opt.frontend.weight_files import completed
from liar_opt.runtime.errors import ModelError, OptionError
from liar_opt.tools.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
Array = np.ndarray
Feeds = dict[str, Array]
WIDTH, WORDS, HEAD = 32, 50, 8
LAYERS = ((64, 4, "Relu"), (96, 4, "Sigmoid"), (64, 2, "Relu"), (128, 4, "Tanh"))
"""Hidden width, heads and activation of each layer."""
PRUNED: dict[str, Any] = {"ffn": 0.5, "heads": 0.5, "fresh": True, "latency": False}


def model() -> onnx.ModelProto:
    """Four layers that are not alike: a table, attention, feed-forward layers, a head with a Gemm."""
    rng = np.random.default_rng(0)
    helper, nodes, weights = onnx.helper, [], {}

    def weight(name: str, *shape: int) -> str:
        weights[name] = (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        return name

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    weights["table"] = rng.standard_normal((WORDS, WIDTH)).astype(np.float32)
    weights |= {"gamma": 0.5 + rng.random(WIDTH, np.float32), "beta": rng.random(WIDTH, np.float32)}
    weights |= {"split": np.asarray([0, 0, -1, HEAD]), "joined": np.asarray([0, 0, -1]), "scale": np.float32(HEAD**-0.5)}
    x = node("Gather", ["table", "ids"], "embedded")
    for k, (hidden, heads, activation) in enumerate(LAYERS):
        parts = {}
        for part in "qkv":
            y = node("MatMul", [x, weight(f"{part}{k}", WIDTH, heads * HEAD)], f"{part}{k}_product")
            if k != 2:
                y = node("Add", [y, weight(f"{part}{k}_bias", heads * HEAD)], f"{part}{k}_sum")
            y = node("Reshape", [y, "split"], f"{part}{k}_split")
            parts[part] = node("Transpose", [y], f"{part}{k}_heads", perm=[0, 2, 3, 1] if part == "k" else [0, 2, 1, 3])
        scores = node("MatMul", [parts["q"], parts["k"]], f"scores{k}")
        shares = node("Softmax", [node("Mul", [scores, "scale"], f"scaled{k}")], f"shares{k}", axis=-1)
        mixed = node("Transpose", [node("MatMul", [shares, parts["v"]], f"mixed{k}")], f"turned{k}", perm=[0, 2, 1, 3])
        mixed = node("Reshape", [mixed, "joined"], f"together{k}")
        y = node("MatMul", [mixed, weight(f"o{k}", heads * HEAD, WIDTH)], f"o{k}_product")
        x = node("Add", [x, node("Add", [y, weight(f"o{k}_bias", WIDTH)], f"o{k}_sum")], f"attended{k}")
        x = node("LayerNormalization", [x, "gamma", "beta"], f"normed{k}")
        y = node("MatMul", [x, weight(f"up{k}", WIDTH, hidden)], f"up{k}_product")
        y = node(activation, [node("Add", [y, weight(f"up{k}_bias", hidden)], f"up{k}_sum")], f"hidden{k}")
        y = node("MatMul", [y, weight(f"down{k}", hidden, WIDTH)], f"down{k}_product")
        y = y if k == 3 else node("Add", [y, weight(f"down{k}_bias", WIDTH)], f"down{k}_sum")
        x = node("LayerNormalization", [node("Add", [x, y], f"layer{k}"), "gamma", "beta"], f"out{k}")
    x = node("ReduceMean", [x], "pooled", axes=[1], keepdims=0)
    x = node("Gemm", [x, weight("first", 40, WIDTH), weight("first_bias", 40)], "inner", transB=1)
    node("Gemm", [node("Relu", [x], "bent"), weight("last", 40, 6), weight("last_bias", 6)], "y")
    value = functools.partial(helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch", "tokens"])],
        [value("y", shape=["batch", 6])],
        [onnx.numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def batches(count: int = 6, shapes: tuple[tuple[int, int], ...] = ((4, 9), (3, 5), (6, 12))) -> list[Feeds]:
    rng = np.random.default_rng(1)
    return [{"ids": rng.integers(0, WORDS, shapes[k % len(shapes)])} for k in range(count)]


def quantise(scheme: str, folder: Path) -> Path:
    """Writes the model in a scheme, by ONNX Runtime."""
    source, target = folder / "float.onnx", folder / f"{scheme}.onnx"
    if target.is_file():
        return target
    onnx.save(model(), source)
    rows = iter(batches())

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Feeds | None:
            return next(rows, None)

    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    kinds = quantization.QuantType
    if scheme == "dynamic":
        quantization.quantize_dynamic(source, target, per_channel=True, weight_type=kinds.QInt8)
    elif scheme == "dynamic-uint8":
        quantization.quantize_dynamic(source, target)
    elif scheme.startswith("blocks"):
        level = 4 if scheme == "blocks-8-bit-products" else None
        symmetric = scheme == "blocks-symmetric"
        quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=16, is_symmetric=symmetric, accuracy_level=level)
        quantizer.process()
        quantizer.model.save_model_to_file(str(target))
    else:
        form = quantization.QuantFormat.QOperator if scheme.startswith("QOperator") else quantization.QuantFormat.QDQ
        some = {"op_types_to_quantize": ["MatMul", "Gemm", "Gather"]} if scheme == "QDQ-some" else {}
        quantization.quantize_static(
            source, target, Reader(), quant_format=form, per_channel=scheme != "QOperator", weight_type=kinds.QInt8, **some
        )
    logging.disable(before)
    return target


SCHEMES = {
    "dynamic": "dynamic",
    "dynamic-uint8": "dynamic",
    "QDQ": "QDQ",
    "QDQ-some": "QDQ",
    "QOperator": "QOperator",
    "QOperator-channels": "QOperator",
    "blocks": "blocks",
    "blocks-symmetric": "blocks",
    "blocks-8-bit-products": "blocks",
}


def some(*often: str) -> list[Any]:
    """Returns all schemes; those that are not named are tested with --all alone."""
    return [pytest.param(scheme, marks=() if scheme in often else pytest.mark.rest) for scheme in SCHEMES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised")


def arrays(proto: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}


def run(proto: onnx.ModelProto, feeds: Feeds) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, feeds)[0]
    return result


def apart(x: Array, y: Array) -> float:
    return float(np.sqrt(np.square(x - y).sum() / np.square(y).sum()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_not_cut_is_the_same(scheme: str, folder: Path) -> None:
    path = quantise(scheme, folder)
    came, loaded = onnx.load(path), OnnxModel.load(path)
    assert loaded.reading is not None and loaded.reading.scheme == SCHEMES[scheme]
    loaded.normalise()
    written = loaded.written()
    assert written.unchanged == written.weights == len(loaded.reading.weights) and not written.floats
    again = completed(written.proto, written.arrays)
    onnx.checker.check_model(again)
    before, after = arrays(came), arrays(again)
    assert before.keys() <= after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert Counter(n.op_type for n in again.graph.node if n.op_type != "Constant") == Counter(
        n.op_type for n in came.graph.node if n.op_type != "Constant"
    )
    for feeds in batches(3):
        assert np.array_equal(run(again, feeds), run(came, feeds))


@pytest.mark.parametrize("scheme", some("dynamic", "QDQ", "QOperator", "blocks", "blocks-8-bit-products"))
def test_without_repair_it_is_the_masked_original(scheme: str, folder: Path, tmp_path: Path) -> None:
    path = quantise(scheme, folder)
    result = liar_opt.prune(path, batches(), repair="none", allocate="uniform", **PRUNED)
    found = result.report["kept_scheme"]
    assert found["came"] == found["written"] and found["refused"] is None and found["floats"] == []
    assert found["steps"] <= 0.501 or SCHEMES[scheme] == "blocks"  # blocks of other numbers: with error feedback
    assert found["difference"] <= 1e-5 + 0.1 * found["step"]  # the same numbers: nothing but sums in another order
    assert found["difference"] <= found["allowed"] and (found["unchanged"] > 0 or SCHEMES[scheme] == "blocks")
    saved = result.save(tmp_path / "small.onnx")
    assert saved.stat().st_size < path.stat().st_size
    assert result.report["after"]["bytes"] < result.report["before"]["bytes"] < path.stat().st_size
    small, came = onnx.load(saved), onnx.load(path)
    masked = came_masked(came, path, result.report)
    for feeds in batches(3):
        ours, theirs = run(small, feeds), run(masked, feeds)
        if SCHEMES[scheme] == "blocks":  # blocks of other numbers: they are rounded once more
            step = apart(run(came, feeds), run(model(), feeds))
        else:
            step = apart(theirs, run(completed(*OnnxModel.from_proto(masked).light()), feeds))
        share = {"blocks": 1.5, "dynamic": 3.0}.get(SCHEMES[scheme], 0.3)  # of static scales nothing but rounding differs
        assert apart(ours, theirs) <= 1e-5 + share * step
    if SCHEMES[scheme] != "blocks":
        assert found["kept"] == found["grids"]  # every scale is one of before


def came_masked(came: onnx.ModelProto, path: Path, report: dict[str, Any]) -> onnx.ModelProto:
    """Returns the quantised original, in whose weights stand the numbers for zero where channels went."""
    loaded, _, groups = oracle.analyse(path)
    assert loaded.reading is not None
    kept = {g["name"]: g.get("kept", list(range(g["before"]))) for g in report["groups"]}
    tensors, names = {t.name: t for t in came.graph.initializer}, loaded.gridded()
    for group in groups.groups:
        for consumer in group.consumers:
            gone = [place for place, owner in enumerate(consumer.owners) if owner not in kept[group.name]]
            for use in consumer.uses:
                known, axes = names[use.weight.name]
                weight, axis = loaded.reading.weights[known], axes[use.weight_axis]
                tensor = tensors[weight.numbers]
                numbers = np.array(onnx.numpy_helper.to_array(tensor))
                if weight.packing == "nbits":
                    whole = unpacked(numbers.reshape(len(numbers), -1), 4)
                    zeros = np.full((len(numbers), 1), 8) if not weight.zero else np.asarray(weight.grid.zero)
                    wide = np.repeat(zeros, whole.shape[1] // zeros.shape[1], axis=1)
                    whole[:, gone] = wide[:, gone]
                    numbers = packed(whole, 4).reshape(numbers.shape)
                else:
                    zero = onnx.numpy_helper.to_array(tensors[weight.zero]) if weight.zero else np.zeros((), numbers.dtype)
                    assert zero.size == 1 or not zero.any()
                    channels = [place for place in gone if place < numbers.shape[axis]]  # the places of a window follow
                    np.moveaxis(numbers, axis, 0)[channels] = zero.reshape(-1)[0]
                tensor.CopyFrom(onnx.numpy_helper.from_array(numbers, tensor.name))
    return came


@pytest.mark.parametrize("scheme", some("QDQ", "blocks"))
def test_default_options(scheme: str, folder: Path, tmp_path: Path) -> None:
    path = quantise(scheme, folder)
    result = liar_opt.prune(path, batches(), fresh=True, latency=False)
    found, report = result.report["kept_scheme"], result.report
    assert found["came"] == found["written"] and found["refused"] is None
    assert found["difference"] <= found["allowed"] and 0 < found["kept"] < found["grids"]
    anew = found["rounded"]  # what was repaired, with error feedback
    assert 0 < anew["kept"] <= anew["weights"] and anew["after"] < anew["before"]
    assert found["difference"] <= 1e-5 + 0.1 * found["step"]
    assert report["prunable"]["after"] < report["prunable"]["before"]
    saved = result.save(tmp_path / "small.onnx")
    assert saved.stat().st_size < path.stat().st_size
    # What was not touched has the bytes that it had.
    before, after = arrays(onnx.load(path)), arrays(onnx.load(saved))
    same = [name for name in before if name in after and before[name].tobytes() == after[name].tobytes()]
    assert any(name.startswith("first") for name in same) or report["groups"][-1]["after"] < report["groups"][-1]["before"]
    assert found["unchanged"] >= (1 if SCHEMES[scheme] != "blocks" else 0)
    # A second run reads what the first has written.
    again = liar_opt.inspect(saved)
    assert again.report["model"]["notes"][0].startswith(f"quantised ({found['written']})")
    repaired, feeds = onnx.load(saved), batches(1)[0]
    assert np.isfinite(run(repaired, feeds)).all()


def test_weights_that_no_group_has_are_the_same(folder: Path, tmp_path: Path) -> None:
    path = quantise("QDQ", folder)
    result = liar_opt.prune(path, batches(), ffn=0.5, fresh=True, latency=False)
    before, after = arrays(onnx.load(path)), arrays(onnx.load(result.save(tmp_path / "small.onnx")))
    for name in ("table", *(f"{part}{k}" for part in "qkvo" for k in range(len(LAYERS)))):
        for end in ("quantized", "scale", "zero_point"):
            assert before[f"{name}_{end}"].tobytes() == after[f"{name}_{end}"].tobytes()
    activations = [name for name in before if name.startswith(("shares", "layer", "attended")) and name.endswith("_scale")]
    assert activations and all(before[name].tobytes() == after[name].tobytes() for name in activations)


def test_the_command_says_the_scheme(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, data = quantise("dynamic", folder), tmp_path / "data.npz"
    np.savez(data, ids=np.random.default_rng(2).integers(0, WORDS, (40, 8)))
    assert main(["inspect", str(path), "--report", str(tmp_path / "inspect.json")]) == 0
    told = capsys.readouterr()
    assert "quantised (dynamic: " in told.out + told.err
    output = tmp_path / "small.onnx"
    command = [str(path), "-o", str(output), "--calibration", str(data), "--sparsity", "0.3", "--report"]
    assert main([*command, str(tmp_path / "report.json")]) == 0
    told = capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kept_scheme"]["written"].startswith("dynamic: ")
    assert "scheme kept: dynamic: " in told.out and "quantising allows" in told.out
    assert report["after"]["file_bytes"] == output.stat().st_size < path.stat().st_size == report["before"]["file_bytes"]


@pytest.mark.rest
def test_a_target_counts_the_file_that_is_written(folder: Path, tmp_path: Path) -> None:
    path = quantise("dynamic", folder)
    result = liar_opt.prune(path, batches(), target="size=0.8x", fresh=True, latency=False)
    assert result.save(tmp_path / "small.onnx").stat().st_size == pytest.approx(result.report["target"]["wanted"], rel=0.03)


def convolutions() -> onnx.ModelProto:
    """Four convolutions that are not alike, with biases, and a Gemm."""
    rng = np.random.default_rng(5)
    helper, nodes, weights, width = onnx.helper, [], {}, 3
    name = "x"
    for k, (channels, kernel, stride) in enumerate(((16, 3, 1), (24, 3, 2), (32, 1, 1), (16, 3, 1))):
        shape = (channels, width, kernel, kernel)
        weights[f"w{k}"] = (rng.standard_normal(shape) / np.sqrt(width * kernel**2)).astype(np.float32)
        weights[f"b{k}"] = rng.standard_normal(channels).astype(np.float32)
        pads = [kernel // 2] * 4
        nodes.append(
            helper.make_node("Conv", [name, f"w{k}", f"b{k}"], [f"c{k}"], f"c{k}", pads=pads, strides=[stride] * 2)
        )
        nodes.append(helper.make_node("Relu", [f"c{k}"], [f"r{k}"], f"r{k}"))
        name, width = f"r{k}", channels
    weights["last"] = rng.standard_normal((5, width)).astype(np.float32)
    weights["last_bias"] = rng.standard_normal(5).astype(np.float32)
    nodes.append(helper.make_node("GlobalAveragePool", [name], ["pooled"], "pooled"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], "flat"))
    nodes.append(helper.make_node("Gemm", ["flat", "last", "last_bias"], ["y"], "y", transB=1))
    value = functools.partial(helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    inputs, outputs = [value("x", shape=["batch", 3, "height", "width"])], [value("y", shape=["batch", 5])]
    initializers = [onnx.numpy_helper.from_array(w, name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "convolutions", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("repair", ["none", "liar"])
@pytest.mark.parametrize("form", ["QDQ", pytest.param("QOperator", marks=pytest.mark.rest)])
def test_convolutions(form: str, repair: str, tmp_path: Path) -> None:
    rng, source, path = np.random.default_rng(6), tmp_path / "float.onnx", tmp_path / "whole.onnx"
    shapes = ((4, 3, 12, 12), (2, 3, 9, 14), (5, 3, 12, 12))
    data = [{"x": rng.standard_normal(shapes[k % 3]).astype(np.float32)} for k in range(6)]
    onnx.save(convolutions(), source)
    rows = iter(data)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Feeds | None:
            return next(rows, None)

    written = getattr(quantization.QuantFormat, form)
    kinds = {"weight_type": quantization.QuantType.QInt8, "per_channel": True}
    quantization.quantize_static(source, path, Reader(), quant_format=written, **kinds)
    result = liar_opt.prune(path, data, sparsity=0.4, multiple_of=1, repair=repair, fresh=True, latency=False)
    found = result.report["kept_scheme"]
    assert found["came"] == found["written"] and not found["floats"] and found["difference"] <= found["allowed"]
    small, came = result.model, onnx.load(path)
    operators = Counter(n.op_type for n in came.graph.node if n.op_type.startswith(("Q", "Conv")))
    assert Counter(n.op_type for n in small.graph.node if n.op_type.startswith(("Q", "Conv"))) == operators
    if repair == "none":
        masked = came_masked(came, path, result.report)
        for feeds in data[:3]:
            assert apart(run(small, feeds), run(masked, feeds)) <= 0.02
    else:  # biases are at the product of the scales that the repaired weights have now
        whole = arrays(small)
        names = [n.input[2] for n in small.graph.node if n.op_type == "Conv" and form == "QDQ"]
        makers = {out: node for node in small.graph.node for out in node.output}
        for name in names:
            maker, reader = makers[name], next(n for n in small.graph.node if name in n.input)
            scales = [whole[makers[reader.input[k]].input[1]] for k in (0, 1)]
            assert np.allclose(whole[maker.input[1]], scales[0] * scales[1], rtol=1e-5)


def attention() -> onnx.ModelProto:
    """Four layers of ONNX Runtime's own Attention with feed-forward layers, that are not alike."""
    rng, helper, nodes, weights, x = np.random.default_rng(0), onnx.helper, [], {}, "x"

    def node(op: str, inputs: list[str], output: str, *shape: int, **more: Any) -> str:
        if shape:
            weights[f"{output}_w"] = (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        nodes.append(helper.make_node(op, [*inputs, *([f"{output}_w"] if shape else [])], [output], output, **more))
        return output

    weights["gamma"] = np.ones(WIDTH, np.float32)
    for k, (hidden, heads, activation) in enumerate(LAYERS):
        y = node("Attention", [x], f"a{k}", WIDTH, 3 * WIDTH, num_heads=heads, domain="com.microsoft")
        weights[f"b{k}"] = rng.standard_normal(3 * WIDTH).astype(np.float32)
        nodes[-1].input.append(f"b{k}")
        y = node("MatMul", [y], f"o{k}", WIDTH, WIDTH)
        x = node("LayerNormalization", [node("Add", [y, x], f"s{k}"), "gamma"], f"n{k}")
        y = node(activation, [node("MatMul", [x], f"u{k}", WIDTH, hidden)], f"h{k}")
        y = node("MatMul", [y], f"d{k}", hidden, WIDTH)
        x = node("LayerNormalization", [node("Add", [y, x], f"t{k}"), "gamma"], f"x{k}")
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", "tokens", WIDTH]) for n in ("x", x)]
    initializers = [onnx.numpy_helper.from_array(w, name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "attention", ends[:1], ends[1:], initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.rest
@pytest.mark.parametrize("optimised", [False, True])
def test_attention_of_onnx_runtime(optimised: bool, tmp_path: Path) -> None:
    source, path = tmp_path / "float.onnx", tmp_path / "whole.onnx"
    onnx.save(attention(), source)
    extra = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    quantization.quantize_dynamic(source, path, op_types_to_quantize=["MatMul", "Attention"], extra_options=extra)
    wanted = {"QAttention", "MatMulInteger"}
    if optimised:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        path, wanted = tmp_path / "optimised.onnx", {"QAttention", "DynamicQuantizeMatMul"}
    rng = np.random.default_rng(1)
    data = [{"x": rng.standard_normal((4, n, WIDTH)).astype(np.float32)} for n in (5, 9, 7, 5, 6, 8)]
    result = liar_opt.prune(path, data, ffn=0.4, heads=0.4, repair="none", allocate="uniform", fresh=True, latency=False)
    found, small = result.report["kept_scheme"], result.model
    assert found["floats"] == [] and found["difference"] <= found["allowed"] and found["kept"] == found["grids"]
    assert wanted <= {node.op_type for node in small.graph.node} and found["came"] == found["written"]
    masked = came_masked(onnx.load(path), path, result.report)
    step = apart(run(masked, data[0]), run(completed(*OnnxModel.from_proto(masked).light()), data[0]))
    assert apart(run(small, data[0]), run(masked, data[0])) <= 1e-5 + 3.0 * step


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "quantised twice": ({"quantize": "int8"}, "the model is quantised already \\(QDQ\\)"),
    "words": ({"vocabulary": [1, 2, 3]}, "of a quantised model widths go alone"),
    "blocks": ({"blocks": 1}, "of a quantised model widths go alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_done_with_a_quantised_model(name: str, folder: Path) -> None:
    options, match = REFUSED[name]
    with pytest.raises(OptionError, match=match):
        liar_opt.prune(quantise("QDQ", folder), batches(), **options)


def test_two_schemes_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = onnx.load(quantise("dynamic", folder))
    (output,) = mixed.graph.output
    parameters = [np.float32(0.1), np.uint8(128)]
    mixed.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), f"own{k}") for k, v in enumerate(parameters))
    for node in mixed.graph.node:
        node.output[:] = ["before" if name == "y" else name for name in node.output]
    mixed.graph.node.extend(
        [
            onnx.helper.make_node("QuantizeLinear", ["before", "own0", "own1"], ["whole"], "quantise"),
            onnx.helper.make_node("DequantizeLinear", ["whole", "own0", "own1"], [output.name], "dequantise"),
        ]
    )
    onnx.checker.check_model(mixed)
    path = tmp_path / "mixed.onnx"
    onnx.save(mixed, path)
    with pytest.raises(ModelError, match=r"is quantised in two schemes: node '.*' \(.*\) is dynamic, node 'quantise'"):
        OnnxModel.load(path)
    assert main(["inspect", str(path)]) == 2
    told = capsys.readouterr()
    assert len(told.err.strip().splitlines()) == 1 and "mixed.onnx' is quantised in two schemes" in told.err


def test_a_grid_says_what_it_can() -> None:
    rng = np.random.default_rng(3)
    numbers = rng.integers(-127, 128, (12, 7)).astype(np.int8)
    grid = Grid.read(numbers, rng.random(7).astype(np.float32), np.zeros(7, np.int8), 1)
    cut, kept, units = grid.refitted(grid.values[:, [0, 2, 5]])
    assert (kept, units) == (3, 3) and np.array_equal(cut.numbers, numbers[:, [0, 2, 5]])
    assert np.array_equal(cut.scale, grid.scale[[0, 2, 5]])
    moved = grid.values[3:].copy()
    moved[:, 4] *= np.float32(1.37)
    cut, kept, units = grid.refitted(moved)
    assert (kept, units) == (6, 7) and np.array_equal(cut.numbers[:, :4], numbers[3:, :4])
    assert cut.steps(moved) <= 0.5001 and np.abs(cut.numbers[:, 4]).max() == 127


@pytest.mark.parametrize("symmetric", [False, True])
def test_blocks_that_are_whole_stay(symmetric: bool) -> None:
    rng = np.random.default_rng(4)
    zeros = np.full((5, 4), 8, np.uint8) if symmetric else rng.integers(0, 16, (5, 4)).astype(np.uint8)
    numbers = rng.integers(0, 16, (5, 64)).astype(np.uint8)
    grid = Grid.read(numbers, rng.random((5, 4)).astype(np.float32), zeros, 1, 16, bits=4, signed=True)
    assert grid.symmetric is symmetric
    rows, kept, units = grid.refitted(grid.values[[1, 4]])
    assert (kept, units) == (8, 8) and np.array_equal(rows.numbers, numbers[[1, 4]])
    columns, kept, units = grid.refitted(grid.values[:, [*range(16), *range(20, 37)]])
    assert (kept, units) == (5, 15) and columns.scale.shape == (5, 3)
    assert columns.steps(grid.values[:, [*range(16), *range(20, 37)]]) <= 1.0
    assert np.array_equal(unpacked(packed(numbers, 4), 4), numbers)


# Graphs by hand: what quantisers other than ONNX Runtime's write -----------------------------------------------------


class Hand:
    """A feed-forward stack whose weights a function stores: three layers that are not alike."""

    def __init__(self, store: Any, quantise: Any = None, kind: Any = np.float32) -> None:
        self.rng, self.kind = np.random.default_rng(0), kind
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        x = "x"
        for k, hidden in enumerate((64, 96, 128)):
            read = x if quantise is None else quantise(self, x, f"read{k}")
            y = self.node(
                "Add", [store(self, read, f"up{k}", self.drawn(32, hidden)), self.put(f"b{k}", self.drawn(hidden))]
            )
            y = self.node("Relu", [y])
            y = store(self, y if quantise is None else quantise(self, y, f"inner{k}"), f"down{k}", self.drawn(hidden, 32))
            x = self.node("Add", [x, y])
        self.node("Identity", [x], "y")

    def drawn(self, *shape: int) -> Array:
        return np.asarray(self.rng.standard_normal(shape) / np.sqrt(shape[0]), self.kind)

    def put(self, name: str, value: Any) -> str:
        kept = isinstance(value, onnx.TensorProto)
        self.weights[name] = value if kept else onnx.numpy_helper.from_array(np.asarray(value), name)
        return name

    def node(self, op: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or f"{op}_{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(op, inputs, [output], output, **attributes))
        return output

    def proto(self) -> onnx.ModelProto:
        helper, kind = onnx.helper, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(self.kind))
        ends = [helper.make_tensor_value_info(name, kind, ["batch", "tokens", 32]) for name in "xy"]
        graph = helper.make_graph(self.nodes, "hand", ends[:1], ends[1:], list(self.weights.values()))
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def channels(hand: Hand, read: str, name: str, weight: Array, axis: int = 1, said: int = 1) -> str:
    """Stores a weight in int8 by channel, and multiplies by it."""
    scale = np.abs(weight).max(axis=1 - axis) / 127
    numbers = np.rint(weight / np.expand_dims(scale, 1 - axis)).astype(np.int8)
    parts = [hand.put(f"{name}_numbers", numbers), hand.put(f"{name}_scale", scale)]
    return hand.node("MatMul", [read, hand.node("DequantizeLinear", parts, f"{name}_floats", axis=said)])


def from_the_end(hand: Hand, read: str, name: str, weight: Array) -> str:
    return channels(hand, read, name, weight, said=-1)


def no_zero_point(hand: Hand, read: str, name: str, weight: Array) -> str:
    """Stores the magnitudes of a weight in uint8 for all, without a zero point; what is repaired is below zero, too."""
    scale = np.float32(np.abs(weight).max() / 255)
    numbers = np.rint(np.abs(weight) / scale).astype(np.uint8)
    parts = [hand.put(f"{name}_numbers", numbers), hand.put(f"{name}_scale", scale)]
    return hand.node("MatMul", [read, hand.node("DequantizeLinear", parts, f"{name}_floats")])


def constants(hand: Hand, read: str, name: str, weight: Array) -> str:
    """Stores a weight by one scale, which is a Constant's number."""
    scale = float(np.abs(weight).max() / 127)
    numbers = hand.put(f"{name}_numbers", np.rint(weight / scale).astype(np.int8))
    known = hand.node("Constant", [], f"{name}_scale", value_float=scale)
    return hand.node("MatMul", [read, hand.node("DequantizeLinear", [numbers, known], f"{name}_floats")])


def four_bits(hand: Hand, read: str, name: str, weight: Array) -> str:
    """Stores a weight in blocks of 16 along what is contracted."""
    blocks = weight.reshape(-1, 16, weight.shape[1])
    scale = np.abs(blocks).max(axis=1) / 7
    numbers = np.rint(blocks / scale[:, None]).reshape(weight.shape).astype(int)
    tensor = onnx.helper.make_tensor(f"{name}_numbers", onnx.TensorProto.INT4, weight.shape, numbers.reshape(-1).tolist())
    parts = [hand.put(f"{name}_numbers", tensor), hand.put(f"{name}_scale", scale.astype(np.float32))]
    return hand.node("MatMul", [read, hand.node("DequantizeLinear", parts, f"{name}_floats", axis=0, block_size=16)])


def nbits(hand: Hand, read: str, name: str, weight: Array) -> str:
    """Stores a weight as MatMulNBits has it, in blocks of 16."""
    rows, columns = weight.shape
    blocks = weight.T.reshape(columns, -1, 16).astype(np.float32)
    scale = np.abs(blocks).max(axis=2) / 7
    numbers = packed((np.rint(blocks / scale[..., None]) + 8).astype(np.uint8), 4)
    parts = [read, hand.put(f"{name}_numbers", numbers), hand.put(f"{name}_scale", scale.astype(hand.kind))]
    sizes = {"K": rows, "N": columns, "bits": 4, "block_size": 16}
    return hand.node("MatMulNBits", parts, domain="com.microsoft", **sizes)


def signed(hand: Hand, read: str, name: str) -> str:
    """Quantises an activation to int8, which no zero point says."""
    scale = hand.put(f"{name}_scale", np.float32(0.05))
    whole = hand.node("QuantizeLinear", [read, scale], f"{name}_whole", output_dtype=onnx.TensorProto.INT8)
    return hand.node("DequantizeLinear", [whole, scale], f"{name}_floats")


HANDS: dict[str, tuple[Any, ...]] = {
    "channels": (channels,),
    "from the end": (from_the_end,),
    "no zero point": (no_zero_point,),
    "constants": (constants,),
    "four bits": (four_bits,),
    "half": (nbits, None, np.float16),
    "signed activations": (channels, signed),
}


def real(kind: Any = np.float32) -> list[Feeds]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((4, 5 + k, 32)).astype(kind)} for k in range(4)]


@pytest.mark.parametrize("name", HANDS)
def test_what_other_quantisers_write(name: str, tmp_path: Path) -> None:
    came, data = Hand(*HANDS[name]).proto(), real(*HANDS[name][2:])
    onnx.save(came, tmp_path / "whole.onnx")
    result = liar_opt.prune(tmp_path / "whole.onnx", data, sparsity=0.3, fresh=True, latency=False)
    found, exact = result.report["kept_scheme"], 1e-2 if name == "half" else 1e-5
    assert found["refused"] is None and found["floats"] == []
    assert found["difference"] <= (exact if name != "signed activations" else found["allowed"])
    assert found["step"] < 0.1  # of which a scheme that was lost would be more
    small = onnx.load(result.save(tmp_path / "small.onnx"))
    assert apart(run(small, data[0]).astype(float), run(came, data[0]).astype(float)) < 0.5
    axes = [{a.i for n in p.graph.node for a in n.attribute if a.name == "axis"} for p in (came, small)]
    assert axes[0] == axes[1]


def test_constants_that_are_listed_as_inputs(tmp_path: Path) -> None:
    came = Hand(channels).proto()
    given = [onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in came.graph.initializer]
    came.graph.input.extend(given)
    result = liar_opt.prune(came, real(), sparsity=0.3, fresh=True, latency=False)
    assert [value.name for value in result.model.graph.input] == ["x"] and result.report["kept_scheme"]["refused"] is None


def test_a_table_that_is_computed_is_refused() -> None:
    hand = Hand(channels)
    hand.put("table", np.zeros((5, 16), np.uint8))
    hand.put("scales", np.ones((5, 1), np.float32))
    hand.put("at", np.asarray([1]))
    inputs = [hand.node("Identity", ["table"], "computed"), "at", "scales"]
    hand.node("GatherBlockQuantized", inputs, "looked_up", domain="com.microsoft", block_size=32, bits=4)
    with pytest.raises(
        ModelError, match=r"'looked_up' \(GatherBlockQuantized\) .* 'computed' is no constant; prune the float"
    ):
        OnnxModel.from_proto(hand.proto())


def test_what_does_not_run_as_it_came_is_refused(tmp_path: Path) -> None:
    """Its numbers run: what is quantised is clipped, and an index that is made of it lies outside its table."""
    hand = Hand(channels)
    scale, five = hand.put("clipped", np.float32(0.01)), hand.put("five", np.float32(5))
    whole = hand.node("QuantizeLinear", ["place", scale], "whole")
    place = hand.node("Sub", [hand.node("DequantizeLinear", [whole, scale], "floats"), five], "index")
    index = hand.node("Cast", [place], "at", to=onnx.TensorProto.INT64)
    row = hand.node("Gather", [hand.put("rows", np.ones((1, 32), np.float32)), index], "row")
    hand.nodes[-6:] = [*hand.nodes[-5:], hand.nodes[-6]]  # the graph's end is last
    hand.nodes[-1] = onnx.helper.make_node("Add", [hand.nodes[-1].input[0], row], ["y"], "y")
    came = hand.proto()
    came.graph.input.append(onnx.helper.make_tensor_value_info("place", onnx.TensorProto.FLOAT, []))
    onnx.save(came, tmp_path / "whole.onnx")
    data = [{**feeds, "place": np.float32(5)} for feeds in real()]
    with pytest.raises(ModelError, match="does not run as it came, and the numbers that it stands for do"):
        liar_opt.prune(tmp_path / "whole.onnx", data, sparsity=0.3, fresh=True, latency=False)
