# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Values, queries and keys cut to a subspace: the cut model is the original with a projection of low rank put in.

The projections of the references are computed here, by other formulas, from activations of the original.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import oracle
import pytest
import streams
import zoo
from onnx import numpy_helper

from liar_opt import prune
from liar_opt.frontend.onnx_model import onnx_graph
from liar_opt.passes.base import Pipeline
from liar_opt.passes.find_groups import FindGroupsPass
from liar_opt.passes.normalise_graph import NormaliseGraphPass
from liar_opt.passes.open_model import load_state
from liar_opt.passes.prune_groups import PruneGroupsPass
from liar_opt.runtime.errors import ModelError, OptionError

# 4 heads of 6 channels on a stream of 6; queries and keys come from one packed weight with a bias; {} is the attention.
TEXT = """f (float[b, s, 6] x0) => (float[b, s, 6] x1, float[b, s, 24] j, float[b, s, 48] p3) {{
    p2 = MatMul(x0, wqk)  p3 = Add(p2, bqk)  q, k = Split<axis=-1>(p3, n)  v0 = MatMul(x0, wv)  v = Add(v0, bv)
    q4 = Reshape(q, split)  k4 = Reshape(k, split)  v4 = Reshape(v, split)
    qt = Transpose<perm=[0,2,1,3]>(q4)  kt = Transpose<perm=[0,2,3,1]>(k4)  vt = Transpose<perm=[0,2,1,3]>(v4)
    a0 = MatMul(qt, kt)  a = Mul(a0, tenth)  p = Softmax(a)  c = MatMul(p, vt)
    ct = Transpose<perm=[0,2,1,3]>(c)  j0 = Reshape(ct, join)  z = MatMul(j0, wo)  x1 = Add(x0, z)  {} }}"""
WEIGHTS: graphs.Weights = {
    **{"wqk": (6, 48), "bqk": (48,), "wv": (6, 24), "bv": (24,), "wo": (24, 6), "tenth": np.asarray(0.1, np.float32)},
    **{"n": np.asarray([24, 24]), "split": np.asarray([0, 0, 4, 6]), "join": np.asarray([0, 0, 24])},
}
FEEDS = streams.batches(12, 0)
OPTIONS: dict[str, Any] = {"batch_size": 8, "samples": 96, "latency": False}


def model() -> onnx.ModelProto:
    """The model alone."""
    text = TEXT.format("").replace(", float[b, s, 24] j, float[b, s, 48] p3", "")
    return graphs.parse(text, WEIGHTS)


def activations() -> tuple[np.ndarray, np.ndarray]:
    """Contexts [rows, 24], and queries with keys [rows, 48], over the calibration data."""
    watched = graphs.parse(TEXT.format("j = Identity(j0)"), WEIGHTS)
    found = [oracle.run(watched, feeds)[1:] for feeds in FEEDS]
    return tuple(np.concatenate([f[i].reshape(-1, f[i].shape[-1]) for f in found]).astype(np.float64) for i in (0, 1))  # type: ignore[return-value]


def changed(proto: onnx.ModelProto, **weights: np.ndarray) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for tensor in result.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name].astype(np.float32), tensor.name))
    return result


def constants(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in proto.graph.initializer}


def root(matrix: np.ndarray, power: float = 0.5) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    result: np.ndarray = (vectors * values**power) @ vectors.T
    return result


def test_values_are_projected_where_the_output_loses_least() -> None:
    proto = model()
    result = prune(proto, FEEDS, values=0.5, repair="none", weighting="none", **OPTIONS)
    contexts, weight = activations()[0], constants(proto)["wo"]
    expected = np.zeros_like(weight)
    for head in range(4):
        place = slice(6 * head, 6 * head + 6)
        covariance = np.cov(contexts[:, place].T, bias=True)
        vectors = np.linalg.eigh(weight[place].T @ covariance @ weight[place])[1][:, -3:]
        expected[place] = weight[place] @ vectors @ vectors.T  # Eckart-Young on the side of the output
    reference = changed(proto, wo=expected)
    feeds = streams.batches(1, 9)[0]
    assert oracle.difference(oracle.run(result.model, feeds), oracle.run(reference, feeds)) < 1e-5
    assert oracle.difference(oracle.run(result.model, feeds), oracle.run(proto, feeds)) > 1e-2
    shapes = {k: v.shape for k, v in constants(result.model).items()}
    assert (shapes["wv"], shapes["bv"], shapes["wo"]) == ((6, 12), (12,), (12, 6))


