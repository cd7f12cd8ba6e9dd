"""Widths that fit what runs the result: every runtime, whatever set the goal, on both engines; and what contradicts."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
import zoo

import liar_opt
from liar_opt.passes import meet_target
from liar_opt.passes.allocate_widths import Expressible
from liar_opt.passes.base import State
from liar_opt.passes.blank_cut import operations
from liar_opt.passes.chosen_passes import passes_of_options
from liar_opt.passes.fit_runtime import FitRuntimePass, Fitted, measured_fit
from liar_opt.passes.groups import ChannelGroup, Consumer
from liar_opt.passes.meet_target import LatencyTable
from liar_opt.passes.onnx_backend import OnnxBackend
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.runtimes import RUNTIMES
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.latency import Latency
from liar_opt.tools import cli
from liar_opt.tools.report import runtime_fit

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, WORDS, LENGTH, HEAD, FFN = 4, 61, 11, 8, 512
GOALS: dict[str, dict[str, Any]] = {
    "ratios": {"ffn": 0.4, "heads": 0.25},
    "uniform": {"sparsity": 0.4, "allocate": "uniform"},
    "curves": {"sparsity": 0.4},
    "params": {"target": "params=0.8x"},
    "latency": {"target": "latency=1.2x"},
    "max-drop": {"max_drop": "30%"},
    "search": {"sparsity": 0.4, "search": 1.0},
}


@functools.cache
def made() -> Any:
    """A decoder of eight heads in pairs, whose layers differ in how much they do."""
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=HEAD,
        intermediate_size=FFN,
        max_position_embeddings=64,
        use_cache=False,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.mul_(1.0 + index % 3)
    return module


def batches(count: int = 4) -> list[dict[str, np.ndarray]]:
    rngs = map(np.random.default_rng, range(count))
    return [
        {"input_ids": rng.integers(3, WORDS, (4, LENGTH)), "attention_mask": np.ones((4, LENGTH), np.int64)} for rng in rngs
    ]


class _Plain(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return result


@functools.cache
def export() -> Path:
    path = zoo.session_folder() / "runtimes.onnx"
    names = ["input_ids", "attention_mask"]
    with zoo.alone(path.name), warnings.catch_warnings():
        if not path.exists():
            warnings.simplefilter("ignore")
            example = tuple(torch.from_numpy(v) for v in batches(1)[0].values())
            axes = {key: {0: "batch", 1: "sequence"} for key in (*names, "logits")}
            torch.onnx.export(
                _Plain(made()).eval(),
                example,
                str(path),
                dynamo=False,
                input_names=names,
                output_names=["logits"],
                dynamic_axes=axes,
                opset_version=17,
            )
    return path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose time is a known function of the operations."""

    def measure(models: Any, feeds: Any, **_: Any) -> Any:
        given = [feeds] * len(models) if isinstance(feeds, dict) else feeds
        seconds = [0.01 + 1e-8 * operations(m, f) ** 0.9 for m, f in zip(models, given, strict=True)]
        return SimpleNamespace(seconds=seconds, speedup=seconds[0] / seconds[-1], spread=0.001)

    monkeypatch.setattr(meet_target, "deployed", lambda model, device: model)
    monkeypatch.setattr(meet_target, "measure_latency", measure)


def run(model: Any, runtime: str, **options: Any) -> liar_opt.PruneResult:
    common: dict[str, Any] = {"latency": False, "fresh": True, "runtime": runtime, **options}
    return liar_opt.prune(model, batches(), **common)


def widths(result: liar_opt.PruneResult, kind: str) -> list[int]:
    return [g["after"] for g in result.report["groups"] if g["kind"] == kind]


def require_fitting(result: liar_opt.PruneResult, runtime: str, parts: int = 1) -> None:
    row = RUNTIMES[runtime]
    ffn, heads = widths(result, "ffn"), widths(result, "heads")
    assert len(ffn) == len(heads) == LAYERS
    assert min(ffn) < FFN or min(heads) < 8
    block = row.block if row.always else 1
    assert all(n % (math.lcm(row.ffn, block) * parts) == 0 for n in ffn)
    assert all(n % math.lcm(row.heads, parts) == 0 and (n == 8 or n * 2 * HEAD % (block * parts) == 0) for n in heads)
    assert len(set(heads)) == 1 or not row.equal_heads
    assert result.report["fitted"]["runtime"] == runtime


