"""Widths: option ranges, both forms, rounding, emptying."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import graphs
import numpy as np
import pytest

import liar_opt
from liar_opt import prune
from liar_opt.passes.allocate_widths import (
    AllocateWidthsPass,
    Expressible,
    candidates_of,
    joined,
    kept_width,
    removed_parameters,
)
from liar_opt.passes.base import State
from liar_opt.passes.curves import Curves, GroupCurve
from liar_opt.passes.groups import QUERY_KEY, ChannelGroup, Consumer
from liar_opt.runtime.errors import ModelError, OptionError


def group(name: str, kind: str, size: int, parameters: int) -> ChannelGroup:
    return ChannelGroup(name, kind, 0, size, (Consumer((), np.arange(size)),), parameters, 0, 0)


class Model:
    source = None

    def __init__(self) -> None:
        self.notes: list[str] = []


def state(*groups: ChannelGroup) -> State:
    model: Any = Model()
    return State(model, groups=groups)


LAYERS = tuple(
    g for i in range(6) for g in (group(f"h{i}", "heads", 12, 12 * 1000), group(f"f{i}", "ffn", 1536, 1536 * 77))
)


def keep(*groups: ChannelGroup, **options: Any) -> dict[str, int]:
    result = state(*groups)
    AllocateWidthsPass(**options)(result)
    return result.keep


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("option", ["sparsity", "ffn", "heads"])
def test_ratios_are_in_range(option: str, ratio: float) -> None:
    with pytest.raises(OptionError, match=rf"{option} .* outside \[0, 1\)"):
        keep(*LAYERS, **{option: ratio})


def test_both_forms_exclude_each_other() -> None:
    with pytest.raises(OptionError, match="exclude each other"):
        keep(*LAYERS, sparsity=0.3, ffn=0.2)
    with pytest.raises(OptionError, match="multiple-of 0"):
        keep(*LAYERS, multiple_of=0)


def test_nothing_to_prune() -> None:
    with pytest.raises(ModelError, match="no prunable group"):
        keep(sparsity=0.3)
    with pytest.raises(ModelError, match="no prunable group of kind 'heads'"):
        keep(group("f", "ffn", 88, 100), heads=0.5)


def test_a_kind_without_a_ratio_is_left_alone_whatever_its_width() -> None:
    odd = (group("f", "ffn", 90, 100), group("g", "ffn", 13, 100), group("h", "heads", 5, 100))
    assert keep(*odd, heads=0.4) == {"f": 90, "g": 13, "h": 3}
    assert keep(*odd, ffn=0.0, heads=0.0) == {"f": 90, "g": 13, "h": 5}
    assert keep(*odd, sparsity=0.0) == {"f": 90, "g": 13, "h": 5}


@pytest.mark.parametrize("size", [88, 90, 13, 1536, 3072])
@pytest.mark.parametrize("step", [1, 8, 64])
@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.77])
def test_feed_forward_widths_are_multiples(size: int, step: int, ratio: float) -> None:
    try:
        kept = kept_width(group("f", "ffn", size, 1), ratio, step)
    except OptionError:
        assert size * (1 - ratio) < step
        return
    assert kept == size or kept % min(step, size) == 0
    assert abs(kept - size * (1 - ratio)) <= min(step, size) / 2 + 1e-9 or kept == size
    assert 1 <= kept <= size


def test_heads_are_rounded_to_whole_ones() -> None:
    assert [kept_width(group("h", "heads", 12, 1), r, 8) for r in (0.0, 0.04, 0.05, 0.5, 0.95)] == [12, 12, 11, 6, 1]


def test_a_ratio_that_empties_a_group_is_refused_with_what_is_possible() -> None:
    with pytest.raises(OptionError, match=r"ratio 0\.99 would empty group 'h0'.*the most is 0\.916"):
        keep(*LAYERS, heads=0.99)
    assert keep(group("h0", "heads", 12, 1), heads=0.916) == {"h0": 1}


def test_curves_of_groups_that_no_multiple_fits_into_are_refused_by_naming_it() -> None:
    narrow = state(group("n0", "ffn", 6, 600), group("n1", "ffn", 5, 600), group("single", "heads", 1, 100))
    narrow.add(Curves({}))
    with pytest.raises(OptionError, match=r"multiple-of 8 leaves every group whole"):
        AllocateWidthsPass(sparsity=0.3, allocate="curves")(narrow)
    AllocateWidthsPass(sparsity=0.3, allocate="curves", multiple_of=2)(narrow)
    assert narrow.keep["n0"] < 6


def test_a_group_that_no_multiple_fits_into_stays_whole() -> None:
    narrow = (*LAYERS, group("narrow", "ffn", 6, 600))
    assert keep(*narrow, ffn=0.75)["narrow"] == 6
    assert keep(*narrow, ffn=0.75) == {**keep(*LAYERS, ffn=0.75), "narrow": 6}


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.4, 0.55, 0.8])
def test_sparsity_is_met_within_one_step(sparsity: float) -> None:
    kept = keep(*LAYERS, sparsity=sparsity)
    total = sum(g.parameters for g in LAYERS)
    smallest = 8 * 77
    assert abs(removed_parameters(LAYERS, kept) - sparsity * total) <= smallest
    assert all(kept[g.name] % 8 == 0 for g in LAYERS if g.kind == "ffn")


def test_steps_keep_odd_widths_on_multiples() -> None:
    odd = tuple(replace(g, size=1530, parameters=1530 * 77) if g.kind == "ffn" else g for g in LAYERS)
    kept = keep(*odd, sparsity=0.001)
    assert all(kept[g.name] == g.size or kept[g.name] % 8 == 0 for g in odd if g.kind == "ffn")


def test_the_default_is_a_sparsity() -> None:
    assert keep(*LAYERS) == keep(*LAYERS, sparsity=0.3)


def values_state() -> State:
    result = state(group("h", "heads", 8, 800), group("f", "ffn", 64, 6400))
    result.values = (replace(group("h (values)", "values", 10, 400), sets=8),)
    return result


def test_values_are_no_part_of_sparsity() -> None:
    result = values_state()
    AllocateWidthsPass(sparsity=0.5)(result)
    assert result.keep == {"h": 4, "f": 32}
    assert [g.kind for g in result.groups] == ["heads", "ffn"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"values": 0.3}, {"h": 8, "f": 64, "h (values)": 7}),
        ({"values": 0.3, "heads": 0.5}, {"h": 4, "f": 64, "h (values)": 7}),
        ({"values": 0.3, "sparsity": 0.5}, {"h": 4, "f": 32, "h (values)": 7}),
        ({"values": 0.0}, {"h": 8, "f": 64}),
    ],
)
def test_values_go_when_asked_for(options: dict[str, Any], kept: dict[str, int]) -> None:
    result = values_state()
    AllocateWidthsPass(**options)(result)
    assert result.keep == kept
    assert [g.name for g in result.groups] == list(kept)


def test_values_that_are_not_there() -> None:
    with pytest.raises(ModelError, match="no prunable group of kind 'values'"):
        keep(*LAYERS, values=0.3)
    with pytest.raises(OptionError, match=r"values 1 is outside \[0, 1\)"):
        keep(*LAYERS, values=1.0)


def test_heads_and_their_queries_share_their_candidates() -> None:
    """Costs count what is left of the weights of both; no pair stays that another beats in both."""
    rng = np.random.default_rng(0)
    heads = replace(group("h", "heads", 4, 400), constants=frozenset({1, 2, 3}))
    query = replace(group("q", QUERY_KEY, 8, 200), constants=frozenset({1, 2}))
    apart = replace(query, name="other", constants=frozenset({1, 9}))
    curves = {g.name: GroupCurve(np.append(np.sort(rng.random(g.size))[::-1], 0.0), np.zeros(0)) for g in (heads, query)}
    (choice,), meaning = joined(candidates_of([heads], 8, curves), [heads], [query, apart], 2, curves)
    assert list(meaning) == ["h"] and len(meaning["h"]) == choice.size > 4
    assert meaning["h"][-1] == {"h": 4, "q": 8} and choice.costs[-1] == 400 and choice.errors[-1] == 0.0
    assert (np.diff(choice.costs) > 0).all() and (np.diff(choice.errors) < 0).all()
    for pair, cost, error in zip(meaning["h"], choice.costs, choice.errors, strict=True):
        assert pair["q"] % 2 == 0
        assert cost == pytest.approx(200 * pair["h"] / 4 + 200 * pair["h"] / 4 * pair["q"] / 8)
        assert error == pytest.approx(curves["h"].errors[pair["h"]] + curves["q"].errors[pair["q"]])
    for h in range(1, 5):
        for r in range(2, 9, 2):
            cost, error = 50 * h + 50 * h * r / 8, curves["h"].errors[h] + curves["q"].errors[r]
            assert ((choice.costs <= cost + 1e-9) & (choice.errors <= error + 1e-9)).any()


def test_queries_share_in_a_sparsity_alone() -> None:
    for options in ({"query_key": "auto", "heads": 0.5}, {"query_key": "auto", "sparsity": 0.3, "allocate": "uniform"}):
        with pytest.raises(OptionError, match="query-key auto shares in a sparsity, a target or max-drop by curves"):
            keep(*LAYERS, **options)


CHAIN = "f (float[b, s, 16] x) => (float[b, s, 16] y) { u = MatMul(x, w1)  h = Relu(u)  v = MatMul(h, w2)  k = Tanh(v)  y = MatMul(k, w3) }"  # fmt: skip # noqa: E501


@pytest.mark.parametrize("allocate", ["uniform", "curves"])
def test_a_weight_between_two_groups_is_counted_once(allocate: str) -> None:
    """It shrinks with both: as much goes as was asked for, not more."""
    proto = graphs.parse(CHAIN, {"w1": (16, 64), "w2": (64, 96), "w3": (96, 16)})
    feeds = [graphs.feeds_of(proto, {"b": 4, "s": 16}, seed) for seed in range(12)]
    report = prune(proto, feeds, sparsity=0.5, allocate=allocate, multiple_of=1, new_bias=False, latency=False).report
    everything = 16 * 64 + 64 * 96 + 96 * 16
    assert report["prunable"]["before"] == report["before"]["parameters"] == everything
    assert report["prunable"]["after"] == report["after"]["parameters"] == pytest.approx(everything / 2, rel=0.02)
    assert liar_opt.inspect(proto).report["prunable_parameters"] == everything


BESIDE = """f (float[b, s, 16] x) => (float[b, s, 16] y) { p = MatMul(x, w1)  g, u = Split<axis=2>(p, n)
    a = Relu(g)  c = Tanh(u)  d = MatMul(a, w2)  e = MatMul(c, w3)  y = Add(d, e) }"""


def test_parts_of_one_weight_are_counted_by_themselves() -> None:
    """Side by side in one axis they share nothing."""
    weights: dict[str, Any] = {"w1": (16, 40), "n": np.asarray([24, 16], np.int64), "w2": (24, 16), "w3": (16, 16)}
    proto = graphs.parse(BESIDE, weights)
    feeds = [graphs.feeds_of(proto, {"b": 4, "s": 16}, seed) for seed in range(4)]
    report = prune(proto, feeds, sparsity=0.5, allocate="uniform", multiple_of=1, new_bias=False, latency=False).report
    assert sorted(g["parameters"] for g in report["groups"]) == [2 * 16 * 16, 2 * 16 * 24]
    assert report["prunable"] == {"before": 2 * 16 * 40, "after": 16 * 40}
    assert report["after"]["parameters"] == 16 * 40


def said(
    allowed: dict[str, tuple[int, ...]],
    linked: tuple[str, ...] = (),
    groups: tuple[ChannelGroup, ...] | None = None,
    **options: Any,
) -> tuple[dict[str, int], list[str]]:
    """Widths where a configuration can say some alone, and the notes."""
    result = state(*(SAID if groups is None else groups))
    notes: list[str] = []
    result.model.notes = notes
    result.add(Expressible("the configuration", allowed, frozenset(linked)))
    AllocateWidthsPass(uniform=True, **options)(result)
    return result.keep, notes


SAID = (group("h", "heads", 8, 8 * 500), group("f", "ffn", 96, 96 * 125))


@pytest.mark.parametrize(("ratio", "kept"), [(0.1, 8), (0.25, 4), (0.45, 4), (0.7, 2)])
def test_the_nearest_number_that_can_be_said(ratio: float, kept: int) -> None:
    """Of two that are as near the smaller one, where heads were asked for by name."""
    assert kept_width(SAID[0], ratio, 8, (1, 2, 4)) == kept
    assert kept_width(SAID[0], 0.25, 8, (1, 2, 4), more=True) == 8


def test_others_make_up_for_what_cannot_be_said() -> None:
    keep, notes = said({"h": (1, 2, 4)}, sparsity=0.25)
    assert keep == {"h": 8, "f": 64}  # 4,000 of 16,000
    assert notes == [
        "heads: 8 stay, where the ratio alone leaves 6: of 8 heads the configuration can say 1, 2, 4, no other number below"
    ]
    assert said({"h": (1, 2, 4)}, sparsity=0.375)[0] == {"h": 4, "f": 64}
    assert said({}, sparsity=0.25) == ({"h": 6, "f": 72}, [])


def test_nothing_that_can_be_said_would_go() -> None:
    with pytest.raises(
        OptionError, match=r"nothing would go: of 8 heads the configuration can say 1, no other .*--format onnx"
    ):
        said({"h": (1,)}, heads=0.25)
    assert said({"h": (1,)}, heads=0.0, ffn=0.5)[0] == {"h": 8, "f": 48}


def test_widths_that_one_field_says_stay_in_proportion_and_others_do_not() -> None:
    """Mamba's time-step rank, and its inner width that happens to be a multiple of it."""
    both = (group("rank", "ffn", 3, 300), group("inner", "ffn", 96, 9600))
    assert said({}, groups=both, ffn=0.5)[0] == {"rank": 3, "inner": 48}
    with pytest.raises(OptionError, match="the ratios round to nothing"):
        said({}, ("rank", "inner"), both, ffn=0.5)
    assert said({}, ("rank", "inner"), both, ffn=0.7, multiple_of=1)[0] == {"rank": 1, "inner": 32}