def test_queries_are_projected_where_the_logits_lose_least() -> None:
    proto = model()
    result = prune(proto, FEEDS, query_key=0.5, **OPTIONS)
    both, weights = activations()[1], constants(proto)
    expected, bias = weights["wqk"].copy(), weights["bqk"].copy()
    lost = whole = 0.0
    for head in range(4):
        place = slice(6 * head, 6 * head + 6)
        q, k = both[:, :24][:, place], both[:, 24:][:, place]
        first, second = q.T @ q / len(q), np.cov(k.T, bias=True)
        left, values, right = np.linalg.svd(root(first) @ root(second))
        form = root(first, -0.5) @ (left[:, :3] * values[:3]) @ right[:3] @ root(second, -0.5)
        expected[:, place], bias[place] = expected[:, place] @ form, bias[place] @ form
        lost, whole = lost + np.square(values[3:]).sum(), whole + np.square(values).sum()
    reference = changed(proto, wqk=expected, bqk=bias)
    feeds = streams.batches(1, 9)[0]
    assert oracle.difference(oracle.run(result.model, feeds), oracle.run(reference, feeds)) < 1e-5
    assert oracle.difference(oracle.run(result.model, feeds), oracle.run(proto, feeds)) > 1e-3
    shapes = {k: v.shape for k, v in constants(result.model).items()}
    assert (shapes["wqk"], shapes["bqk"], shapes["wv"]) == ((6, 24), (24,), (6, 24))
    (repair,) = result.report["groups"][-1]["repairs"]
    assert repair["error_repair"] == pytest.approx(lost / whole, rel=1e-4)
    assert repair["error_repair"] < repair["error_none"]


def test_at_full_rank_nothing_changes() -> None:
    for repair in ("none", "liar"):
        state = load_state(model())
        Pipeline(passes=[NormaliseGraphPass(), FindGroupsPass()])(state)
        from liar_opt.runtime.calibration_data import load_calibration

        state.calibration = load_calibration([dict(f) for f in FEEDS], state.model.inputs(), batch_size=8)
        groups = (*state.queries, *state.values)
        state.keep = {g.name: g.size for g in groups}
        visitor = PruneGroupsPass(repair=repair).visitor(state)
        visitor.sweep.over(visitor, groups)
        turned = onnx_graph(state.model).to_proto()
        before, after = constants(model()), constants(turned)
        assert all(np.abs(before[n] - after[n]).max() > 0.1 for n in ("wqk", "wv", "wo", "bqk", "bv"))
        feeds = streams.batches(1, 9)[0]
        assert oracle.difference(oracle.run(turned, feeds), oracle.run(model(), feeds)) < 1e-5


def test_a_subspace_beats_channels_and_its_repair_beats_none() -> None:
    errors = {}
    for cut in ("rotate", "select"):
        for repair in ("liar", "bias", "none"):
            result = prune(model(), FEEDS, values=0.5, value_cut=cut, repair=repair, **OPTIONS)
            errors[cut, repair] = streams.error(model(), result.model)
            assert result.report["verification"]["exact_difference"] < 1e-5
    assert errors["rotate", "liar"] < errors["select", "liar"]
    assert errors["rotate", "liar"] <= errors["rotate", "bias"] < errors["rotate", "none"]


def test_all_of_it_together_and_after_an_interruption(tmp_path: Path) -> None:
    options = {**OPTIONS, "heads": 0.5, "values": 0.34, "query_key": 0.34}
    result = prune(model(), FEEDS, **options)
    kinds = [(g["kind"], g["before"], g["after"]) for g in result.report["groups"]]
    assert kinds == [("heads", 4, 2), ("query-key", 6, 4), ("values", 6, 4)]
    shapes = {k: v.shape for k, v in constants(result.model).items()}
    assert (shapes["wqk"], shapes["wv"], shapes["wo"]) == ((6, 16), (6, 8), (8, 6))
    for repair in ("dense", "residual"):
        assert prune(model(), FEEDS, repair=repair, **options).report["verification"]["exact_difference"] < 1e-5
    for stop in range(1, 40, 9):  # stages of the three sweeps

        def interrupt(stage: str, done: int, total: int, stop: int = stop) -> None:
            if stage == "calibrate" and done == stop:
                raise KeyboardInterrupt

        folder = tmp_path / f"{stop}"
        try:
            prune(model(), FEEDS, resume=folder, progress=interrupt, **options)
        except KeyboardInterrupt:
            pass
        again = prune(model(), FEEDS, resume=folder, **options)
        assert again.model.SerializeToString() == result.model.SerializeToString()