@pytest.mark.parametrize("runtime", ["ort-cpu", "ort-cuda", "webgpu"])
def test_a_graph_fits_each_runtime(runtime: str) -> None:
    result = run(export(), runtime, sparsity=0.4)
    require_fitting(result, runtime)
    assert result.report["verification"]["exact_difference"] < 1e-4


@pytest.mark.parametrize("runtime", ["qnn", "gguf", "vllm"])
def test_a_checkpoint_fits_each_runtime(runtime: str, tmp_path: Path) -> None:
    result = run(made(), runtime, sparsity=0.4)
    require_fitting(result, runtime)
    assert result.report["verification"]["exact_difference"] < 1e-4
    config = transformers.AutoConfig.from_pretrained(result.save(tmp_path / "smaller"))
    assert config.intermediate_size == widths(result, "ffn")[0]
    assert config.num_key_value_heads == widths(result, "heads")[0]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("goal", [pytest.param(g, marks=pytest.mark.rest if g == "max-drop" else ()) for g in GOALS])
def test_whatever_set_the_goal(goal: str) -> None:
    require_fitting(run(export(), "genai", **GOALS[goal]), "genai")


@pytest.mark.parametrize("goal", ["curves", "params"])
def test_a_module_fits_by_itself(goal: str) -> None:
    require_fitting(run(made(), "genai", checkpoint=False, **GOALS[goal]), "genai")


def test_without_a_runtime_widths_would_not_fit() -> None:
    free = liar_opt.prune(export(), batches(), sparsity=0.4, latency=False, fresh=True)
    assert "fitted" not in free.report
    assert any(n % 64 for n in widths(free, "ffn"))


