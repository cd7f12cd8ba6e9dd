# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Whole experts: found by how scores choose them, cut with their columns of the router, as if it never chose them."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import oracle
import pytest
import streams

import liar_opt
from liar_opt.frontend.experts import find_experts, rows_by_expert
from liar_opt.passes.cut_experts import measure_experts
from liar_opt.runtime.errors import ModelError, OptionError

LAYER = """n{i} = LayerNormalization<axis = -1>(x{i}, ones, zeros)  flat{i} = Reshape(n{i}, many)  logits{i} = MatMul(flat{i}, router{i})
    {score}
    numbers{i} = Reshape(choice{i}, rows)  x3{i} = Unsqueeze(flat{i}, middle)  wide{i} = Expand(x3{i}, twice)  xs{i} = Reshape(wide{i}, many)
    xc{i} = Unsqueeze(xs{i}, last)  w1{i} = Gather(up{i}, numbers{i})  u{i} = MatMul(w1{i}, xc{i})  h{i} = Relu(u{i})
    w2{i} = Gather(down{i}, numbers{i})  z{i} = MatMul(w2{i}, h{i})  zs{i} = Squeeze(z{i}, last)  shares{i} = Reshape(share{i}, column)  part{i} = Mul(zs{i}, shares{i})
    pairs{i} = Reshape(part{i}, paired)  sum{i} = ReduceSum<keepdims = 0>(pairs{i}, middle)  like{i} = Shape(x{i})  back{i} = Reshape(sum{i}, like{i})  x{next} = Add(x{i}, back{i})"""
SOFTMAX = "best{i}, choice{i} = TopK(logits{i}, two)  share{i} = Softmax(best{i})"
SHARED = "p{i} = Softmax(logits{i})  best{i}, choice{i} = TopK(p{i}, two)  s{i} = ReduceSum(best{i}, last)  share{i} = Div(best{i}, s{i})"
SIGMOID = "p{i} = Sigmoid(logits{i})  c{i} = Add(p{i}, correction{i})  best{i}, choice{i} = TopK(c{i}, two)  share{i} = GatherElements<axis = 1>(p{i}, choice{i})"
COUNTED = "m{i} = ArgMax<axis = 1>(logits{i})  best{i}, choice{i} = TopK(logits{i}, two)  share{i} = Softmax(best{i})"
SIZES = (6, 5, 7, 6)
"""Experts of each layer."""


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def mixture(score: str = SHARED, sizes: tuple[int, ...] = SIZES) -> onnx.ModelProto:
    """Layers of experts of several numbers and widths, two of which are chosen for each row."""
    layers = "\n".join(LAYER.format(i=i, next=i + 1, score=score.format(i=i)) for i in range(len(sizes)))
    weights: dict[str, Any] = {
        **{
            "many": ints(-1, 8),
            "two": ints(2),
            "rows": ints(-1),
            "middle": ints(1),
            "twice": ints(1, 2, 1),
            "last": ints(-1),
        },
        **{
            "column": ints(-1, 1),
            "paired": ints(-1, 2, 8),
            "ones": np.ones(8, np.float32),
            "zeros": np.zeros(8, np.float32),
        },
    }
    for i, count in enumerate(sizes):
        weights |= {f"router{i}": (8, count), f"up{i}": (count, 9 + i, 8), f"down{i}": (count, 8, 9 + i)}
        if "correction" in score:
            weights[f"correction{i}"] = np.random.default_rng(i).normal(0, 0.05, count).astype(np.float32)
    return graphs.parse(f"f (float[b, s, 8] x0) => (float[b, s, 8] x{len(sizes)}) {{ {layers} }}", weights)


