"""The search: never worse than its start, inside its time, and the variants are what pruning makes."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from streams import STREAM, WEIGHTS, error, prepared, pruned

from liar_opt import prune
from liar_opt.passes.measure_curves import MeasureCurvesPass
from liar_opt.passes.search_widths import Searched, SearchWidthsPass
from liar_opt.runtime.errors import OptionError


def lopsided() -> onnx.ModelProto:
    """The second block adds next to nothing."""
    proto = graphs.parse(STREAM, WEIGHTS)
    for tensor in proto.graph.initializer:
        if tensor.name == "v1":
            tensor.CopyFrom(onnx.numpy_helper.from_array(0.05 * onnx.numpy_helper.to_array(tensor), "v1"))
    return proto


def searched(proto: onnx.ModelProto, keep: tuple[int, int], **options: Any) -> Any:
    state = prepared(proto, 1.0)
    MeasureCurvesPass()(state)
    state.keep = dict(zip((g.name for g in state.groups), keep, strict=True))
    SearchWidthsPass(**{"multiple_of": 1, **options})(state)
    return state


def test_a_bad_start_is_mended_at_the_same_cost() -> None:
    proto = lopsided()
    state = searched(proto, (6, 13))
    found = state.found(Searched)
    assert found.found < found.start and found.tried > 0
    first, second = state.keep.values()
    assert first > 6 and second < 13
    assert sum(g.parameters * state.keep[g.name] / g.size for g in state.groups) <= sum(
        g.parameters * k / g.size for g, k in zip(state.groups, (6, 13), strict=True)
    )
    before, after = (pruned(proto, dict(zip(state.keep, k, strict=True)))[0] for k in ((6, 13), (first, second)))
    assert error(proto, after) < error(proto, before)


@pytest.mark.parametrize("keep", [(8, 8), (17, 19), (3, 14), (1, 1)])
def test_never_worse_than_the_start(keep: tuple[int, int]) -> None:
    found = searched(graphs.parse(STREAM, WEIGHTS), keep).found(Searched)
    assert found.found <= found.start


def test_it_ends_with_its_time() -> None:
    found = searched(lopsided(), (6, 13), search=1e-9).found(Searched)
    assert found.tried == 0 and found.found == found.start
    with pytest.raises(OptionError, match="search 0 is not above zero"):
        searched(lopsided(), (6, 13), search=0.0)


def test_kinds_with_ratios_of_their_own_do_not_exchange() -> None:
    state = prepared(lopsided(), 1.0)
    assert [g.kind for g in state.groups] == ["ffn", "ffn"]
    assert searched(lopsided(), (6, 13), same_kind=True).found(Searched).tried > 0


def test_from_python_and_what_it_cannot_follow() -> None:
    proto = lopsided()
    feeds = prepared(proto, 1.0).calibration
    assert feeds is not None
    options: dict[str, Any] = {"multiple_of": 1, "latency": False, "allocate": "uniform"}
    result = prune(proto, feeds.batches, sparsity=0.5, search=5.0, **options)
    plain = prune(proto, feeds.batches, sparsity=0.5, **options)
    assert result.report["search"]["found"] <= result.report["search"]["start"]
    assert result.report["after"]["parameters"] <= plain.report["after"]["parameters"] + 6
    assert error(proto, result.model) < error(proto, plain.model)
    assert np.isfinite(result.report["verification"]["exact_difference"])
    with pytest.raises(OptionError, match="a search starts from"):
        prune(proto, feeds.batches, target="params=0.5x", search=5.0)