# 2 key-value heads of 4 channels for 6 query heads.
GROUPED = """f (float[b, s, 6] x0) => (float[b, s, 6] x1) {
    q = MatMul(x0, wq)  k = MatMul(x0, wk)  v = MatMul(x0, wv)  q4 = Reshape(q, six)  k4 = Reshape(k, two)  v4 = Reshape(v, two)
    qt = Transpose<perm=[0,2,1,3]>(q4)  k2 = Transpose<perm=[0,2,1,3]>(k4)  v2 = Transpose<perm=[0,2,1,3]>(v4)
    ku = Unsqueeze(k2, axis)  vu = Unsqueeze(v2, axis)  ke = Tile(ku, times)  ve = Tile(vu, times)
    kr = Reshape(ke, merged)  vr = Reshape(ve, merged)  kt = Transpose<perm=[0,1,3,2]>(kr)
    a = MatMul(qt, kt)  p = Softmax(a)  c = MatMul(p, vr)
    ct = Transpose<perm=[0,2,1,3]>(c)  j = Reshape(ct, join)  z = MatMul(j, wo)  x1 = Add(x0, z) }"""
GROUPED_WEIGHTS: graphs.Weights = {
    **{"wq": (6, 24), "wk": (6, 8), "wv": (6, 8), "wo": (24, 6), "axis": np.asarray([2])},
    **{"six": np.asarray([0, 0, 6, 4]), "two": np.asarray([0, 0, 2, 4]), "join": np.asarray([0, 0, 24])},
    **{"times": np.asarray([1, 1, 3, 1, 1]), "merged": np.asarray([0, 6, -1, 4])},
}


def test_heads_that_share_keys_and_values_share_their_subspaces() -> None:
    proto = graphs.parse(GROUPED, GROUPED_WEIGHTS)
    errors = {}
    for cut in ("rotate", "select"):
        result = prune(proto, FEEDS, values=0.5, query_key=0.25, value_cut=cut, **OPTIONS)
        shapes = {k: v.shape for k, v in constants(result.model).items()}
        assert [shapes[n] for n in ("wq", "wk", "wv", "wo")] == [(6, 18), (6, 6), (6, 4), (12, 6)]
        assert result.report["verification"]["exact_difference"] < 1e-5
        errors[cut] = streams.error(proto, result.model)
    assert errors["rotate"] < errors["select"]


def test_values_of_a_fused_attention_are_turned_and_its_queries_stay() -> None:
    text = """f (float[b, s, 6] x0) => (float[b, s, 6] x1) { q = MatMul(x0, wq)  k = MatMul(x0, wk)  v = MatMul(x0, wv)
        c = Attention<q_num_heads = 6, kv_num_heads = 2>(q, k, v)  z = MatMul(c, wo)  x1 = Add(x0, z) }"""
    weights: graphs.Weights = {"wq": (6, 24), "wk": (6, 8), "wv": (6, 12), "wo": (36, 6)}
    proto = graphs.parse(text, weights, opset=23)
    result = prune(proto, FEEDS, values=0.5, **OPTIONS)
    assert result.report["groups"][-1]["kind"] == "values" and not any(
        "cut by channels" in r.reason for r in result.refusals
    )
    assert result.report["verification"]["exact_difference"] < 1e-5
    with pytest.raises(ModelError, match="no product of queries and keys, and fused attention operators keep their widths"):
        prune(proto, FEEDS, query_key=0.5, **OPTIONS)


def test_values_that_cannot_be_turned_are_cut_by_channels() -> None:
    text = TEXT.format("").replace(", float[b, s, 24] j, float[b, s, 48] p3", "").replace("c = MatMul(p, vt)", "vs = Mul(vt, each)  c = MatMul(p, vs)")  # fmt: skip
    result = prune(graphs.parse(text, {**WEIGHTS, "each": (6,)}), FEEDS, values=0.5, **OPTIONS)
    assert any("cut by channels" in r.reason and "scales each channel" in r.reason for r in result.refusals)
    assert result.report["refusals"][-1]["nodes"]


CASES = (
    "bert-torchscript-eager-dynamic",
    "bert-dynamo-sdpa-dynamic",
    "vit-torchscript-sdpa-dynamic",
    "gpt2-torchscript-eager-dynamic",
)


@pytest.mark.parametrize("name", [c.name for c in zoo.cases(fast=False) if c.name in CASES])
def test_exported_models(name: str) -> None:
    case = next(c for c in zoo.cases(fast=False) if c.name == name)
    feeds = [zoo.feeds_of(case, seed=seed) for seed in range(6)]
    report = prune(zoo.ready(case).path, feeds, values=0.5, query_key=0.5, latency=False).report
    halves = {g["kind"]: g["after"] / g["before"] for g in report["groups"] if g["kind"] in ("values", "query-key")}
    assert halves == {"values": 0.5, "query-key": 0.5} and not any(
        "cut by channels" in r["reason"] for r in report["refusals"]
    )
    assert report["verification"]["exact_difference"] < 1e-4


