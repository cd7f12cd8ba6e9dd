"""Patterns of zeros in weights that keep their shape: graphs and modules, alone and behind widths, what is written."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import test_both_engines
import torch
from graphs import parse
from modules import prune_module
from onnx import numpy_helper
from test_both_engines import batches, export, made

import liar_opt
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.patterns import Pattern
from liar_opt.tools.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK: dict[str, Any] = {"latency": False}
LAYERS = test_both_engines.LAYERS
KINDS = ("q", "k", "v", "o", "gate", "up", "down")


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def patterned(result: Any) -> list[tuple[str, np.ndarray]]:
    """The weights that have a pattern, in the graph's order, [n, m]."""
    found = result.report["patterned"]["weights"]
    if isinstance(result, liar_opt.PruneResult) and hasattr(result, "module"):
        state = result.module.state_dict()
        return [(w["weight"], state[w["weight"]].numpy().T) for w in found]
    stored = weights(result.model)
    return [(w["weight"], stored[w["weight"]]) for w in found]


def run(model: onnx.ModelProto) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, batches(1)[0])[0]
    return result


@pytest.mark.parametrize("text", ["2:4", pytest.param("blocks=8x4:0.5", marks=pytest.mark.rest)])
def test_a_graph(text: str, tmp_path: Path) -> None:
    dense, pattern = onnx.load(export("llama")), Pattern.parse(text)
    result = liar_opt.prune(export("llama"), batches(), pattern=text, **QUICK)
    found = patterned(result)
    assert len(found) == LAYERS * len(KINDS)
    assert all(pattern.holds(w) and np.mean(w == 0) == pytest.approx(0.5, abs=0.01) for _, w in found)
    before, after = weights(dense), weights(result.model)
    assert before.keys() <= after.keys()  # constants of nodes are initializers now
    names = {name for name, _ in found}
    assert all(before[n].shape == after[n].shape for n in before)
    assert all(np.array_equal(before[n], after[n]) for n in before.keys() - names)
    assert [o.name for o in result.model.graph.output] == [o.name for o in dense.graph.output]
    report = result.report
    assert report["verification"]["outputs"]["logits"]["cosine"] > 0.4  # of random weights; 0.2 by a mask
    assert report["verification"]["exact_difference"] < 1e-5
    assert any("head" in r["reason"] or "tied" in r["reason"] for r in report["refusals"])
    saved = onnx.load(result.save(tmp_path / "small.onnx"))
    assert np.array_equal(run(saved), run(result.model)) and json.dumps(report)


@pytest.mark.parametrize(
    ("name", "text", "solver"),
    [
        ("llama", "2:4", "wanda"),
        pytest.param("bert", "0.5", "wanda", marks=pytest.mark.rest),
        pytest.param("llama", "2:4", "fista", marks=pytest.mark.rest),
    ],
)
def test_graph_and_module_have_the_same_zeros(name: str, text: str, solver: str) -> None:
    options = {"pattern": text, "pattern_solver": solver, **QUICK}
    graph, module = liar_opt.prune(export(name), batches(), **options), prune_module(made(name), batches(), **options)
    ours, theirs = patterned(graph), patterned(module)
    assert len(ours) == len(theirs)
    for (_, x), (_, y) in zip(ours, theirs, strict=True):
        assert x.shape == y.shape
        same = np.mean((x == 0) == (y == 0))
        assert same == 1.0 if solver == "wanda" else same > 0.98  # near ties fall by rounding
    assert type(module.module) is type(made(name))


def test_magnitude_is_a_mask_by_hand() -> None:
    module, pattern = made("bert"), Pattern.parse("2:4")
    result = prune_module(module, batches(), pattern="2:4", pattern_solver="magnitude", **QUICK)
    state = {n: p.clone() for n, p in module.state_dict().items()}
    masked = [n for n, p in state.items() if p.ndim == 2 and "encoder" in n]
    for name in masked:
        weight = state[name].numpy().astype(np.float64)
        state[name] *= torch.from_numpy(pattern.mask(np.square(weight.T)).T)
    assert len(masked) == 6 * LAYERS
    found = result.module.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)
    feeds = {k: torch.from_numpy(v) for k, v in batches(1)[0].items()}
    with torch.no_grad():
        before, after = module(**feeds)[0], result.module(**feeds)[0]
    assert not torch.allclose(before, after, atol=1e-2)


@pytest.mark.rest
def test_each_solver_on_a_model() -> None:
    errors = {}
    for solver in ("magnitude", "wanda", "sparsegpt", "fista"):
        report = liar_opt.prune(export("llama"), batches(), pattern="2:4", pattern_solver=solver, **QUICK).report
        errors[solver] = report["verification"]["outputs"]["logits"]["relative_rms"]
    assert errors["fista"] < errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


