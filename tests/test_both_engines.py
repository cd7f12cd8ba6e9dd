"""What is done to a module in torch, and to its export in ONNX Runtime, is the same: one row for each capability.

The module is traced; the export is TorchScript's, another graph of other operators. Both keep the same blocks, and their
weights are equal to rounding.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import oracle
import pytest
import torch
import transformers
import zoo
from onnx import numpy_helper

import liar_opt
from liar_opt.passes import meet_target
from liar_opt.passes.blank_cut import operations
from liar_opt.passes.result import ModuleResult

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, WORDS, LENGTH = 4, 101, 13
ROUNDING = 0.04
"""Of the largest weight. Repair of what attention has nearly averaged magnifies rounding: the engines' BERTs are 0.001
(ratios) and 0.01 to 0.02 (dense) apart, by the processor. What is drawn smaller or larger has more near ties."""
CAPABILITIES: dict[str, dict[str, Any]] = {
    "ratios": {"ffn": 0.4, "heads": 0.25},
    "curves": {"sparsity": 0.3},
    "global": {"sparsity": 0.3, "allocate": "global"},
    "dense": {"ffn": 0.4, "heads": 0.25, "repair": "dense"},
    "residual": {"sparsity": 0.3, "repair": "residual"},
    "target": {"target": "params=0.8x", "allocate": "curves"},
    "flops": {"target": "flops=0.8x", "allocate": "curves"},
    "latency": {"target": "latency=1.2x", "allocate": "curves"},
    "max-drop": {"max_drop": "5%"},
    "search": {"sparsity": 0.3, "search": 600.0},
    "flap": {"sparsity": 0.3, "allocate": "flap"},
    "values": {"values": 0.34},
    "channels of values": {"values": 0.34, "value_cut": "select"},
    "queries": {"query_key": 0.34},
    "queries that share": {"sparsity": 0.3, "query_key": "auto"},
    "refit": {"ffn": 0.4, "heads": 0.25, "refit": True},
    "whole layers": {"sparsity": 0.6, "whole_layers": "on"},
    "whole layers by flops": {"target": "flops=0.4x", "whole_layers": "on"},
    "whole layers by latency": {"target": "latency=1.8x", "whole_layers": "on"},
    "all within heads": {"heads": 0.25, "values": 0.34, "query_key": 0.34},
}


def _bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=60,
        num_hidden_layers=LAYERS,
        num_attention_heads=5,
        intermediate_size=88,
        max_position_embeddings=37,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def _llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=88,
        max_position_embeddings=64,
        initializer_range=0.1,
        use_cache=False,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {"bert": _bert, "llama": _llama}


@functools.cache
def made(name: str) -> Any:
    """A model whose vectors are drawn, too, and whose layers differ in how much they do; all tests have the same one."""
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            if parameter.ndim < 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            else:
                parameter.mul_(1.0 + 0.2 * (index % 3))
    return module


def batches(count: int = 12) -> list[dict[str, np.ndarray]]:
    """Texts, some of them padded."""
    result = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        mask = np.ones((4, LENGTH), np.int64)
        mask[1, -4:] = 0
        result.append({"input_ids": rng.integers(3, WORDS, (4, LENGTH)), "attention_mask": mask})
    return result


class _Plain(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return result


@functools.cache
def export(name: str) -> Path:
    """Exports a model, once for all test workers."""
    path = zoo.session_folder() / f"both-engines-{name}.onnx"
    names, outputs = ["input_ids", "attention_mask"], ["logits"]
    with zoo.alone(path.name), warnings.catch_warnings():
        if not path.exists():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Plain(made(name)).eval(),
                tuple(torch.from_numpy(v) for v in batches(1)[0].values()),
                str(path),
                dynamo=False,
                input_names=names,
                output_names=outputs,
                dynamic_axes={key: {0: "batch", 1: "sequence"} for key in (*names, *outputs)},
                opset_version=17,
            )
    return path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose time is a known function of the operations, on which both engines depend alike."""

    def measure(models: Any, feeds: Any, **_: Any) -> Any:
        batches = [feeds] * len(models) if isinstance(feeds, dict) else feeds
        seconds = [0.01 + 1e-8 * operations(m, f) ** 0.9 for m, f in zip(models, batches, strict=True)]
        return SimpleNamespace(seconds=seconds, speedup=seconds[0] / seconds[-1], spread=0.001)

    monkeypatch.setattr(meet_target, "deployed", lambda model, device: model)
    monkeypatch.setattr(meet_target, "measure_latency", measure)


