"""Modules that are no models of transformers, and what can be done with both forms of the result."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo_fx
from torch import nn

import liar_opt
from liar_opt.frontend.fx_module import Executor, Sym, analyse, example_from, lower, trace
from liar_opt.frontend.fx_onnx import export_onnx
from liar_opt.frontend.hf_checkpoint import without_cache
from liar_opt.frontend.tables import vocabulary
from liar_opt.passes.find_groups import find_groups
from liar_opt.passes.result import ModuleResult
from liar_opt.runtime.errors import CheckError, ModelError, OptionError
from liar_opt.runtime.sessions import Session

pytestmark = pytest.mark.usefixtures("one_thread")


class Attention(nn.Module):
    """Packed projections, a number of heads in an attribute, and a scale from a size."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (t.reshape(b * self.heads, s, -1) for t in self.packed(x, b, s))
        scores = torch.bmm(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5
        mixed = torch.bmm(scores.softmax(-1), v).reshape(b, self.heads, s, -1)
        result: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(b, s, self.width))
        return result

    def packed(self, x: torch.Tensor, b: int, s: int) -> list[torch.Tensor]:
        parts = self.qkv(x).split(self.width, dim=-1)
        return [p.reshape(b, s, self.heads, -1).transpose(1, 2) for p in parts]


