"""Groups are proved before the work, and what is wrong with one costs its sparsity alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
import zoo
import zoo_decoders

import liar_opt
from liar_opt.frontend.onnx_model import onnx_graph
from liar_opt.frontend.rewrite import Rewriter
from liar_opt.passes.base import Pipeline, State
from liar_opt.passes.find_groups import FindGroupsPass
from liar_opt.passes.normalise_graph import NormaliseGraphPass
from liar_opt.passes.open_model import load_state
from liar_opt.passes.prove_groups import Failure, Proof, ProveGroupsPass, probe_feeds
from liar_opt.passes.prune_groups import PruneGroupsPass
from liar_opt.passes.sweep import Sweep
from liar_opt.passes.verify_model import VerifyModelPass, dense_session
from liar_opt.runtime.errors import CheckError

TEXT = """f (float[b, s, 6] x) => (float[b, s, 6] y) {
    a1 = MatMul(x, u1)  h1 = Relu(a1)  b1 = MatMul(h1, w1)  r1 = Add(x, b1)
    a2 = MatMul(r1, u2)  h2 = Relu(a2)  b2 = MatMul(h2, w2)  r2 = Add(r1, b2)
    a3 = MatMul(r2, u3)  h3 = Relu(a3)  b3 = MatMul(h3, w3)  r3 = Add(r2, b3)
    a4 = MatMul(r3, u4)  h4 = Relu(a4)  b4 = MatMul(h4, w4)  y = Add(r3, b4) }"""
SIZES = {1: 17, 2: 13, 3: 10, 4: 9}
WEIGHTS: graphs.Weights = {f"u{i}": (6, n) for i, n in SIZES.items()} | {f"w{i}": (n, 6) for i, n in SIZES.items()}
FEEDS = {"x": np.random.default_rng(0).standard_normal((40, 3, 6)).astype(np.float32)}


def analysed(source: Any) -> State:
    state = load_state(source)
    Pipeline(passes=[NormaliseGraphPass(), FindGroupsPass()])(state)
    return state


def pruned(**options: Any) -> liar_opt.PruneResult:
    common: dict[str, Any] = {"calibration": FEEDS, "latency": False, "fresh": True, "multiple_of": 1, "batch_size": 8}
    return liar_opt.prune(graphs.parse(TEXT, WEIGHTS), **{**common, **options})


def widths(result: liar_opt.PruneResult) -> list[int]:
    """The hidden widths of the four layers, from the written file."""
    shapes = {t.name: list(t.dims) for t in result.model.graph.initializer}
    return [shapes[f"u{i}"][1] for i in SIZES]


def wrongly(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Has the rewriter drop the first blocks of a dimension, whichever it is told to drop."""
    right = Rewriter.cut

    def wrong(self: Rewriter, cuts: Mapping[int, Any]) -> None:
        changed = {
            leaf: range(size - len(list(kept)), size) if self.algebra.size(leaf) == size else kept
            for leaf, kept in cuts.items()
        }
        right(self, changed)

    monkeypatch.setattr(Rewriter, "cut", wrong)


