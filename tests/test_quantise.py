"""Quantising behind pruning: the four corners, what is written, the target that counts it, and what is refused."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import test_runtimes
import torch
import transformers
from test_runtimes import batches, export, made, widths

import liar_opt
from liar_opt.frontend import onnx_quantise
from liar_opt.frontend.onnx_engine import OnnxEngine
from liar_opt.frontend.onnx_model import OnnxOriginal
from liar_opt.frontend.onnx_quantise import RefusedError, Scheme, quantised
from liar_opt.frontend.onnx_rounding import Rows, grid_of, rounded_anew
from liar_opt.frontend.weight_files import lightened
from liar_opt.passes import quantise_result
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.quantise_result import require_room
from liar_opt.runtime.errors import ModelError, OptionError
from liar_opt.tools import cli
from liar_opt.tools.report import corners

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"ffn": 0.4, "latency": False, "fresh": True}
OPERATORS = {"int8": "MatMulInteger", "int8-static": "QuantizeLinear", "int4": "MatMulNBits"}
LEAST = {"int8": 0.99, "int8-static": 0.9, "int4": 0.9}
"""Cosine of quantised to float, of the same model."""
command = test_runtimes.command


def first(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, feeds)[0]
    return result


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    x, y = (a.reshape(-1, a.shape[-1]) for a in (x, y))
    return float(np.mean((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)))


@functools.cache
def small(scheme: str | None, multiple_of: int = 8) -> liar_opt.PruneResult:
    """What several tests read: the export, cut by a ratio and quantised."""
    return liar_opt.prune(export(), batches(), quantize=scheme, multiple_of=multiple_of, **SMALL)


@pytest.mark.parametrize("scheme", OPERATORS)
def test_the_corners_of_a_graph(scheme: str, tmp_path: Path) -> None:
    result = small(scheme)
    found = result.report["quantised"]
    assert found["refused"] is None and found["dense_refused"] is None
    assert [(c["name"], c["quantised"]) for c in found["corners"]] == [
        ("dense", False),
        ("pruned", False),
        ("dense", True),
        ("pruned", True),
    ]
    sizes = [c["bytes"] for c in found["corners"]]
    assert sizes[3] < sizes[2] < sizes[1] < sizes[0]
    assert found["corners"][0]["cosine"] == pytest.approx(1.0) and found["corners"][0]["relative_rms"] < 1e-6
    assert all(c["cosine"] < 1.0 - 1e-6 for c in found["corners"][1:])
    assert found["rows"] > 0 and found["output"] == "logits"
    anew = found["rounded"]
    assert 0 < anew["kept"] <= anew["weights"] and anew["after"] < anew["before"]
    path = result.save(tmp_path / "small.onnx")
    saved = onnx.load(path)
    assert OPERATORS[scheme] in {node.op_type for node in saved.graph.node}
    assert path.stat().st_size == pytest.approx(sizes[3], rel=0.02)
    # What was quantised is what was pruned: beside a run without quantising, near by the step of the quantiser alone.
    alone = small(None, multiple_of=32 if scheme == "int4" else 8)
    assert widths(alone, "ffn") == widths(result, "ffn")
    feeds = batches(1)[0]
    assert cosine(first(saved, feeds), first(alone.model, feeds)) > LEAST[scheme]


def test_blocks_make_widths_multiples_of_them() -> None:
    result = small("int4")
    assert all(n % 32 == 0 for n in widths(result, "ffn")) and min(widths(result, "ffn")) < test_runtimes.FFN
    assert result.report["fitted"]["asked"] == [
        "feed-forward widths in multiples of 32",
        "groups of heads in multiples of 2",
    ]
    assert result.report["quantised"]["block"] == 32
    with pytest.raises(OptionError, match="no narrower heads fits openvino and 4-bit blocks of 128"):
        liar_opt.prune(export(), batches(), quantize="int4", runtime="openvino", heads=0.5)


def test_a_module_is_quantised_as_onnx(tmp_path: Path) -> None:
    result = liar_opt.prune(made(), batches(), quantize="int8", checkpoint=False, **SMALL)
    found = result.report["quantised"]
    assert found["refused"] is None and len(found["corners"]) == 4
    saved = onnx.load(result.save(tmp_path / "small.onnx"))
    assert "MatMulInteger" in {node.op_type for node in saved.graph.node}
    feeds = batches(1)[0]
    with pytest.raises(OptionError, match="what was quantised is ONNX"):
        result.save(tmp_path / "small.pt2")
    with torch.no_grad():
        wanted = result.module(**{k: torch.from_numpy(v) for k, v in feeds.items()}).logits.numpy()  # type: ignore[attr-defined]
    assert cosine(first(saved, feeds), wanted) > 0.99


def test_a_target_of_bytes_counts_the_quantised_file(tmp_path: Path) -> None:
    dense = liar_opt.prune(export(), batches(), quantize="int8", **(SMALL | {"ffn": 0.0})).report["quantised"]["corners"]
    wanted = 0.8 * dense[2]["bytes"]
    options = SMALL | {"ffn": None, "target": f"size={wanted:.0f}", "allocate": "curves"}
    result = liar_opt.prune(export(), batches(), quantize="int8", **options)
    assert result.report["target"]["found"] == pytest.approx(wanted, rel=0.02)
    assert result.save(tmp_path / "small.onnx").stat().st_size == pytest.approx(wanted, rel=0.02)
    with pytest.raises(OptionError, match=r"is met already: the model has .* once it is quantised"):
        liar_opt.prune(export(), batches(), quantize="int8", **(options | {"target": "size=0.9x"}))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"quantize": "int5"}, "quantize 'int5' is unknown; choose one of int8, int8-static, int4"),
    "no QDQ": ({"quantize": "int8", "runtime": "tensorrt"}, "tensorrt does not run int8; give int8-static"),
    "words": ({"quantize": "int8", "vocabulary": [1, 2, 3]}, "quantize stands behind a cut of widths"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_said_before_any_work(name: str) -> None:
    options, match = REFUSED[name]
    with pytest.raises(OptionError, match=match):
        liar_opt.prune(export(), batches(), **options)


def test_a_model_that_is_not_held_is_not_quantised() -> None:
    state: Any = SimpleNamespace(memory=SimpleNamespace(low=True, limit=10**9), model=SimpleNamespace(merged=None))
    require_room(state, PruneOptions())
    with pytest.raises(OptionError, match="quantize holds the whole model in memory"):
        require_room(state, PruneOptions(quantize="int4"))
    state.model.merged = object()
    with pytest.raises(OptionError, match="quantize does not take a merged decoder"):
        require_room(state, PruneOptions(quantize="int4"))


def test_a_checkpoint_is_quantised_by_torchao(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao")
    made().save_pretrained(tmp_path / "model")
    np.savez(tmp_path / "data.npz", **{k: np.concatenate([b[k] for b in batches()]) for k in batches(1)[0]})  # type: ignore[arg-type]
    given = [str(tmp_path / "model"), "--calibration", str(tmp_path / "data.npz"), "--ffn", "0.4", "--quantize", "int8"]
    report = tmp_path / "report.json"
    assert cli.main([*given, "-o", str(tmp_path / "out"), "--report", str(report)]) == 0
    assert "quantised to int8" in capsys.readouterr().out.splitlines()[-1]
    found = json.loads(report.read_text("utf-8"))["quantised"]
    sizes = [corner["bytes"] for corner in found["corners"]]
    assert found["refused"] is None and sizes[3] < sizes[2] < sizes[1] < sizes[0]
    assert found["output"] == "logits" and all(0.9 < c["cosine"] < 1.0 - 1e-6 for c in found["corners"][1:])
    assert all(corner["seconds"] > 0 for corner in found["corners"])
    assert sizes[3] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(loaded.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
    result = liar_opt.prune(made(), batches(), **SMALL)
    ours: Any = result.module  # type: ignore[attr-defined]
    feeds = {k: torch.from_numpy(v) for k, v in batches(1)[0].items()}
    with torch.no_grad():
        x, y = (m(**feeds).logits.numpy() for m in (loaded, ours))
    assert cosine(x, y) > 0.99 and not np.array_equal(x, y)
    with pytest.raises(ModelError, match=r"is quantised \(torchao\); prune the float checkpoint"):
        liar_opt.inspect(tmp_path / "out")


def test_a_checkpoint_without_torchao_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "torchao" else found(name))
    with pytest.raises(OptionError, match=r"quantize of a checkpoint needs the package 'torchao'.*liar-opt\[torchao\]"):
        liar_opt.prune(made(), batches(), quantize="int8", ffn=0.3)


NOT_SAID: dict[str, tuple[dict[str, Any], str]] = {
    "int4": ({"quantize": "int4"}, "a checkpoint is quantised to int8 alone: .*give int8, or write ONNX"),
    "static": ({"quantize": "int8-static"}, "a checkpoint is quantised to int8 alone"),
    "deci": ({"quantize": "int8", "checkpoint": "deci"}, "what reads DeciLM reads no weights of torchao"),
}


@pytest.mark.parametrize("name", NOT_SAID)
def test_what_a_checkpoint_cannot_say_is_refused(name: str) -> None:
    options, match = NOT_SAID[name]
    with pytest.raises(OptionError, match=match):
        liar_opt.prune(made(), batches(), ffn=0.3, **{"checkpoint": True, **options})
    with pytest.raises(OptionError, match="and Linear has none"):
        liar_opt.prune(torch.nn.Linear(8, 8), [{"input": torch.ones(2, 8)}], quantize="int8", ffn=0.3)


@pytest.mark.parametrize("where", ["quantiser", "run"])
def test_a_quantiser_that_refuses_leaves_the_float_model(
    where: str,
    command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no(*_: Any, **__: Any) -> None:
        raise ValueError("the weights of node 'x' are of no type that I know.")

    if where == "quantiser":
        monkeypatch.setattr(onnx_quantise, "_quantise", no)
    else:
        monkeypatch.setattr(quantise_result, "_require_runs", lambda *_: (_ for _ in ()).throw(RefusedError("no kernel")))
    report = tmp_path / "report.json"
    assert command("--quantize", "int8", "--no-latency", "--report", str(report)) == 1
    out, err = capsys.readouterr()
    words = "of no type that I know" if where == "quantiser" else "no kernel"
    assert f"{words}); it was written in float to '{tmp_path / 'out.onnx'}'" in err
    assert "which stays in float" in out
    saved = onnx.load(tmp_path / "out.onnx")
    assert "MatMulInteger" not in {node.op_type for node in saved.graph.node}
    assert words in json.loads(report.read_text("utf-8"))["quantised"]["refused"]


def test_the_command_prints_the_corners(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, page = tmp_path / "report.json", tmp_path / "page.html"
    assert command("--quantize", "int4", "--report", str(report), "--html", str(page)) == 0
    out = capsys.readouterr().out
    assert "int4, blocks of 32" in out and "quantised to int4" in out.splitlines()[-1]
    for name in ("dense, float", "pruned, float", "dense, int4", "pruned, int4"):
        assert name in out and name in page.read_text("utf-8")
    found = json.loads(report.read_text("utf-8"))
    small = found["quantised"]["corners"][3]
    assert small["bytes"] == (tmp_path / "out.onnx").stat().st_size and small["seconds"] > 0
    assert corners(found).row_count == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "out.onnx", "page.html", "report.json"]


def test_nothing_is_written_beside_the_input(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(export().read_bytes())
    liar_opt.prune(path, batches(), quantize="int8", **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


# The quantiser alone --------------------------------------------------------------------------------------------------


def test_gemm_is_taken_in_blocks_and_external_data_is_mapped() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 64] x) => (float[n, 48] y) { y = Gemm(x, w, b) }'
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((64, 48)), "b": rng.standard_normal(48)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in arrays.items())
    model, size = quantised(OnnxOriginal(*lightened(proto)), Scheme("int4"))
    found = model.as_given()
    assert "MatMulNBits" in {node.op_type for node in found.graph.node} and size < 64 * 48 * 2
    x = rng.standard_normal((7, 64)).astype(np.float32)
    wanted = x @ arrays["w"] + arrays["b"]
    got = first(found, {"x": x})
    assert 1e-3 < np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 0.15


def test_branches_have_no_static_ranges() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 4] x, bool c) => (float[n, 4] y) {
        y = If(c) <then_branch = a () => (float[n, 4] p) { p = MatMul(x, w) },
                   else_branch = b () => (float[n, 4] q) { q = Identity(x) }> }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    with pytest.raises(RefusedError, match="branches"):
        quantised(OnnxOriginal(*lightened(proto)), Scheme("int8-static"), [{}])


SINGLE = '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 70] x) => (float[n, 48] y) { h = Relu(x) y = MatMul(h, w) }'


def single() -> tuple[onnx.ModelProto, np.ndarray]:
    proto = onnx.parser.parse_model(SINGLE)
    weight = np.random.default_rng(0).standard_normal((70, 48)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return proto, weight


def correlated(seed: int, count: int = 400) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, 9)) @ np.random.default_rng(9).standard_normal((9, 70))
    return {"x": (mixed + 0.3 * rng.standard_normal((count, 70))).astype(np.float32)}


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "int4"])
def test_grids_are_what_the_runtime_reads(scheme: str) -> None:
    proto, weight = single()
    small = quantised(OnnxOriginal(*lightened(proto)), Scheme(scheme), [correlated(0)])[0]
    grid = grid_of("w", small.as_given())
    assert grid is not None and grid.numbers.shape == weight.shape
    assert grid.numbers.min() >= grid.ends[0] and grid.numbers.max() <= grid.ends[1]
    decoded = (grid.numbers - grid.zero) * grid.scale
    steps = np.broadcast_to(np.abs(grid.scale), weight.shape)
    assert (np.abs(decoded - weight) <= 0.51 * steps).mean() > 0.98
    if scheme != "int8-static":  # of which activations are rounded to steps of the data's
        np.testing.assert_allclose(first(small.as_given(), {"x": np.eye(70, dtype=np.float32)}), decoded, atol=2e-3)


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "int4"])
def test_weights_are_rounded_anew_where_that_loses_less(scheme: str) -> None:
    proto, weight = single()
    whole = OnnxOriginal(*lightened(proto))
    small = quantised(whole, Scheme(scheme), [correlated(0)])[0]
    fitted, held = (Rows([correlated(seed)], [None]) for seed in (0, 1))
    better, found = rounded_anew(whole, small, fitted, held, OnnxEngine("cpu"))
    assert (found.kept, found.weights) == (1, 1) and found.after < 0.8 * found.before
    h = np.maximum(correlated(2)["x"], 0).astype(np.float64)
    errors = []
    for model in (small, better):
        grid = grid_of("w", model.as_given())
        assert grid is not None
        errors.append(np.linalg.norm(h @ ((grid.numbers - grid.zero) * grid.scale - weight)))
    assert errors[1] < 0.9 * errors[0]
    again = quantised(whole, Scheme(scheme), [correlated(0)])[0]
    assert rounded_anew(whole, again, held, fitted, OnnxEngine("cpu"))[1].weights == 1
    masked = Rows([correlated(0)], [np.zeros(400, np.bool_)])
    assert rounded_anew(whole, again, masked, masked, OnnxEngine("cpu"))[1].kept == 0


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_where_nothing_is_quantised_the_report_says_so(scheme: str) -> None:
    rng, nodes, weights, x = np.random.default_rng(0), [], [], "x"
    for k, (before, after) in enumerate(((3, 16), (16, 32), (32, 24), (24, 4))):
        values = np.asarray(rng.standard_normal((after, before, 1, 1)) / np.sqrt(before), np.float32)
        weights.append(onnx.numpy_helper.from_array(values, f"w{k}"))
        nodes.append(onnx.helper.make_node("Conv", [x, f"w{k}"], [f"c{k}"], f"c{k}"))
        nodes.append(onnx.helper.make_node("Relu", [f"c{k}"], [x := f"r{k}"], f"r{k}"))
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["b", c, 5, 5]) for n, c in (("x", 3), (x, 4))]
    graph = onnx.helper.make_graph(nodes, "sliding", ends[:1], ends[1:], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    data = [{"x": rng.standard_normal((4, 3, 5, 5)).astype(np.float32)} for _ in range(4)]
    result = liar_opt.prune(model, data, ffn=0.5, latency=False, quantize=scheme)
    found = result.report["quantised"]
    assert f"it finds no weight that {scheme} takes" in found["refused"] and found["refused"] == found["dense_refused"]
    assert [corner["quantised"] for corner in found["corners"]] == [False, False]
