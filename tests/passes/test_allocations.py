"""Sharing a goal out: the knapsack against trying everything, thresholds, and what all allocations promise."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from liar_opt.passes.allocations import ALLOCATIONS, Candidates, curves, flap, globally, uniform


def choice(name: str, size: int, cost: float, seed: int, step: int = 1, convex: bool = True) -> Candidates:
    rng = np.random.default_rng(seed)
    widths = np.unique(np.append(np.arange(step, size, step), size))
    falls = np.sort(rng.exponential(size=size)) if convex else rng.exponential(size=size)
    errors = np.concatenate([[0.0], np.cumsum(falls)])[::-1]  # with 0 .. size blocks kept
    return Candidates(name, widths, cost * widths, errors[widths] * rng.uniform(0.2, 3.0), rng.exponential(size=size))


def some(seed: int, convex: bool = True) -> list[Candidates]:
    return [
        choice("a", 4, 10.0, seed, convex=convex),
        choice("b", 6, 3.0, seed + 1, 2, convex),
        choice("c", 5, 7.0, seed + 2),
    ]


def loss(candidates: list[Candidates], keep: dict[str, int]) -> float:
    return sum(float(m.errors[np.searchsorted(m.widths, keep[m.name])]) for m in candidates)


def total(candidates: list[Candidates], keep: dict[str, int]) -> float:
    return sum(float(m.costs[np.searchsorted(m.widths, keep[m.name])]) for m in candidates)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.35, 0.5, 0.8])
def test_the_knapsack_is_near_the_best_of_all_choices(seed: int, share: float) -> None:
    candidates = some(seed)
    goal = share * sum(m.costs[-1] for m in candidates)
    every = [
        dict(zip("abc", widths, strict=True)) for widths in itertools.product(*(m.widths.tolist() for m in candidates))
    ]
    keep = curves(candidates, goal)
    # Nothing within the goal is better, but for what lies between the goal and its last part.
    assert loss(candidates, keep) <= min(loss(candidates, k) for k in every if total(candidates, k) <= goal * 0.999) + 1e-12
    assert loss(candidates, keep) <= loss(candidates, uniform(candidates, goal)) + 1e-12 or total(candidates, keep) < goal


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
@pytest.mark.parametrize("convex", [True, False])
def test_the_goal_is_met_as_nearly_as_single_steps_allow(name: str, convex: bool) -> None:
    for seed in range(5):
        candidates = some(seed, convex)
        everything, least = sum(m.costs[-1] for m in candidates), sum(m.costs[0] for m in candidates)
        for share in (0.3, 0.6, 0.9):
            goal = max(share * everything, least)
            keep = ALLOCATIONS[name](candidates, goal)
            assert all(keep[m.name] in m.widths for m in candidates)
            largest = max(float(np.diff(m.costs).max()) for m in candidates)
            assert abs(total(candidates, keep) - goal) <= largest / 2
        assert ALLOCATIONS[name](candidates, everything) == {m.name: m.size for m in candidates}
        assert ALLOCATIONS[name](candidates, least) == {m.name: int(m.widths[0]) for m in candidates}


def test_equal_heads_are_met_exactly() -> None:
    candidates = [choice(f"h{i}", 12, 49_344.0, i, convex=False) for i in range(6)]
    for name, allocation in ALLOCATIONS.items():
        keep = allocation(candidates, 36 * 49_344.0)
        assert sum(keep.values()) == 36, name
        assert (len(set(keep.values())) > 1) == (name != "uniform"), name


def test_uniform_is_uniform() -> None:
    candidates = [choice(f"f{i}", 1536, 769.0, i, 8) for i in range(4)]
    assert set(uniform(candidates, 0.5 * 4 * 1536 * 769.0).values()) == {768}


def test_thresholds_are_normalised_by_their_papers() -> None:
    widths = np.arange(1, 5)
    low = Candidates("low", widths, widths.astype(float), np.zeros(4), np.asarray([1.0, 1.0, 1.0, 5.0]))
    high = Candidates("high", widths, widths.astype(float), np.zeros(4), 1e6 * np.asarray([1.0, 2.0, 3.0, 4.0]))
    # In units of the mean low is 0.5 (3x) 2.5, high 0.4 0.8 1.2 1.6; standardised -0.58 (3x) 1.73, -1.3 -0.4 0.4 1.3.
    assert globally([low, high], 4.0) == {"low": 1, "high": 3}
    assert flap([low, high], 4.0) == {"low": 1, "high": 3}
    spread = Candidates("spread", widths, widths.astype(float), np.zeros(4), np.asarray([0.0, 0.0, 0.0, 100.0]))
    even = Candidates("even", widths, widths.astype(float), np.zeros(4), np.asarray([1.0, 1.1, 1.2, 1.3]))
    assert globally([spread, even], 4.0) == {"spread": 1, "even": 3}
    # Blocks are averages of many channels, which spread more: what is standardised by the channels lies near zero.
    heads = replace(high, values=np.asarray([1.0, 1.1, 1.2, 1.3]), deviation=2.0)
    assert flap([low, heads], 4.0) == {"low": 1, "high": 3} and flap([low, heads], 5.0) == {"low": 1, "high": 4}


def test_dead_groups_are_no_trouble() -> None:
    widths = np.arange(1, 4)
    dead = Candidates("dead", widths, widths.astype(float), np.zeros(3), np.zeros(3))
    live = Candidates("live", widths, widths.astype(float), np.asarray([3.0, 1.0, 0.0]), np.asarray([1.0, 2.0, 3.0]))
    assert curves([dead, live], 4.0) == {"dead": 1, "live": 3}
    for allocation in ALLOCATIONS.values():
        assert total([dead, live], allocation([dead, live], 4.0)) == 4.0