@pytest.mark.parametrize("case", zoo.cases(fast=True), ids=lambda case: case.name)
def test_nothing_is_wrong_in_the_zoo(case: zoo.Case) -> None:
    state = analysed(zoo.ready(case).path)
    proof = Proof(state, PruneGroupsPass())
    assert proof.faults({g.name: g.size - 1 for g in state.groups}) == {}
    assert proof.faults({g.name: max(1, g.size // 2) for g in (*state.groups, *state.values)}) == {}
    assert proof.faults({g.name: max(1, g.size // 2) for g in (*state.queries, *state.groups)}) == {}


@pytest.mark.parametrize("name", ["gpt2-torchscript-cache", "llama-dynamo", "mixtral-torchscript", "t5-gated-torchscript"])
def test_nothing_is_wrong_in_decoders(name: str) -> None:
    (case,) = (c for c in zoo_decoders.cases() if c.name == name)
    state = analysed(zoo_decoders.ready(case).path)
    proof = Proof(state, PruneGroupsPass())
    caches = [n for n in proof.feeds[0] if n.startswith("past")]
    assert not caches or any(feeds[caches[0]].shape[2] > 1 for feeds in proof.feeds)
    assert proof.faults({g.name: max(1, g.size // 2) for g in (*state.queries, *state.groups, *state.values)}) == {}


def test_probes_differ_in_batch_and_length() -> None:
    state = analysed(graphs.parse(TEXT, {**WEIGHTS, "u1": (6, 5), "w1": (5, 6)}))
    shapes = [feeds["x"].shape for feeds in probe_feeds(state, dense_session(state))]
    assert shapes == [(2, 7, 6), (3, 11, 6), (1, 1, 6)]  # 5 is a width, and so is 6


def test_calibration_samples_serve_where_the_model_wants_a_size_of_its_own() -> None:
    text = """f (float[b, s, 6] x) => (float[b, s, 6] y) {
        p = Add(x, table)  a = MatMul(p, u)  h = Relu(a)  y = MatMul(h, w) }"""
    model = graphs.parse(text, {"table": (4, 6), "u": (6, 17), "w": (17, 6)})
    state = analysed(model)
    assert [f["x"].shape for f in probe_feeds(state, dense_session(state))] == [(1, 1, 6)]
    result = liar_opt.prune(model, {"x": np.ones((9, 4, 6), np.float32)}, ffn=0.5, latency=False, multiple_of=1)
    assert result.report["groups"][0]["after"] == 9


@pytest.mark.parametrize("sparsity", [True, False])
def test_a_wrong_cut_costs_one_group(sparsity: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    wrongly(monkeypatch, 13)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = pruned(**({"sparsity": 0.4} if sparsity else {"ffn": 0.5}))
    before, after = [17, 13, 10, 9], widths(result)
    assert after[1] == 13
    assert all(a < b for i, (a, b) in enumerate(zip(after, before, strict=True)) if i != 1) or sparsity
    assert sum(after) < sum(before)
    (refusal,) = (r for r in result.report["refusals"] if r["reason"].startswith("left alone"))
    assert len(refusal["nodes"]) == 1
    assert "output 'y' differs" in refusal["reason"]
    assert all(g["name"] not in refusal["nodes"] for g in result.report["groups"])


def test_two_wrong_groups_are_both_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrongly(monkeypatch, 13)
    wrongly(monkeypatch, 9)
    assert widths(pruned(ffn=0.5)) == [9, 13, 5, 9]


def test_a_cut_that_raises_is_not_bisected(monkeypatch: pytest.MonkeyPatch) -> None:
    right, tried = Rewriter.cut, []

    def raises(self: Rewriter, cuts: Mapping[int, Any]) -> None:
        sizes = [self.algebra.size(leaf) for leaf in cuts]
        tried.append(sizes)
        if 10 in sizes:
            raise KeyError("gone")
        right(self, cuts)

    monkeypatch.setattr(Rewriter, "cut", raises)
    result = pruned(ffn=0.5)
    assert widths(result) == [9, 7, 10, 5]
    assert sum(10 in sizes for sizes in tried) == 1
    assert any("KeyError: 'gone'" in r["reason"] for r in result.report["refusals"])


def test_where_every_cut_is_wrong_the_exit_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in SIZES.values():
        wrongly(monkeypatch, size)
    with pytest.raises(CheckError, match=r"no group that could be cut is left: .* \(output 'y' differs"):
        pruned(ffn=0.5)


class Counted(Proof):
    """A proof whose rehearsals fail where any of some sets of groups is cut."""

    def __init__(self, bad: Sequence[set[str]]) -> None:
        self.bad, self.feeds, self.count = bad, [{}], 0

    def failure(self, keep: Mapping[str, int], blocks: Mapping[str, Sequence[int]]) -> Failure | None:
        self.count += 1
        return Failure("bad") if any(s <= keep.keys() for s in self.bad) else None


@pytest.mark.parametrize("at", [0, 1, 30, 63])
def test_one_fault_is_found_by_bisection(at: int) -> None:
    proof = Counted([{f"g{at}"}])
    assert proof.faults({f"g{i}": 1 for i in range(64)}) == {f"g{at}": "bad"}
    assert proof.count <= 2 * math.log2(64) + 1


def test_groups_that_are_wrong_together_lose_the_later_one() -> None:
    proof = Counted([{"g3", "g17"}, {"g40"}])
    assert proof.faults({f"g{i}": 1 for i in range(64)}).keys() == {"g17", "g40"}


def test_what_breaks_while_measuring_costs_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Sweep.measure

    def breaks(self: Sweep, taps: list[Any], stop: int, first: Any) -> Any:
        if any(tap.width == 10 for tap in taps):
            raise IndexError("a part that is not there")
        return right(self, taps, stop, first)

    monkeypatch.setattr(Sweep, "measure", breaks)
    for options in ({"ffn": 0.5}, {"sparsity": 0.5}):
        result = pruned(**options)
        assert widths(result)[2] == 10
        assert sum(widths(result)) < sum(SIZES.values())
        assert any("IndexError: a part that is not there" in r["reason"] for r in result.report["refusals"])


def test_a_failed_check_of_the_result_leaves_out_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    right = VerifyModelPass.apply

    def fails(self: VerifyModelPass, state: State, plan: None) -> Any:
        if any(g.size == 17 and state.keep.get(g.name, 17) < 17 for g in state.groups):
            raise CheckError("cut against masked original: output 'y' differs by 1; nothing was written")
        return right(self, state, plan)

    monkeypatch.setattr(VerifyModelPass, "apply", fails)
    result = pruned(ffn=0.5)
    assert widths(result)[0] == 17
    assert sum(widths(result)) < sum(SIZES.values())


def test_the_pass_changes_nothing_but_the_groups() -> None:
    state = analysed(graphs.parse(TEXT, WEIGHTS))
    before = onnx_graph(state.model).to_proto().SerializeToString()
    result = ProveGroupsPass()(state)
    assert not result.changes
    assert result.refusals == ()
    assert len(state.groups) == 4
    assert onnx_graph(state.model).to_proto().SerializeToString() == before


def test_an_original_is_read_once_more_after_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(graphs.parse(TEXT, WEIGHTS), path)
    before = path.read_bytes()
    wrongly(monkeypatch, 13)
    liar_opt.prune(path, FEEDS, ffn=0.5, latency=False, multiple_of=1).save(tmp_path / "out.onnx")
    assert path.read_bytes() == before