def test_parts_divide_heads_and_widths() -> None:
    result = run(made(), "vllm", sparsity=0.4, tensor_parallel=2)
    require_fitting(result, "vllm", parts=2)
    alone = liar_opt.prune(export(), batches(), heads=0.3, ffn=0.3, tensor_parallel=4, latency=False)
    assert widths(alone, "heads") == [4] * LAYERS and all(n % 4 == 0 for n in widths(alone, "ffn"))
    assert alone.report["fitted"]["runtime"] is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"runtime": "abacus"}, "runtime 'abacus' is unknown; choose one of ort-cpu, "),
    "no ONNX": ({"runtime": "vllm"}, "vllm reads no ONNX, .*give the checkpoint"),
    "no ONNX, either": ({"runtime": "gguf"}, "gguf reads no ONNX"),
    "another multiple": ({"runtime": "tensorrt", "multiple_of": 24}, "multiple-of 24 excludes tensorrt, .*multiples of 64"),
    "values alone": ({"runtime": "ort-cuda", "values": 0.25}, "ort-cuda wants values as wide as queries and keys"),
    "parts": ({"tensor_parallel": 3}, "tensor-parallel 3 does not divide the 16 heads of .*o_proj"),
    "no parts": ({"tensor_parallel": 0}, "tensor-parallel 0 is below 1"),
    "no heads": (
        {"heads": 0.5, "tensor_parallel": 8},
        "no narrower heads fits tensor-parallel 8: .* has 8, .*multiple of 8",
    ),
    "layers as a whole": (
        {"runtime": "genai", "sparsity": 0.3, "whole_layers": "on"},
        "genai counts the layers .*leave whole-layers out",
    ),
    "each its own": ({"runtime": "genai", "sparsity": 0.3, "allocate": "flap"}, "as many heads in each layer.*'flap'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_contradicts_is_said_before_any_work(name: str) -> None:
    options, match = REFUSED[name]
    calls: list[str] = []
    with pytest.raises(OptionError, match=match):
        liar_opt.prune(export(), batches(), progress=lambda stage, *_: calls.append(stage), **options)
    assert not {"prune", "curves", "verify"} & set(calls)


def test_a_checkpoint_runtime_refuses_onnx_of_a_checkpoint() -> None:
    with pytest.raises(OptionError, match="gguf reads no ONNX"):
        liar_opt.prune(made(), batches(), runtime="gguf", checkpoint=False)


def test_a_multiple_of_what_is_wanted_is_kept() -> None:
    result = run(export(), "ort-cpu", sparsity=0.4, multiple_of=48)
    assert all(n % 48 == 0 or n == FFN for n in widths(result, "ffn"))


def test_values_and_keys_of_one_ratio_fit() -> None:
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    module = transformers.BertModel(config, add_pooling_layer=False).eval()
    result = liar_opt.prune(
        module, batches(), values=0.25, query_key=0.25, runtime="tensorrt", checkpoint=False, latency=False
    )
    assert widths(result, "values") == widths(result, "query-key") == [12] * 4


@pytest.mark.parametrize(("runtime", "whole"), [("webgpu", "off"), ("ort-cpu", "auto")])
def test_layers_go_whole_where_the_runtime_loads_that(runtime: str, whole: str) -> None:
    chosen = passes_of_options(PruneOptions(sparsity=0.3, runtime=runtime, whole_layers="auto"), True)
    assert chosen.curves is not None and chosen.curves.whole == whole


def test_channels_are_counted_and_not_the_places_of_a_kernel() -> None:
    """A kernel of two by two contracts each channel four times."""
    rng, nodes, weights, x = np.random.default_rng(0), [], [], "x"
    for k, (before, after) in enumerate(((3, 32), (32, 96), (96, 64), (64, 4))):
        values = np.asarray(rng.standard_normal((after, before, 2, 2)) / np.sqrt(4 * before), np.float32)
        weights.append(onnx.numpy_helper.from_array(values, f"w{k}"))
        nodes.append(onnx.helper.make_node("Conv", [x, f"w{k}"], [f"c{k}"], f"c{k}"))
        nodes.append(onnx.helper.make_node("Relu", [f"c{k}"], [x := f"r{k}"], f"r{k}"))
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["b", None, "h", "w"]) for n in ("x", x)]
    ends[0].type.tensor_type.shape.dim[1].dim_value = 3
    graph = onnx.helper.make_graph(nodes, "sliding", ends[:1], ends[1:], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    data = [{"x": rng.standard_normal((4, 3, 9, 9)).astype(np.float32)} for _ in range(4)]
    result = liar_opt.prune(model, data, ffn=0.5, runtime="qnn", latency=False)
    kept = widths(result, "ffn")
    assert min(kept) < 96 and all(n % 32 == 0 for n in kept)
    assert "channels between convolutions in multiples of 32" in result.report["fitted"]["asked"]


# The pass alone -------------------------------------------------------------------------------------------------------


def group(name: str, kind: str, size: int, block: int = 1, queries: int = 1) -> ChannelGroup:
    owners = np.repeat(np.arange(size), block)
    return ChannelGroup(name, kind, 0, size, (Consumer((), owners),), 100 * size, 0, 0, queries=queries)


def fitted(*groups: ChannelGroup, expressible: Expressible | None = None, **options: Any) -> State:
    model: Any = SimpleNamespace(notes=[], source=None)
    state = State(model, groups=groups)
    if expressible is not None:
        state.add(expressible)
    FitRuntimePass(**options)(state)
    return state


def steps(state: State) -> dict[str, int]:
    return {g.name: g.step for g in state.groups}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"runtime": "ort-cpu"}, {"f": 16, "runs": 2, "h": 1, "g": 1}),
        ({"runtime": "gguf"}, {"f": 256, "runs": 32, "h": 4, "g": 8}),
        ({"runtime": "vllm"}, {"f": 128, "runs": 16, "h": 1, "g": 1}),
        ({"runtime": "vllm", "tensor_parallel": 2}, {"f": 256, "runs": 32, "h": 2, "g": 2}),
        ({"runtime": "vllm", "tensor_parallel": 2, "blocks": True}, {"f": 256, "runs": 32, "h": 4, "g": 8}),
        ({"blocks": True}, {"f": 32, "runs": 4, "h": 1, "g": 1}),
        ({"tensor_parallel": 8}, {"f": 8, "runs": 1, "h": 8, "g": 8}),
        ({"tensor_parallel": 16}, {"f": 16, "runs": 2, "h": 16, "g": 8}),
    ],
)
def test_steps_are_in_blocks(options: dict[str, Any], expected: dict[str, int]) -> None:
    groups = (group("f", "ffn", 2048), group("runs", "ffn", 256, 8), group("h", "heads", 16, 64))
    assert steps(fitted(*groups, group("g", "heads", 8, 32, 2), **options)) == expected


def test_what_a_configuration_can_say_is_thinned() -> None:
    said = Expressible("it", {"h": (2, 4, 6), "a": (32, 48, 64), "b": (64, 96, 128)}, frozenset({"a", "b"}))
    groups = (group("h", "heads", 8, 64), group("a", "ffn", 96), group("b", "ffn", 192))
    state = fitted(*groups, expressible=said, runtime="ort-cpu", blocks=True)
    assert state.found(Expressible).allowed == {"h": (2, 4, 6), "a": (32, 64), "b": (64, 128)}
    state = fitted(*groups, expressible=said, tensor_parallel=4)
    assert state.found(Expressible).allowed["h"] == (4,)