def test_a_multiple_that_leaves_groups_whole_is_told() -> None:
    narrow = state(group("a", "ffn", 7, 70), group("b", "ffn", 8, 80))
    with pytest.raises(
        OptionError, match=r"multiple-of 8 leaves every group whole: the widest has 8 channels.*--multiple-of 2"
    ):
        AllocateWidthsPass(ffn=0.5)(narrow)
    wanted = state(replace(group("a", "ffn", 768, 70), step=256))
    with pytest.raises(OptionError, match=r"multiple-of 96, with the multiples of 256 .* leaves every .*; leave it out"):
        AllocateWidthsPass(ffn=0.5, multiple_of=96)(wanted)
    some = state(group("a", "ffn", 7, 70), group("b", "ffn", 24, 240))
    AllocateWidthsPass(ffn=0.5)(some)
    assert some.keep == {"a": 7, "b": 16}
    assert len(some.model.notes) == 1 and "'a': no wider than the multiple of 8" in some.model.notes[0]
    wide = state(group("b", "ffn", 24, 240))
    AllocateWidthsPass(ffn=0.5)(wide)
    assert wide.model.notes == []


def test_ratios_that_round_to_nothing() -> None:
    given: list[dict[str, Any]] = [{"ffn": 0.05}, {"sparsity": 0.02}, {"heads": 0.1, "ffn": 0.0}]
    for asked in given:
        with pytest.raises(OptionError, match="the ratios round to nothing"):
            AllocateWidthsPass(**asked)(state(group("a", "ffn", 40, 400), group("b", "heads", 3, 300)))
    whole = state(group("a", "ffn", 40, 400))
    AllocateWidthsPass(ffn=0.0)(whole)  # that was asked for
    assert whole.keep == {"a": 40}