TIED = """
g (float[b, 8] x) => (float[b, 8] y) {
    a = MatMul(x, w)
    b0 = Relu(a)
    c = MatMul(b0, v)
    d = Add(c, x)
    e = MatMul(d, w)
    f = Relu(e)
    h = MatMul(f, v)
    i = Add(h, d)
    j = Relu(i)
    k = MatMul(j, head)
    y = Add(k, bias)
}
"""


def test_a_shared_weight_has_one_pattern() -> None:
    model = parse(TIED, {"w": (8, 16), "v": (16, 8), "head": (8, 8), "bias": (8,)})
    data = [{"x": np.random.default_rng(i).standard_normal((16, 8)).astype(np.float32)} for i in range(12)]
    result = liar_opt.prune(model, data, pattern="2:4", **QUICK)
    found = result.report["patterned"]["weights"]
    assert [(w["weight"], len(w["nodes"])) for w in found] == [("w", 2), ("v", 2)]
    assert len(result.model.graph.initializer) == 4
    (refusal,) = [r for r in result.report["refusals"] if "pattern" in r["reason"]]
    assert "it is a head" in refusal["reason"]
    after = weights(result.model)
    assert np.array_equal(after["head"], weights(model)["head"]) and Pattern.parse("2:4").holds(after["w"])


def test_behind_widths() -> None:
    result = liar_opt.prune(export("llama"), batches(), ffn=0.4, heads=0.25, pattern="2:4", **QUICK)
    alone = liar_opt.prune(export("llama"), batches(), ffn=0.4, heads=0.25, **QUICK)
    found = patterned(result)
    assert len(found) == LAYERS * len(KINDS) and all(Pattern.parse("2:4").holds(w) for _, w in found)
    before, after = weights(alone.model), weights(result.model)
    assert {n: w.shape for n, w in before.items()} == {n: w.shape for n, w in after.items()}
    assert result.report["groups"] == alone.report["groups"]
    loss = [r.report["verification"]["outputs"]["logits"]["cosine"] for r in (alone, result)]
    assert 0.4 < loss[1] < loss[0]


@pytest.mark.rest
def test_behind_the_widths_of_a_module(tmp_path: Path) -> None:
    result = prune_module(made("llama"), batches(), ffn=0.4, pattern="2:4", **QUICK)
    found = patterned(result)
    assert len(found) == LAYERS * len(KINDS) and all(Pattern.parse("2:4").holds(w) for _, w in found)
    assert max(w.shape[0] for _, w in found) < 88
    folder = result.save(tmp_path / "smaller")
    import transformers

    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    feeds = {k: torch.from_numpy(v) for k, v in batches(1)[0].items()}
    with torch.no_grad():
        assert torch.allclose(again(**feeds).logits, result.module(**feeds).logits, atol=1e-5)
    stored = again.state_dict()
    assert all(np.array_equal(stored[name].numpy().T, weight) for name, weight in found)


def test_sparse_storage(tmp_path: Path) -> None:
    options = {"pattern_solver": "wanda", "sparse_storage": True, **QUICK}
    result = liar_opt.prune(export("llama"), batches(), pattern="0.9", **options)
    path = result.save(tmp_path / "small.onnx")
    result.sparse_storage = False
    dense = result.save(tmp_path / "dense.onnx")
    stored = onnx.load(path)
    assert len(stored.graph.sparse_initializer) == LAYERS * len(KINDS)
    assert path.stat().st_size < 0.7 * dense.stat().st_size
    assert np.array_equal(run(stored), run(result.model))
    onnx.checker.check_model(stored)
    again = liar_opt.inspect(path)  # read as it was
    assert len(again.groups) == 2 * LAYERS
    half = liar_opt.prune(export("llama"), batches(), pattern="2:4", **options)
    assert not onnx.load(half.save(tmp_path / "half.onnx")).graph.sparse_initializer
    assert "no weight is smaller as a sparse initializer" in half.report["model"]["notes"][-1]


def test_what_a_module_cannot() -> None:
    with pytest.raises(OptionError, match="a checkpoint has none"):
        liar_opt.prune(made("llama"), batches(2), pattern="2:4", sparse_storage=True, checkpoint=True, **QUICK)
    with pytest.raises(OptionError, match="leave it or pattern out"):
        liar_opt.prune(made("llama"), batches(2), pattern="2:4", backend="onnxruntime", **QUICK)
    result = prune_module(made("bert"), batches(3), pattern="2:4", pattern_solver="magnitude", **QUICK)
    with pytest.raises(OptionError, match=r"on CUDA in half precision alone, and the module is in torch.float32 on cpu"):
        result.semi_structured()