def test_groups_that_no_step_fits_are_left_whole_with_a_note() -> None:
    state = fitted(group("f", "ffn", 200), group("g", "ffn", 1024), runtime="gguf")
    assert any("'f': no narrower width fits gguf" in n for n in state.model.notes)
    with pytest.raises(OptionError, match=r"nothing fits gguf: .*'f', ffn, has 200, what stays must be a multiple of 256"):
        fitted(group("f", "ffn", 200), runtime="gguf")


def test_the_next_width_is_that_of_the_table() -> None:
    state = fitted(group("f", "ffn", 256), group("h", "heads", 8, 8), runtime="ort-cuda")
    state.keep = {"f": 192, "h": 8}
    assert measured_fit(state, "cpu", 1.5, 0.01) == replace(state.found(Fitted), device="cpu", speedup=1.5, faster=True)
    slow = measured_fit(state, "cpu", 1.01, 0.01)
    assert slow is not None and slow.faster is False and slow.next is None
    flat = ([64, 128, 192, 256], [0.0, 0.0, 0.1, 0.2])
    state.add(LatencyTable(1.0, {"f": flat, "h": ([1, 8], [0.0, 0.0])}))
    slow = measured_fit(state, "cpu", 0.9, 0.01)
    assert slow is not None and slow.next == {"group": "f", "width": 128, "seconds": pytest.approx(0.1)}
    assert measured_fit(State(state.model), "cpu", 0.9, 0.01) is None


@pytest.mark.parametrize("seconds", [(1.0, 1.2), (1.0, 0.8)], ids=["slower", "faster"])
def test_where_a_result_is_not_faster_narrower_widths_are_timed(
    seconds: tuple[float, float], clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxBackend, "timed", lambda *_: Latency(seconds, 3, "", 0.001))
    result = run(export(), "qnn", ffn=0.1, latency=True)
    said = result.report["fitted"]
    assert said["faster"] is (seconds[1] < 1.0)
    if said["faster"]:
        assert said["next"] is None
        return
    kept = {g["name"]: g["after"] for g in result.report["groups"]}
    assert said["next"]["width"] < kept[said["next"]["group"]] and said["next"]["seconds"] > 0
    assert said["next"]["width"] % 32 == 0 or kept[said["next"]["group"]] <= 16


def told(**more: Any) -> str:
    fit = {"runtime": "qnn", "asked": ["feed-forward widths in multiples of 32"], "device": "cpu", "next": None}
    return runtime_fit({"fitted": {**fit, "speedup": None, "faster": None, **more}})


def test_the_line_says_whether_it_is_faster() -> None:
    asked = "for qnn: feed-forward widths in multiples of 32; "
    assert told() == f"{asked}not timed here"
    assert told(speedup=1.5, faster=True) == f"{asked}1.50 x as fast on cpu by measurement"
    assert "not faster (0.90 x as fast on cpu by measurement), and no narrower width was timed" in told(
        speedup=0.9, faster=False
    )
    better = {"group": "f", "width": 128, "seconds": 0.002}
    assert told(speedup=0.9, faster=False, next=better).endswith("that would be: 128 in 'f', 2.00 ms by the latency table")


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., int]:
    data = {k: np.concatenate([b[k] for b in batches()]) for k in batches(1)[0]}
    np.savez(tmp_path / "data.npz", **data)  # type: ignore[arg-type]

    def call(*more: str) -> int:
        given = ["--calibration", str(tmp_path / "data.npz"), "-o", str(tmp_path / "out.onnx"), "--ffn", "0.4"]
        return cli.main([str(export()), *given, *more])

    return call


def test_the_command_says_what_was_asked_for(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxBackend, "timed", lambda *_: Latency((0.02, 0.01), 3, "", 0.001))  # no narrower ones are tried
    page = tmp_path / "page.html"
    assert command("--for", "qnn", "--html", str(page)) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("for qnn: "))
    assert "feed-forward widths in multiples of 32; " in line and " x as fast on cpu" in line
    assert "feed-forward widths in multiples of 32" in page.read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--for", "abacus"), "invalid choice: 'abacus'"),
        (("--for", "vllm"), "vllm reads no ONNX"),
        (("--for", "qnn", "--multiple-of", "12"), "multiple-of 12 excludes qnn"),
        (("--tensor-parallel", "3"), "does not divide"),
    ],
)
def test_the_command_refuses(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], match: str
) -> None:
    assert command(*options) == 2
    captured = capsys.readouterr()
    assert match in captured.err and len(captured.err.splitlines()) == 1
    assert not (tmp_path / "out.onnx").exists()