@functools.cache
def both(name: str, **options: Any) -> tuple[ModuleResult, liar_opt.PruneResult]:
    """The same run on both engines."""
    # A ridge of its own would be chosen by errors that differ in their last digits alone.
    common: dict[str, Any] = {"latency": False, "multiple_of": 4, "fresh": True, "ridge": 0.1, **options}
    module = liar_opt.prune(made(name), batches(), checkpoint=False, **common)
    assert isinstance(module, ModuleResult)
    return module, liar_opt.prune(export(name), batches(), **common)


def kept(result: liar_opt.PruneResult) -> list[tuple[str, list[int]]]:
    """The kind and the kept blocks of every group, in execution order."""
    return [(g["kind"], g.get("kept") or list(range(g["after"]))) for g in result.report["groups"]]


def apart(module: ModuleResult, proto: onnx.ModelProto) -> float:
    """How far the parameters of a module are from those of an export, relative to the largest of each."""
    arrays = [numpy_helper.to_array(t) for t in proto.graph.initializer]
    arrays += [a.T for a in arrays if a.ndim == 2]
    worst = 0.0
    for parameter in module.module.parameters():
        value = parameter.detach().numpy()
        found = [float(np.abs(a - value).max()) for a in arrays if a.shape == value.shape]
        worst = max(worst, min(found) / float(np.abs(value).max()))
    return worst


