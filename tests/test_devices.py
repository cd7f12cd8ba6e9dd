"""The device does not change the result: models pruned on CUDA are those that are pruned on the CPU.

Without a CUDA device only the CPU's part runs, which shows that pruning twice gives the same model.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
import torch
import zoo
import zoo_decoders
import zoo_fx
from onnx import numpy_helper

import liar_opt
from liar_opt.passes.result import ModuleResult
from liar_opt.runtime.sessions import Session, cuda_works

CUDA = pytest.mark.skipif(not cuda_works(), reason="no CUDA device")
TORCH_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
GRAPHS = (
    "bert-torchscript-eager-dynamic",
    "bert-dynamo-sdpa-dynamic",
    "bert-torchscript-eager-dynamic-transformers",
    "bert-torchscript-eager-dynamic-fp16",
    "deberta-v3-torchscript-eager-dynamic",
    "vit-torchscript-classic-dynamic-transformers",
    "llama-torchscript",
    "llama-torchscript-cache",
    "whisper-dynamo",
)
MODULES = ("bert", "llama", "vit", "whisper")
TOLERANCE = {"float32": 2e-3, "float16": 5e-2}
"""Relative; a repair magnifies the rounding of what it is fitted to."""


def graph(name: str) -> Any:
    """Returns an exported model, with a batch for calibration and another one."""
    found = [c for c in zoo.every_case() if c.name == name]
    if found:
        return zoo.ready(found[0])
    return zoo_decoders.ready(next(c for c in zoo_decoders.cases() if c.name == name))


def worst(got: dict[str, Any], reference: dict[str, Any]) -> float:
    """The largest relative difference of any output."""
    return max(
        float(np.linalg.norm(got[name].astype(np.float64) - value) / np.linalg.norm(value.astype(np.float64)))
        for name, value in reference.items()
    )


@pytest.mark.parametrize(
    ("name", "device"), [(GRAPHS[0], "cpu"), *(pytest.param(name, "cuda", marks=CUDA) for name in GRAPHS)]
)
def test_a_graph(name: str, device: Any) -> None:
    """Selection that looks at weights alone, so that rounding cannot choose; the repair is the measured part."""
    built = graph(name)
    options: dict[str, Any] = {"ffn": 0.5, "heads": 0.4, "multiple_of": 1, "score": "magnitude", "latency": False}
    results = [liar_opt.prune(built.path, [built.feeds], provider=p, **options) for p in ("cpu", device)]
    assert [r.report["device"] for r in results] == ["cpu", device]
    assert [g["kept"] for g in results[0].report["groups"]] == [g["kept"] for g in results[1].report["groups"]]
    dtype = results[1].report["verification"]["exact_dtype"]
    assert dtype == "float16" or results[1].report["verification"]["exact_difference"] < 1e-4
    narrower = results[0].report["cache_shapes"]
    feeds = {k: v[:, : narrower[k][1]] if k in narrower else v for k, v in built.feeds.items()}
    outputs = [Session(r.model.SerializeToString()).run(feeds, arrays=True) for r in results]
    assert worst(outputs[1], outputs[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_the_whole_of_it(device: Any, tmp_path: Path) -> None:
    """The default selection, error curves, a target in seconds, timing, saving."""
    built = zoo.ready(next(c for c in zoo.every_case() if c.name == GRAPHS[0]))
    uniform = liar_opt.prune(built.path, [built.feeds], provider=device, sparsity=0.4, multiple_of=1)
    assert uniform.report["verification"]["exact_difference"] < 1e-4
    assert uniform.report["latency"]["pruned_seconds"] > 0
    uniform.save(tmp_path / "small.onnx")
    outputs = [
        Session(model, device).run(built.feeds, arrays=True)
        for model in (tmp_path / "small.onnx", uniform.model.SerializeToString())
    ]
    assert worst(*outputs) < 1e-5
    curves = liar_opt.prune(
        built.path, [built.feeds], provider=device, target="flops=0.7x", repair="dense", multiple_of=1, latency=False
    )
    assert curves.report["target"]["found"] == pytest.approx(curves.report["target"]["wanted"], rel=0.05)


@pytest.mark.parametrize("device", DEVICES)
def test_products_on_the_device_are_exact(device: Any) -> None:
    """Unless they are timed: CUDA's default for float32 keeps three digits."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((512, 300)).astype(np.float32)
    proto = graphs.parse("f (float[a, 300] x) => (float[a, 300] y) { y = MatMul(x, w) }", {"w": (300, 300)})
    exact = x.astype(np.float64) @ numpy_helper.to_array(proto.graph.initializer[0]).astype(np.float64)
    session = Session(proto.SerializeToString(), device)
    measured = session.run({"x": x}, arrays=True)["y"]
    assert np.abs(measured - exact).max() < 2e-5 * np.abs(exact).max()
    timed = session.as_deployed().run({"x": x}, arrays=True)["y"]
    assert np.abs(timed - exact).max() < 2e-2 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("name", "device"), [(MODULES[0], "cpu"), *(pytest.param(name, "cuda", marks=TORCH_CUDA) for name in MODULES)]
)
def test_a_module(name: str, device: str) -> None:
    module, feeds = zoo_fx.build(name), zoo_fx.feeds(name)
    options: dict[str, Any] = {"ffn": 0.5, "heads": 0.4, "multiple_of": 1, "score": "magnitude", "latency": False}
    outputs, kept = [], []
    for place in ("cpu", device):
        result = liar_opt.prune(copy.deepcopy(module).to(place), [feeds], checkpoint=False, **options)
        assert isinstance(result, ModuleResult)
        assert result.report["device"].split(":")[0] == place
        kept.append([g["kept"] for g in result.report["groups"]])
        with torch.no_grad():
            value = result.module.to("cpu")(**zoo_fx.tensors(feeds))
        outputs.append({"first": (value if isinstance(value, torch.Tensor) else next(iter(value.values()))).numpy()})
    assert kept[0] == kept[1]
    assert worst(outputs[1], outputs[0]) < TOLERANCE["float32"]
