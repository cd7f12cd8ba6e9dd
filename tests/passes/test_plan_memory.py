# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""A limit on memory changes how groups are measured, not what comes out."""

from __future__ import annotations

from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
import streams
from onnx import numpy_helper

from liar_opt.frontend.onnx_model import onnx_graph
from liar_opt.frontend.onnx_segments import plan_segments
from liar_opt.passes import plan_memory, sweep
from liar_opt.passes.find_groups import FindGroupsPass
from liar_opt.passes.normalise_graph import NormaliseGraphPass
from liar_opt.passes.open_model import load_state
from liar_opt.passes.plan_memory import SPARE, Need, Parts, measure_together, require_room
from liar_opt.passes.prove_groups import ProveGroupsPass
from liar_opt.passes.prune_groups import PruneGroupsPass
from liar_opt.passes.verify_model import VerifyModelPass
from liar_opt.runtime import array_store
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.memory import parse_size

NEEDS = [Need("a", (100,), 500), Need("b", (200,), 500), Need("c", (100, 50), 500)]


def test_all_together_where_they_fit() -> None:
    parts = measure_together(NEEDS, 1000, 10**8)
    assert parts.groups == [[0, 1, 2]]
    assert not parts.on_disk
    assert 1000 + sum(n.moments for n in NEEDS) < parts.need < 10**8


def test_apart_where_they_do_not() -> None:
    needs = [*NEEDS, *NEEDS, *NEEDS]
    limit = 1000 + NEEDS[1].solving
    parts = measure_together(needs, 1000, limit)
    assert [i for part in parts.groups for i in part] == list(range(9))
    assert parts.on_disk
    assert len(parts.groups) > 1
    assert parts.need <= limit < measure_together(needs, 1000, 10**8).need
    for part in parts.groups:
        assert 1000 + sum(needs[i].measuring for i in part) <= limit


def test_the_least_that_would_do_for_all_is_said_and_does() -> None:
    beside = [(need, 1000) for need in NEEDS]
    with pytest.raises(OptionError, match=r"group 'b' \(width 200\); give at least ([0-9.]+MB)") as caught:
        require_room(beside, 1000)
    least = str(caught.value).split("at least ")[1].split(",")[0]
    require_room(beside, parse_size(least))
    assert measure_together(NEEDS, 1000, parse_size(least)).need <= parse_size(least)
    assert measure_together(NEEDS, 1000, 1000).need == 1000 + NEEDS[1].solving  # it takes what it needs


PARALLEL = "f (float[b, s, 6] x0) => (float[b, s, 6] y) { n = Tanh(x0)  u = MatMul(n, w1)  h = Relu(u)  z = MatMul(h, w2)  t = MatMul(n, w3)  k = Relu(t)  p = MatMul(k, w4)  a = Add(z, p)  y = Add(x0, a) }"
WEIGHTS: graphs.Weights = {"w1": (6, 47), "w2": (47, 6), "w3": (6, 53), "w4": (53, 6)}