class Block(nn.Module):
    def __init__(self, width: int = 30, heads: int = 5, hidden: int = 42) -> None:
        super().__init__()
        self.table = nn.Embedding(17, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = x + self.attention(self.first(x))
        x = x + self.down(torch.nn.functional.gelu(self.up(self.second(x))))
        assert isinstance(x, torch.Tensor)
        return x


class Scaled(nn.Module):
    """Weights that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(12, 20)), nn.Parameter(torch.randn(20, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.a) @ self.b


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x) if x.sum() > 0 else x
        return result


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def batches(count: int = 4) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"tokens": torch.randint(0, 17, (3, 7), generator=generator)} for _ in range(count)]


def pruned(module: nn.Module, data: Any, **options: Any) -> ModuleResult:
    options = {"ffn": 0.5, "multiple_of": 2, "latency": False, **options}
    result = liar_opt.prune(module, data, **options)
    assert isinstance(result, ModuleResult)
    return result


def test_a_module_of_ones_own() -> None:
    module = Block().eval()
    result = pruned(module, batches(), heads=0.4)
    assert {g.kind: g.size for g in result.groups} == {"heads": 5, "ffn": 42}
    names = {(a["where"], a["name"], a["before"], a["after"]) for a in result.report["verification"]["attributes"]}
    assert ("attention", "heads", 5, 3) in names and ("attention", "width", 30, 18) in names
    assert result.module.get_submodule("down").bias is not None, (
        "the repair may give a layer a bias where nothing forbids it"
    )
    other = torch.randint(0, 17, (4, 9))
    with torch.no_grad():
        torch.testing.assert_close(result.module(other), result.graph_module(tokens=other), rtol=1e-4, atol=1e-5)
        assert module(other).shape == result.module(other).shape
    kept = pruned(module, batches(), heads=0.4, new_bias=False)
    assert kept.module.get_submodule("down").bias is None


def test_data_loaders_and_dicts_are_calibration_data() -> None:
    rows = torch.cat([b["tokens"] for b in batches()])
    rows_of: Any = [{"tokens": r} for r in rows]
    loader: Any = torch.utils.data.DataLoader(rows_of, batch_size=3)
    results = [pruned(Block().eval(), data) for data in (loader, {"tokens": rows})]
    assert all(r.report["calibration"]["samples"] == 12 for r in results)
    assert pruned(Block().eval(), None, example={"tokens": rows[:3]}).report["calibration"]["synthetic"]


def test_weights_without_a_layer_are_cut_where_they_are() -> None:
    data = [{"x": torch.randn(5, 12)} for _ in range(4)]
    result = pruned(Scaled().eval(), data, new_bias=False)
    shapes = {name: tuple(value.shape) for name, value in result.module.named_parameters()}
    assert shapes == {"a": (12, 10), "b": (10, 12)}


def test_the_traced_graph_saves_loads_and_exports(tmp_path: Path) -> None:
    result = pruned(Block().eval(), batches(), heads=0.4)
    tokens = torch.randint(0, 17, (4, 9))
    with torch.no_grad():
        expected = result.module(tokens)
    path = result.save(tmp_path / "small.pt2")
    script = (
        "import sys, torch\n"
        "m = torch.export.load(sys.argv[1]).module()\n"
        "torch.save(m(tokens=torch.load(sys.argv[2])), sys.argv[3])\n"
    )
    torch.save(tokens, tmp_path / "tokens.pt")
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "tokens.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(liar_opt.OptionError, match="exists"):
        result.save(path)
    import onnxruntime

    onnx_path = result.save(tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(onnx_path, providers=["CPUExecutionProvider"])
    (there,) = session.run(None, {"tokens": tokens.numpy()})
    np.testing.assert_allclose(there, expected.numpy(), rtol=1e-3, atol=1e-4)
    with pytest.raises(liar_opt.OptionError, match="no model of transformers"):
        result.save(tmp_path / "folder")


@pytest.mark.slow
def test_both_forms_compile() -> None:
    result = pruned(Block().eval(), batches(), heads=0.4)
    tokens = torch.randint(0, 17, (3, 7))
    with torch.no_grad():
        expected = result.module(tokens)
        for form in (result.module, result.graph_module):
            compiled = torch.compile(form, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(tokens=tokens), expected, rtol=1e-4, atol=1e-5)


class Counting(nn.Module):
    """Reads from the data how many parts there are, where torch prints the whole graph before it gives up."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(x, size=(int(x[0, 0, 0, 0]), 4), mode="bilinear")


def test_a_module_that_cannot_be_traced_is_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(liar_opt.ModelError, match=r"torch\.export refuses Counting"):
        pruned(Counting(), [{"x": torch.ones(3, 2, 4, 4)}])
    assert capfd.readouterr() == ("", "")


class TwoTables(nn.Module):
    """Ids that two tables look up, of 23 and 17 rows, and kinds of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.kinds = nn.Embedding(23, 8), nn.Embedding(17, 8), nn.Embedding(2, 8)

    def forward(self, tokens: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.first(tokens) + self.second(tokens) + self.kinds(kinds)
        return result


def test_every_table_has_a_row_for_every_token_id() -> None:
    module = TwoTables()
    feeds = {name: torch.zeros(3, 7, dtype=torch.int64) for name in ("tokens", "kinds")}
    assert vocabulary(lower(trace(module, feeds), module)) == 17


def test_what_is_as_long_as_the_tokens_is_cut_with_them() -> None:
    given = {
        "tokens": torch.ones(4, 32, dtype=torch.int64),
        "boxes": torch.ones(4, 32, 4),
        "image": torch.ones(4, 3, 32, 32),
    }
    shapes = {k: tuple(v.shape) for k, v in example_from(given, {31}, "cpu").items()}
    assert shapes == {"tokens": (3, 29), "boxes": (3, 29, 4), "image": (3, 3, 32, 32)}
    whole = example_from(given, {31}, "cpu", free=False)
    assert whole["tokens"].shape == (3, 32) and whole["boxes"].shape == (3, 32, 4)


def test_a_module_that_cannot_be_traced() -> None:
    with pytest.raises(liar_opt.ModelError, match=r"torch\.export refuses Branching.*test_fx_module\.py:\d+.*ONNX"):
        pruned(Branching(), [{"x": torch.randn(3, 4)}])


@pytest.mark.parametrize(
    ("data", "options", "sentence"),
    [
        (None, {}, "nothing says what the inputs of Block are; give calibration data with an array for each of tokens"),
        ([{"words": torch.zeros(3, 7, dtype=torch.int64)}], {}, "none of 'words' is an argument of Block.forward"),
        (batches(), {"checkpoint": True}, "no model of transformers"),
        (batches(), {"checkpoint": True, "values": 0.5}, "values works on a traced graph: a configuration has one width"),
        (batches(), {"backend": "numpy"}, "backend 'numpy' is unknown"),
    ],
)
def test_bad_input(data: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(liar_opt.OptionError, match=sentence):
        pruned(Block(), data, **options)


def test_the_lowered_graph_computes_what_the_module_computes() -> None:
    module = Block().eval()
    example = example_from(batches(1)[0], {30, 42}, "cpu")
    model = lower(trace(module, example), module)
    for rows, length in ((3, 7), (4, 9)):
        tokens = torch.randint(0, 17, (rows, length))
        (output,) = Executor(model).run({"tokens": tokens}).values()
        with torch.no_grad():
            torch.testing.assert_close(output, module(tokens))
    numbers = [n for node in model.graph.nodes for n in node.attrs.get("size", []) or []]
    assert any(isinstance(n, Sym) for n in numbers) and any(type(n) is int for n in numbers)
    assert model.inputs()[0].shape == ("batch", "sequence_7")
    assert "aten::linear" in model.listing()
    found = find_groups(analyse(model))
    assert not found.refusals or all(r.reason for r in found.refusals)
    assert model.parameters() == sum(p.numel() for p in module.parameters())


class ConvolutionModule(nn.Module):
    """Of a Conformer: gates in the second half, a depthwise convolution, a batch norm."""

    def __init__(self, width: int = 24, inner: int = 32) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv1d(width, 2 * inner, 1), nn.Conv1d(inner, width, 1)
        self.depthwise = nn.Conv1d(inner, inner, 5, padding=2, groups=inner)
        self.norm = nn.BatchNorm1d(inner)
        for name, low, high in (("running_mean", -1.0, 1.0), ("running_var", 0.5, 2.0)):
            self.norm.get_buffer(name).uniform_(low, high)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gated = nn.functional.glu(self.enter(x), dim=1)
        result: torch.Tensor = x + self.leave(nn.functional.silu(self.norm(self.depthwise(gated))))
        return result


def test_gates_depthwise_convolutions_and_batch_norms() -> None:
    data = [{"x": torch.randn(3, 24, 20)} for _ in range(3)]
    result = pruned(ConvolutionModule().eval(), data)
    assert [(c.before, c.after) for c in result.changes] == [(32, 16)] and not result.report["model"]["notes"]
    assert result.report["verification"]["exact_difference"] < 1e-5
    module: Any = result.module
    sizes = (module.depthwise.groups, module.depthwise.in_channels, module.depthwise.out_channels, module.norm.num_features)
    assert sizes == (16, 16, 16, 16)
    assert [p.shape[0] for p in module.norm.buffers() if p.ndim] == [16, 16]


class Noisy(Block):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = super().forward(tokens)
        return x + torch.randn_like(x)


def test_a_module_that_draws_random_numbers() -> None:
    with pytest.raises(ModelError, match=r"gives another output '.*' each time it runs on the same inputs"):
        pruned(Noisy().eval(), batches())


class Divided(nn.Module):
    """Computes the width of its heads from that of its input: with fewer heads no attribute makes that right."""

    def __init__(self, width: int = 30, heads: int = 5) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, width = x.shape
        shape = (b, s, self.heads, width // self.heads)
        q, k, v = (f(x).reshape(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        result: torch.Tensor = x + self.out(mixed.transpose(1, 2).reshape(b, s, -1))
        return result


def test_code_that_cannot_fit_gives_the_traced_graph(tmp_path: Path) -> None:
    data = [{"x": torch.randn(3, 7, 30)} for _ in range(4)]
    result = pruned(Divided().eval(), data, ffn=None, heads=0.4, latency=True)
    assert isinstance(result.module, torch.fx.GraphModule)
    (note,) = result.report["model"]["notes"]
    assert note.startswith("the result is the traced graph: no attributes of Divided were found that make its code fit")
    assert note.endswith("5 is 3 now in '')") and result.report["latency"]["speedup"] > 0
    assert result.report["after"]["parameters"] < result.report["before"]["parameters"]
    other = torch.randn(2, 7, 30)
    with torch.no_grad():
        expected = result.module(x=other)
    result.save(tmp_path / "small.onnx")
    found = Session(tmp_path / "small.onnx").run({"x": other.numpy()}, arrays=True)
    np.testing.assert_allclose(next(iter(found.values())), expected.numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(OptionError, match=r"give a path that ends in .pt2"):
        result.save(tmp_path / "checkpoint")


class Packed(nn.Module):
    """Queries, keys and values from one projection, into fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 72), nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (p.reshape(b, s, 4, 6).transpose(1, 2) for p in self.qkv(x).split(24, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: torch.Tensor = x + self.out(mixed.transpose(1, 2).reshape(b, s, 24))
        return result


def test_values_queries_and_keys_of_fused_attention(tmp_path: Path) -> None:
    """The scale stays that of the width that was; what is measured in ONNX Runtime becomes the same."""
    module, data = Packed().eval(), [{"x": torch.randn(8, 7, 12)} for _ in range(4)]
    options: dict[str, Any] = {"ffn": None, "heads": 0.5, "values": 0.34, "query_key": 0.5, "ridge": 0.1}
    result, other = (pruned(module, data, backend=backend, **options) for backend in ("torch", "onnxruntime"))
    kinds = [(g["kind"], g["before"], g["after"]) for g in result.report["groups"]]
    assert kinds == [("heads", 4, 2), ("query-key", 6, 3), ("values", 6, 4)]
    assert result.report["verification"]["exact_difference"] < 1e-5
    shapes = sorted(tuple(p.shape) for p in result.module.parameters())
    assert shapes == [(12,), (12, 8), (20,), (20, 12)] and isinstance(result.module, torch.fx.GraphModule)
    x = torch.randn(2, 7, 12)
    with torch.no_grad():
        expected = result.module(x)
        assert difference(other.module(x), expected) < 1e-3
    loaded = torch.export.load(result.save(tmp_path / "small.pt2")).module()
    torch.testing.assert_close(loaded(x=x), expected, rtol=1e-4, atol=1e-5)
    alone = pruned(module, data, ffn=None, query_key=0.5)
    assert alone.report["verification"]["exact_difference"] < 1e-5
    kept = [g for g in liar_opt.inspect(module, example=data[0]).report["values"]]
    assert {g["kind"] for g in kept} == {"values", "query-key"}


def test_inspecting_a_module_changes_nothing() -> None:
    module = zoo_fx.build("bert")
    found = liar_opt.inspect(module)
    assert {g["kind"] for g in found.report["groups"]} == {"ffn", "heads"}
    assert found.report["before"]["parameters"] == sum(p.numel() for p in module.parameters())


def test_onnx_and_fx_prune_alike_with_greedy_selection() -> None:
    module = zoo_fx.build("bert")
    data = [zoo_fx.feeds("bert", batch=16, seed=s) for s in range(12)]
    options: dict[str, Any] = {"ffn": 0.4, "heads": 0.4, "multiple_of": 4, "latency": False}
    traced = liar_opt.prune(module, data, checkpoint=False, **options)
    symbolic = {k: [0, 1] for k in data[0]}
    proto = export_onnx(module, zoo_fx.tensors(zoo_fx.feeds("bert")), symbolic)
    exported = liar_opt.prune(proto, data, **options)
    assert isinstance(traced, ModuleResult)
    for ours, theirs in zip(traced.report["groups"], exported.report["groups"], strict=True):
        assert (ours["kind"], ours["kept"]) == (theirs["kind"], theirs["kept"])
        for a, b in zip(ours["repairs"], theirs["repairs"], strict=True):
            assert a["ridge"] == b["ridge"]
            assert a["error_repair"] == pytest.approx(b["error_repair"], rel=1e-3, abs=1e-9)
    import onnxruntime

    arrays = zoo_fx.feeds("bert", seed=77)
    session = onnxruntime.InferenceSession(exported.model.SerializeToString(), providers=["CPUExecutionProvider"])
    there = session.run(None, arrays)[0]
    with torch.no_grad():
        here = traced.module(**zoo_fx.tensors(arrays)).last_hidden_state.numpy()
    assert np.abs(here - there).max() <= 1e-4 * np.abs(there).max()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_torch_and_onnx_runtime_measure_the_same(name: str) -> None:
    """Moments that scores get, kept sets and outputs are those of the other backend, to rounding."""
    seen: dict[str, list[Any]] = {"torch": [], "onnxruntime": []}
    module = zoo_fx.build(name)
    data = [zoo_fx.feeds(name, batch=16, seed=s) for s in range(8)]
    outputs = []
    for backend, found in seen.items():

        def score(consumers: Any, found: list[Any] = found) -> Any:
            found += [c.statistics for c in consumers]
            return np.sqrt(sum(c.by_block(c.statistics.mean_square) for c in consumers))

        options: dict[str, Any] = {"heads": 0.3, "ridge": 1e-3, "multiple_of": 4, "checkpoint": name == "llama"}
        result = pruned(module, data, backend=backend, score=score, **options)
        with torch.no_grad(), without_cache(result.module):
            outputs.append(result.module(**zoo_fx.tensors(zoo_fx.feeds(name, seed=99)))[0])
        assert result.report["verification"]["exact_difference"] < 1e-5
    assert len(seen["torch"]) == len(seen["onnxruntime"]) == 4
    for ours, theirs in zip(seen["torch"], seen["onnxruntime"], strict=True):
        assert ours.count == pytest.approx(theirs.count, rel=1e-6)  # a sum of weights
        np.testing.assert_allclose(ours.mean, theirs.mean, atol=1e-5 * np.abs(theirs.mean).max())
        np.testing.assert_allclose(ours.uncentred, theirs.uncentred, atol=1e-5 * np.abs(theirs.uncentred).max())
    assert difference(outputs[0], outputs[1]) < 1e-3


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_half_precision_checkpoints(tmp_path: Path) -> None:
    module = zoo_fx.build("llama").to(torch.bfloat16)
    data = [zoo_fx.feeds("llama", seed=s) for s in range(4)]
    result = pruned(module, data, ffn=None, sparsity=0.4, multiple_of=4, allocate="uniform")
    assert result.report["verification"]["exact_dtype"] == "bfloat16"
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(result.save(tmp_path / "out"), dtype="auto")
    assert loaded.dtype == torch.bfloat16 and loaded.config.num_key_value_heads == 2
    ids = torch.arange(3, 9).reshape(1, -1)
    written = [
        loaded.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=c).tolist() for c in (True, False)
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(2, 5, 16))])  # type: ignore[no-untyped-call]
@pytest.mark.parametrize("inside", [False, True])
def test_script_modules_are_named(compiled: Any, inside: bool) -> None:
    module = compiled(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)).eval())
    module = nn.Sequential(module, nn.Identity()) if inside else module
    with pytest.raises(
        ModelError, match="'0' of Sequential is a ScriptModule" if inside else "the model is a ScriptModule"
    ):
        liar_opt.prune(module, {"input": torch.randn(8, 5, 16)}, ffn=0.5)


