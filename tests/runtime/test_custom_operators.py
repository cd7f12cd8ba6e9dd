"""Libraries of operators that ONNX Runtime lacks: with onnxruntime-extensions, where it is installed."""

from __future__ import annotations

from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
from onnx import helper

from liar_opt.passes.prune_job import inspect, prune
from liar_opt.runtime.errors import ModelError, OptionError
from liar_opt.runtime.sessions import Session, custom_operators, unknown_operators
from liar_opt.tools import cli

TEXT = "f (float[b, s, 6] x) => (float[b, s, 6] y) { u = MatMul(x, w1)  h = Relu(u)  v = MatMul(h, w2)  y = Identity(v) }"


@pytest.fixture
def proto() -> onnx.ModelProto:
    """Ends in an operator that gives its positive and its negative part."""
    model = graphs.parse(TEXT, {"w1": (6, 40), "w2": (40, 6)})
    model.graph.node[-1].CopyFrom(helper.make_node("NegPos", ["v"], ["n", "y"], domain="ai.onnx.contrib", name="parts"))
    model.opset_import.append(helper.make_opsetid("ai.onnx.contrib", 1))
    return model


@pytest.fixture
def library() -> Path:
    return Path(pytest.importorskip("onnxruntime_extensions").get_library_path())


def test_unknown_operators() -> None:
    asked = [
        ("", "MatMul"),
        ("ai.onnx", "Relu"),
        ("com.microsoft", "Gelu"),
        ("acme", "Norm"),
        ("", "Nonsense"),
        ("acme", "Norm"),
    ]
    assert unknown_operators(asked) == ["acme::Norm", "Nonsense"]


def test_pruned_with_its_library(proto: onnx.ModelProto, library: Path) -> None:
    x = np.random.default_rng(0).standard_normal((64, 5, 6)).astype(np.float32)
    with pytest.raises(ModelError, match=r"ai\.onnx\.contrib::NegPos is not in this ONNX Runtime"):
        prune(proto, {"x": x}, ffn=0.5)
    result = prune(proto, {"x": x}, ffn=0.5, allocate="uniform", custom_ops=library)
    assert [g["after"] for g in result.report["groups"]] == [24]
    assert result.report["latency"]["runs"] > 0  # the processes that time have the library as well
    with custom_operators([library]):
        y = Session(result.model.SerializeToString()).run({"x": x}, arrays=True)["y"]
    assert y.shape == x.shape and (y >= 0).all() and y.any()
    with pytest.raises(Exception, match="NegPos"):  # it is gone when the run is done
        Session(result.model.SerializeToString())


def test_the_command(proto: onnx.ModelProto, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    assert cli.main(["inspect", str(path)]) == 0
    assert "NegPos is not in this ONNX Runtime" in capsys.readouterr().err
    assert cli.main(["inspect", str(path), "--custom-ops", str(library)]) == 0
    assert "NegPos" not in capsys.readouterr().err
    argv = [str(path), "--ffn", "0.5", "--no-latency", "--custom-ops", str(library), "--custom-ops", str(library)]
    assert cli.main(argv) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert cli.main([str(path), "--ffn", "0.5", "--force"]) == 2
    err = capsys.readouterr().err
    assert "node 'parts' (ai.onnx.contrib::NegPos)" in err and "--custom-ops" in err


@pytest.mark.parametrize("call", [inspect, prune])
def test_libraries_that_are_none(proto: onnx.ModelProto, tmp_path: Path, call: object) -> None:
    with pytest.raises(OptionError, match=r"library '.*none.so' of custom operators is no file"):
        call(proto, custom_ops=[tmp_path / "none.so"])  # type: ignore[operator]
    text = tmp_path / "text.so"
    text.write_text("no library")
    with pytest.raises(OptionError, match=r"library '.*text.so' of custom operators cannot be loaded"):
        call(proto, custom_ops=str(text))  # type: ignore[operator]
