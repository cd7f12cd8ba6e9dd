# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Measure, select, repair, cut: what the repair buys on rows that it has not seen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import oracle
import pytest
from onnx import numpy_helper
from streams import BLOCK, STREAM, WEIGHTS, batches, data, error, pruned

from liar_opt.frontend.onnx_engine import OnnxPart
from liar_opt.passes import calibrate
from liar_opt.passes.find_groups import FindGroupsPass
from liar_opt.passes.normalise_graph import NormaliseGraphPass
from liar_opt.passes.open_model import load_state
from liar_opt.passes.prune_job import inspect, prune
from liar_opt.runtime import memory
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.errors import CheckError, InternalError, ModelError, OptionError


@pytest.mark.parametrize("score", ["greedy", "activation-weighted", "magnitude", "random"])
def test_repair_beats_bias_beats_none_on_held_out_rows(score: str) -> None:
    proto = graphs.parse(STREAM, WEIGHTS)
    errors = [error(proto, pruned(proto, 0.5, repair=r, score=score)[0]) for r in ("liar", "bias", "none")]
    assert errors[0] < 0.5 * errors[1] < errors[1] < errors[2]


def test_greedy_leaves_the_least_residual() -> None:
    text = "f (float[b, s, 6] x0) => (float[b, s, 6] x1) { u = MatMul(x0, w)  h = Relu(u)  x1 = MatMul(h, v) }"
    for seed in range(5):
        proto = graphs.parse(text, {"w": (6, 17), "v": (17, 6)}, seed=seed)
        left = {}
        for score in ("greedy", "magnitude", "activation-weighted", "random"):
            _, _, result = pruned(proto, 0.5, score=score, ridge=1e-6)
            left[score] = result.changes[0].details["consumers"][0]["error_repair"]
        assert left["greedy"] <= min(left.values()) * 1.05
        assert left["greedy"] < left["magnitude"]


def test_the_reported_errors_are_those_of_the_rows() -> None:
    """One layer: E|x W - x_U W' - b'|^2 / E|x W|^2 on the calibration rows, by running both."""
    text = "f (float[b, s, 6] x0) => (float[b, s, 6] x1) { u = MatMul(x0, w)  h = Relu(u)  x1 = MatMul(h, v) }"
    proto = graphs.parse(text, {"w": (6, 17), "v": (17, 6)})
    feeds = batches(20, 0)
    for repair in ("liar", "bias", "none"):
        cut, _, result = pruned(proto, 0.5, repair=repair)
        details = result.changes[0].details["consumers"][0]
        x, y = (np.concatenate([oracle.run(m, f)[0].reshape(-1, 6) for f in feeds]) for m in (cut, proto))
        measured = ((x - y) ** 2).sum() / (y**2).sum()
        assert details["error_repair"] == pytest.approx(measured, rel=1e-3)
        if repair != "liar":
            assert details[f"error_{repair}"] == pytest.approx(measured, rel=1e-3)


def test_a_few_rows_of_huge_activations_do_not_decide_alone() -> None:
    """Separators in BERT are such rows: by the plain mean square they are all that counts, and the others lose."""
    proto = graphs.parse(STREAM, WEIGHTS)
    feeds = batches(20, 0)
    for feed in feeds:
        feed["x0"][0, 0] = -100.0 * feed["x0"][0, 0, ::-1]
    errors = {w: error(proto, pruned(proto, 0.5, data(feeds), weighting=w)[0]) for w in ("stream", "none")}
    assert errors["stream"] < 0.8 * errors["none"]
    assert errors["stream"] < 2.0 * error(proto, pruned(proto, 0.5)[0])


def test_padding_is_not_measured() -> None:
    proto = graphs.parse(STREAM, WEIGHTS)
    clean = batches(10, 0)
    masks = tuple(np.random.default_rng(i).random((8, 5)) < 0.7 for i in range(10))
    dirty = tuple({"x0": np.where(m[..., None], f["x0"], np.float32(50))} for f, m in zip(clean, masks, strict=True))
    other = tuple({"x0": np.where(m[..., None], f["x0"], np.float32(-7))} for f, m in zip(clean, masks, strict=True))
    first, second = (pruned(proto, 0.5, data(feeds, masks))[0] for feeds in (dirty, other))
    for a, b in zip(first.graph.initializer, second.graph.initializer, strict=True):
        np.testing.assert_allclose(numpy_helper.to_array(a), numpy_helper.to_array(b), rtol=1e-4, atol=1e-5)