def cut(limit: int, monkeypatch: pytest.MonkeyPatch) -> tuple[onnx.ModelProto, list[Parts]]:
    monkeypatch.setattr(sweep, "anonymous", lambda: 0)
    monkeypatch.setattr(plan_memory, "SPARE", 0)
    state = load_state(graphs.parse(PARALLEL, WEIGHTS), limit)
    NormaliseGraphPass()(state)
    FindGroupsPass()(state)
    state.calibration = streams.data(streams.batches(20, 0))
    state.keep = {g.name: g.size // 2 for g in state.groups}
    seen: list[Parts] = []
    parts = sweep.Sweep.parts

    def noted(*arguments: object) -> Parts:
        seen.append(parts(*arguments))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(sweep.Sweep, "parts", noted)
    PruneGroupsPass()(state)
    VerifyModelPass()(state)
    monkeypatch.undo()
    return onnx_graph(state.model).to_proto(), seen


def test_groups_measured_apart_come_out_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two feed-forward layers side by side are one segment; their moments wait on disk."""
    put, stored = array_store.ArrayStore.put, []

    def everything(self: array_store.ArrayStore, array: np.ndarray, least: int = 0) -> np.ndarray:
        stored.append(array.shape)
        return put(self, array, 0)

    monkeypatch.setattr(array_store.ArrayStore, "put", everything)
    free, together = cut(10**9, monkeypatch)
    assert not together[0].on_disk
    assert stored == []
    monkeypatch.setattr(array_store.ArrayStore, "put", everything)
    limited, apart = cut(180_000, monkeypatch)
    assert apart[0].on_disk
    assert sorted(stored) == [(47, 47), (47, 47), (53, 53), (53, 53)]
    assert [n.name for n in free.graph.node] == [n.name for n in limited.graph.node]
    for a, b in zip(free.graph.initializer, limited.graph.initializer, strict=True):
        assert a.name == b.name
        np.testing.assert_allclose(numpy_helper.to_array(a), numpy_helper.to_array(b), rtol=1e-4, atol=1e-5)


def test_too_little_for_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="memory 50KB is too small for the moments of group 'MatMul_"):
        cut(50_000, monkeypatch)


def test_no_work_is_done_where_a_later_group_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer is wider than the first, and the limit is enough for the first alone."""
    chain = """f (float[b, s, 6] x0) => (float[b, s, 6] y) {
        u = MatMul(x0, w1)  h = Relu(u)  z = MatMul(h, w2)  a = Add(x0, z)
        t = MatMul(a, w3)  k = Relu(t)  p = MatMul(k, w4)  y = Add(a, p) }"""
    weights: graphs.Weights = {"w1": (6, 20), "w2": (20, 6), "w3": (6, 900), "w4": (900, 6)}
    monkeypatch.setattr(sweep, "anonymous", lambda: 0)
    state = load_state(graphs.parse(chain, weights), SPARE + 10**6)
    NormaliseGraphPass()(state)
    FindGroupsPass()(state)
    state.calibration = streams.data(streams.batches(20, 0))
    state.keep = {g.name: g.size // 2 for g in state.groups}
    before = onnx_graph(state.model).to_proto()
    with pytest.raises(OptionError, match=r"\(width 900\); give at least"):
        PruneGroupsPass()(state)
    assert onnx_graph(state.model).to_proto() == before


def test_the_least_does_where_more_room_takes_more() -> None:
    """What stays in memory under a larger limit is asked for, too."""

    def needs(limit: int) -> list[tuple[Need, int]]:
        return [(need, 1000 + (3 * 10**7 if limit > 10**7 else 0) + (10**7 if limit > 7 * 10**7 else 0)) for need in NEEDS]

    with pytest.raises(OptionError) as caught:
        require_room(needs(1000), 1000, needs)
    least = parse_size(str(caught.value).split("at least ")[1].split(",")[0])
    require_room(needs(least), least, needs)
    assert least > 10**7 + 3 * 10**7 + NEEDS[1].solving


def test_what_was_enough_before_the_work_is_enough_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, now = SPARE + 10**6, [0]
    monkeypatch.setattr(sweep, "anonymous", lambda: now[0])
    state = load_state(graphs.parse(PARALLEL, WEIGHTS), limit)
    NormaliseGraphPass()(state)
    FindGroupsPass()(state)
    state.calibration = streams.data(streams.batches(20, 0))
    state.keep = {g.name: g.size // 2 for g in state.groups}
    (groups,) = PruneGroupsPass().plan(state)
    run = sweep.Sweep(state)
    segments = [(s.groups, s.first) for s in plan_segments(state.analysed(), groups)[1]]
    run.require_room(segments)
    now[0] = SPARE
    run.require_room(segments)
    now[0] = SPARE + 10**7
    with pytest.raises(OptionError, match="is too small"):
        run.require_room(segments)


def test_a_model_that_is_large_beside_the_limit_is_not_in_memory(tmp_path: Path) -> None:
    onnx.save(graphs.parse(PARALLEL, {**WEIGHTS, "w1": (6, 4700), "w2": (4700, 6)}), tmp_path / "m.onnx")
    held = {
        limit: sum(
            c.values.nbytes for c in load_state(tmp_path / "m.onnx", limit).model.constants() if c.values.flags.writeable
        )
        for limit in (10**5, 10**9)
    }
    assert held[10**5] < 10**5 < held[10**9]


def test_a_rehearsal_under_a_tight_limit_writes_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    put, stored = array_store.ArrayStore.put, []

    def everything(self: array_store.ArrayStore, array: np.ndarray, least: int = 0) -> np.ndarray:
        stored.append((self, array.shape))
        return put(self, array, 0)

    state = load_state(graphs.parse(PARALLEL, WEIGHTS), 5000)
    assert state.memory.low
    NormaliseGraphPass()(state)
    FindGroupsPass()(state)
    monkeypatch.setattr(array_store.ArrayStore, "put", everything)
    result = ProveGroupsPass()(state)
    assert result.refusals == ()
    assert {(47, 6), (46, 6), (53, 6), (52, 6)} <= {shape for _, shape in stored}  # masked, and cut
    assert state.memory.store not in [store for store, _ in stored]  # they go with the rehearsal