def test_a_quantised_graph_is_refused() -> None:
    whole = parse(TIED, {"w": (8, 16), "v": (16, 8), "head": (8, 8), "bias": (8,)})
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        onnx.save(whole, path := Path(folder) / "model.onnx")
        quantize_dynamic(path, small := Path(folder) / "small.onnx")
        with pytest.raises(OptionError, match="of a quantised model widths go alone"):
            liar_opt.prune(small, None, pattern="2:4", **QUICK)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pattern": "4:2"}, "keeps 4 of each 2"),
        ({"pattern": "1.5"}, "between 0 and 1"),
        ({"pattern": f"2:{'4' * 5000}"}, "is not understood"),
        ({"pattern": "\uff12:\uff14"}, "is not understood"),
        ({"pattern": "1e-9"}, "less than one number or block of every weight; give a larger ratio"),
        ({"pattern": "0.999999"}, "weight '.*' .node '.*of 48 x 48 numbers it would leave none.*give a.* smaller RATIO"),
        ({"pattern": "2:4", "ridge": float("nan")}, "give 0 or more"),
        ({"pattern": "2:4", "ridge": -1.0, "ffn": 0.4}, "give 0 or more"),
        ({"pattern": "2:4", "refit": True}, "not a pattern; run it on the result"),
        ({"pattern": "2:5"}, "does not fit weight '.*' .node '.*q_proj.*its 48 inputs are no multiple of 5"),
        ({"pattern": "blocks=7x8:0.5"}, "outputs are no multiple of 7"),
        ({"pattern": "2:4", "pattern_solver": "best"}, "pattern-solver 'best' is unknown; choose one of magnitude"),
        ({"pattern": "2:4", "ffn": 0.4, "multiple_of": 2}, "give multiple-of 4"),
        ({"pattern": "2:4", "quantize": "int8"}, "quantise the result"),
        ({"pattern": "2:4", "blocks": 1}, "give a sparsity"),
        ({"pattern": "2:4", "resume": "folder"}, "leave resume or pattern out"),
        ({"pattern_solver": "wanda"}, "give a --pattern"),
        ({"sparse_storage": True}, "give a --pattern"),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        liar_opt.prune(export("llama"), batches(2), **QUICK, **options)


WIDE = """
g (float[b, 18] x) => (float[b, 18] y) {
    a = MatMul(x, w)
    c = Relu(a)
    d = MatMul(c, v)
    e = Add(d, x)
    y = Relu(e)
}
"""


def _wide() -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    data = [{"x": np.random.default_rng(i).standard_normal((4, 18)).astype(np.float32)} for i in range(4)]
    return parse(WIDE, {"w": (18, 36), "v": (36, 18)}), data


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_fits_no_width_that_stays_is_refused_before_widths_are_cut(dry_run: bool) -> None:
    model, data = _wide()
    begun: list[str] = []
    given = {**QUICK, "ffn": 0.3, "dry_run": dry_run, "progress": lambda what, done, of: begun.append(what)}
    with pytest.raises(OptionError, match=r"does not fit weight 'w' .node.*its 18 inputs are no multiple of 4"):
        liar_opt.prune(model, data, pattern="2:4", **given)
    assert not begun
    if not dry_run:  # 36 inputs of 'v' are no multiple of 8, but 24 are
        result = liar_opt.prune(model, data, pattern="blocks=1x2:0.5", **given)
        assert all(w["zeros"] == 0.5 for w in result.report["patterned"]["weights"])


@pytest.mark.parametrize("solver", ["sparsegpt", "refit", "fista"])
def test_a_ridge_that_is_too_small_for_the_data_is_one_sentence(solver: str) -> None:
    model, data = _wide()
    with pytest.raises(OptionError, match="does not say what weight 'w' should be at ridge 0; give a larger ridge"):
        liar_opt.prune(model, data[:2], pattern="1:2", pattern_solver=solver, ridge=0.0, **QUICK)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data: dict[str, Any] = {k: np.concatenate([b[k] for b in batches(2)]) for k in batches(1)[0]}
    np.savez(tmp_path / "data.npz", **data)
    given = [str(export("llama")), "--calibration", str(tmp_path / "data.npz"), "-o", str(tmp_path / "small.onnx")]
    options = ["--pattern", "2:4", "--pattern-solver", "sparsegpt", "--explain", "--html", str(tmp_path / "page.html")]
    assert main([*given, *options]) == 0
    told = capsys.readouterr().out
    assert "pattern: 2:4 in 28 weights by sparsegpt: 50.0 % of them is zero" in told
    assert "of those that stay are zero" in told and "x as fast" in told
    assert "Zeros by weight" in (tmp_path / "page.html").read_text()
    assert main([*given, "--pattern", "2:5", "--force"]) == 2
    assert "does not fit weight" in capsys.readouterr().err