def test_nothing_removed_changes_nothing() -> None:
    proto = graphs.parse(STREAM, WEIGHTS)
    cut, state, result = pruned(proto, 1.0)
    assert not result.changes
    assert state.repairs == []
    before = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    after = {i.name: numpy_helper.to_array(i) for i in cut.graph.initializer}
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


def test_later_segments_see_the_pruned_stream() -> None:
    """With the first block emptied of meaning the second is fitted to what is left: better than dense moments."""
    proto = graphs.parse(STREAM, WEIGHTS)
    _, state, result = pruned(proto, 0.4)
    assert [c.where for c in result.changes] == [g.name for g in state.groups]
    assert [c.after for c in result.changes] == [7, 8]
    assert result.changes[1].details["rows"] == 20 * 8 * 5


def test_shared_weights_are_pooled_and_stay_shared() -> None:
    shared = BLOCK.replace("w{0}", "w").replace("b{0}", "b").replace("v{0}", "v")
    text = f"f (float[b, s, 6] x0) => (float[b, s, 6] x2) {{ {shared.format(0, 1)}\n {shared.format(1, 2)} }}"
    proto = graphs.parse(text.replace("float[b, ", "float[n, "), {"w": (6, 17), "b": (17,), "v": (17, 6)})
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(0.4 * numpy_helper.to_array(tensor), tensor.name))
    cut, _, result = pruned(proto, 0.5)
    assert result.changes[0].details["rows"] == 2 * 20 * 8 * 5
    assert {i.name for i in cut.graph.initializer} >= {"w", "b", "v"}
    assert len(cut.graph.initializer) <= 5  # and a new bias for each use
    assert error(proto, cut) < error(proto, pruned(proto, 0.5, repair="none")[0])


def test_chain_of_layers_without_biases() -> None:
    text = "f (float[b, s, 6] x0) => (float[b, s, 5] y) { u = MatMul(x0, w1)  h = Relu(u)  v = MatMul(h, w2)  k = Relu(v)  y = MatMul(k, w3) }"
    proto = graphs.parse(text, {"w1": (6, 17), "w2": (17, 13), "w3": (13, 5)})
    full, none = (pruned(proto, 0.6, repair=r)[0] for r in ("liar", "none"))
    onnx.checker.check_model(full)
    assert error(proto, full) < error(proto, none)


def test_nan_is_the_models_fault_or_the_datas() -> None:
    feeds = batches(3, 0)
    feeds[1]["x0"][0, 0, 0] = np.nan
    with pytest.raises(ModelError, match="activation 'h0' has NaN or Inf"):
        pruned(graphs.parse(STREAM, WEIGHTS), 0.5, data(feeds))


def test_a_part_that_does_not_run_is_ours() -> None:
    """Whether the data is at fault is asked of the original, in `prune`; a part by itself says nothing of it."""
    feeds = ({"x0": np.zeros((2, 3, 7), np.float32)},)
    with pytest.raises(InternalError, match=r"fails on the part of the model that computes .*h0"):
        pruned(graphs.parse(STREAM, WEIGHTS), 0.5, data(feeds))


POSITIONS = (
    "f (float[b, s, 6] x) => (float[b, s, 6] y) { p = Add(x, table)  u = MatMul(p, w)  h = Relu(u)  y = MatMul(h, v) }"
)


def of_lengths(*lengths: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((3, n, 6)).astype(np.float32)} for n in lengths]


@pytest.mark.parametrize("lengths", [(7, 7), (5, 7), (7, 5)])
@pytest.mark.parametrize("memory", [None, "4GB"])
def test_data_on_which_the_original_fails(lengths: tuple[int, ...], memory: str | None) -> None:
    """The graph says any length; a constant fits one alone. Told before the work if the first batch says it."""
    proto = graphs.parse(POSITIONS, {"table": (1, 5, 6), "w": (6, 40), "v": (40, 6)})
    with pytest.raises(ModelError, match=r"ONNX Runtime fails on the calibration data \('x' \[[136], 7, 6\]\)"):
        prune(proto, of_lengths(*lengths), ffn=0.5, allocate="uniform", memory=memory)