def test_queries_that_share_in_a_sparsity() -> None:
    case = next(c for c in zoo.cases(fast=False) if c.name == CASES[0])
    feeds = [zoo.feeds_of(case, seed=seed) for seed in range(6)]
    options: dict[str, Any] = {"sparsity": 0.4, "query_key": "auto", "multiple_of": 4, "latency": False}
    report = prune(zoo.ready(case).path, feeds, search=0.1, **options).report
    kinds = {g["kind"] for g in report["groups"]}
    assert kinds == {"ffn", "heads", "query-key"} and {c["kind"] for c in report["curves"].values()} == kinds
    for group in (g for g in report["groups"] if g["kind"] == "query-key"):
        points = report["curves"][group["name"]]["points"]
        assert points[-1] == [group["before"], 0.0] and all(a[1] >= b[1] >= 0 for a, b in itertools.pairwise(points))
        assert report["curves"][group["name"]]["worth"] > 0
    prunable = sum(g["parameters"] for g in report["groups"] if g["kind"] != "query-key")
    removed = report["before"]["parameters"] - report["after"]["parameters"]
    assert removed / prunable == pytest.approx(0.4, abs=0.05)
    assert 1 - report["prunable"]["after"] / report["prunable"]["before"] == pytest.approx(0.4, abs=0.03)
    assert report["verification"]["exact_difference"] < 1e-4


@pytest.mark.parametrize("kind", ["params", "size", "flops"])
def test_queries_that_share_in_a_target(kind: str) -> None:
    """The same amount goes, and more of it from queries and keys than where heads alone may give them."""
    case = next(c for c in zoo.cases(fast=False) if c.name == CASES[0])
    feeds = [zoo.feeds_of(case, seed=seed) for seed in range(6)]
    options: dict[str, Any] = {"target": f"{kind}=0.8x", "query_key": "auto", "multiple_of": 2, "latency": False}
    report = prune(zoo.ready(case).path, feeds, **options).report
    assert {g["kind"] for g in report["groups"]} >= {"query-key"}
    assert report["target"]["found"] == pytest.approx(report["target"]["wanted"], rel=0.03)
    assert report["verification"]["exact_difference"] < 1e-4


def test_queries_that_share_in_a_limit() -> None:
    case = next(c for c in zoo.cases(fast=False) if c.name == CASES[0])
    feeds = [zoo.feeds_of(case, seed=seed) for seed in range(6)]
    options: dict[str, Any] = {"query_key": "auto", "multiple_of": 2, "latency": False}
    report = prune(zoo.ready(case).path, feeds, max_drop=0.02, **options).report
    assert {g["kind"] for g in report["groups"]} >= {"query-key"}
    assert 0 < report["target"]["found"] <= 0.02
    assert report["verification"]["exact_difference"] < 1e-4


def test_bad_options() -> None:
    for wanted in ({"target": "params=0.8x"}, {"max_drop": 0.1}):
        with pytest.raises(OptionError, match="exclude each other"):
            prune(model(), FEEDS, query_key=0.5, **wanted, **OPTIONS)
        with pytest.raises(OptionError, match="query-key auto shares in a sparsity, a target or max-drop by curves"):
            prune(model(), FEEDS, query_key="auto", allocate="uniform", **wanted, **OPTIONS)
    with pytest.raises(OptionError, match=r"query-key 1 is outside \[0, 1\)"):
        prune(model(), FEEDS, query_key=1.0, **OPTIONS)
    with pytest.raises(OptionError, match="value-cut 'svd' is unknown; choose one of rotate, select"):
        prune(model(), FEEDS, values=0.5, value_cut="svd", **OPTIONS)
    normed = TEXT.format("").replace(", float[b, s, 24] j, float[b, s, 48] p3", "").replace("qt = Transpose<perm=[0,2,1,3]>(q4)", "q5 = Relu(q4)  qt = Transpose<perm=[0,2,1,3]>(q5)")  # fmt: skip
    with pytest.raises(
        ModelError, match=r"width of queries and keys cannot be cut: .*Relu.* is not linear; leave query-key out"
    ):
        prune(graphs.parse(normed, WEIGHTS), FEEDS, query_key=0.5, **OPTIONS)


def test_what_goes_within_heads_counts_among_the_prunable() -> None:
    """As many parameters as the shapes say: values, queries and keys of the heads that are left."""
    given: list[dict[str, Any]] = [{"values": 0.5}, {"query_key": 0.5}, {"heads": 0.5, "values": 0.34, "query_key": 0.34}]
    for ratios in given:
        report = prune(model(), FEEDS, repair="none", **ratios, **OPTIONS).report
        removed = report["before"]["parameters"] - report["after"]["parameters"]
        assert report["prunable"]["before"] - report["prunable"]["after"] == removed > 0