def curved(*groups: ChannelGroup, seed: int = 0) -> State:
    """Groups with falling curves; attention loses more than the feed-forward layers do."""
    rng, result = np.random.default_rng(seed), state(*groups)
    own = {}
    for g in groups:
        steps = np.sort(rng.random(g.size) ** 2)[::-1] * (3.0 if g.kind == "heads" else 1.0) / g.size
        own[g.name] = GroupCurve(np.append(np.cumsum(steps[::-1])[::-1], 0.0), np.zeros(g.size))
    result.add(Curves(own))
    return result


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.35, 0.5])
def test_one_width_a_kind_is_the_pair_of_least_summed_error(sparsity: float) -> None:
    found = curved(*LAYERS)
    AllocateWidthsPass(sparsity, allocate="curves", uniform=True)(found)
    curves, whole = found.found(Curves).by_group, sum(g.parameters for g in LAYERS)

    def told(heads: int, ffn: int) -> tuple[float, float]:
        widths = {g.name: heads if g.kind == "heads" else ffn for g in LAYERS}
        return removed_parameters(LAYERS, widths) / whole, sum(curves[n].errors[w] for n, w in widths.items())

    assert len({found.keep[g.name] for g in LAYERS if g.kind == "heads"}) == 1
    assert len({found.keep[g.name] for g in LAYERS if g.kind == "ffn"}) == 1
    gone, error = told(found.keep["h0"], found.keep["f0"])
    step = 8 / 1536
    assert abs(gone - sparsity) < step
    pairs = [told(h, f) for h in range(1, 13) for f in range(8, 1537, 8)]
    assert error <= min(lost for share, lost in pairs if share >= sparsity + step)


def test_widths_that_can_be_said_are_candidates_alone() -> None:
    linked = (group("small", "ffn", 40, 4000), group("large", "ffn", 80, 8000))
    heads = group("h", "heads", 12, 12000)
    found = curved(heads, *linked)
    allowed = {"h": (4, 6), "small": (16, 24, 32), "large": (32, 48, 64)}
    found.add(Expressible("a configuration", allowed, frozenset({"small", "large"})))
    AllocateWidthsPass(0.4, allocate="curves", uniform=True)(found)
    assert found.keep["large"] == 2 * found.keep["small"]
    assert found.keep["small"] in (16, 24, 32, 40) and found.keep["h"] in (4, 6, 12)
    free = curved(heads, *linked)
    AllocateWidthsPass(0.4, allocate="curves", uniform=True)(free)  # one is as many times another as before
    assert free.keep["large"] == 2 * free.keep["small"]
    with pytest.raises(OptionError, match="exclude each other"):
        AllocateWidthsPass(0.4, allocate="global", uniform=True)(curved(heads))