@pytest.mark.parametrize("options", [{"ffn": 0.5}, {"ffn": 0.5, "allocate": "uniform"}, {"pattern": "2:4"}], ids=str)
def test_data_on_which_the_original_fails_by_its_values(options: dict[str, Any]) -> None:
    """As where an exporter has fixed how many rows a router sends to an expert; the first batches say nothing of it."""
    proto = graphs.parse(
        """f (float[b, 8] x) => (float[b, 8] y) { g = Greater(x, ten)  i = Cast<to=7>(g)  n = ReduceMax<keepdims=0>(i)
        z = Gather(one, n)  v = Add(x, z)  u = MatMul(v, w)  h = Relu(u)  y = MatMul(h, v1) }""",
        {"w": (8, 40), "v1": (40, 8), "ten": np.float32(10), "one": np.zeros(1, np.float32)},
    )
    batches = [{"x": np.random.default_rng(i).standard_normal((8, 8)).astype(np.float32)} for i in range(8)]
    batches[-1]["x"][3, 2] = 20
    with pytest.raises(ModelError, match=r"fails on the calibration data .* Gather node.* did the export fix a number"):
        prune(proto, batches, latency=False, provider="cpu", fresh=True, **options)


def test_a_size_that_the_data_asks_for_and_no_machine_has() -> None:
    """As a Range over token ids that were made up: the operator that asks is named, and what gives it less to ask."""
    proto = graphs.parse(
        """f (float[b, 8] x) => (float[b, 8] y) { m = ReduceMax<keepdims=0>(x)  n = Cast<to=7>(m)  r = Range(zero, n, one)
        k = Size(r)  c = Cast<to=1>(k)  v = Add(x, c)  u = MatMul(v, w)  h = Relu(u)  y = MatMul(h, v1) }""",
        {"w": (8, 40), "v1": (40, 8), "zero": np.int64(0), "one": np.int64(1)},
    )
    feeds = [{"x": np.full((2, 8), 1e15, np.float32)}]
    with pytest.raises(OptionError, match=r"no memory .* Range node.* \(--calibration\)"):
        prune(proto, feeds, latency=False, provider="cpu", fresh=True, ffn=0.5)


def test_a_model_that_the_optimizer_of_onnx_runtime_breaks() -> None:
    """It moves transposes through a Pad whose axes are not in order; the data is not to blame."""
    proto = graphs.parse(
        "f (float[b, 4, s] x) => (float[b, 4, s] z) { e = Conv(x, w)  t = Transpose<perm=[0, 2, 1]>(e) "
        "c = Pad(t, pads, zero, axes)  d = Slice(c, one, end, one)  a = Transpose<perm=[0, 2, 1]>(d)  y = Conv(a, v) "
        "u = Conv(y, p)  h = Relu(u)  z = Conv(h, o) }",
        {
            "w": (12, 4, 1),
            "v": (4, 14, 1),
            "p": (16, 4, 1),
            "o": (4, 16, 1),
            "zero": np.float32(0),
            "one": np.asarray([1]),
            "pads": np.asarray([1, 0, 1, 1, 0, 0]),
            "axes": np.asarray([2, 0, 1]),
            "end": np.asarray([1 << 31]),
        },
        opset=18,
    )
    data = {"x": np.random.default_rng(0).standard_normal((6, 4, 5)).astype(np.float32)}
    with pytest.raises(ModelError, match=r"the same data runs with ONNX Runtime's optimizer off, so the data is not"):
        prune(proto, data, ffn=0.5)


def part_of(run: Any) -> Any:
    """Makes parts whose sessions run ``run``."""
    right = OnnxPart.__init__

    def made(self: OnnxPart, session: Any, wanted: Any, taps: Any) -> None:
        right(self, type("Broken", (), {"run": run})(), wanted, taps)

    return made


def test_a_part_that_fails_where_the_original_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Got invalid dimensions")

    proto = graphs.parse(POSITIONS, {"table": (1, 5, 6), "w": (6, 40), "v": (40, 6)})
    monkeypatch.setattr(OnnxPart, "__init__", part_of(fail))
    with pytest.raises(CheckError, match=r"InternalError: ONNX Runtime fails on the part of the model that .*h/2"):
        prune(proto, of_lengths(5, 5), ffn=0.5, allocate="uniform")