def outputs_apart(module: torch.nn.Module, proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> float:
    """How far the first outputs are from each other, relative to the largest."""
    with torch.no_grad():
        found = module(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    ours = (found if isinstance(found, torch.Tensor) else found[0]).numpy()
    theirs = oracle.run(proto, feeds)[0]
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


REST = {
    ("llama", "latency"),
    ("llama", "whole layers by latency"),
    ("llama", "whole layers by flops"),
    ("llama", "target"),
    ("llama", "refit"),
    ("llama", "search"),
    ("bert", "whole layers by latency"),
}
"""What the other model shows as well."""
CASES = [
    pytest.param(name, capability, marks=pytest.mark.rest if (name, capability) in REST else ())
    for name in MODELS
    for capability in CAPABILITIES
    if name != "llama" or "query_key" not in CAPABILITIES[capability]  # a rotary embedding stands between
]


@pytest.mark.parametrize(("name", "capability"), CASES)
@pytest.mark.usefixtures("clock")
def test_both_engines_make_the_same(name: str, capability: str) -> None:
    module, graph = both(name, **CAPABILITIES[capability])
    assert kept(module) == kept(graph)
    assert any(group["after"] < group["before"] for group in graph.report["groups"])
    if any(change.details.get("rotated") for change in graph.changes):  # the sign of an axis is open
        assert outputs_apart(module.module, graph.model, batches(1)[0]) < ROUNDING
    else:
        assert apart(module, graph.model) < ROUNDING
    for when in ("before", "after"):
        assert module.report[when]["flops"] == graph.report[when]["flops"] > 0


class Windows(torch.nn.Module):
    """Channels into a window, and through a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 10, 3, padding=1)
        self.narrow = torch.nn.Conv2d(10, 12, 3, padding=(1, 2))
        self.wide = torch.nn.Conv2d(12, 10, 3, padding=(1, 0), bias=False)
        self.expand, self.depthwise = torch.nn.Conv2d(10, 16, 1), torch.nn.Conv2d(16, 16, 3, padding="same", groups=16)
        self.project = torch.nn.Conv2d(16, 9, (3, 2), stride=(2, 1), dilation=(1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.wide(self.narrow(x).relu())
        result: torch.Tensor = self.project(self.depthwise(self.expand(x).relu()).sigmoid())
        return result


class Sequence(torch.nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.enter, self.leave = torch.nn.Linear(6, 14), torch.nn.Linear(10, 5)
        self.layer = kind(14, 10, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.leave(self.layer(self.enter(x).tanh())[0])
        return result


OTHERS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "windows": (Windows, (4, 3, 9, 8), {"ffn": 0.5}),
    "windows by curves": (Windows, (4, 3, 9, 8), {"sparsity": 0.4}),
    "LSTM": (lambda: Sequence(torch.nn.LSTM), (4, 7, 6), {"recurrent": 0.5}),
    "GRU": (lambda: Sequence(torch.nn.GRU), (4, 7, 6), {"recurrent": 0.5}),
    "RNN": (lambda: Sequence(torch.nn.RNN), (4, 7, 6), {"recurrent": 0.5}),
    "RNN of Relu": (lambda: Sequence(functools.partial(torch.nn.RNN, nonlinearity="relu")), (4, 7, 6), {"recurrent": 0.5}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_both_engines_make_the_same_of_other_layers(name: str, tmp_path: Path) -> None:
    make, shape, options = OTHERS[name]
    torch.manual_seed(0)
    module, path = make().eval(), tmp_path / "model.onnx"
    given = [{"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)} for seed in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.randn(shape),), str(path), dynamo=False, input_names=["x"], opset_version=17)
    common: dict[str, Any] = {"latency": False, "multiple_of": 2, "fresh": True, "ridge": 0.1, **options}
    ours, theirs = liar_opt.prune(module, given, **common), liar_opt.prune(path, given, **common)
    assert isinstance(ours, ModuleResult) and kept(ours) == kept(theirs)
    assert type(ours.module) is type(module)
    assert ours.report["after"]["parameters"] < ours.report["before"]["parameters"]
    assert outputs_apart(ours.module, theirs.model, given[0]) < 1e-3


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("target", ["flops=0.8x", "latency=1.2x"])
def test_a_checkpoint_meets_a_target_with_one_width_a_kind(target: str) -> None:
    result = liar_opt.prune(made("llama"), batches(), target=target, multiple_of=4, fresh=True, latency=False)
    found = result.report["target"]
    step = found["dense"] * 4 / 88  # of all feed-forward widths at once, more than they are of the whole
    assert found["found"] == pytest.approx(found["wanted"], abs=step / 2)
    for kind in ("ffn", "heads"):
        assert len({g["after"] for g in result.report["groups"] if g["kind"] == kind}) == 1


def test_another_repair_is_seen() -> None:
    """What is called rounding is less than what a repair, or its target, makes of the same kept blocks."""
    ratios = CAPABILITIES["ratios"]
    results = {"liar": both("bert", **ratios), "dense": both("bert", **CAPABILITIES["dense"])}
    results["residual"] = both("bert", **ratios, repair="residual")
    for one, other in (("liar", "dense"), ("dense", "residual"), ("residual", "liar")):
        assert apart(results[one][0], results[other][1].model) > 2 * ROUNDING


def test_a_rotary_embedding_is_the_reason_in_both() -> None:
    for model in (made("llama"), export("llama")):
        with pytest.raises(liar_opt.ModelError, match="taken apart before the product, as a rotary embedding does"):
            liar_opt.prune(model, batches(1), query_key=0.3, checkpoint=False)
        planned = liar_opt.prune(model, batches(1), query_key="auto", sparsity=0.2, checkpoint=False, dry_run=True)
        assert any("queries and keys keep their width: it is taken apart" in n for n in planned.report["model"]["notes"])


def test_a_checkpoint_keeps_its_layers(tmp_path: Path) -> None:
    """Stock code runs every layer: it is refused before any work; the traced graph is written without."""
    with pytest.raises(liar_opt.OptionError, match=r"stock code of a checkpoint runs every layer .* --format onnx"):
        liar_opt.prune(made("bert"), batches(), whole_layers="on", sparsity=0.3)
    module, _ = both("bert", **CAPABILITIES["whole layers"])
    assert "the result is the traced graph: whole layers went" in " ".join(module.report["model"]["notes"])
    module.save(tmp_path / "whole.pt2")
    feeds = {name: torch.from_numpy(value) for name, value in batches(1)[0].items()}
    found = torch.export.load(tmp_path / "whole.pt2").module()(**feeds)
    with torch.no_grad():
        ours = module.module(**feeds)
    torch.testing.assert_close(found[0], ours[0], rtol=1e-4, atol=1e-5)
    assert module.report["after"]["parameters"] == sum(p.numel() for p in module.module.parameters())