def feeds(*shape: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x0": np.random.default_rng(seed).standard_normal((*shape, 8)).astype(np.float32)}


def calibration() -> list[dict[str, np.ndarray]]:
    return [feeds(6, 5, seed=seed) for seed in range(8)]


def pruned(proto: onnx.ModelProto, **options: Any) -> liar_opt.PruneResult:
    return liar_opt.prune(proto, calibration(), provider="cpu", latency=False, multiple_of=1, **options)


def masked(proto: onnx.ModelProto, kept: list[list[int]]) -> onnx.ModelProto:
    """The original, whose scores are -inf for experts that are not kept: written into the text, before all that reads them."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for i, own in enumerate(kept):
        router = next(t for t in result.graph.initializer if t.name == f"router{i}")
        gone = np.full(router.dims[1], -np.inf, np.float32)
        gone[own] = 0
        result.graph.initializer.append(onnx.numpy_helper.from_array(gone, f"gone{i}"))
        product = next(k for k, n in enumerate(result.graph.node) if n.output[0] == f"logits{i}")
        result.graph.node[product].output[0] = f"raw{i}"
        result.graph.node.insert(product + 1, onnx.helper.make_node("Add", [f"raw{i}", f"gone{i}"], [f"logits{i}"]))
        for tensor in result.graph.initializer:
            if tensor.name == f"correction{i}":
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + gone, tensor.name))
    return result


def exact(proto: onnx.ModelProto, result: liar_opt.PruneResult) -> tuple[list[list[int]], dict[str, list[int]]]:
    """Compares a cut model with the original that never chooses the others; the experts kept, and the shapes of weights."""
    kept = [layer["kept"] for layer in result.report["experts"]["layers"]]
    original = masked(proto, kept)
    for shape in ((1, 1), (2, 5), (7, 3)):
        (ours,), (theirs,), (dense,) = (oracle.run(m, feeds(*shape, seed=9)) for m in (result.model, original, proto))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        assert shape == (1, 1) or np.abs(ours - dense).max() > 1e-3
    return kept, {t.name: list(t.dims) for t in result.model.graph.initializer}


@pytest.mark.parametrize("score", [SOFTMAX, SHARED, SIGMOID], ids=["softmax of the best", "softmax", "sigmoid, corrected"])
def test_a_cut_model_is_the_original_whose_router_never_chooses_the_others(score: str) -> None:
    proto = mixture(score)
    result = pruned(proto, experts=0.4)
    found = result.report["experts"]
    assert [(layer["before"], layer["after"]) for layer in found["layers"]] == [(6, 4), (5, 3), (7, 4), (6, 4)]
    assert found["exact_difference"] < 1e-5
    kept, left = exact(proto, result)
    assert [left[f"router{i}"] for i in range(4)] == [[8, len(own)] for own in kept]
    assert [left[f"down{i}"] for i in range(4)] == [[len(own), 8, 9 + i] for i, own in enumerate(kept)]
    assert result.report["after"]["parameters"] == result.report["before"]["parameters"] - (
        found["parameters_before"] - found["parameters_after"]
    )


def test_experts_that_add_most_stay() -> None:
    """What each adds, computed beside: the norm of its output times its gate, summed over the rows that chose it."""
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in mixture().graph.initializer}
    sums, counts = np.zeros(6), np.zeros(6)
    for batch in calibration():
        x = batch["x0"].reshape(-1, 8).astype(np.float64)
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        p = np.exp(x @ arrays["router0"])
        choice = np.argsort(-p, axis=1)[:, :2]
        best = np.take_along_axis(p, choice, 1)
        best /= best.sum(1, keepdims=True)
        for row, experts, gates in zip(x, choice, best, strict=True):
            for e, gate in zip(experts, gates, strict=True):
                sums[e] += gate * np.linalg.norm(arrays["down0"][e] @ np.maximum(arrays["up0"][e] @ row, 0))
                counts[e] += 1
    state = streams.prepared(mixture(), 0.5, streams.data(tuple(calibration())))
    layer, *_ = find_experts(state.analysed())[0]
    np.testing.assert_allclose(measure_experts(state, [layer])[layer], [sums, counts], rtol=1e-4)
    said = pruned(mixture(), experts=0.4).report["experts"]["layers"][0]
    assert said["kept"] == sorted(np.argsort([-s for s in said["scores"]])[:4].tolist())


def test_experts_go_first_and_widths_of_the_rest_behind_them() -> None:
    proto = mixture()
    result = pruned(proto, experts=0.4, ffn=0.5)
    report = result.report
    assert {g["index_sets"] for g in report["groups"]} == {3, 4}
    assert all(g["after"] == -(-g["before"] // 2) or g["after"] == g["before"] // 2 for g in report["groups"])
    assert report["verification"]["exact_difference"] < 1e-4
    assert report["before"]["parameters"] == liar_opt.inspect(proto).report["before"]["parameters"]
    assert report["before"]["flops"] > report["after"]["flops"]
    (dense,), (cut,) = oracle.run(proto, feeds(30, 5, seed=4)), oracle.run(result.model, feeds(30, 5, seed=4))
    plain = pruned(proto, experts=0.4, ffn=0.5, repair="none")
    (bare,) = oracle.run(plain.model, feeds(30, 5, seed=4))
    assert np.square(dense - cut).sum() < np.square(dense - bare).sum()
    said = report["verification"]["outputs"]["x4"]["relative_rms"]  # beside the model as it came
    alone = np.sqrt(np.square(dense - cut).sum() / np.square(dense).sum())
    assert said == pytest.approx(alone, rel=0.3)
    assert [c.what for c in result.changes[:4]] == ["experts"] * 4


@pytest.mark.parametrize(
    "goal", [{"sparsity": 0.5}, pytest.param({"target": "params=0.5x"}, marks=pytest.mark.rest), {"max_drop": 0.9}], ids=str
)
def test_a_goal_counts_what_experts_took(goal: dict[str, Any]) -> None:
    whole = liar_opt.inspect(mixture()).report
    report = pruned(mixture(), experts=0.2, fresh=True, **goal).report
    before, after = (report[when]["parameters"] for when in ("before", "after"))
    assert report["prunable"]["before"] == whole["prunable_parameters"] and before == whole["before"]["parameters"]
    left = report["prunable"]["after"] / report["prunable"]["before"]
    if "sparsity" in goal:
        assert left == pytest.approx(0.5, abs=0.02)
    elif "target" in goal:
        assert after == pytest.approx(0.5 * before, rel=0.02) and report["target"]["dense"] == before
    else:
        assert report["target"]["found"] <= 0.9 and report["target"]["sparsity"] == pytest.approx(1 - left, abs=0.01)


@pytest.mark.parametrize("more", [{}, {"ffn": 0.3}], ids=["alone", "with widths"])
def test_experts_go_and_then_blocks(more: dict[str, Any]) -> None:
    proto = mixture()
    result = pruned(proto, experts=0.4, blocks=1, block_repair="none", repair="none", score="magnitude", **more)
    experts, blocks = result.report["experts"], result.report["blocks"]
    assert [c.what for c in result.changes[:5]] == ["experts"] * 4 + ["blocks"]
    assert result.report["before"]["parameters"] == liar_opt.inspect(proto).report["before"]["parameters"]
    assert max(experts["exact_difference"], blocks["exact_difference"]) < 1e-5
    original = masked(proto, [layer["kept"] for layer in experts["layers"]])
    for node in original.graph.node:
        node.input[:] = [blocks["source"] if name == blocks["target"] else name for name in node.input]
    if blocks["target"] == "x4":
        for node in original.graph.node:
            node.output[:] = ["gone" if name == "x4" else name for name in node.output]
        original.graph.node.append(onnx.helper.make_node("Identity", [blocks["source"]], ["x4"]))
    (ours,), (theirs,) = (oracle.run(m, feeds(3, 5, seed=9)) for m in (result.model, original))
    if more:
        assert {g["after"] < g["before"] for g in result.report["groups"]} == {True}
        assert result.report["verification"]["exact_difference"] < 1e-4
    else:
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_dry_run_says_what_would_be_left() -> None:
    proto = mixture()
    for more in ({}, {"ffn": 0.5}):
        result = pruned(proto, experts=0.4, dry_run=True, **more)
        assert "after" not in result.report
        assert sum("experts would be left" in note for note in result.report["model"]["notes"]) == 4
        (ours,), (theirs,) = (oracle.run(m, feeds(2, 3)) for m in (result.model, proto))
        np.testing.assert_array_equal(ours, theirs)


def test_an_inspection_lists_experts() -> None:
    report = liar_opt.inspect(mixture()).report
    found = [g for g in report["values"] if g["kind"] == "experts"]
    assert [(g["before"], g["chosen"]) for g in found] == [(n, 2) for n in SIZES]
    assert found[0]["parameters"] == 6 * (8 + 2 * 9 * 8)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"experts": 0.8},
            r"experts 0\.8 would leave 1 of 6 experts \(node '.*'\), and 2 are needed to choose 2 for each token; give less than 0\.6",
        ),
        ({"experts": 0.05}, r"experts 0\.05 leaves all of every layer; give at least 0\.072"),
        ({"experts": 1.0}, r"experts is 1; give the share that goes, above 0 and below 1"),
    ],
)
def test_ratios_that_cannot_be(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        pruned(mixture(), **options)


def test_what_the_sentence_offers_works() -> None:
    result = pruned(mixture(), experts=0.66)
    assert [layer["after"] for layer in result.report["experts"]["layers"]] == [2, 2, 2, 2]


def test_scores_that_something_else_reads_keep_their_experts() -> None:
    layer = LAYER.format(i=0, next=1, score=COUNTED.format(i=0))
    text = f"f (float[b, s, 8] x0) => (float[b, s, 8] x1, int64[n, 1] m0) {{ {layer} }}"
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in mixture(sizes=(6,)).graph.initializer}
    proto = graphs.parse(text, weights)
    with pytest.raises(ModelError, match="no expert can go: ArgMax reads the scores of all experts"):
        pruned(proto, experts=0.4)
    assert any("ArgMax reads the scores" in r["reason"] for r in liar_opt.inspect(proto).report["refusals"])


def test_scores_that_are_an_output_keep_their_experts() -> None:
    proto = mixture(sizes=(6,))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("logits0", onnx.TensorProto.FLOAT, [None, 6]))
    with pytest.raises(
        ModelError, match=r"no expert can go: the scores of its router are an output of the model \('logits0'\)"
    ):
        pruned(proto, experts=0.4)


def test_a_model_without_experts_says_so() -> None:
    with pytest.raises(ModelError, match=r"whose router chooses among experts by TopK.*; leave experts out"):
        pruned(
            graphs.parse(
                "f (float[b, 8] x0) => (float[b, 8] y) { u = MatMul(x0, w)  h = Relu(u)  y = MatMul(h, v) }",
                {"w": (8, 12), "v": (12, 8)},
            ),
            experts=0.4,
        )


def test_experts_inside_an_operator_go_by_their_gates() -> None:
    block = """r{i} = MatMul(x{i}, router{i})  logits{i} = Reshape(r{i}, all)
        e{i} = com.microsoft.MoE<k = 2, activation_type = "relu">(x{i}, logits{i}, up{i}, , down{i})  x{next} = Add(x{i}, e{i})"""
    layers = "\n".join(block.format(i=i, next=i + 1) for i in range(4))
    sizes = {
        f"{name}{i}": shape
        for i in range(4)
        for name, shape in (("router", (8, 6)), ("up", (6, 12, 8)), ("down", (6, 8, 12)))
    }
    proto = graphs.parse(f"f (float[b, s, 8] x0) => (float[b, s, 8] x4) {{ {layers} }}", {"all": ints(-1, 6), **sizes})
    result = pruned(proto, experts=0.4)
    found = result.report["experts"]
    assert found["gates"]
    assert [layer["after"] for layer in found["layers"]] == [4] * 4
    original = masked(proto, [layer["kept"] for layer in found["layers"]])
    for shape in ((1, 1), (2, 5), (7, 3)):
        (ours,), (theirs,) = (oracle.run(m, feeds(*shape, seed=9)) for m in (result.model, original))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows_of_router(proto, result, found["layers"][0]["kept"]), 0)


def rows_of_router(proto: onnx.ModelProto, result: liar_opt.PruneResult, kept: list[int]) -> np.ndarray:
    before, after = (
        next(onnx.numpy_helper.to_array(t) for t in m.graph.initializer if t.name == "router0")
        for m in (proto, result.model)
    )
    return np.asarray(before[:, kept] - after)


def test_padding_is_no_row_of_any_expert() -> None:
    norms = np.asarray([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    real = np.asarray([True, True, True, False])
    totals = rows_by_expert(norms, np.asarray([2, 0, 2, 1]), 4, real)
    np.testing.assert_allclose(totals, [[1, 0, 7, 0], [1, 0, 2, 0]])


def test_experts_of_one_layer_are_one_dimension() -> None:
    _, walk, _ = graphs.analyse(mixture())
    layers, unfit = find_experts(walk)
    assert not unfit
    assert [(layer.size, layer.top_k, layer.least, len(layer.constants)) for layer in layers] == [
        (n, 2, 2, 3) for n in SIZES
    ]


# -- experts that lie apart ---------------------------------------------------------------------------------------------

CHOSEN = """n{i} = LayerNormalization<axis = -1>(x{i}, ones, zeros)  logits{i} = MatMul(n{i}, router{i})
    best{i}, choice{i} = TopK(logits{i}, two)  share{i} = Softmax(best{i})
    like{i} = Shape(logits{i})  nothing{i} = ConstantOfShape(like{i})  gates{i} = ScatterElements<axis = -1>(nothing{i}, choice{i}, share{i})"""
EXPERT = "u{i}_{e} = MatMul(n{i}, up{i}_{e})  h{i}_{e} = Relu(u{i}_{e})  f{i}_{e} = MatMul(h{i}_{e}, down{i}_{e})"
TIMES = "t{i}_{e} = Mul(f{i}_{e}, g{i}_{e})"
SUM = "sum{i} = Sum({terms})"
ROUTED = """m{i}_{e} = Equal(rows{i}, number{e})  z{i}_{e} = NonZero(m{i}_{e})  place{i}_{e} = Transpose<perm = [1, 0]>(z{i}_{e})
    some{i}_{e} = GatherND(shares{i}, place{i}_{e})  first{i}_{e} = Gather<axis = 0>(z{i}_{e}, number0)  own{i}_{e} = Gather(flat{i}, first{i}_{e})
    u{i}_{e} = MatMul(own{i}_{e}, up{i}_{e})  h{i}_{e} = Relu(u{i}_{e})  f{i}_{e} = MatMul(h{i}_{e}, down{i}_{e})
    g{i}_{e} = Unsqueeze(some{i}_{e}, last)  t{i}_{e} = Mul(f{i}_{e}, g{i}_{e})  at{i}_{e} = Unsqueeze(first{i}_{e}, last)
    y{i}_{next} = ScatterND<reduction = "add">(y{i}_{e}, at{i}_{e}, t{i}_{e})"""


def lone(form: str, i: int, count: int) -> str:
    """One layer of experts with weights of their own, whose gates are taken out in one of several ways."""
    gates = {
        "index": "k{i}_{e} = Gather<axis = -1>(gates{i}, number{e})  g{i}_{e} = Unsqueeze(k{i}_{e}, last)",
        "slice": "g{i}_{e} = Slice(gates{i}, list{e}, list{n}, last)",
        "equal": "m{i}_{e} = Equal(choice{i}, number{e})  c{i}_{e} = Cast<to = 1>(m{i}_{e})  s{i}_{e} = Mul(c{i}_{e}, share{i})  g{i}_{e} = ReduceSum<keepdims = 1>(s{i}_{e}, last)",
    }
    lines = [CHOSEN.format(i=i)]
    each = range(count)
    if form == "split":
        lines.append(f"{', '.join(f'g{i}_{e}' for e in each)} = Split<axis = -1>(gates{i}, split{count})")
    if form == "rows":
        lines.append(
            f"rows{i} = Reshape(choice{i}, pairs)  shares{i} = Reshape(share{i}, pairs)  flat{i} = Reshape(n{i}, many)"
        )
        lines.append(f"wide{i} = Shape(flat{i})  y{i}_0 = ConstantOfShape(wide{i})")
        lines += [ROUTED.format(i=i, e=e, next=e + 1) for e in each]
        lines.append(f"back{i} = Shape(x{i})  sum{i} = Reshape(y{i}_{count}, back{i})")
    else:
        lines += [EXPERT.format(i=i, e=e) for e in each]
        lines += [gates.get(form, "").format(i=i, e=e, n=e + 1) for e in each]
    if form == "beside":
        lines += [f"l{i}_{e} = Unsqueeze(f{i}_{e}, before)" for e in each]
        lines.append(
            f"all{i} = Concat<axis = -2>({', '.join(f'l{i}_{e}' for e in each)})  w{i} = Unsqueeze(gates{i}, last)"
        )
        lines.append(f"both{i} = Mul(all{i}, w{i})  sum{i} = ReduceSum<keepdims = 0>(both{i}, before)")
    elif form in ("slice", "split"):
        lines += [TIMES.format(i=i, e=e) for e in each]
        lines.append(SUM.format(i=i, terms=", ".join(f"t{i}_{e}" for e in each)))
    elif form != "rows":
        lines += [TIMES.format(i=i, e=e) for e in each]
        sums = [f"t{i}_0", *(f"p{i}_{e}" for e in range(1, count - 1)), f"sum{i}"]
        lines += [f"{sums[e]} = Add({sums[e - 1]}, t{i}_{e})" for e in range(1, count)]
    return "\n".join([*lines, f"x{i + 1} = Add(x{i}, sum{i})"])


def apart(*forms: str) -> onnx.ModelProto:
    """Layers of experts with weights of their own, 5 and 6 of them."""
    counts = [5 + i % 2 for i in range(len(forms))]
    weights: dict[str, Any] = {
        **{"two": ints(2), "last": ints(-1), "before": ints(-2), "pairs": ints(-1, 2), "many": ints(-1, 8)},
        **{"ones": np.ones(8, np.float32), "zeros": np.zeros(8, np.float32)},
        **{f"number{e}": np.asarray(e) for e in range(7)},
        **{f"list{e}": ints(e) for e in range(7)},
        **{f"split{count}": ints(*[1] * count) for count in (5, 6)},
    }
    for i, count in enumerate(counts):
        weights[f"router{i}"] = (8, count)
        for e in range(count):
            weights |= {f"up{i}_{e}": (8, 9 + i + e), f"down{i}_{e}": (9 + i + e, 8)}
    text = "\n".join(lone(form, i, count) for i, (form, count) in enumerate(zip(forms, counts, strict=True)))
    return graphs.parse(f"f (float[b, s, 8] x0) => (float[b, s, 8] x{len(forms)}) {{ {text} }}", weights)


FORMS = ("index", "slice", "split", "equal", "beside", "rows")


def test_experts_with_weights_of_their_own_go_with_them() -> None:
    proto = apart(*FORMS)
    result = pruned(proto, experts=0.4)
    found = result.report["experts"]
    assert [(layer["before"], layer["after"]) for layer in found["layers"]] == [(5, 3), (6, 4)] * 3
    kept, left = exact(proto, result)
    for i, own in enumerate(kept):
        assert left[f"router{i}"] == [8, len(own)]
        assert {e for e in range(6) if f"up{i}_{e}" in left} == set(own) == {e for e in range(6) if f"down{i}_{e}" in left}
    assert all(n.op_type != "Split" or len(n.output) == len(kept[2]) for n in result.model.graph.node)
    gone = found["parameters_before"] - found["parameters_after"]
    assert result.report["after"]["parameters"] == result.report["before"]["parameters"] - gone


def test_experts_apart_stay_by_what_they_add() -> None:
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in apart("index", "rows").graph.initializer}
    sums, counts = np.zeros(5), np.zeros(5)
    for batch in calibration():
        x = batch["x0"].reshape(-1, 8).astype(np.float64)
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        scores = x @ arrays["router0"]
        choice = np.argsort(-scores, axis=1)[:, :2]
        best = np.exp(np.take_along_axis(scores, choice, 1))
        best /= best.sum(1, keepdims=True)
        for row, experts, gates in zip(x, choice, best, strict=True):
            for e, gate in zip(experts, gates, strict=True):
                sums[e] += gate * np.linalg.norm(np.maximum(row @ arrays[f"up0_{e}"], 0) @ arrays[f"down0_{e}"])
                counts[e] += 1
    state = streams.prepared(apart("index", "rows"), 0.5, streams.data(tuple(calibration())))
    first, second = find_experts(state.analysed())[0]
    totals = measure_experts(state, [first, second])
    np.testing.assert_allclose(totals[first], [sums, counts], rtol=1e-4)
    assert totals[second][1].sum() == counts.sum()  # rows that chose an expert, two for each
    assert first.parameters == 8 * 5 + sum(2 * 8 * (9 + e) for e in range(5))


def test_experts_whose_score_does_more_than_multiply_stay() -> None:
    proto = apart("index")
    next(n for n in proto.graph.node if n.output[0] == "t0_3").op_type = "Div"
    with pytest.raises(ModelError, match=r"no expert can go: Div reads what the router says of one expert \(node '.*'\)"):
        pruned(proto, experts=0.4)


def test_a_choice_that_is_not_of_experts_is_none() -> None:
    proto = apart("index")
    for node in proto.graph.node:
        node.input[:] = ["number0" if name == "number4" else name for name in node.input]  # the last is asked for nowhere
    with pytest.raises(ModelError, match="no layer is found whose router chooses among experts"):
        pruned(proto, experts=0.4)