@pytest.mark.parametrize("said", ["Failed to allocate memory for requested buffer of size 99", "std::bad_alloc"])
def test_memory_that_runs_out_is_no_bug(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(said)

    proto = graphs.parse(POSITIONS, {"table": (1, 5, 6), "w": (6, 40), "v": (40, 6)})
    monkeypatch.setattr(OnnxPart, "__init__", part_of(fail))
    with pytest.raises(OptionError, match="prune-groups ran out of memory"):
        prune(proto, of_lengths(5, 5), ffn=0.5, allocate="uniform")


def test_an_operator_that_onnx_runtime_lacks_is_named_before_any_work() -> None:
    text = POSITIONS.replace("y = MatMul(h, v)", "z = MatMul(h, v)  y = test.MyNorm(z)")
    proto = graphs.parse(text, {"table": (1, 5, 6), "w": (6, 40), "v": (40, 6)})
    said = r"test::MyNorm is not in this ONNX Runtime \(node '\w+' \(test::MyNorm\) of the model\); --custom-ops"
    for dry_run in (False, True):
        with pytest.raises(ModelError, match=said):
            prune(proto, {"y": np.zeros(1)}, ffn=0.5, dry_run=dry_run)
    found = inspect(proto)
    assert [g.size for g in found.groups] == [40]
    assert any(re.search(said, note) for note in found.report["model"]["notes"])


def test_a_graph_that_onnx_runtime_refuses() -> None:
    proto = graphs.parse(POSITIONS, {"table": (1, 5, 7), "w": (6, 40), "v": (40, 6)})
    with pytest.raises(ModelError, match="ONNX Runtime cannot load the model: "):
        prune(proto, of_lengths(5), ffn=0.5)
    assert any("cannot load" in note for note in inspect(proto).report["model"]["notes"])


def test_options() -> None:
    proto = graphs.parse(STREAM, WEIGHTS)
    for option, match in (
        ({"score": "best"}, "score 'best' is unknown"),
        ({"repair": "all"}, "repair 'all' is unknown"),
        ({"ridge": -1.0}, "negative"),
        ({"ridge": float("nan")}, "negative"),
    ):
        with pytest.raises(OptionError, match=match):
            pruned(proto, 0.5, **option)


def test_one_seed_one_result() -> None:
    proto = graphs.parse(STREAM, WEIGHTS)
    kept = [[c.details["kept"] for c in pruned(proto, 0.5, score="random", seed=s)[2].changes] for s in (1, 1, 2)]
    assert kept[0] == kept[1] != kept[2]


def test_branches_that_read_from_outside() -> None:
    text = """f (float[b, s, 6] x0, bool c) => (float[b, s, 6] y) {
        u = MatMul(x0, w1)  h = Relu(u)  z = MatMul(h, w2)  k = Tanh(x0)
        r = If (c) <
            then_branch = g1 () => (float[b, s, 6] t) { t = Add(k, w3) },
            else_branch = g2 () => (float[b, s, 6] e) { e = Mul(k, w3) }
        >
        a = Add(r, z)  u2 = MatMul(a, w4)  h2 = Relu(u2)  y = MatMul(h2, w5) }"""
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 6), "w3": (6,), "w4": (6, 13), "w5": (13, 6)})
    feeds = tuple({**f, "c": np.asarray(i % 2 == 0)} for i, f in enumerate(batches(8, 0)))
    cut, _, result = pruned(proto, 0.5, data(feeds))
    assert [c.after for c in result.changes] == [6, 6]
    onnx.checker.check_model(cut)


def test_a_shape_that_layers_share_is_computed_anew_behind_the_first() -> None:
    block = """u{0} = MatMul(x{0}, w{0})  r{0} = Reshape(u{0}, k)  p{0} = Softmax(r{0})  f{0} = Reshape(p{0}, m)
        z{0} = MatMul(f{0}, v{0})  x{1} = Add(x{0}, z{0})"""
    text = f"""f (float[b, s, 6] x0) => (float[b, s, 6] x2) {{ n = Shape<end = 2>(x0)  k = Concat<axis = 0>(n, heads)
        m = Concat<axis = 0>(n, rest)  {block.format(0, 1)}  {block.format(1, 2)} }}"""
    weights: dict[str, tuple[int, ...] | np.ndarray] = {"heads": np.asarray([5, 4]), "rest": np.asarray([-1])}
    proto = graphs.parse(text, {**weights, **{f"{w}{i}": (6, 20) if w == "w" else (20, 6) for i in range(2) for w in "wv"}})
    cut, _, result = pruned(proto, 0.6)
    assert [c.after for c in result.changes] == [3, 3]
    onnx.checker.check_model(cut, full_check=True)
    assert error(proto, cut) > 0.0