def test_a_list_of_tensors_is_named() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 64)

        def forward(self, parts: list[torch.Tensor]) -> torch.Tensor:
            joined: torch.Tensor = self.up(torch.cat(parts, 1))
            return joined

    data = {"parts": [torch.randn(8, 3, 16), torch.randn(8, 2, 16)]}
    with pytest.raises(OptionError, match="input 'parts' is a list of tensors"):
        liar_opt.prune(Joined().eval(), data, ffn=0.5)


def test_whose_fault_a_failing_part_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module runs on the data: it is ours, and the group is left alone. It does not: it is the data's, in any batch."""

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(9, 16)
            self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x: torch.Tensor = self.down(torch.relu(self.up(self.places(input_ids))))
            return x

    ids = torch.arange(40).reshape(8, 5) % 9
    module = Placed().eval()
    options: dict[str, Any] = {"ffn": 0.5, "latency": False, "example": {"input_ids": ids[:2]}}
    monkeypatch.setattr("liar_opt.passes.calibrate.vocabulary", lambda model: None)
    with pytest.raises(ModelError, match=r"torch fails on the calibration data \('input_ids' \[8, 5\]\)"):
        liar_opt.prune(module, {"input_ids": ids + 7}, **options)
    with pytest.raises(ModelError, match=r"torch fails on the calibration data \('input_ids' \[8, 5\]\)"):
        liar_opt.prune(module, [{"input_ids": ids}, {"input_ids": ids + 7}], batch_size=8, **options)

    def fail(self: Any, inputs: Any, nodes: Any = None, wanted: Any = None) -> Any:
        if nodes is not None:
            raise RuntimeError("broken")
        return run(self, inputs)

    run = Executor.run
    monkeypatch.setattr(Executor, "run", fail)
    with pytest.raises(CheckError, match=r"would be wrong .*torch fails on a part of the model: broken"):
        liar_opt.prune(module, {"input_ids": ids}, **options)
