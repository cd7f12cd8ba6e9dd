"""Whole runs with torch as the solver, here on the CPU: they keep what numpy keeps, with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
import zoo_decoders
import zoo_fx
from onnx import numpy_helper

import liar_opt
from liar_opt.passes.measured import Measured
from liar_opt.passes.result import ModuleResult
from liar_opt.runtime import arrays
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.moments import Moments
from liar_opt.tools.cli import main

PLAIN: dict[str, Any] = {"latency": False, "multiple_of": 1, "fresh": True}
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("bert-torchscript-eager-dynamic", {"sparsity": 0.4}),
    ("bert-torchscript-eager-dynamic", {"ffn": 0.5, "heads": 0.5, "score": "swaps", "repair": "dense"}),
    ("bert-torchscript-eager-dynamic", {"values": 0.5, "query_key": 0.25}),
    ("llama-torchscript", {"ffn": 0.4, "heads": 0.5, "values": 0.5}),
]


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=CUDA)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """torch's device for ``solver="device"``."""
    monkeypatch.setattr(arrays, "device_of_torch", lambda: request.param)
    yield request.param


def built(name: str) -> Any:
    found = [c for c in zoo.every_case() if c.name == name]
    return zoo.ready(found[0]) if found else zoo_decoders.ready(next(c for c in zoo_decoders.cases() if c.name == name))


def require_same(host: Any, there: Any) -> None:
    """The same blocks; errors and weights to 1e-6, relative to the largest of each."""
    for one, two in zip(host.report["groups"], there.report["groups"], strict=True):
        assert one.get("kept") == two.get("kept")
        for a, b in zip(one.get("repairs", ()), two.get("repairs", ()), strict=True):
            assert a["ridge"] == b["ridge"] and a["error_repair"] == pytest.approx(b["error_repair"], rel=1e-4, abs=1e-7)


def require_near(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name, one in first.items():
        np.testing.assert_allclose(one, second[name], rtol=0, atol=1e-6 * float(np.abs(one).max(initial=0.0)), err_msg=name)


@pytest.mark.parametrize(("name", "options"), RUNS)
def test_a_graph(name: str, options: dict[str, Any], device: str) -> None:
    case = built(name)
    host, there = (
        liar_opt.prune(case.path, [case.feeds], solver=solver, provider="cpu", **PLAIN, **options)
        for solver in ("host", "device")
    )
    assert host.report["solver"] == {"where": "host", "precision": "float64"}
    assert there.report["solver"]["where"] != "host"
    require_same(host, there)
    weights = [{t.name: numpy_helper.to_array(t) for t in r.model.graph.initializer} for r in (host, there)]
    floats = [{n: w for n, w in found.items() if w.dtype == np.float32} for found in weights]
    if "values" not in options:  # a rotated direction may have the other sign
        require_near(*floats)
    assert host.report["verification"]["outputs"].keys() == there.report["verification"]["outputs"].keys()
    for output, one in host.report["verification"]["outputs"].items():
        two = there.report["verification"]["outputs"][output]
        assert one["relative_rms"] == pytest.approx(two["relative_rms"], rel=1e-4)


def test_a_module(device: str) -> None:
    module, feeds = zoo_fx.build("llama"), zoo_fx.feeds("llama")
    found = [
        liar_opt.prune(module, [feeds], solver=solver, sparsity=0.4, checkpoint=False, **PLAIN)
        for solver in ("host", "device")
    ]
    require_same(*found)
    weights = []
    for result in found:
        assert isinstance(result, ModuleResult)
        weights.append({n: p.detach().cpu().numpy() for n, p in result.module.named_parameters()})
    require_near(*weights)


def test_functions_of_the_user_get_arrays_of_numpy(device: str) -> None:
    seen: list[Any] = []

    def score(consumers: Any) -> Any:
        seen.extend(consumers)
        return sum(c.by_block(c.statistics.mean_square) for c in consumers)

    def repair(consumer: Measured, kept: Any, removed: Any) -> Any:
        seen.append(consumer)
        return consumer.weight[kept], consumer.statistics.mean[removed] @ consumer.weight[removed]

    case = built(RUNS[0][0])
    liar_opt.prune(case.path, [case.feeds], solver="device", ffn=0.4, score=score, repair=repair, **PLAIN)
    assert seen and all(isinstance(m.weight, np.ndarray) and isinstance(m.covariance, np.ndarray) for m in seen)


def test_no_device_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arrays, "device_of_torch", lambda: None)
    assert main([str(tmp_path / "none.onnx"), "--solver", "device", "-o", str(tmp_path / "out.onnx")]) == 2
    said = capsys.readouterr().err
    assert "solver 'device' needs a CUDA device" in said and "use solver 'host'" in said
    with pytest.raises(OptionError, match="solver 'fpga' is unknown"):
        liar_opt.prune(tmp_path / "none.onnx", solver="fpga")


def test_nothing_of_a_run_stays() -> None:
    assert arrays.solver() is arrays.HOST and Moments(2).arrays is arrays.HOST