# 2 heads of 6 values on the left of a stream: v = x wv, mixed by weights that x gives, joined and projected.
MIXED = """f (float[b, s, 6] x0, float[b, 2, past, 6] pv) => (float[b, s, 6] y, float[b, 2, all, 6] nv) {
    q = MatMul(x0, wq)  v = MatMul(x0, wv)  q4 = Reshape(q, split)  v4 = Reshape(v, split)
    qt = Transpose<perm=[0,2,1,3]>(q4)  vt = Transpose<perm=[0,2,1,3]>(v4)  nv = Concat<axis=2>(pv, vt)
    k = Transpose<perm=[0,1,3,2]>(nv)  a = MatMul(qt, k)  p = Softmax(a)  c = MatMul(p, nv)
    ct = Transpose<perm=[0,2,1,3]>(c)  j = Reshape(ct, join)  z = MatMul(j, wo)  y = Add(x0, z) }"""
MIXED_WEIGHTS: graphs.Weights = {
    **{"wq": (6, 12), "wv": (6, 12), "wo": (12, 6)},
    **{"split": np.asarray([0, 0, 2, 6]), "join": np.asarray([0, 0, 12])},
}


@pytest.mark.parametrize("written", [True, False])
def test_feeds_of_a_cache_are_cut_with_it(written: bool) -> None:
    """An exporter need not write the shapes of outputs."""
    proto = graphs.parse(MIXED, MIXED_WEIGHTS)
    for value in proto.graph.output if not written else ():
        value.type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(3)
    feeds = tuple({**f, "pv": rng.standard_normal((8, 2, 3, 6)).astype(np.float32)} for f in batches(12, 0))
    result = prune(proto, feeds, heads=0.5, batch_size=8, latency=True, samples=96)
    assert [(g["kind"], g["before"], g["after"]) for g in result.report["groups"]] == [("heads", 2, 1)]
    assert result.report["cache_shapes"] == {"pv": ["b", 1, "past", 6], **({"nv": ["b", 1, "all", 6]} if written else {})}
    assert result.report["verification"]["exact_difference"] < 1e-5
    assert {v.name: len(v.type.tensor_type.shape.dim) for v in result.model.graph.input} == {"x0": 3, "pv": 4}


ATTENTION = """f (float[b, s, 6] x0) => (float[b, s, 6] x1) {
    q = MatMul(x0, wq)  k = MatMul(x0, wk)  v = MatMul(x0, wv)
    q4 = Reshape(q, split)  k4 = Reshape(k, split)  v4 = Reshape(v, split)
    qt = Transpose<perm=[0,2,1,3]>(q4)  kt = Transpose<perm=[0,2,3,1]>(k4)  vt = Transpose<perm=[0,2,1,3]>(v4)
    a = MatMul(qt, kt)  p = Softmax(a)  c = MatMul(p, vt)
    ct = Transpose<perm=[0,2,1,3]>(c)  j = Reshape(ct, join)  z = MatMul(j, wo)  x1 = Add(x0, z) }"""
ATTENTION_WEIGHTS: graphs.Weights = {
    **{"wq": (6, 24), "wk": (6, 24), "wv": (6, 24), "wo": (24, 6)},
    **{"split": np.asarray([0, 0, 4, 6]), "join": np.asarray([0, 0, -1])},
}


@pytest.mark.parametrize("score", ["greedy", "activation-weighted", "random"])
def test_each_head_keeps_as_many_values_of_its_own(score: str) -> None:
    proto = graphs.parse(ATTENTION, ATTENTION_WEIGHTS)
    result = prune(
        proto, batches(12, 0), values=0.5, batch_size=8, samples=96, score=score, value_cut="select", latency=False
    )
    (heads, values) = result.report["groups"]
    assert (heads["kind"], heads["before"], heads["after"]) == ("heads", 4, 4)
    assert (values["kind"], values["before"], values["after"], values["index_sets"]) == ("values", 6, 3, 4)
    kept = np.asarray(values["kept"]).reshape(4, 3)
    assert (kept // 6 == np.arange(4)[:, None]).all()
    assert len({tuple(row) for row in (kept % 6).tolist()}) > 1
    assert {i.name: tuple(i.dims) for i in result.model.graph.initializer if i.name in ("wq", "wv", "wo")} == {
        "wq": (6, 24),
        "wv": (6, 12),
        "wo": (12, 6),
    }
    assert result.report["verification"]["exact_difference"] < 1e-5


def test_values_are_cut_of_the_heads_that_are_left() -> None:
    proto = graphs.parse(ATTENTION, ATTENTION_WEIGHTS)
    errors = {}
    for repair in ("liar", "bias", "none"):
        result = prune(
            proto, batches(12, 0), heads=0.5, values=0.34, batch_size=8, samples=96, latency=False, repair=repair
        )
        assert [(g["kind"], g["after"]) for g in result.report["groups"]] == [("heads", 2), ("values", 4)]
        left = set(result.report["groups"][0]["kept"])
        assert {i // 6 for i in result.report["groups"][1]["kept"]} == left
        assert result.report["verification"]["exact_difference"] < 1e-5
        errors[repair] = error(proto, result.model)
    assert errors["liar"] < errors["bias"] < errors["none"]


def test_rows_of_concatenated_tokens_are_counted(tmp_path: Path) -> None:
    """Six samples in batches of four: of the last batch only two are real, each with the 4 + 3 rows of both inputs."""
    text = (
        "f (float[4, 4, 6] x, float[4, 3, 6] z) => (float[4, 7, 5] y) { c = Concat<axis=1>(x, z)  a = MatMul(c, w1)\n"
        " h = Relu(a)  y = MatMul(h, w2) }"
    )
    path = tmp_path / "model.onnx"
    onnx.save(graphs.parse(text, {"w1": (6, 16), "w2": (16, 5)}), path)
    rng = np.random.default_rng(0)
    data = {k: rng.standard_normal((6, n, 6)).astype(np.float32) for k, n in (("x", 4), ("z", 3))}
    result = prune(path, data, ffn=0.5, latency=False)
    assert [c.details["rows"] for c in result.changes] == [6 * 7]


def test_batches_that_do_not_fit_the_memory_are_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images and long texts: what is alive at a time may take more than the machine has."""
    feeds = {name: np.concatenate([b[name] for b in batches(10, 0)]) for name in batches(1, 0)[0]}
    proto = graphs.parse(STREAM, WEIGHTS)
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 13)
    result = prune(proto, calibration=feeds, sparsity=0.3, allocate="uniform", multiple_of=1, latency=False)
    (note,) = (n for n in result.report["model"]["notes"] if "batches: one of" in n)
    assert "calibration ran in" in note
    monkeypatch.undo()
    large = prune(proto, calibration=feeds, sparsity=0.3, allocate="uniform", multiple_of=1, latency=False)
    assert not any("batches: one of" in n for n in large.report["model"]["notes"])
    first, second = (r.report["groups"][0]["repairs"][0]["error_none"] for r in (result, large))
    assert first == pytest.approx(second, rel=0.5)


def test_under_a_limit_that_was_given_batches_leave_room_for_other_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is alive takes some 60 KB; ONNX Runtime keeps that for each session that was run."""
    feeds = {name: np.concatenate([b[name] for b in batches(10, 0)]) for name in batches(1, 0)[0]}
    monkeypatch.setattr(calibrate, "anonymous", lambda: 0)
    state = load_state(graphs.parse(STREAM, WEIGHTS), 100_000)
    NormaliseGraphPass()(state)
    FindGroupsPass()(state)
    notes: list[str] = []
    whole = CalibrationData((feeds,), (None,), 80, 80, "test", (), False)
    fitted = calibrate.fitted(state, whole, notes)
    samples = [len(b["x0"]) for b in fitted.batches]
    assert sum(samples) == 80 and samples[0] in (1, 2, 4, 8, 16, 32) and len(notes) == 1
    state.memory.asked = False
    assert calibrate.fitted(state, whole, notes) is whole
